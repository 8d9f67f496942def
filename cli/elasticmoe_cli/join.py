"""One instance on this host: a launcher and a sidecar, watched.

The sidecar is started again when it dies (the engine runs on). When the launcher ends, the instance
ends, and its engine with it. SIGTERM goes to the sidecar, which leaves the group if that follows
who is there; then the launcher is stopped.
"""

from __future__ import annotations

import ctypes
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from elasticmoe_protocol import keys

from elasticmoe_cli.errors import CommandFailed
from elasticmoe_cli.inject import inject

SIDECAR_AGAIN_S = 1.0
STOP_S = 40.0
"""Longest wait for a launcher: it kills its engine at once."""
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, kw_only=True)
class Instance:
    """What to run. python: of the environment that has the engine. command: `vllm serve …`.

    command_file: instead of a command, one that may change (the launcher's `--command-file`).
    launcher_options: `--engine` and `--preload` of the launcher. environ: on top of this process's.
    """

    name: str
    deployment: str
    coordinator: str
    keys_dir: Path
    run_dir: Path
    command: Sequence[str]
    command_file: Path | None = None
    python: str = sys.executable
    address: str = "127.0.0.1"
    rpc_port: int = 0
    probe_port: int = 0
    policy: str = "declared"
    ordinal: int | None = None
    launcher_options: Sequence[str] = ()
    environ: Mapping[str, str] = field(default_factory=dict)

    def launcher_words(self) -> list[str]:
        """Command line of the launcher."""
        return [
            self.python,
            *("-m", "elasticmoe_engine.launcher"),
            *("--run-dir", str(self.run_dir)),
            *("--probe-port", str(self.probe_port)),
            *("--probe-host", self.address),
            *("--host-ip", self.address),
            *self.launcher_options,
            *(("--", *self.command) if self.command_file is None else ()),
            *(("--command-file", str(self.command_file)) if self.command_file is not None else ()),
        ]

    def sidecar_words(self) -> list[str]:
        """Command line of the sidecar."""
        words = [
            *(sys.executable, "-m", "elasticmoe_cli", "sidecar"),
            *("--deployment", self.deployment),
            *("--instance", self.name),
            *("--coordinator", self.coordinator),
            *("--keys", str(self.keys_dir)),
            *("--run-dir", str(self.run_dir)),
            *("--address", self.address),
            *("--rpc-port", str(self.rpc_port)),
            *("--policy", self.policy),
        ]
        return words if self.ordinal is None else [*words, "--ordinal", str(self.ordinal)]


def run(instance: Instance) -> int:
    """Run an instance until it is told to stop or its launcher ends; returns the exit status."""
    run_dir = instance.run_dir
    try:
        keys.load_sidecar(instance.keys_dir)  # before a launcher imports for minutes
    except keys.KeysError as error:
        raise CommandFailed(f"{error}, or name its folder with --keys", 2) from None
    try:
        run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_owner(run_dir)
        injected = inject(run_dir / "injected")
    except OSError as error:
        raise CommandFailed(f"--run-dir {run_dir} can't be used ({error.strerror})", 2) from None
    # What belongs to an earlier life of this name is not continued: its engine is gone.
    for name in ("journal.msgpack", "incarnation"):
        (run_dir / name).unlink(missing_ok=True)
    return _Supervisor(instance, injected).run()


def _check_owner(run_dir: Path) -> None:
    """Code is run from there. Raises CommandFailed when somebody else could have put it there."""
    about = run_dir.stat()
    if about.st_uid != os.geteuid() or about.st_mode & stat.S_IWOTH:
        raise CommandFailed(
            f"--run-dir {run_dir} can be written by somebody else: choose another one, or let it "
            "be made",
            2,
        )


class _Supervisor:
    def __init__(self, instance: Instance, injected: Path) -> None:
        self._instance = instance
        python_path = os.pathsep.join(filter(None, [str(injected), os.environ.get("PYTHONPATH")]))
        environ = {**os.environ, **instance.environ, "PYTHONPATH": python_path}
        words = instance.launcher_words()
        try:
            self._launcher = _child(words, signal.SIGTERM, environ)
        except OSError as error:
            raise CommandFailed(
                f"{instance.python} can't be started ({error.strerror}): name the Python that has "
                "vLLM with --python",
                2,
            ) from None
        self._sidecar = self._start_sidecar()
        self._stops = 0

    def run(self) -> int:
        """Watch both."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        try:
            while True:
                launcher, sidecar = self._launcher.poll(), self._sidecar.poll()
                if launcher is not None:
                    return launcher if launcher >= 0 else 1
                if self._stops and sidecar is not None:
                    return 0
                if sidecar == 2:
                    return 2  # it said what to change
                if sidecar is not None:
                    time.sleep(SIDECAR_AGAIN_S)
                    if not self._stops:
                        self._sidecar = self._start_sidecar()
                time.sleep(0.05)
        finally:
            self._end(self._launcher)
            self._end(self._sidecar)

    def _start_sidecar(self) -> subprocess.Popen[bytes]:
        # SIGTERM could have it wait for a release that nobody gives.
        return _child(self._instance.sidecar_words(), signal.SIGKILL)

    def _stop(self, *_: object) -> None:
        """The first signal asks the sidecar to leave, the second one doesn't wait for it."""
        self._stops += 1
        if self._sidecar.poll() is None:
            self._sidecar.send_signal(signal.SIGTERM)

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _child(
    words: Sequence[str], last: signal.Signals, environ: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """A process that gets the signal `last` should this one be killed: nobody else would end it."""
    libc = ctypes.CDLL(None)

    def die_with_parent() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, last)

    return subprocess.Popen(words, env=environ, start_new_session=True, preexec_fn=die_with_parent)
