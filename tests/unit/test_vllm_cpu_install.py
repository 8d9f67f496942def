import sys
from pathlib import Path

import pytest
from elasticmoe_vllm_cpu import flags, install, kernels, platform


def test_a_stamp_of_this_very_version_means_ready(tmp_path: Path) -> None:
    installer = install.Installer(tmp_path)
    assert not installer.ready()
    (tmp_path / install.STAMP).write_text("another version")
    assert not installer.ready()
    (tmp_path / install.STAMP).write_text(install._fingerprint())
    assert installer.ready()


def test_a_failed_step_leaves_no_stamp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: install.Installer) -> None:
        raise install.InstallError("no disk")

    folder = tmp_path / "venv"
    folder.mkdir()
    (folder / install.STAMP).write_text("old")
    monkeypatch.setattr(install.Installer, "_make_venv", fail)
    monkeypatch.setattr(sys, "argv", ["install", str(folder)])
    assert install.main() == 1
    assert not (folder / install.STAMP).exists()
    assert capsys.readouterr().err.startswith("no disk\nthat step failed; run this command again")


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(install.InstallError, match="has other files in it: name a new folder"):
        install.Installer(tmp_path)._make_venv()
    assert (tmp_path / "thesis.txt").exists()


def test_what_a_command_said_is_told_without_addresses() -> None:
    script = "print('no route to https://user:key@index.example/simple/x'); raise SystemExit(3)"
    with pytest.raises(install.InstallError) as caught:
        install._run([sys.executable, "-c", script])
    assert str(caught.value) == "no route to <address>"


def test_requirements_are_one_closed_pinned_set() -> None:
    lines = Path(install.__file__).with_name("requirements.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all("==" in pin and "://" not in pin for pin in pins)
    names = {pin.partition("==")[0].lower() for pin in pins}
    assert len(names) == len(pins)
    assert "torch==2.13.0" in pins
    assert not names & {"vllm", "torchvision", "torchaudio", "torchcodec"}


def test_the_plugin_does_nothing_without_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ELASTICMOE_CPU_KERNELS", str(tmp_path))
    assert kernels() == tmp_path
    assert platform() is None
    (tmp_path / "_C.abi3.so").touch()
    assert platform() == "elasticmoe_vllm_cpu.cpu_platform.ElasticCpuPlatform"


def test_only_a_joiner_is_told_to_join() -> None:
    base = {"VLLM_ELASTIC_EP_SCALE_UP_LAUNCH": "1", "HOME": "/h"}
    assert "VLLM_ELASTIC_EP_SCALE_UP_LAUNCH" not in flags.environment(base)
    joiner = flags.environment({"HOME": "/h"}, joiner=True)
    assert joiner["VLLM_ELASTIC_EP_SCALE_UP_LAUNCH"] == "1"
    assert joiner["HOME"] == "/h"


@pytest.mark.parametrize("size", [2, 3, 4])
def test_slots_divide_at_every_size(size: int) -> None:
    words = flags.rank_flags(0, size, rpc_port=1)
    redundant = int(words[-1].partition('"num_redundant_experts":')[2].rstrip("}"))
    assert (16 + redundant) == flags.SLOTS * size
