"""One operator and 300 groups: memory, CPU, times and requests of its real process.

    python benchmarks/kubernetes/many.py [--groups N] [--idle S] [--out FILE]

The operator (kopf and all) runs in a process of its own against an API server and coordinators that
are simulated in another one (`many_server.py`). Exit status 1 when a target is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elasticmoe_cli.errors import CommandFailed
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from limits import limited  # noqa: E402

MEMORY_MB, IDLE_SHARE, PATCH_S = 200.0, 0.10, 1.0
"""Targets: resident at rest; of one core when idle; 99 of 100 changes at the StatefulSet."""

RANKS = 3
CHANGES = 50
LIBRARIES = {
    "nothing": "pass",
    "kopf": "import kopf",
    "kopf, all of the operator": "import elasticmoe_cli.main, elasticmoe_operator.run",
    "kopf, httpx": "import kopf, httpx",
    "kopf, kubernetes": "import kopf, kubernetes.client",
    "kopf, lightkube": "import kopf, lightkube",
}


# --- processes ------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@dataclass
class Process:
    """One of ours, and what it uses."""

    popen: subprocess.Popen[str]

    @property
    def _folder(self) -> Path:
        return Path(f"/proc/{self.popen.pid}")

    def megabytes(self, which: str = "VmRSS") -> float:
        """VmRSS: now. VmHWM: the most so far."""
        if self.popen.poll() is not None:
            raise CommandFailed(f"a process ended with status {self.popen.returncode}")
        text = (self._folder / "status").read_text()
        return float(text.partition(f"{which}:")[2].split()[0]) / 1024

    def cpu_s(self) -> float:
        text = (self._folder / "stat").read_text().rpartition(")")[2]
        return sum(map(int, text.split()[11:13])) / os.sysconf("SC_CLK_TCK")

    def waited_s(self) -> float:
        """Seconds that its main thread was ready to run and others had the cores."""
        return int((self._folder / "schedstat").read_text().split()[1]) / 1e9

    def close(self) -> float:
        """Seconds until it ended."""
        began = time.monotonic()
        self.popen.terminate()
        try:
            self.popen.wait(20)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()
        return time.monotonic() - began


def asked(port: int, path: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data=data)
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.load(answer)


class Server:
    """Simulated Kubernetes and coordinators."""

    def __init__(self, groups: int, log: Any) -> None:
        words = [sys.executable, str(HERE / "many_server.py"), str(groups)]
        self.process = Process(
            subprocess.Popen(words, stdout=subprocess.PIPE, stderr=log, text=True)
        )
        stdout = self.process.popen.stdout
        self.ports = json.loads((stdout.readline() if stdout else "") or "{}")
        if not self.ports:
            raise CommandFailed("the simulated API server did not start")
        self.names: list[str] = list(self.ports["coordinators"])

    def __call__(self, verb: str = "state", **body: Any) -> dict[str, Any]:
        found: dict[str, Any] = asked(self.ports["api"], f"/benchmark/{verb}", body)
        return found


class Operator:
    """The operator's process."""

    def __init__(self, server: Server, log: Any) -> None:
        self.ports = {one: free_port() for one in ("times", "health", "metrics")}
        given = json.dumps({**server.ports, **self.ports})
        words = [sys.executable, str(HERE / "many_operator.py"), given]
        self.process = Process(subprocess.Popen(words, stdout=log, stderr=log, text=True))

    def times(self) -> list[float]:
        """Of each look since it was asked last."""
        found: list[float] = asked(self.ports["times"], "/")
        return found


def until(what: str, condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise CommandFailed(f"{what}: not after {seconds:g} s")
        time.sleep(0.2)


# --- what is measured -----------------------------------------------------------------------------


def quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else float("nan")


@dataclass
class Phase:
    """What the operator did in one part of the benchmark."""

    name: str
    seconds: float
    cpu_s: float
    waited_s: float
    rss: float
    peak: float
    looks: list[float]
    requests: dict[str, int]
    about: str = ""
    reached: list[float] = field(default_factory=list)
    """Seconds from the phase's begin, of each group, until it was where it should be."""

    @property
    def share(self) -> float:
        return self.cpu_s / self.seconds

    @property
    def api(self) -> int:
        """Requests to the Kubernetes API."""
        return sum(n for name, n in self.requests.items() if not name.startswith("coordinators'"))

    @property
    def coordinators(self) -> int:
        return sum(self.requests.values()) - self.api


class Bench:
    """300 groups from nothing, at rest, changed one by one, changed at once, and found again."""

    def __init__(self, server: Server, log: Any, console: Console, idle_s: float) -> None:
        self.server, self.log, self.console, self.idle_s = server, log, console, idle_s
        self.phases: dict[str, Phase] = {}
        self.patched: list[float] = []
        self.told: list[float] = []
        self.ended_s = 0.0
        self.operator = Operator(server, log)

    def settled(self) -> bool:
        self.operator.process.megabytes()  # it lives
        return len(self.server()["settled"]) == len(self.server.names)

    @contextmanager
    def phase(self, key: str, name: str) -> Iterator[Phase]:
        """Count what the operator does here."""
        self.console.print(f"{name} …", style="dim")
        process = self.operator.process
        before, cpu, began = self.server()["requests"], process.cpu_s(), time.monotonic()
        waited = process.waited_s()
        self.operator.times()
        found = Phase(name, 0, 0, 0, 0, 0, [], {})
        yield found
        found.seconds, found.cpu_s = time.monotonic() - began, process.cpu_s() - cpu
        found.waited_s = process.waited_s() - waited
        found.rss, found.peak = process.megabytes(), process.megabytes("VmHWM")
        found.looks = self.operator.times()
        after = self.server()["requests"]
        found.requests = {
            one: n - before.get(one, 0) for one, n in after.items() if n > before.get(one, 0)
        }
        self.phases[key] = found

    def listening(self) -> bool:
        try:
            asked(self.operator.ports["times"], "/")
            state = self.server()["requests"]
        except OSError:
            self.operator.process.megabytes()
            return False
        watches: int = sum(n for name, n in state.items() if name.startswith("watch "))
        return watches >= 5

    def moved(self, phase: Phase, since: float) -> None:
        """Wait until all groups are where they should be."""
        until(phase.name, self.settled, 600)
        settled: dict[str, float] = self.server()["settled"]
        phase.reached = [at - since for at in settled.values()]

    def run(self) -> None:
        server, names = self.server, self.server.names
        until("the operator's start", self.listening, 60)
        with self.phase("empty", "no group"):
            time.sleep(3)
        with self.phase("create", f"{len(names)} made at once") as phase:
            began = server("create", replicas=RANKS)["now"]
            self.moved(phase, began)
            available = [at - began for at in server()["available"].values()]
        phase.about = f"Available: {quantile(available, 0.5):.1f} s, the last {max(available):.1f}"
        time.sleep(20)  # kopf's workers end 5 s after the last event
        with self.phase("idle", "at rest"):
            time.sleep(self.idle_s)
        self.one_by_one()
        time.sleep(5)
        with self.phase("burst", f"all to {RANKS + 1} at once") as phase:
            self.moved(phase, server("scale", names=names, replicas=RANKS + 1)["now"])
        with self.phase("back", "all back at once") as phase:
            self.moved(phase, server("scale", names=names, replicas=RANKS)["now"])
        time.sleep(20)
        self.restart()
        with self.phase("delete", "all deleted at once") as phase:
            server("delete")
            until(phase.name, lambda: not server()["there"], 600)

    def one_by_one(self) -> None:
        chosen = random.sample(self.server.names, min(CHANGES, len(self.server.names)))
        for key, size in (("up", RANKS + 1), ("down", RANKS)):
            with self.phase(key, f"{len(chosen)} to {size}, one by one"):
                for name in chosen:
                    self.server("scale", names=[name], replicas=size)
                    time.sleep(random.uniform(0.1, 0.3))
                until("changes one by one", self.settled, 120)
        state = self.server()
        self.patched, self.told = list(state["patched"]), list(state["told"])

    def restart(self) -> None:
        self.ended_s = self.operator.process.close()
        self.server("unseen")
        before = self.server()["requests"]
        began = time.monotonic()
        self.operator = Operator(self.server, self.log)
        wanted = len(self.server.names)
        until("a look at all groups", lambda: self.server()["seen"] == wanted, 120)
        took = time.monotonic() - began
        time.sleep(15)
        process = self.operator.process
        after = self.server()["requests"]
        requests = {one: n - before.get(one, 0) for one, n in after.items()}
        self.phases["restart"] = Phase(
            "operator restarted",
            time.monotonic() - began,
            process.cpu_s(),
            process.waited_s(),
            process.megabytes(),
            process.megabytes("VmHWM"),
            self.operator.times(),
            requests,
            f"all looked at after {took:.1f} s; it ended in {self.ended_s:.1f} s",
        )


def libraries() -> dict[str, float]:
    """Resident after an import, of what is installed."""
    found = {}
    for name, words in LIBRARIES.items():
        text = f"{words}\nprint(open('/proc/self/status').read().split('VmRSS:')[1].split()[0])"
        command = [sys.executable, "-c", text]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            found[name] = int(done.stdout) / 1024
    return found


# --- tables ---------------------------------------------------------------------------------------


def table(bench: Bench, groups: int) -> Table:
    found = Table(
        title=f"One operator, {groups} groups of {RANKS} ranks (CPU and waits in s, memory in MB)"
    )
    found.add_column("", no_wrap=True)
    for name in (
        "seconds",
        "CPU s",
        "core",
        "waits",
        "RSS",
        "peak",
        "looks",
        "p50 ms",
        "p99 ms",
        "API/s",
        "coord/s",
    ):
        found.add_column(name, justify="right")
    for one in bench.phases.values():
        found.add_row(
            one.name,
            f"{one.seconds:.1f}",
            f"{one.cpu_s:.1f}",
            f"{one.share:.1%}",
            f"{one.waited_s:.1f}",
            f"{one.rss:.0f}",
            f"{one.peak:.0f}",
            str(len(one.looks)),
            f"{quantile(one.looks, 0.5) * 1000:.1f}",
            f"{quantile(one.looks, 0.99) * 1000:.1f}",
            f"{one.api / one.seconds:.1f}",
            f"{one.coordinators / one.seconds:.1f}",
        )
    return found


def lines(bench: Bench) -> Iterator[str]:
    for one in bench.phases.values():
        parts = [one.about] if one.about else []
        if one.reached:
            half, last = statistics.median(one.reached), max(one.reached)
            parts.append(f"groups at rest: {half:.1f} s, the last {last:.1f}")
        if parts:
            yield f"{one.name}: {'; '.join(parts)}"
    for name, values in (
        ("replicas changed -> StatefulSet patched (one more)", bench.patched),
        ("replicas changed -> coordinator told (one fewer)", bench.told),
    ):
        yield (
            f"{name}: p50 {quantile(values, 0.5) * 1000:.0f} ms, "
            f"p99 {quantile(values, 0.99) * 1000:.0f} ms of {len(values)}"
        )


def verdicts(bench: Bench) -> dict[str, tuple[float, float]]:
    """Each target: what was measured, and the most that it may be."""
    phases = bench.phases
    rest = max(phases[one].rss for one in ("idle", "restart"))
    most = max(one.peak for one in phases.values())
    return {
        "memory at rest, MB": (rest, MEMORY_MB),
        "memory at most, MB": (most, MEMORY_MB),
        "CPU at rest, of a core": (phases["idle"].share, IDLE_SHARE),
        "replicas to StatefulSet, p99 s": (quantile(bench.patched, 0.99), PATCH_S),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--groups", type=int, default=300)
    parser.add_argument("--idle", type=float, default=60.0, help="seconds at rest")
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds for all of it")
    options = parser.parse_args()
    if not 1 <= options.groups <= 1000 or options.idle < 1 or options.limit <= 0:
        parser.error("--groups is 1 to 1000, --idle at least 1, and --limit more than 0")
    console = Console(width=120, highlight=False)
    folder = Path(tempfile.mkdtemp(prefix="elasticmoe-many-"))
    bench: Bench | None = None
    server: Server | None = None
    try:
        with limited(options.limit), (folder / "log").open("w") as log:
            try:
                server = Server(options.groups, log)
                bench = Bench(server, log, console, options.idle)
                bench.run()
            finally:
                for one in (bench.operator.process if bench else None, server and server.process):
                    if one:
                        one.close()
    except CommandFailed as failure:
        print(f"many.py: {failure} (the log is in {folder})", file=sys.stderr)
        return failure.status
    except KeyboardInterrupt:
        shutil.rmtree(folder, ignore_errors=True)
        return 130
    shown = table(bench, options.groups)
    console.print(shown)
    for line in lines(bench):
        console.print(line)
    idle = bench.phases["idle"]
    rates = {one: n / idle.seconds for one, n in sorted(idle.requests.items())}
    console.print("at rest, a second: " + ", ".join(f"{n:.2f} {one}" for one, n in rates.items()))
    imports = ", ".join(f"{name} {size:.0f}" for name, size in libraries().items())
    console.print(f"MB after an import of: {imports}")
    missed = False
    for name, (value, most) in verdicts(bench).items():
        met = value < most
        missed |= not met
        console.print(f"target: {name}: {value:.3g}, under {most:g}: {'met' if met else 'missed'}")
    warnings = [one for one in (folder / "log").read_text().splitlines() if " [INFO" not in one]
    console.print(f"lines of warnings and errors in the operator's log: {len(warnings)}")
    for line in warnings[:5]:
        console.print(f"  {line[:200]}")
    if options.out:
        figures = {
            "phases": {key: vars(one) for key, one in bench.phases.items()},
            "patched": bench.patched,
            "told": bench.told,
        }
        options.out.write_text(json.dumps(figures, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
