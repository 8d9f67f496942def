"""A whole group on this host: the same parts as everywhere, as processes.

Everything is in one folder: `group.json` (what was asked for), `keys/`, a folder for the
coordinator and one for each instance with its log. A process is known by its id and its start time,
so that an id that the kernel gave to somebody else is never signalled. An instance is known to the
coordinator by its serving port: a name is used again while the one before may not be forgotten yet.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from elasticmoe_coordinator.core.config import GroupConfig

from elasticmoe_cli.api import Coordinator
from elasticmoe_cli.errors import CommandFailed
from elasticmoe_cli.profiles import Profile

Tick = Callable[[dict[str, Any]], None]
"""Called with the group's status while something is waited for."""
POLL_S = 0.1
ADDRESS = "127.0.0.1"


@dataclass(frozen=True, kw_only=True)
class Options:
    """A group's limits, as the coordinator's. Each is an option of `elasticmoe coordinator`."""

    deployment: str = "local"
    policy: str = GroupConfig.policy
    min_size: int = GroupConfig.min_size
    max_size: int = 4
    drain_policy: str = GroupConfig.drain_policy
    drain_timeout_s: int = GroupConfig.drain_timeout
    loss_policy: str = GroupConfig.loss_policy
    stall_s: float = GroupConfig.stall
    preflight_limit_s: float = GroupConfig.preflight_limit
    start_limit_s: float = GroupConfig.start_limit
    prepare_limit_s: float = GroupConfig.prepare_limit
    commit_limit_s: float = GroupConfig.commit_limit
    lame_duck_s: float = GroupConfig.lame_duck
    replacement_s: float = GroupConfig.replacement
    settle_s: float = GroupConfig.settle
    restart_limit: int = GroupConfig.restart_limit
    restart_window_s: float = GroupConfig.restart_window

    def words(self) -> list[str]:
        """For the coordinator's command line."""
        words = []
        for name, value in asdict(self).items():
            words += ["--" + name.removesuffix("_s").replace("_", "-"), str(value)]
        return words


class LocalGroup:
    """The group of one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.keys_dir = self.folder / "keys"
        self._file = self.folder / "group.json"

    # --- what is there --------------------------------------------------------------------------

    @property
    def exists(self) -> bool:
        """Whether a group was started here and not ended."""
        return self._file.exists()

    def coordinator(self) -> Coordinator:
        """Its coordinator's API. Raises CommandFailed."""
        ready = self.folder / "coordinator" / "ready.json"
        try:
            url = json.loads(ready.read_text())["http"]
        except (OSError, ValueError, KeyError):
            raise CommandFailed(
                f"no group runs in {self.folder}: start one with `elasticmoe local up`"
            ) from None
        return Coordinator(url, self.keys_dir)

    def instances(self) -> list[str]:
        """Names of the instances that were started, in the order of their numbers."""
        folders = (self.folder / "instances").glob("*")
        return sorted((one.name for one in folders), key=lambda name: int(name[1:]))

    def pid(self, name: str) -> int | None:
        """Process of an instance (its `join`), or of "coordinator"; None when it is gone."""
        return _alive(self._home(name) / "pid.json")

    def log(self, name: str) -> Path:
        """Where an instance, or "coordinator", writes."""
        return self._home(name) / "log"

    def run_dir(self, name: str) -> Path:
        """An instance's run folder."""
        return self._home(name) / "run"

    # --- start and stop -------------------------------------------------------------------------

    def create(self, profile: Profile, options: Options) -> None:
        """Begin a group: its folder and its coordinator. Raises CommandFailed."""
        if self.exists:
            raise CommandFailed(
                f"a group runs in {self.folder} already: `elasticmoe local down` ends it, or name "
                "another folder with --dir",
                2,
            )
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise CommandFailed(f"{self.folder} can't be made ({error.strerror})", 2) from None
        self._clear()  # logs of a group that failed
        contents = {"profile": asdict(profile), "options": asdict(options)}
        self._file.write_text(json.dumps(contents, indent=2))
        self.start_coordinator()

    def start_coordinator(self, bind: str = "tcp://127.0.0.1:0", http_port: int = 0) -> None:
        """Start the coordinator, at the addresses that it had before if it had some."""
        home = self._home("coordinator")
        home.mkdir(parents=True, exist_ok=True)
        ready = home / "ready.json"
        with contextlib.suppress(OSError, ValueError, KeyError):
            before = json.loads(ready.read_text())
            bind, http_port = before["zmq"], int(before["http"].rpartition(":")[2])
        words = [
            *(sys.executable, "-m", "elasticmoe_cli", "coordinator"),
            *("--keys", str(self.keys_dir)),
            *("--bind", bind),
            *("--http-port", str(http_port)),
            *self._options().words(),
            *("--ready-file", str(ready)),
            *("--state-file", str(home / "state.json")),
        ]
        process = self._start("coordinator", words)
        while not _is_of(ready, process.pid):
            if process.poll() is not None:
                raise CommandFailed(
                    f"the coordinator did not start: {self._last_line('coordinator')}"
                )
            time.sleep(POLL_S / 2)

    def add(self) -> str:
        """Start one more instance; returns its name. Raises CommandFailed."""
        used = {int(name[1:]) for name in self.instances()}
        number = next(number for number in range(len(used) + 1) if number not in used)
        self.start_instance(number)
        return f"r{number}"

    def start_instance(self, number: int) -> None:
        """Start the instance with this number, as a new one."""
        contents, options = self._contents(), self._options()
        name = f"r{number}"
        profile: Mapping[str, Any] = contents["profile"]
        home = self._home(name)
        shutil.rmtree(home / "run", ignore_errors=True)
        home.mkdir(parents=True, exist_ok=True)
        ready = json.loads((self.folder / "coordinator" / "ready.json").read_text())
        port = free_port()
        self._stopped(without=port)
        (home / "port").write_text(str(port))
        launcher = [
            word for option in profile["launcher_options"] for word in ("--launcher", option)
        ]
        words = [
            *(sys.executable, "-m", "elasticmoe_cli", "join"),
            *("--name", name),
            *("--ordinal", str(number)),
            *("--deployment", options.deployment),
            *("--coordinator", ready["zmq"]),
            *("--keys", str(self.keys_dir)),
            *("--run-dir", str(self.run_dir(name))),
            *("--python", profile["python"]),
            *("--address", ADDRESS),
            *("--rpc-port", str(free_port())),
            *("--policy", options.policy),
            *launcher,
            "--",
            *profile["command"],
            *("--host", ADDRESS),
            *("--port", str(port)),
        ]
        own = {k: v.format(number=number) for k, v in profile["by_number"].items()}
        self._start(name, words, {**profile["environ"], **own})

    def stop_instance(self, name: str, wait_s: float = 660.0) -> None:
        """Have an instance end (it leaves first where the group follows), and forget it."""
        pid = self.pid(name)
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
            _await_end(self._home(name) / "pid.json", wait_s)
        self._stopped(also=self._port(name))
        shutil.rmtree(self._home(name), ignore_errors=True)

    def down(self, *, keep_logs: bool = False) -> None:
        """End everything that was started here, whatever its state."""
        names = [*self.instances(), "coordinator"]
        pids = {name: self.pid(name) for name in names}
        for pid in pids.values():
            if pid is not None:
                # Twice: an instance of a group that follows doesn't wait for its release then.
                for _ in range(2):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGTERM)
                    time.sleep(POLL_S)
        for name in names:
            _await_end(self._home(name) / "pid.json", 60.0)
        self._file.unlink(missing_ok=True)
        if not keep_logs:
            self._clear()

    # --- sizes ----------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """The coordinator's status without instances that were stopped here. Raises CommandFailed.

        The coordinator forgets them only after a while: they might come back.
        """
        status = self.coordinator().status()
        stopped = self._stopped()
        status["instances"] = [
            one
            for one in status["instances"]
            if one["servingPort"] not in stopped or one["rank"] is not None
        ]
        return status

    def scale(self, size: int, tick: Tick = lambda _: None) -> dict[str, Any] | None:
        """Bring the group to a size: start instances, ask for it, wait, stop who is not needed.

        Returns the operation (None: nothing was to do). Raises CommandFailed, also when the
        operation failed: the old size serves then.
        """
        options = self._options()
        if not options.min_size <= size <= options.max_size:
            raise CommandFailed(
                f"size {size} is not between {options.min_size} and {options.max_size}: choose one "
                "that is",
                2,
            )
        if self.pid("coordinator") is None:
            self.start_coordinator()
        coordinator = self.coordinator()
        for name in self.instances()[:size]:
            if self.pid(name) is None:
                self.start_instance(int(name[1:]))
        while len(self.instances()) < size:
            self.add()
        if options.policy == "declared":
            self._await_standby(size, tick)
            operation = coordinator.scale(size)
            if operation is not None:
                for now in coordinator.until_ended(operation["id"]):
                    operation = now
                    tick(self.status())
                if operation["state"] != "succeeded":
                    raise CommandFailed(f"the group did not become {size}: {operation['error']}")
        else:
            operation = None
        for name in reversed(self.instances()):
            if len(self.instances()) > size:
                self._await_deletable(name, tick)
                self.stop_instance(name)
        self.await_serving(size, tick)
        return operation

    def await_serving(self, size: int, tick: Tick = lambda _: None) -> None:
        """Wait until a group of this size serves. Raises CommandFailed for one that gave up."""
        while True:
            status = self.status()
            tick(status)
            ready = sum(1 for one in status["instances"] if one["ready"])
            if status["state"] == "Serving" and status["size"] == size == ready:
                return
            if status["state"] == "Failed":
                raise CommandFailed(f"the group failed: {status['message']}")
            time.sleep(POLL_S)

    def _await_standby(self, size: int, tick: Tick) -> None:
        """Wait until all instances that are needed are known and warm. Raises CommandFailed."""
        while True:
            status = self.status()
            tick(status)
            known = self._known(status)
            names = self.instances()[:size]
            for name in names:
                if self.pid(name) is None:
                    raise CommandFailed(f"instance {name} ended: {self._last_line(name)}")
                reason = known.get(name, {}).get("reason", "")
                if name in known and reason and not _passes(reason) and known[name]["standby"]:
                    raise CommandFailed(f"instance {name} can't serve: {reason}")
            if all(name in known and _usable(known[name]) for name in names):
                return
            time.sleep(POLL_S)

    def _await_deletable(self, name: str, tick: Tick) -> None:
        if self._options().policy == "follow":
            return
        while True:
            status = self.status()
            tick(status)
            known = self._known(status)
            if name not in known or known[name]["safeToDelete"] or self.pid(name) is None:
                return
            time.sleep(POLL_S)

    def _known(self, status: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
        """What the coordinator says of those that run now, not of earlier ones with a name."""
        ports = {name: self._port(name) for name in self.instances()}
        return {
            one["instance"]: one
            for one in status["instances"]
            if ports.get(one["instance"]) == one["servingPort"]
        }

    def _port(self, name: str) -> int:
        try:
            return int((self._home(name) / "port").read_text())
        except (OSError, ValueError):
            return 0

    def _stopped(self, *, also: int = 0, without: int = 0) -> set[int]:
        """Serving ports of instances that were stopped."""
        file = self.folder / "stopped.json"
        known: set[int] = set(json.loads(file.read_text())) if file.exists() else set()
        changed = (known | {also} if also else known) - {without}
        if changed != known:
            file.write_text(json.dumps(sorted(changed)))
        return changed

    # --- files and processes --------------------------------------------------------------------

    def _home(self, name: str) -> Path:
        return self.folder / name if name == "coordinator" else self.folder / "instances" / name

    def _clear(self) -> None:
        """Forget what is known of processes that have ended."""
        for name in ("instances", "coordinator"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        (self.folder / "stopped.json").unlink(missing_ok=True)

    def _contents(self) -> dict[str, Any]:
        try:
            contents: dict[str, Any] = json.loads(self._file.read_text())
        except OSError:
            raise CommandFailed(
                f"no group runs in {self.folder}: start one with `elasticmoe local up`"
            ) from None
        return contents

    def _options(self) -> Options:
        return Options(**self._contents()["options"])

    def _start(
        self, name: str, words: list[str], environ: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        home = self._home(name)
        with (home / "log").open("ab") as log:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **(environ or {})},
            )
        began = _start_time(process.pid)
        (home / "pid.json").write_text(json.dumps({"pid": process.pid, "began": began}))
        return process

    def _last_line(self, name: str) -> str:
        lines = self.log(name).read_text(errors="replace").strip().splitlines()
        return f"{lines[-1] if lines else 'it said nothing'} (all of it: {self.log(name)})"


def free_port() -> int:
    """A TCP port that nobody uses now. Raises CommandFailed.

    Below those that Linux gives to outgoing connections (ip_local_port_range, 32768 by default):
    it is bound only after a while, and must not be gone then.
    """
    for _ in range(1000):
        port = random.randrange(20000, 32768)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((ADDRESS, port))
            return port
    raise CommandFailed("no TCP port from 20000 to 32767 is free: stop what uses them")


def _is_of(ready: Path, pid: int) -> bool:
    """Whether a coordinator's file was written by this process."""
    try:
        return bool(json.loads(ready.read_text())["pid"] == pid)
    except (OSError, ValueError, KeyError):
        return False


def _usable(instance: Mapping[str, Any]) -> bool:
    return bool(instance["active"] or (instance["standby"] and not instance["reason"]))


def _passes(reason: str) -> bool:
    """Reasons that go by themselves."""
    return any(words in reason for words in ("imported", "awaited", "heard", "did not answer"))


def _start_time(pid: int) -> int | None:
    """Clock ticks after boot at which a process began (field 22 of proc_pid_stat(5))."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else int(fields[19])


def _alive(file: Path) -> int | None:
    try:
        known = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    pid: int = known["pid"]
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)  # if it is a child of this very process
    return pid if _start_time(pid) == known["began"] is not None else None


def _await_end(file: Path, seconds: float) -> None:
    """Wait until a process is gone; SIGKILL when it takes longer."""
    limit = time.monotonic() + seconds
    while (pid := _alive(file)) is not None:
        if time.monotonic() > limit:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(POLL_S / 2)
