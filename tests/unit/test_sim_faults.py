from pathlib import Path

import pytest
from elasticmoe_sim.faults import Faults, parse


def test_words_are_for_all_ranks_or_for_one() -> None:
    text = "hang 2:crash_core slow=3"
    assert parse(text, 0) == {"hang": "", "slow": "3"}
    assert parse(text, 2) == {"hang": "", "slow": "3", "crash_core": ""}


def test_an_unknown_word_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown fault 'explode'"):
        parse("explode", 0)


def test_a_file_switches_faults_while_the_engine_runs(tmp_path: Path) -> None:
    path = tmp_path / "faults"
    faults = Faults(1, {"SIM_FAULTS": "slow=2", "SIM_FAULTS_FILE": str(path)})
    assert faults.watched
    assert "hang" not in faults
    path.write_text("1:hang 0:refuse")
    assert "hang" in faults
    assert "refuse" not in faults
    assert faults.slowness == 2.0
    path.unlink()
    assert "hang" not in faults


def test_no_faults_by_default() -> None:
    faults = Faults(0, {})
    assert not faults.watched
    assert faults.now() == {}
    assert faults.slowness == 1.0
