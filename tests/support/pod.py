"""Pods as the kubelet makes them, as processes of several users on this host. Needs root.

A pod's parts share a run folder that belongs to the pod's group (fsGroup, setgid). Engine and
sidecar have users of their own, no home, and no capability that lets them write what is not theirs;
the sidecar's root file system is read-only.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from support.launcher import SIM, SIM_ENVIRON

FS_GROUP = 2000
NON_ROOT = 65532
ELASTICMOE = str(Path(sys.executable).with_name("elasticmoe"))
# This Python may lie in root's home: its users may pass through there and read, not write.
_ONLY = "-all,+dac_read_search"


def as_user(uid: int, *groups: int) -> list[str]:
    """Words before a command."""
    caps = (f"--inh-caps={_ONLY}", f"--ambient-caps={_ONLY}", f"--bounding-set={_ONLY}")
    extra = f"--groups={','.join(map(str, groups))}" if groups else "--clear-groups"
    return ["setpriv", f"--reuid={uid}", f"--regid={uid}", extra, *caps]


def read_only(writable: Path) -> list[str]:
    """Words before a command that may write in one folder only."""
    script = 'mount --bind "$1" "$1" && mount -o remount,bind,ro / && shift && exec "$@"'
    return ["unshare", "--mount", "sh", "-ec", script, "sh", str(writable)]


@cache
def possible() -> bool:
    """Whether this host lets a test do all this."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("setpriv", "unshare"))):
        return False
    with tempfile.TemporaryDirectory() as folder:
        words = [*read_only(Path(folder)), *as_user(NON_ROOT, FS_GROUP), sys.executable, "-V"]
        return subprocess.run(words, capture_output=True, check=False).returncode == 0


def empty_dir(path: Path) -> Path:
    """A volume of a pod with an fsGroup."""
    path.mkdir(parents=True)
    os.chown(path, 0, FS_GROUP)
    path.chmod(0o2777)
    return path


class Secret:
    """A Secret as a volume: links to a folder that is replaced as a whole."""

    def __init__(self, path: Path, files: Mapping[str, str]) -> None:
        self.path = path
        path.mkdir(parents=True)
        self._number = 0
        self.update(files)

    def update(self, files: Mapping[str, str]) -> None:
        """What the kubelet does after the Secret was changed."""
        self._number += 1
        new = self.path / f"..2026_11_25_{self._number}"
        new.mkdir(mode=0o755)
        for name, text in files.items():
            (new / name).write_text(text)
            os.chmod(new / name, 0o440)
            if os.geteuid() == 0:
                os.chown(new / name, 0, FS_GROUP)
        old = (self.path / "..data").resolve()
        (self.path / "..data_tmp").symlink_to(new.name)
        (self.path / "..data_tmp").replace(self.path / "..data")
        for name in files:
            if not (self.path / name).is_symlink():
                (self.path / name).symlink_to(f"..data/{name}")
        if old.name != "..data":
            shutil.rmtree(old)


class Processes:
    """What was started, with a log each; all of it ends with this."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running: list[subprocess.Popen[bytes]] = []

    def start(self, name: str, *words: str, **environ: str) -> subprocess.Popen[bytes]:
        """A process without a home."""
        own = {key: value for key, value in os.environ.items() if key != "HOME"}
        with (self._folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                words, env=own | environ, stdout=log, stderr=subprocess.STDOUT, cwd="/"
            )
        self._running.append(process)
        return process

    def log(self, name: str) -> str:
        return (self._folder / f"{name}.log").read_text(errors="replace")

    def end(self) -> None:
        for process in self._running:
            if process.poll() is None:
                process.terminate()
        for process in self._running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(8)
            process.kill()
            process.wait()


@contextlib.contextmanager
def processes(folder: Path) -> Iterator[Processes]:
    made = Processes(folder)
    try:
        yield made
    finally:
        made.end()


class Pod:
    """One instance. uid: the pod's, not a user's."""

    def __init__(
        self, folder: Path, name: str, engine: int, sidecar: int, running: Processes
    ) -> None:
        self.name, self._engine, self._sidecar, self._running = name, engine, sidecar, running
        self.run_dir = empty_dir(folder / name / "run")
        self._injected = empty_dir(folder / name / "opt")
        self.uid = f"uid-of-{name}"
        done = subprocess.run(
            [
                *read_only(self._injected),
                *as_user(NON_ROOT, FS_GROUP),
                *(ELASTICMOE, "inject", str(self._injected)),
            ],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.count("\n") == 1

    def start_launcher(self, port: int) -> subprocess.Popen[bytes]:
        return self._running.start(
            f"{self.name}-launcher",
            *as_user(self._engine, FS_GROUP),
            *(sys.executable, "-m", "elasticmoe_engine.launcher", "--run-dir", str(self.run_dir)),
            *("--probe-port", "0", "--host-ip", "127.0.0.1", "--engine", SIM),
            *("--", "vllm", "serve", "sim", "--host", "0.0.0.0", "--port", str(port)),
            **SIM_ENVIRON,
            PYTHONPATH=str(self._injected),
        )

    def start_sidecar(
        self, coordinator: str, keys: Path, ordinal: int, rpc_port: int
    ) -> subprocess.Popen[bytes]:
        return self._running.start(
            f"{self.name}-sidecar",
            *read_only(self.run_dir),
            *as_user(self._sidecar, FS_GROUP),
            *(ELASTICMOE, "sidecar", "--instance", self.name, "--ordinal", str(ordinal)),
            *("--coordinator", coordinator, "--keys", str(keys), "--run-dir", str(self.run_dir)),
            *("--address", "127.0.0.1", "--rpc-port", str(rpc_port), "--incarnation", self.uid),
            *("--http-host", "0.0.0.0", "--leave-grace", "60"),
        )

    def leave(self, timeout_s: float) -> str:
        """The engine container's preStop hook; returns what it says."""
        done = subprocess.run(
            [
                *as_user(self._engine, FS_GROUP),
                *(sys.executable, "-m", "elasticmoe_engine.leave"),
                *("--run-dir", str(self.run_dir), "--timeout", str(timeout_s)),
            ],
            env={**os.environ, "PYTHONPATH": str(self._injected)},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout
