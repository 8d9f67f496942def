"""What is said when a call to launcher or gate can't be made."""

from __future__ import annotations

from pathlib import Path

import httpcore
import httpx
import pytest
from elasticmoe_sidecar.engine import Failure, Launcher


@pytest.mark.parametrize(
    ("cause", "said"),
    [
        (
            PermissionError(13, "Permission denied"),
            "may not open /run/x/launcher.sock: run as the ",
        ),
        (
            FileNotFoundError(2, "No such file"),
            "no launcher on /run/x/launcher.sock (ConnectError)",
        ),
    ],
)
async def test_a_socket_that_cannot_be_opened_is_named(
    monkeypatch: pytest.MonkeyPatch, cause: OSError, said: str
):
    async def fail(*_: object, **__: object) -> httpx.Response:
        try:
            raise httpcore.ConnectError(str(cause)) from cause
        except httpcore.ConnectError as error:
            raise httpx.ConnectError(str(error)) from error

    monkeypatch.setattr(httpx.AsyncClient, "request", fail)
    launcher = Launcher(Path("/run/x/launcher.sock"), "")
    answer = await launcher.state()
    assert isinstance(answer, Failure)
    assert said in answer.reason
    await launcher.close()
