"""A Kubernetes API server and the coordinators of many groups, simulated in one process.

    python benchmarks/kubernetes/many_server.py GROUPS

As much of Kubernetes as the operator uses: lists in pages, watches with bookmarks, server-side
apply, merge and JSON patches, deletions, Secrets, events, discovery. Controllers are part of it: a
StatefulSet makes and removes pods, each as large as real ones are (a status, managed fields), and a
Deployment its coordinator. Each coordinator has a port of its own, as in a cluster it has an
address: connections to one are no use for another. Its engines take the times below.

Paths under /benchmark are for `many.py`. The first line on stdout says where everything listens.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import itertools
import json
import signal
import sys
import time
import uuid
from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from aiohttp import web

Object = dict[str, Any]
Key = tuple[str, str]
"""Namespace and name."""

NAMESPACE = "models"
GROUP = "elasticmoe.io"
DEPLOYMENT = f"{GROUP}/deployment"
PLURAL = "elasticmoedeployments"

SCHEDULE_S, WARM_S = 0.05, 1.0
"""From a pod's creation to its node, and to a warm launcher that is registered."""
START_S = 1.0
LAME_DUCK_S, PREPARE_S, COMMIT_S = 1.0, 0.6, 0.4
LEAVE_S = 0.3
BOOKMARK_S = 50.0
LOG = 50_000
"""Events that a watch can be taken up again from."""

RESOURCES: dict[str, list[tuple[str, str]]] = {
    "v1": [
        ("namespaces", "Namespace"),
        ("pods", "Pod"),
        ("events", "Event"),
        ("secrets", "Secret"),
        ("services", "Service"),
        ("configmaps", "ConfigMap"),
        ("serviceaccounts", "ServiceAccount"),
    ],
    "apps/v1": [("statefulsets", "StatefulSet"), ("deployments", "Deployment")],
    "policy/v1": [("poddisruptionbudgets", "PodDisruptionBudget")],
    "networking.k8s.io/v1": [("networkpolicies", "NetworkPolicy")],
    "apiextensions.k8s.io/v1": [("customresourcedefinitions", "CustomResourceDefinition")],
    f"{GROUP}/v1alpha1": [(PLURAL, "ElasticMoEDeployment")],
}
KINDS = {name: (version, kind) for version, every in RESOURCES.items() for name, kind in every}


def now_text() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def managed_fields(manager: str, parts: Object, subresource: str = "") -> Object:
    """As large as the API server's own note of who wrote which field."""

    def tree(value: Any) -> Any:
        if isinstance(value, dict):
            return {f"f:{key}": tree(inner) for key, inner in value.items()}
        if isinstance(value, list) and value and isinstance(value[0], dict):
            name = next((one for one in ("name", "type", "mountPath") if one in value[0]), "name")
            return {
                f'k:{{"{name}":"{one.get(name)}"}}': {".": {}, **tree(one)}
                for one in value
                if isinstance(one, dict)
            }
        return {}

    found = {
        "manager": manager,
        "operation": "Update",
        "apiVersion": "v1",
        "time": now_text(),
        "fieldsType": "FieldsV1",
        "fieldsV1": tree(parts),
    }
    return found | ({"subresource": subresource} if subresource else {})


def merged(before: Any, patch: Any) -> Any:
    """RFC 7386."""
    if not isinstance(patch, dict):
        return patch
    found = dict(before) if isinstance(before, dict) else {}
    for key, value in patch.items():
        if value is None:
            found.pop(key, None)
        else:
            found[key] = merged(found.get(key), value)
    return found


def json_patched(before: Object, steps: list[Object]) -> Object | None:
    """RFC 6902, as far as kopf uses it; None where a test fails."""
    found = copy.deepcopy(before)
    for step in steps:
        *path, last = (
            one.replace("~1", "/").replace("~0", "~") for one in step["path"].split("/")[1:]
        )
        inner: Any = found
        for one in path:
            inner = inner[int(one)] if isinstance(inner, list) else inner.setdefault(one, {})
        place: Any = last
        if isinstance(inner, list):
            place = len(inner) if last == "-" else int(last)
        match step["op"]:
            case "test":
                if inner[place] != step["value"]:
                    return None
            case "remove":
                del inner[place]
            case "add" if isinstance(inner, list):
                inner.insert(place, step["value"])
            case _:
                inner[place] = step["value"]
    return found


class Store:
    """Objects by plural, their versions, and who watches them."""

    def __init__(self) -> None:
        self.objects: dict[str, dict[Key, Object]] = defaultdict(dict)
        self.version = 1
        self.watches: dict[str, set[asyncio.Queue[bytes | None]]] = defaultdict(set)
        self.log: dict[str, deque[tuple[int, bytes]]] = defaultdict(lambda: deque(maxlen=LOG))

    def get(self, plural: str, name: str) -> Object | None:
        return self.objects[plural].get((NAMESPACE, name))

    def put(self, plural: str, fresh: Object) -> Object:
        """Write it; nothing happens when it is the same."""
        metadata = fresh["metadata"]
        key = (metadata.get("namespace", ""), metadata["name"])
        old = self.objects[plural].get(key)
        if old is not None and old == fresh:
            return old
        if old is None:
            metadata.setdefault("uid", str(uuid.uuid4()))
            metadata.setdefault("creationTimestamp", now_text())
            metadata["generation"] = 1
        elif plural != "pods" and old.get("spec") != fresh.get("spec"):
            metadata["generation"] = old["metadata"]["generation"] + 1
        ends = metadata.get("deletionTimestamp") and not metadata.get("finalizers")
        if ends and plural == PLURAL:
            self.remove(plural, key)
            return fresh
        self._say(plural, "MODIFIED" if old else "ADDED", fresh)
        self.objects[plural][key] = fresh
        return fresh

    def remove(self, plural: str, key: Key) -> None:
        found = self.objects[plural].pop(key, None)
        if found is not None:
            self._say(plural, "DELETED", copy.deepcopy(found))

    def _say(self, plural: str, kind: str, fresh: Object) -> None:
        self.version += 1
        fresh["metadata"]["resourceVersion"] = str(self.version)
        line = json.dumps({"type": kind, "object": fresh}).encode() + b"\n"
        self.log[plural].append((self.version, line))
        for watch in self.watches[plural]:
            watch.put_nowait(line)


@dataclass
class Operation:
    """One of a coordinator."""

    id: str
    kind: str
    from_size: int
    to_size: int
    phase: str = "wait"
    state: str = "running"
    started: float = field(default_factory=time.time)
    ended: float | None = None
    phases: list[tuple[str, float]] = field(default_factory=list)

    def enter(self, phase: str) -> None:
        self.phases.append((self.phase, time.time() - self.started))
        self.phase = phase

    def told(self) -> Object:
        return {
            "id": self.id,
            "kind": self.kind,
            "fromSize": self.from_size,
            "toSize": self.to_size,
            "phase": self.phase,
            "state": self.state,
            "started": self.started,
            "ended": self.ended,
            "attempt": 1,
            "reason": "somebody asked for it",
            "error": "",
            "phases": [{"phase": name, "seconds": spent} for name, spent in self.phases],
        }


class Coordinator:
    """Of one group: pods register when they are warm; engines take their times."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.cluster, self.name = cluster, name
        self.there = False
        self.desired = self.generation = 0
        self.registered: dict[int, str] = {}
        self.members: set[int] = set()
        self.operation: Operation | None = None
        self.history: deque[Operation] = deque(maxlen=10)
        self.version = 0
        self._moved = asyncio.Event()
        self.asked_at = 0.0

    def touch(self) -> None:
        """It is another one now: who waits for that goes on."""
        self.version += 1
        self._moved.set()
        self._moved = asyncio.Event()

    async def moves(self) -> None:
        """Wait for the next change."""
        await self._moved.wait()

    def target(self, id: str, size: int) -> tuple[Object, int]:
        """PUT /v1/target."""
        self.asked_at = time.monotonic()
        every = [*self.history, *([self.operation] if self.operation else [])]
        known = next((one for one in every if one.id == id), None)
        if known is not None:
            return {"operation": known.told()}, 200
        if self.operation is not None:
            busy = f"operation {self.operation.id} is running"
            return {"error": {"code": "conflict", "message": busy}}, 409
        self.desired, before = size, len(self.members)
        if size == before:
            return {"operation": None}, 200
        kind = "start" if not before else "scale_up" if size > before else "scale_down"
        self.operation = Operation(id, kind, before, size)
        self.touch()
        self.cluster.later(self._run(self.operation))
        return {"operation": self.operation.told()}, 202

    async def _run(self, operation: Operation) -> None:
        size = operation.to_size
        while len(self.registered) < size:
            await self.moves()
        if operation.kind == "start":
            steps = [("start", START_S)]
        else:
            steps = [("prepare", PREPARE_S), ("commit", COMMIT_S)]
        if operation.kind == "scale_down":
            steps.insert(0, ("lame_duck", LAME_DUCK_S))
        for phase, seconds in steps:
            operation.enter(phase)
            self.touch()
            await asyncio.sleep(seconds)
        self.members = set(sorted(self.registered)[:size])
        self.generation += 1
        operation.enter("")
        operation.state, operation.ended = "succeeded", time.time()
        self.history.append(operation)
        self.operation = None
        self.touch()
        for ordinal in self.registered:
            self.cluster.ready(self.name, ordinal, ordinal in self.members)

    def status(self) -> Object:
        running = self.operation
        state, reason = "Serving", "AsDesired"
        if running is not None:
            state = "Starting" if running.kind == "start" else "Resizing"
            reason = "".join(word.capitalize() for word in running.kind.split("_"))
        elif not self.members:
            state, reason = "Waiting", "NoTarget"
        return {
            "deployment": self.name,
            "state": state,
            "reason": reason,
            "message": "",
            "term": 1,
            "generation": self.generation,
            "policy": "declared",
            "size": len(self.members),
            "desired": self.desired,
            "minSize": 2,
            "maxSize": 8,
            "numExperts": 128,
            "slotsPerRank": 64,
            "redundantExperts": 0,
            "elastic": True,
            "inelasticReason": "",
            "engineEpoch": "",
            "pauseMode": "keep",
            "model": "Qwen/Qwen3-30B-A3B",
            "operation": running.told() if running else None,
            "history": [one.told() for one in self.history],
            "instances": [self._instance(*one) for one in sorted(self.registered.items())],
        }

    def _instance(self, ordinal: int, uid: str) -> Object:
        active = ordinal in self.members
        return {
            "instance": f"{self.name}-{ordinal}",
            "incarnation": uid,
            "ordinal": ordinal,
            "address": f"10.244.1.{ordinal + 2}",
            "rank": ordinal if active else None,
            "state": "active" if active else "standby",
            "desired": active,
            "registered": True,
            "suspect": False,
            "standby": not active,
            "active": active,
            "ready": active,
            "fenced": False,
            "fence": "open",
            "retired": False,
            "safeToDelete": not active,
            "leaving": False,
            "warm": True,
            "inFlight": 0,
            "held": 0,
            "openConnections": 0,
            "lateRefused": 0,
            "holdRefused": 0,
            "waiting": 0.0,
            "running": 0.0,
            "kvCache": 0.0,
            "servingPort": 8000,
            "probePort": 7412,
            "engineVersion": "0.33.0",
            "model": "Qwen/Qwen3-30B-A3B",
            "command": "",
            "nextCommand": "",
            "nextCommandProblem": "",
            "reason": "",
        }


class Cluster:
    """Store, controllers, coordinators, and what the benchmark wants to know."""

    def __init__(self, names: list[str]) -> None:
        self.store = Store()
        self.names = names
        self.coordinators = {name: Coordinator(self, name) for name in names}
        self.tasks: set[asyncio.Task[None]] = set()
        self.requests: Counter[str] = Counter()
        self.scaled_at: dict[str, float] = {}
        self.patched: list[float] = []
        """Seconds from a change of `replicas` to the StatefulSet's."""
        self.told: list[float] = []
        """Seconds from a change of `replicas` to the coordinator's target, of a smaller size."""
        self.asked_for: dict[str, float] = {}
        self.available_at: dict[str, float] = {}
        self.settled_at: dict[str, float] = {}
        self.seen: set[str] = set()

    def later(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self.tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            print(f"many_server.py: {error!r}", file=sys.stderr, flush=True)

    # --- controllers ------------------------------------------------------------------------------

    def written(self, plural: str, before: Object | None, after: Object) -> None:
        """What follows from a write of the operator's."""
        name = after["metadata"]["name"]
        if plural == "statefulsets" and before != after:
            grows = before and after["spec"]["replicas"] > before["spec"]["replicas"]
            if grows and (since := self.scaled_at.pop(name, 0.0)):
                self.patched.append(time.monotonic() - since)
            self.ranks(name)
        elif plural == "deployments" and before is None:
            self.later(self._coordinator_comes(after))
        elif plural == PLURAL:
            self._note(name, after)

    def _note(self, name: str, after: Object) -> None:
        """When a group became Available, and when it was where it should be."""
        status = after.get("status", {})
        told = {one["type"]: one["status"] for one in status.get("conditions") or []}
        if told.get("Available") == "True":
            self.available_at.setdefault(name, time.monotonic())
        wanted = after["spec"]["replicas"]
        widths = {status.get(one) for one in ("replicas", "readyReplicas", "createdReplicas")}
        rests = not status.get("operation") and told.get("Progressing") == "False"
        if widths == {wanted} and rests:
            self.settled_at.setdefault(name, time.monotonic())
        else:
            self.settled_at.pop(name, None)

    def ranks(self, name: str) -> None:
        """A StatefulSet's pods, as many as it wants."""
        found = self.store.get("statefulsets", name)
        wanted = found["spec"]["replicas"] if found else 0
        for ordinal in range(wanted):
            if found and self.store.get("pods", f"{name}-{ordinal}") is None:
                self._make_pod(found, f"{name}-{ordinal}", ordinal)
                self.later(self._pod_comes(name, ordinal))
        ordinal = wanted
        while (pod := self.store.get("pods", f"{name}-{ordinal}")) is not None:
            if "deletionTimestamp" not in pod["metadata"]:
                pod = copy.deepcopy(pod)
                pod["metadata"]["deletionTimestamp"] = now_text()
                self.store.put("pods", pod)
                self.later(self._pod_goes(name, ordinal))
            ordinal += 1
        self._count_ready(name)

    def _make_pod(self, owner: Object, name: str, ordinal: int | None = None) -> None:
        metadata, template = owner["metadata"], copy.deepcopy(owner["spec"]["template"])
        labels = {**template["metadata"].get("labels", {}), "controller-revision-hash": "7d4f9c"}
        if ordinal is not None:
            labels["apps.kubernetes.io/pod-index"] = str(ordinal)
            labels["statefulset.kubernetes.io/pod-name"] = name
        reference = {"apiVersion": owner["apiVersion"], "kind": owner["kind"], "controller": True}
        reference |= {"name": metadata["name"], "uid": metadata["uid"]}
        spec = template["spec"]
        for one in (*spec.get("containers", []), *spec.get("initContainers", [])):
            one.setdefault("terminationMessagePath", "/dev/termination-log")
            one.setdefault("terminationMessagePolicy", "File")
        spec |= {"schedulerName": "default-scheduler", "priority": 0, "dnsPolicy": "ClusterFirst"}
        tolerations = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")
        spec.setdefault("tolerations", []).extend(
            {"key": one, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300}
            for one in tolerations
        )
        about = {"labels": labels, "annotations": template["metadata"].get("annotations", {})}
        fields = managed_fields("kube-controller-manager", {"metadata": about, "spec": spec})
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": name,
                "namespace": NAMESPACE,
                **about,
                "ownerReferences": [{**reference, "blockOwnerDeletion": True}],
                "managedFields": [fields],
            },
            "spec": spec,
            "status": {"phase": "Pending", "qosClass": "Burstable"},
        }
        self.store.put("pods", pod)

    def _pod_status(self, pod: Object, ready: bool) -> Object:
        """A running pod's."""
        at, word = now_text(), "True" if ready else "False"
        every = {"PodReadyToStartContainers": "True", "Initialized": "True", "Ready": word}
        every |= {"ContainersReady": word, "PodScheduled": "True"}
        containers = [
            {
                "name": one["name"],
                "image": one["image"],
                "imageID": f"{one['image']}@sha256:{'0' * 64}",
                "containerID": f"containerd://{'1' * 64}",
                "ready": ready,
                "started": True,
                "restartCount": 0,
                "lastState": {},
                "state": {"running": {"startedAt": at}},
                "volumeMounts": one.get("volumeMounts", []),
            }
            for one in pod["spec"]["containers"]
        ]
        return {
            "phase": "Running",
            "qosClass": "Burstable",
            "hostIP": "172.18.0.3",
            "hostIPs": [{"ip": "172.18.0.3"}],
            "podIP": "10.244.1.7",
            "podIPs": [{"ip": "10.244.1.7"}],
            "startTime": at,
            "conditions": [
                {"type": one, "status": value, "lastProbeTime": None, "lastTransitionTime": at}
                for one, value in every.items()
            ],
            "containerStatuses": containers,
        }

    async def _pod_comes(self, name: str, ordinal: int) -> None:
        pod_name = f"{name}-{ordinal}"
        await asyncio.sleep(SCHEDULE_S)
        if (found := self.store.get("pods", pod_name)) is None:
            return
        fresh = copy.deepcopy(found)
        fresh["spec"]["nodeName"] = "worker-1"
        self.store.put("pods", fresh)
        await asyncio.sleep(WARM_S - SCHEDULE_S)
        if (found := self.store.get("pods", pod_name)) is None:
            return
        fresh = copy.deepcopy(found)
        fresh["status"] = self._pod_status(fresh, False)
        fields = {"status": fresh["status"]}
        fresh["metadata"]["managedFields"].append(managed_fields("kubelet", fields, "status"))
        self.store.put("pods", fresh)
        coordinator = self.coordinators[name]
        coordinator.registered[ordinal] = fresh["metadata"]["uid"]
        coordinator.touch()

    async def _pod_goes(self, name: str, ordinal: int) -> None:
        await asyncio.sleep(LEAVE_S)
        self.coordinators[name].registered.pop(ordinal, None)
        self.coordinators[name].touch()
        self.store.remove("pods", (NAMESPACE, f"{name}-{ordinal}"))
        self.ranks(name)

    def ready(self, name: str, ordinal: int, ready: bool) -> None:
        """A readiness probe turned."""
        found = self.store.get("pods", f"{name}-{ordinal}")
        if found is None:
            return
        was = {one["type"]: one["status"] for one in found["status"].get("conditions", [])}
        if was.get("Ready") == ("True" if ready else "False"):
            return
        fresh = copy.deepcopy(found)
        fresh["status"] = self._pod_status(fresh, ready)
        self.store.put("pods", fresh)
        self._count_ready(name)

    def _count_ready(self, name: str) -> None:
        found = self.store.get("statefulsets", name)
        if found is None:
            return
        coordinator = self.coordinators[name]
        status = {
            "replicas": found["spec"]["replicas"],
            "readyReplicas": len(coordinator.members),
            "availableReplicas": len(coordinator.members),
            "observedGeneration": found["metadata"]["generation"],
        }
        self.store.put("statefulsets", {**copy.deepcopy(found), "status": status})

    async def _coordinator_comes(self, owner: Object) -> None:
        name = owner["metadata"]["name"]
        await asyncio.sleep(WARM_S)
        self._make_pod(owner, f"{name}-7d4f9c-x2x4x")
        pod = copy.deepcopy(self.store.objects["pods"][NAMESPACE, f"{name}-7d4f9c-x2x4x"])
        pod["status"] = self._pod_status(pod, True)
        self.store.put("pods", pod)
        conditions = [
            {"type": one, "status": "True", "reason": "MinimumReplicasAvailable", "message": ""}
            for one in ("Available", "Progressing")
        ]
        fresh = copy.deepcopy(self.store.objects["deployments"][NAMESPACE, name])
        fresh["status"] = {"replicas": 1, "readyReplicas": 1, "conditions": conditions}
        self.store.put("deployments", fresh)
        self.coordinators[name.removesuffix("-coordinator")].there = True

    # --- what the benchmark does ------------------------------------------------------------------

    def create(self, replicas: int) -> None:
        spec = {
            "replicas": replicas,
            "minReplicas": 2,
            "maxReplicas": 8,
            "scaling": {"lameDuckSeconds": 6, "drainTimeoutSeconds": 300, "warmStandby": 0},
            "template": {
                "spec": {
                    "containers": [
                        {
                            "name": "engine",
                            "image": "vllm/vllm-openai:v0.33.0",
                            "args": ["Qwen/Qwen3-30B-A3B", "--gpu-memory-utilization", "0.8"],
                            "env": [
                                {"name": f"SETTING_{number}", "value": "of the model"}
                                for number in range(10)
                            ],
                            "resources": {"limits": {"nvidia.com/gpu": "1"}},
                            "volumeMounts": [{"name": "model", "mountPath": "/model"}],
                        }
                    ],
                    "volumes": [{"name": "model", "hostPath": {"path": "/model"}}],
                }
            },
        }
        for name in self.names:
            body = {
                "apiVersion": f"{GROUP}/v1alpha1",
                "kind": "ElasticMoEDeployment",
                "metadata": {
                    "name": name,
                    "namespace": NAMESPACE,
                    "managedFields": [managed_fields("kubectl", {"spec": spec})],
                },
                "spec": copy.deepcopy(spec),
            }
            self.store.put(PLURAL, body)

    def scale(self, names: list[str], replicas: int) -> None:
        for name in names:
            fresh = copy.deepcopy(self.store.objects[PLURAL][NAMESPACE, name])
            shrinks = fresh["spec"]["replicas"] > replicas
            fresh["spec"]["replicas"] = replicas
            self.settled_at.pop(name, None)
            since = self.asked_for if shrinks else self.scaled_at
            since[name] = time.monotonic()
            self.store.put(PLURAL, fresh)

    def delete(self) -> None:
        for name in self.names:
            fresh = copy.deepcopy(self.store.objects[PLURAL][NAMESPACE, name])
            fresh["metadata"]["deletionTimestamp"] = now_text()
            self.store.put(PLURAL, fresh)

    def state(self) -> Object:
        return {
            "there": len(self.store.objects[PLURAL]),
            "now": time.monotonic(),
            "available": self.available_at,
            "settled": self.settled_at,
            "patched": self.patched,
            "told": self.told,
            "seen": len(self.seen),
            "requests": self.requests,
        }


# --- HTTP -----------------------------------------------------------------------------------------


def failure(status: int, reason: str) -> web.Response:
    body = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": reason}
    return web.json_response({**body, "reason": reason, "code": status}, status=status)


class Api:
    """The Kubernetes API."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.store = cluster, cluster.store

    def app(self) -> web.Application:
        app = web.Application(client_max_size=8 << 20)
        routes = app.router
        routes.add_post("/benchmark/{verb}", self.benchmark)
        routes.add_get("/version", self.version)
        routes.add_get("/api", self.version)
        routes.add_get("/apis", self.groups)
        for root in ("/api/{version:v1}", "/apis/{group}/{version}"):
            routes.add_get(root, self.resources)
            routes.add_get(root + "/{plural}", self.collection)
            inner = root + "/namespaces/{namespace}/{plural}"
            routes.add_route("*", inner, self.collection)
            routes.add_route("*", inner + "/{name}", self.one)
            routes.add_route("*", inner + "/{name}/{subresource}", self.one)
        return app

    async def benchmark(self, request: web.Request) -> web.Response:
        asked, cluster = await request.json(), self.cluster
        match request.match_info["verb"]:
            case "create":
                cluster.create(asked["replicas"])
            case "scale":
                cluster.scale(asked["names"], asked["replicas"])
            case "delete":
                cluster.delete()
            case "unseen":
                cluster.seen.clear()
        return web.json_response(cluster.state())

    async def version(self, request: web.Request) -> web.Response:
        if request.path == "/api":
            return web.json_response({"kind": "APIVersions", "versions": ["v1"]})
        return web.json_response({"major": "1", "minor": "35", "gitVersion": "v1.35.0"})

    async def groups(self, _: web.Request) -> web.Response:
        groups = []
        for known in RESOURCES:
            if "/" in known:
                name, version = known.split("/")
                versions = [{"groupVersion": known, "version": version}]
                groups.append({"name": name, "versions": versions, "preferredVersion": versions[0]})
        return web.json_response({"kind": "APIGroupList", "groups": groups})

    async def resources(self, request: web.Request) -> web.Response:
        info = request.match_info
        version = f"{info['group']}/{info['version']}" if "group" in info else info["version"]
        verbs = ["create", "delete", "get", "list", "patch", "update", "watch"]
        found = []
        for plural, kind in RESOURCES.get(version, []):
            namespaced = plural not in ("namespaces", "customresourcedefinitions")
            one = {"name": plural, "singularName": kind.lower(), "namespaced": namespaced}
            found.append({**one, "kind": kind, "verbs": verbs})
            if plural in (PLURAL, "pods", "statefulsets", "deployments"):
                status = {"name": f"{plural}/status", "singularName": "", "namespaced": True}
                found.append({**status, "kind": kind, "verbs": ["get", "patch", "update"]})
        return web.json_response({"kind": "APIResourceList", "resources": found})

    def _count(self, verb: str, request: web.Request) -> None:
        info = request.match_info
        part = f"/{info['subresource']}" if "subresource" in info else ""
        self.cluster.requests[f"{verb} {info['plural']}{part}"] += 1

    def _listed(self, request: web.Request) -> list[Object]:
        plural = request.match_info["plural"]
        every = [one for _, one in sorted(self.store.objects[plural].items())]
        if selector := request.query.get("labelSelector"):
            every = [one for one in every if selector in one["metadata"].get("labels", {})]
        return every

    async def collection(self, request: web.Request) -> web.StreamResponse:
        plural = request.match_info["plural"]
        if plural not in KINDS:
            return failure(404, "NotFound")
        if request.method == "POST":
            self._count("create", request)
            await request.read()
            return web.json_response({"metadata": {}}, status=201)
        if request.query.get("watch") == "true":
            self._count("watch", request)
            return await self.watch(request, plural)
        self._count("list", request)
        every, about = self._listed(request), {"resourceVersion": str(self.store.version)}
        limit = int(request.query.get("limit") or 0)
        if limit:
            begin = int(request.query.get("continue") or 0)
            if begin + limit < len(every):
                about["continue"] = str(begin + limit)
            every = every[begin : begin + limit]
        version, kind = KINDS[plural]
        body = {"kind": f"{kind}List", "apiVersion": version, "metadata": about, "items": every}
        return web.json_response(body)

    async def watch(self, request: web.Request, plural: str) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Content-Type": "application/json"})
        await answer.prepare(request)
        since = int(request.query.get("resourceVersion") or 0)
        lines: asyncio.Queue[bytes | None] = asyncio.Queue()
        for version, line in self.store.log[plural]:
            if version > since:
                lines.put_nowait(line)
        self.store.watches[plural].add(lines)
        try:
            while True:
                found: bytes | None = None
                with contextlib.suppress(TimeoutError):
                    found = await asyncio.wait_for(lines.get(), BOOKMARK_S)
                if found is None:
                    version_, kind = KINDS[plural]
                    mark: Object = {"kind": kind, "apiVersion": version_}
                    mark["metadata"] = {"resourceVersion": str(self.store.version)}
                    found = json.dumps({"type": "BOOKMARK", "object": mark}).encode() + b"\n"
                await answer.write(found)
        except (ConnectionError, asyncio.CancelledError):
            return answer
        finally:
            self.store.watches[plural].discard(lines)

    async def one(self, request: web.Request) -> web.Response:
        info = request.match_info
        plural, key = info["plural"], (info["namespace"], info["name"])
        # Read first: what follows is one step, as in etcd.
        patch: Any = await request.json() if request.method == "PATCH" else {}
        found = self.store.objects[plural].get(key)
        kind = request.content_type
        applies = kind == "application/apply-patch+yaml"
        verb = "apply" if applies else request.method.lower()
        self._count(verb, request)
        if found is None and not applies:
            return failure(404, "NotFound")
        match request.method:
            case "GET":
                return web.json_response(found)
            case "DELETE":
                self.store.remove(plural, key)
                if plural == "statefulsets":
                    self.cluster.ranks(info["name"])
                return web.json_response({"kind": "Status", "status": "Success"})
        if kind == "application/json-patch+json":
            fresh = json_patched(found or {}, patch)
            if fresh is None:
                return failure(422, "Invalid")
        else:
            wanted = ((patch.get("metadata") or {}).get("uid")) if found else None
            if found is not None and wanted not in (None, found["metadata"]["uid"]):
                return failure(409, "Conflict")
            fresh = merged(copy.deepcopy(found) if found else {}, patch)
        if found is None:
            parts = {"metadata": patch["metadata"], "spec": patch.get("spec", {})}
            fresh["metadata"]["managedFields"] = [managed_fields("elasticmoe-operator", parts)]
        fresh = self.store.put(plural, fresh)
        self.cluster.written(plural, found, fresh)
        return web.json_response(fresh, status=200 if found else 201)


class Coordinators:
    """The coordinators' APIs: which one is said by the host's name."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/v1/status", self.status)
        app.router.add_put("/v1/target", self.target)
        return app

    def _named(self, request: web.Request) -> Coordinator:
        name = request.host.partition("-coordinator.")[0]
        found = self.cluster.coordinators.get(name)
        if found is None or not found.there:
            raise web.HTTPServiceUnavailable
        self.cluster.seen.add(name)
        return found

    async def status(self, request: web.Request) -> web.Response:
        self.cluster.requests["coordinators' status"] += 1
        found = self._named(request)
        known = request.headers.get("If-None-Match", "")
        wait = float(request.headers.get("Prefer", "wait=0").removeprefix("wait="))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait):
                while known == f'W/"{found.version}"':
                    await found.moves()
        tag = {"ETag": f'W/"{found.version}"'}
        if known == tag["ETag"]:
            return web.Response(status=304, headers=tag)
        return web.json_response(found.status(), headers=tag)

    async def target(self, request: web.Request) -> web.Response:
        self.cluster.requests["coordinators' target"] += 1
        found, asked = self._named(request), await request.json()
        body, status = found.target(asked["operationId"], asked["size"])
        if status == 202 and (since := self.cluster.asked_for.pop(found.name, 0.0)):
            self.cluster.told.append(time.monotonic() - since)
        return web.json_response(body, status=status)


async def serve(count: int) -> None:
    cluster = Cluster([f"group-{number:03}" for number in range(count)])
    about: Object = {"metadata": {"name": f"{PLURAL}.{GROUP}"}, "spec": {"group": GROUP}}
    cluster.store.put("customresourcedefinitions", about)
    cluster.store.put("namespaces", {"metadata": {"name": NAMESPACE}})
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    runners = []
    ports: list[int] = []
    # As uvicorn, which coordinators have: an idle connection is closed after 5 s.
    for app, sites, keep in (
        (Api(cluster).app(), 1, 75.0),
        (Coordinators(cluster).app(), count, 5.0),
    ):
        runner = web.AppRunner(app, access_log=None, keepalive_timeout=keep, shutdown_timeout=0.1)
        await runner.setup()
        runners.append(runner)
        for _ in itertools.repeat(None, sites):
            await web.TCPSite(runner, "127.0.0.1", 0).start()
        ports += [address[1] for address in runner.addresses]
    api, *others = ports
    hosts = dict(zip(cluster.names, others, strict=True))
    print(json.dumps({"api": api, "coordinators": hosts}), flush=True)
    await ended.wait()
    for runner in runners:
        await runner.cleanup()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1])))
