"""Resizes on a real cluster: what each part of a `kubectl scale` takes.

    scripts/cluster/cluster exec .venv/bin/python benchmarks/kubernetes/scale.py [--engine vllm-cpu]

2 -> 3 -> 2 several times with `warmStandby` 0 and 1, in a namespace of its own, which goes at the
end. The operator has to be installed. Times come from watches and from what coordinator and
launchers say of themselves, so nodes and this machine need one clock, as in kind. Exit status 1
when a target is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import yaml
from elasticmoe_cli import cluster_demo
from elasticmoe_cli.errors import CommandFailed
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))
from limits import limited

Object = dict[str, Any]

NAME, SMALL, LARGE = "scaled", 2, 3
CREATED_S, WARM_S, COLD_S = 1.0, 3.0, 6.0
"""Targets: until the pod is created; what is ours with a warm standby, and without."""

API = "/apis/elasticmoe.io/v1alpha1"
LIMITS = {"sim": 120.0, "vllm-cpu": 600.0}
"""Seconds for one step."""
ENGINES_OWN = ("prepare", "commit")
ASKED_FOR = ("lame_duck", "drain")
"""Phases of the coordinator: the engines' work, and waits for users that the spec asks for."""


# --- the cluster ----------------------------------------------------------------------------------


class Cluster:
    """The Kubernetes API through `kubectl proxy`, which knows every kind of kubeconfig."""

    def __init__(self, socket: str, namespace: str) -> None:
        transport = httpx.AsyncHTTPTransport(uds=socket)
        self.http = httpx.AsyncClient(transport=transport, base_url="http://k", timeout=30)
        self.namespace = namespace

    @property
    def groups(self) -> str:
        return f"{API}/namespaces/{self.namespace}/elasticmoedeployments"

    @property
    def core(self) -> str:
        return f"/api/v1/namespaces/{self.namespace}"

    async def get(self, path: str, **query: str) -> Object:
        return self._object(await self.http.get(path, params=query))

    async def apply(self, path: str, body: Object) -> None:
        headers = {"Content-Type": "application/apply-patch+yaml"}
        query = {"fieldManager": "benchmark", "force": "true"}
        text = json.dumps(body)
        self._object(await self.http.patch(path, content=text, headers=headers, params=query))

    async def merge(self, path: str, body: Object) -> None:
        headers = {"Content-Type": "application/merge-patch+json"}
        self._object(await self.http.patch(path, content=json.dumps(body), headers=headers))

    async def delete(self, path: str) -> None:
        with contextlib.suppress(httpx.HTTPError):
            await self.http.delete(path)

    @staticmethod
    def _object(answer: httpx.Response) -> Object:
        if not answer.is_success:
            raise CommandFailed(f"{answer.request.url.path}: {answer.text[:300]}")
        found: Object = answer.json()
        return found

    async def watch(self, path: str) -> AsyncIterator[Object]:
        """Events from now on, without end; first what is there, as ADDED."""
        while True:
            query = {"watch": "true"}
            with contextlib.suppress(httpx.TransportError):
                async with self.http.stream("GET", path, params=query, timeout=None) as answer:
                    async for line in answer.aiter_lines():
                        yield json.loads(line)
            await asyncio.sleep(0.2)

    async def log(self, pod: str, container: str) -> list[tuple[float, str]]:
        """Lines of a container, each with the time at which it was written."""
        query = {"container": container, "timestamps": "true"}
        answer = await self.http.get(f"{self.core}/pods/{pod}/log", params=query)
        found = []
        for line in answer.text.splitlines():
            at, _, text = line.partition(" ")
            with contextlib.suppress(ValueError):
                # Nanoseconds are more than datetime takes.
                found.append((datetime.fromisoformat(at[:26] + "+00:00").timestamp(), text))
        return found

    async def coordinator(self) -> Object:
        path = f"{self.core}/services/{NAME}-coordinator:7411/proxy/v1/status"
        return await self.get(path)


@contextlib.contextmanager
def proxy() -> Iterator[str]:
    """`kubectl proxy` for the time of the block; the path of its socket."""
    with tempfile.TemporaryDirectory(prefix="elasticmoe-scale-") as folder:
        socket = Path(folder, "api")
        words = ["kubectl", "proxy", f"--unix-socket={socket}", "--disable-filter"]
        try:
            process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
        except FileNotFoundError:
            raise CommandFailed("kubectl is not installed: it is needed here", 2) from None
        try:
            for _ in range(100):
                if socket.exists() or process.poll() is not None:
                    break
                time.sleep(0.05)
            else:
                raise CommandFailed("kubectl proxy did not begin")
            yield str(socket)
        finally:
            process.terminate()
            process.wait()


# --- what is seen ---------------------------------------------------------------------------------


@dataclass
class Seen:
    """Pods and the group as watches tell them, each event with the time at which it came."""

    pods: list[tuple[float, str, Object]] = field(default_factory=list)
    group: Object = field(default_factory=dict)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    created: dict[str, float] = field(default_factory=dict)
    """By UID."""
    ready: dict[str, float] = field(default_factory=dict)
    """By UID, since when."""
    gone: dict[str, float] = field(default_factory=dict)
    there: dict[str, Object] = field(default_factory=dict)
    """By name."""

    async def follow_pods(self, cluster: Cluster) -> None:
        async for event in cluster.watch(f"{cluster.core}/pods"):
            at, pod = time.time(), event["object"]
            metadata = pod.get("metadata", {})
            if metadata.get("labels", {}).get("app.kubernetes.io/component") != "rank":
                continue
            uid, name = metadata["uid"], metadata["name"]
            if event["type"] == "DELETED":
                self.gone[uid] = at
                self.there.pop(name, None)
            else:
                self.there[name] = pod
                self.created.setdefault(uid, at)
            conditions = {one["type"]: one["status"] for one in pod["status"].get("conditions", [])}
            if conditions.get("Ready") == "True":
                self.ready.setdefault(uid, at)
            else:
                self.ready.pop(uid, None)
            self.changed.set()

    async def follow_group(self, cluster: Cluster) -> None:
        async for event in cluster.watch(cluster.groups):
            self.group = event["object"]
            self.changed.set()

    async def until(self, what: str, condition: Callable[[], bool], seconds: float) -> float:
        """The time at which it was so. Raises CommandFailed."""
        try:
            async with asyncio.timeout(seconds):
                while not condition():
                    self.changed.clear()
                    await self.changed.wait()
        except TimeoutError:
            said = self.group.get("status", {}).get("message") or "no word why"
            raise CommandFailed(f"waited {seconds:g} s for {what}: {said}") from None
        return time.time()

    def uid(self, ordinal: int) -> str:
        found = self.there.get(f"{NAME}-{ordinal}")
        return str(found["metadata"]["uid"]) if found else ""

    def rests(self, size: int, standby: int) -> bool:
        status = self.group.get("status", {})
        widths = {status.get(one) for one in ("replicas", "readyReplicas", "desiredReplicas")}
        ranks = {self.uid(ordinal) for ordinal in range(size)}
        told = {one["type"]: one["status"] for one in status.get("conditions") or []}
        return (
            widths == {size}
            and status.get("standbyReplicas", 0) == standby
            and not status.get("operation")
            and told.get("Progressing") == "False"
            and len(self.there) == size + standby
            and "" not in ranks
            and ranks <= set(self.ready)
        )


@dataclass
class Step:
    """One resize; seconds since the PATCH returned, where nothing else is said.

    warm: from the pod's creation until its launcher was warm, of the joiner that was waited for.
    engines: prepare and commit. asked_for: lame duck and drain.
    """

    size: int
    standby: int
    created: float = float("nan")
    warm: float = 0.0
    began: float = 0.0
    engines: float = 0.0
    asked_for: float = 0.0
    done: float = 0.0
    ready: float = 0.0
    gone: float = float("nan")
    told: float = 0.0

    @property
    def ours(self) -> float:
        """Until the engines are done and all pods Ready, without what isn't ours."""
        return max(self.done, self.ready) - self.engines - self.asked_for - self.warm


class Bench:
    """One group, resized."""

    def __init__(self, cluster: Cluster, manifests: list[Object], limit: float) -> None:
        self.cluster, self.manifests, self.limit = cluster, manifests, limit
        self.seen = Seen()

    async def start(self, standby: int) -> None:
        body = next(one for one in self.manifests if one["kind"] == "ElasticMoEDeployment")
        body["metadata"]["name"] = NAME
        body["spec"]["replicas"] = SMALL
        body["spec"].setdefault("scaling", {})["warmStandby"] = standby
        await self.cluster.apply(f"{self.cluster.groups}/{NAME}", body)
        await self.rest(SMALL, standby)

    async def rest(self, size: int, standby: int) -> float:
        words = f"{size} ranks and {standby} standbys"
        return await self.seen.until(words, lambda: self.seen.rests(size, standby), self.limit)

    async def warm(self) -> None:
        """Wait until the coordinator knows the pods that are there and no others, all of them warm:
        a standby registers before it is, and one that left is known a while longer."""
        async with asyncio.timeout(self.limit):
            while not await self._all_warm():  # noqa: ASYNC110  Kubernetes tells nothing of it
                await asyncio.sleep(0.1)

    async def _all_warm(self) -> bool:
        every = (await self.cluster.coordinator())["instances"]
        known = [one for one in every if one["registered"]]
        there = {name: pod["metadata"]["uid"] for name, pod in self.seen.there.items()}
        same = {one["instance"]: one["incarnation"] for one in known} == there
        return same and all(one["warm"] for one in known)

    async def step(self, size: int, standby: int) -> Step:
        """Resize and tell what it took."""
        await self.warm()
        seen, found = self.seen, Step(size, standby)
        grows = size == LARGE
        before = {one["id"] for one in (await self.cluster.coordinator())["history"]}
        surplus = {} if grows else {seen.uid(LARGE - 1 + standby): True}
        known = set(seen.created)
        path = f"{self.cluster.groups}/{NAME}/scale"
        await self.cluster.merge(path, {"spec": {"replicas": size}})
        since = time.time()
        # Ready and the coordinator's own end come before all is at rest: a standby may follow.
        found.told = await self.rest(size, standby) - since
        history = (await self.cluster.coordinator())["history"]
        mine = [one for one in history if one["id"] not in before and one["toSize"] == size]
        if len(mine) != 1 or mine[0]["state"] != "succeeded":
            told = [f"{one['kind']} {one['state']}" for one in history if one["id"] not in before]
            raise Disturbed(", ".join(told) or "the coordinator did nothing")
        operation = mine[0]
        phases = {one["phase"]: one["seconds"] for one in operation["phases"]}
        found.began, found.done = operation["started"] - since, operation["ended"] - since
        found.engines = sum(phases.get(one, 0.0) for one in ENGINES_OWN)
        found.asked_for = sum(phases.get(one, 0.0) for one in ASKED_FOR)
        if grows:
            fresh = [at for uid, at in seen.created.items() if uid not in known]
            if len(fresh) != 1:
                raise Disturbed(f"{len(fresh)} pods were made")
            found.created = fresh[0] - since
            found.ready = max(seen.ready[seen.uid(one)] for one in range(size)) - since
            if not standby:
                warm = await self.warm_at(f"{NAME}-{size - 1}") or operation["started"]
                found.warm = warm - fresh[0]
        else:
            found.gone = max(seen.gone[uid] for uid in surplus) - since
        return found

    async def warm_at(self, pod: str) -> float:
        """When launcher and sidecar of a pod were both there, 0 if their logs don't say."""
        found = []
        for container, word in (("engine", ": warm after"), ("elasticmoe-sidecar", " answers on ")):
            lines = await self.cluster.log(pod, container)
            found.append(next((at for at, text in lines if word in text), 0.0))
        return max(found) if all(found) else 0.0


class Disturbed(Exception):
    """Something else happened meanwhile: the step says nothing."""


# --- the run --------------------------------------------------------------------------------------


def manifests(engine: str, namespace: str, image: str) -> list[Object]:
    """The demo's, in another namespace. Raises CommandFailed."""
    cache = Path(os.environ.get("ELASTICMOE_CACHE", "~/.cache/elasticmoe")).expanduser()
    plan = cluster_demo.Plan(engine=engine, engine_image=image, vllm_cpu=cache / "vllm-cpu")
    found: list[Object] = list(yaml.safe_load_all(cluster_demo.manifest(plan)))
    volume = f"{namespace}-vllm-cpu"
    for one in found:
        match one["kind"]:
            case "Namespace":
                one["metadata"]["name"] = namespace
            case "PersistentVolume":
                one["metadata"]["name"] = volume
                one["spec"]["claimRef"]["namespace"] = namespace
            case kind:
                one["metadata"]["namespace"] = namespace
                if kind == "PersistentVolumeClaim":
                    one["spec"]["volumeName"] = volume
    return found


async def measure(options: argparse.Namespace, socket: str, console: Console) -> list[Step]:
    cluster = Cluster(socket, options.namespace)
    every = manifests(options.engine, options.namespace, options.engine_image)
    for one in every:
        # Six seconds for balancers are not what is measured; two show that they are kept.
        if one["kind"] == "ElasticMoEDeployment":
            one["spec"]["scaling"] = {"lameDuckSeconds": 2, "drainTimeoutSeconds": 30}
    paths = {
        "Namespace": "/api/v1/namespaces",
        "PersistentVolume": "/api/v1/persistentvolumes",
        "PersistentVolumeClaim": f"{cluster.core}/persistentvolumeclaims",
    }
    for one in every:
        if one["kind"] in paths:
            await cluster.apply(f"{paths[one['kind']]}/{one['metadata']['name']}", one)
    bench = Bench(cluster, every, LIMITS[options.engine])
    tasks = [
        asyncio.create_task(bench.seen.follow_pods(cluster)),
        asyncio.create_task(bench.seen.follow_group(cluster)),
    ]
    try:
        return await resize(bench, options.repeat, console)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await clean(cluster, bench, every, paths)


async def resize(bench: Bench, repeat: int, console: Console) -> list[Step]:
    steps: list[Step] = []
    for standby in (0, 1):
        await bench.start(standby)
        done, tries = 0, 0
        while done < repeat:
            if (tries := tries + 1) > repeat + 3:
                raise CommandFailed("disturbed too often")
            try:
                pair = [await bench.step(size, standby) for size in (LARGE, SMALL)]
            except Disturbed as why:
                console.print(f"disturbed ({why}): again", style="yellow")
                await bench.cluster.merge(
                    f"{bench.cluster.groups}/{NAME}/scale", {"spec": {"replicas": SMALL}}
                )
                await bench.rest(SMALL, standby)
                continue
            steps += pair
            done += 1
            up, down = pair
            words = f"standby {standby}: 2 → 3 in {up.told:.1f} s, 3 → 2 in {down.told:.1f} s"
            console.print(words, style="dim")
    return steps


async def clean(cluster: Cluster, bench: Bench, every: Sequence[Object], paths: Any) -> None:
    """Take away what was made: the group first, in order."""
    await cluster.delete(f"{cluster.groups}/{NAME}")
    for _ in range(60):
        if (await cluster.http.get(f"{cluster.groups}/{NAME}")).status_code == 404:
            break
        await asyncio.sleep(1)
    for one in every:
        if one["kind"] in ("Namespace", "PersistentVolume"):
            await cluster.delete(f"{paths[one['kind']]}/{one['metadata']['name']}")
    await cluster.http.aclose()


# --- tables ---------------------------------------------------------------------------------------

COLUMNS = {
    "pod": "created",
    "start": "warm",
    "begins": "began",
    "engines": "engines",
    "drain": "asked_for",
    "done": "done",
    "Ready": "ready",
    "gone": "gone",
    "at rest": "told",
    "ours": "ours",
}


def shown(value: float) -> str:
    return "" if value != value or not value else f"{value:.2f}"


def table(steps: Sequence[Step], engine: str) -> Table:
    found = Table(title=f"{engine}: seconds since kubectl scale")
    for name in ("standby", "step", *COLUMNS):
        step = name == "step"
        found.add_column(name, justify="left" if step else "right", no_wrap=True)
    for standby in (0, 1):
        for size in (LARGE, SMALL):
            these = [one for one in steps if (one.standby, one.size) == (standby, size)]
            words = "2 → 3" if size == LARGE else "3 → 2"
            for what, choose in (("median", statistics.median), ("worst", max)):
                cells = [shown(choose([getattr(s, c) for s in these])) for c in COLUMNS.values()]
                found.add_row(str(standby), f"{words} {what}", *cells)
            found.add_section()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--engine", choices=tuple(LIMITS), default="sim")
    parser.add_argument("--engine-image", default="elasticmoe-engine-base:dev")
    parser.add_argument("--namespace", default="moe-scale")
    parser.add_argument("--repeat", type=int, default=5, help="times 2 → 3 → 2 with each")
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    parser.add_argument("--limit", type=float, default=1200.0, help="seconds for all of it")
    options = parser.parse_args()
    if options.repeat < 1 or options.limit <= 0:
        parser.error("--repeat is at least 1, and --limit more than 0")
    console = Console(width=112, highlight=False)
    try:
        with limited(options.limit), proxy() as socket:
            steps = asyncio.run(measure(options, socket, console))
    except CommandFailed as failure:
        print(f"scale.py: {failure}", file=sys.stderr)
        return failure.status
    except KeyboardInterrupt:
        return 130
    console.print(table(steps, options.engine))
    missed = False
    grown = [one for one in steps if one.size == LARGE]
    for name, most, values in (
        ("pod created", CREATED_S, [one.created for one in grown]),
        ("ours, warm standby", WARM_S, [one.ours for one in grown if one.standby]),
        ("ours, no standby", COLD_S, [one.ours for one in grown if not one.standby]),
    ):
        half, worst = statistics.median(values), max(values)
        missed |= half >= most
        word = "missed" if half >= most else "met"
        console.print(f"target: {name}: {half:.2f} s (worst {worst:.2f}), under {most:g}: {word}")
    if options.out:
        figures = [{**dataclasses.asdict(one), "ours": one.ours} for one in steps]
        options.out.write_text(json.dumps(figures, indent=2) + "\n")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
