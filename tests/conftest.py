"""Puts this folder on the path, so that tests share `support`; options of the test run."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--histories", type=int, default=2000, help="random histories of a group to play"
    )


@pytest.fixture
def histories(request: pytest.FixtureRequest) -> int:
    count: int = request.config.getoption("--histories")
    return count
