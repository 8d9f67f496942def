"""The launcher's main loop: one engine at a time, started, watched, and stopped whole.

Calls from other threads only note what is wanted; everything is done by `run`, in the main thread.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import sys
import threading
import time
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from elasticmoe_engine import launch
from elasticmoe_engine.commands import Commands
from elasticmoe_engine.engine import ColdFirst, Exit, First, WarmFirst, Watch, described
from elasticmoe_engine.forkserver import Forkserver, Warmth
from elasticmoe_engine.launch import LaunchSpec
from elasticmoe_engine.listener import Listener, ListenError
from elasticmoe_engine.local_http import call_unix
from elasticmoe_engine.processes import children, descendants, is_zombie, kill, reap

Phase = Literal["absent", "starting", "running", "stopping", "exited"]

API_SERVER = "APIServer"
_LOOK_EVERY_S = 0.1
_KILL_EVERY_S = 0.02
_ASK_GATE_EVERY_S = 0.1
_REAP_EVERY_S = 1.0
_READ_EVERY_S = 0.5
_END_GRACE_S = 3.0
"""From SIGTERM to SIGKILL of an engine that is there when the launcher itself has to end."""
_TELL_S = 0.5
"""So long it can still be asked after that: the others shall know at once that a rank is gone."""


class ConflictError(Exception):
    """The order does not fit what is here; the text says why."""


class Supervisor:
    """Owns the forkserver, the listener and the engine."""

    def __init__(
        self, commands: Commands, entry: str, run_dir: Path, forkserver: Forkserver, host_ip: str
    ) -> None:
        self._commands, self._entry, self._run_dir = commands, entry, run_dir
        self._forkserver, self._host_ip = forkserver, host_ip
        self.listener = Listener(commands.command.host, commands.command.port)
        self.boot = uuid.uuid4().hex
        self.ready = False
        self.warmth: Warmth | None = None
        self.cold = ""
        """Why there is no warm start; "" while there is or may be one."""
        self._lock = threading.Lock()
        self._phase: Phase = "absent"
        self._spec: LaunchSpec | None = None
        self._launches: set[str] = set()
        self._exit: Exit | None = None
        self._first: First | None = None
        self._suspects: list[int] = []
        self._kill_at = 0.0
        self._terminated = False
        self._quit = False
        self._ending = False
        self._quit_at = 0.0
        self._reap_at = 0.0
        self._read_at = 0.0
        self._watch = Watch()
        self._wake_r, self._wake_w = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._watch.add_fd(self._wake_r)

    # --- from any thread ------------------------------------------------------------------------

    def start(self, spec: LaunchSpec) -> bool:
        """Order an engine; False when this launch was ordered before. Raises ConflictError."""
        with self._lock:
            if self._ending:
                raise ConflictError("this launcher was told to end")
            if self._spec is not None and self._spec.launch == spec.launch:
                return False
            if self._spec is not None:
                raise ConflictError(f"launch {self._spec.launch} is {self._phase}: stop it first")
            if spec.launch in self._launches:
                raise ConflictError(f"launch {spec.launch} has ended: give a new start a new id")
            if difference := self._difference(spec):
                raise ConflictError(difference)
            self._launches.add(spec.launch)
            self._spec, self._exit, self._phase = spec, None, "starting"
        self._wake()
        return True

    def _difference(self, spec: LaunchSpec) -> str:
        """Why the command in force is not the one that the group starts, "" when it is."""
        command, revision = self._commands.adopted
        if spec.command and revision and spec.command != revision:
            return f"command {revision} is in force here, the group starts {spec.command}"
        if spec.fingerprint and spec.fingerprint != command.fingerprint:
            return "the flags in force here are not those that the group starts with"
        return ""

    def stop(self, name: str, grace_s: float) -> None:
        """Order the engine's end; sent again with less grace it ends sooner.

        Raises ConflictError when another launch is here.
        """
        with self._lock:
            if self._spec is None:
                if name not in self._launches:
                    raise ConflictError(f"launch {name} is not here")
                return
            if self._spec.launch != name:
                raise ConflictError(f"launch {self._spec.launch} is here, not {name}")
            kill_at = time.monotonic() + grace_s
            if self._phase == "stopping":
                kill_at = min(kill_at, self._kill_at)
            self._kill_at, self._phase = kill_at, "stopping"
        self._wake()

    def end(self) -> None:
        """Have `run` stop the engine and return, at once when told again.

        May be called by a signal handler: it takes no lock.
        """
        self._quit = self._ending
        self._ending = True
        self._wake()

    @property
    def idle(self) -> bool:
        """Whether there is no engine."""
        return self._spec is None

    @property
    def probe_ready(self) -> bool:
        """What the readiness probe says: what was ordered, unless the engine is lost."""
        return self.ready and self._phase != "exited" and not self._ending

    @property
    def warm(self) -> bool:
        """Whether a start would be a warm one, at once."""
        return self.warmth is not None and self.warmth.ok

    def engine_state(self) -> dict[str, Any]:
        """`engine` of `GET /state`."""
        with self._lock:
            spec, first = self._spec, self._first
            return {
                "phase": self._phase,
                "launch": spec and spec.launch,
                "rank": spec and spec.rank,
                "size": spec and spec.size,
                "exit": self._exit and asdict(self._exit),
                "pid": first and first.pid,
                "pids": [pid for pid in self._watch.alive if pid != self._forkserver.pid],
            }

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_w, b".")

    # --- the main thread ------------------------------------------------------------------------

    def run(self) -> None:
        """Work until `end`."""
        self._forkserver.start()
        while not self._quit:
            if self._ending:
                self._go_on_ending()
            stopping = self._phase == "stopping"
            ended = self._watch.wait(_KILL_EVERY_S if stopping else _LOOK_EVERY_S)
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake_r, 4096)
            self._mind_forkserver(ended)
            self._mind_command()
            if self._phase in ("starting", "running"):
                self._mind_engine(ended)
            if self._phase == "starting" and self._first is None:
                self._begin()
            if self._phase == "stopping":
                self._go_on_stopping()
            self._reap_orphans()
        while self._kill_all():
            time.sleep(_KILL_EVERY_S)

    def _go_on_ending(self) -> None:
        """Stop the engine in order, stay a little while to tell of it, then quit."""
        spec, now = self._spec, time.monotonic()
        if spec is not None:
            if not self._quit_at:
                self._say("told to end: stopping the engine")
            self.stop(spec.launch, _END_GRACE_S)
            self._quit_at = now + _TELL_S
        elif now >= self._quit_at:
            self._quit = True

    def _mind_command(self) -> None:
        """Look for another command now and then; without an engine it is taken over."""
        now = time.monotonic()
        if now < self._read_at:
            return
        self._read_at = now + _READ_EVERY_S
        self._read_command()
        with self._lock:
            adopted = self._spec is None and self._commands.adopt()
        self._say_adopted(adopted)

    def _read_command(self) -> None:
        if line := self._commands.look():
            self._say(line)

    def _say_adopted(self, adopted: bool) -> None:
        if adopted:
            self._say(f"command {self._commands.adopted.revision} is in force")

    def _reap_orphans(self) -> None:
        """Adopted processes that ended; a container's first process has nobody else to do it."""
        now = time.monotonic()
        if now < self._reap_at:
            return
        self._reap_at = now + _REAP_EVERY_S
        first = self._first
        ours = {self._forkserver.pid, self._forkserver.tracker_pid, first and first.pid}
        for pid in children(os.getpid()):
            if pid not in ours and is_zombie(pid):
                reap(pid)

    def _mind_forkserver(self, ended: list[int]) -> None:
        pid = self._forkserver.pid
        if self.cold or pid is None:
            return
        self._watch.add([pid])
        if pid in ended:
            if self.warmth is None:
                self._fall_back("the warm process died while it imported the engine's modules")
                return
            self.warmth = None
            self._say("the warm process died: importing the engine's modules anew")
            if self._first is not None:
                self._left(described("forkserver", None))
            self._forkserver.start()
        elif self.warmth is None and (warmth := self._forkserver.warmth()):
            if not warmth.ok:
                self._fall_back(warmth.error)
            else:
                self.warmth = warmth
                self._say(f"warm after {warmth.seconds:g} s: a launch starts at once")

    def _fall_back(self, reason: str) -> None:
        self.cold = reason
        self._say(f"WARNING: no warm start ({reason}); each start is a cold `vllm serve`")

    def _begin(self) -> None:
        """Start the ordered engine as soon as it is known how."""
        spec = self._spec
        if spec is None or (self.warmth is None and not self.cold):
            return
        warm = not self.cold
        token = secrets.token_urlsafe(32)
        command = self._commands.command  # stays the same as long as there is a spec
        argv = launch.arguments(command, spec)
        host_ip = spec.host_ip or self._host_ip
        changes = launch.environment(
            command, spec, self._run_dir, host_ip, token, os.environ, warm=warm
        )
        (self._run_dir / "gate.sock").unlink(missing_ok=True)
        try:
            first = self._fork(spec, argv, changes) if warm else self._exec(argv, changes)
        except (OSError, EOFError) as error:
            self._left(Exit(API_SERVER, None, f"{API_SERVER} could not be started: {error}"))
            return
        with self._lock:
            self._first = first
        self._watch.add([first.pid])
        threading.Thread(target=self._await_gate, args=(spec,), daemon=True).start()

    def _fork(self, spec: LaunchSpec, argv: list[str], changes: dict[str, str | None]) -> First:
        server = self._forkserver
        process = server.fork(
            API_SERVER, self._entry, self.listener.open(), argv, asdict(spec), changes
        )
        assert server.pid is not None
        return WarmFirst(process, server.pid)

    def _exec(self, argv: list[str], changes: dict[str, str | None]) -> First:
        self.listener.close()  # vLLM makes its own
        words = [self._commands.command.program, "serve", *argv]
        return ColdFirst(words, launch.applied(os.environ, changes))

    def _await_gate(self, spec: LaunchSpec) -> None:
        """In a thread: `running` as soon as the gate of this launch answers."""
        path = self._run_dir / "gate.sock"
        while self._spec is spec and self._phase == "starting":
            with contextlib.suppress(OSError, ValueError):
                status, state = call_unix(path, "GET", "/state")
                if status == 200 and state["launch"] == spec.launch:
                    with self._lock:
                        if self._spec is spec and self._phase == "starting":
                            self._phase = "running"
                    return
            time.sleep(_ASK_GATE_EVERY_S)

    def _mind_engine(self, ended: list[int]) -> None:
        """Note an end that nobody ordered; what is left waits for the ordered stop."""
        first = self._first
        if first is None:
            return
        # The forkserver's end is minded elsewhere.
        ended = [pid for pid in ended if pid != self._forkserver.pid]
        if first.pid in ended:
            self._left(described(API_SERVER, first.code()))
            return
        self._suspects += ended
        if self._suspects and not self._retired():
            # The others end with a killed API server, and may be seen to before it.
            code = first.code()
            killed = code is not None and code < 0
            name = API_SERVER if killed else self._watch.name(self._suspects[0])
            self._left(described(name, code if killed else None))
            return
        self._watch.add(first.beside())

    def _retired(self) -> bool:
        """Whether the rank is out of the layout: then its engine core ends by itself."""
        try:
            _, state = call_unix(self._run_dir / "gate.sock", "GET", "/state", timeout=0.2)
        except (OSError, ValueError):
            return False
        return bool(state.get("retired"))

    def _left(self, exit: Exit) -> None:
        with self._lock:
            if self._phase in ("starting", "running"):
                self._phase, self._exit = "exited", exit
                self._say(f"engine lost: {exit.reason}")

    def _go_on_stopping(self) -> None:
        first = self._first
        gone = first is None or is_zombie(first.pid) or first.pid not in self._watch.alive
        if gone or time.monotonic() >= self._kill_at:
            if self._kill_all():
                return
            try:
                self.listener.open()
            except ListenError:  # asked again until the address is free
                if not self._ending:
                    return
            self._watch.forget()
            # Here and not later: who hears that there is no engine hears of the newest command.
            self._read_command()
            with self._lock:
                self._phase, self._spec, self._first = "absent", None, None
                self._exit, self._suspects, self._terminated = None, [], False
                adopted = self._commands.adopt()
            self._say_adopted(adopted)
            return
        if first is not None and not self._terminated:
            kill(first.pid, signal.SIGTERM)
            self._terminated = True

    def _kill_all(self) -> bool:
        """SIGKILL to everything beneath the launcher but its helpers; False when none was left."""
        spared = {self._forkserver.pid, self._forkserver.tracker_pid}
        if self._quit:
            spared = {None}
        left = descendants(os.getpid()) - spared
        for pid in left:
            if is_zombie(pid):
                reap(pid)
            else:
                kill(pid, signal.SIGKILL)
        return bool(left)

    def _say(self, line: str) -> None:
        print(f"elasticmoe launcher: {line}", file=sys.stderr, flush=True)
