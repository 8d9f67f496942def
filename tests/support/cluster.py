"""A group in a real cluster: apply it, put users on it, break it, wait for what should follow.

Runs where the cluster's addresses are reached and KUBECONFIG is set (see scripts/cluster/cluster).
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import copy
import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
from elasticmoe_cli.load import Endpoint, Load, Result

SYSTEM = "elasticmoe-system"
ENGINE_IMAGE = "elasticmoe-engine-base:dev"
MODEL = "/opt/sim-model"
LOOK_S = 0.25

Object = dict[str, Any]
T = TypeVar("T")


class KubectlError(Exception):
    """kubectl refused; the text is what it says."""


def kubectl(*words: str, stdin: str | None = None, limit: float = 60.0) -> str:
    """What a command of kubectl prints. Raises KubectlError."""
    done = subprocess.run(
        ["kubectl", *words], input=stdin, capture_output=True, text=True, timeout=limit
    )
    if done.returncode:
        raise KubectlError(done.stderr.strip() or done.stdout.strip())
    return done.stdout


def found(*words: str) -> Object | None:
    """`kubectl get … -o json`, None when there is no such object."""
    text = kubectl("get", *words, "-o", "json", "--ignore-not-found")
    return json.loads(text) if text.strip() else None


def listed(*words: str) -> list[Object]:
    """The items of `kubectl get … -o json`."""
    items: list[Object] = json.loads(kubectl("get", *words, "-o", "json"))["items"]
    return items


def eventually(ask: Callable[[], T], limit: float, what: str) -> T:
    """The first truthy answer; fails with `what` and the last answer after `limit` seconds."""
    end = time.monotonic() + limit
    while not (answer := ask()):
        assert time.monotonic() < end, f"not within {limit:g} s: {what} (last: {answer!r})"
        time.sleep(LOOK_S)
    return answer


def manifest(name: str, **spec: Any) -> Object:
    """A group of simulated engines that a restricted namespace admits. spec: over the usual one."""
    engine: Object = {
        "name": "engine",
        "image": ENGINE_IMAGE,
        "imagePullPolicy": "Never",
        "args": [MODEL],
        "resources": {"requests": {"cpu": "20m", "memory": "64Mi"}},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        },
    }
    return {
        "apiVersion": "elasticmoe.io/v1alpha1",
        "kind": "ElasticMoEDeployment",
        "metadata": {"name": name},
        "spec": {
            "replicas": 2,
            "minReplicas": 2,
            "maxReplicas": 4,
            # As long as kube-proxy may need on a busy machine to send nothing more to a rank.
            "scaling": {"lameDuckSeconds": 4, "drainTimeoutSeconds": 30},
            "recovery": {"replacementSeconds": 20, "stallSeconds": 8},
            "template": {
                "metadata": {
                    "annotations": {
                        "elasticmoe.io/launcher-options": "--engine elasticmoe_sim.entry:main"
                    }
                },
                "spec": {
                    "securityContext": {
                        "runAsNonRoot": True,
                        "seccompProfile": {"type": "RuntimeDefault"},
                    },
                    "containers": [engine],
                },
            },
            **spec,
        },
    }


@dataclass
class Group:
    """One ElasticMoEDeployment."""

    namespace: str
    name: str

    # --- what is done to it -----------------------------------------------------------------------

    def apply(self, body: Mapping[str, Any]) -> None:
        """`kubectl apply`. Raises KubectlError."""
        self.kubectl("apply", "-f", "-", stdin=json.dumps(body))

    def scale(self, size: int) -> None:
        """`kubectl scale`."""
        self.kubectl("scale", f"emoe/{self.name}", f"--replicas={size}")

    def patch(self, **spec: Any) -> None:
        """Merge into the spec."""
        text = json.dumps({"spec": spec})
        self.kubectl("patch", "emoe", self.name, "--type=merge", "--patch", text)

    def with_engine(self, **changes: Any) -> None:
        """Change fields of the engine's container."""
        template = copy.deepcopy(self.body()["spec"]["template"])
        template["spec"]["containers"][0].update(changes)
        self.patch(template=template)

    def kubectl(self, *words: str, stdin: str | None = None, limit: float = 60.0) -> str:
        """kubectl in its namespace. Raises KubectlError."""
        return kubectl("-n", self.namespace, *words, stdin=stdin, limit=limit)

    def restart(self) -> str:
        """Ask the coordinator for a planned restart; the operation's id."""
        secret = self.get("secret", f"{self.name}-keys")
        token = base64.b64decode(secret["data"]["token"]).decode().strip()
        operation = f"asked-{time.time_ns()}"
        answer = httpx.post(
            f"{self.coordinator_url()}/v1/restart",
            json={"operationId": operation},
            headers={"Authorization": f"Bearer {token}"},
        )
        answer.raise_for_status()
        return operation

    # --- what is ----------------------------------------------------------------------------------

    def get(self, *words: str) -> Object:
        """An object in its namespace; fails when there is none."""
        body = found("-n", self.namespace, *words)
        assert body is not None, f"no {' '.join(words)}"
        return body

    def body(self) -> Object:
        """The resource itself."""
        return self.get("emoe", self.name)

    def status(self) -> Object:
        """Its status."""
        status: Object = self.body().get("status") or {}
        return status

    def condition(self, kind: str) -> Object:
        """One condition, {} when there is none yet."""
        every = self.status().get("conditions") or []
        return next((one for one in every if one["type"] == kind), {})

    def reason(self, kind: str) -> str:
        """`status/reason` of a condition."""
        one = self.condition(kind)
        return f"{one.get('status')}/{one.get('reason')}"

    def pods(self) -> dict[str, Object]:
        """Its ranks' pods by name."""
        selector = f"elasticmoe.io/deployment={self.name},app.kubernetes.io/component=rank"
        items = listed("-n", self.namespace, "pods", "-l", selector)
        return {one["metadata"]["name"]: one for one in items}

    def uids(self) -> dict[str, str]:
        """UIDs of its ranks' pods by name."""
        return {name: one["metadata"]["uid"] for name, one in self.pods().items()}

    def restarts(self) -> int:
        """Restarts of engine containers, of all pods together."""
        return sum(
            one["restartCount"]
            for pod in self.pods().values()
            for one in pod["status"].get("containerStatuses") or []
        )

    def coordinator_pod(self) -> Object:
        """The coordinator's pod; fails when there is none or more than one that is not ending."""
        selector = f"elasticmoe.io/deployment={self.name},app.kubernetes.io/component=coordinator"
        items = listed("-n", self.namespace, "pods", "-l", selector)
        (pod,) = [one for one in items if "deletionTimestamp" not in one["metadata"]]
        return pod

    def coordinator_url(self) -> str:
        """Base URL of the coordinator's HTTP API."""
        address = self.get("service", f"{self.name}-coordinator")["spec"]["clusterIP"]
        return f"http://{address}:7411"

    def coordinated(self) -> Object:
        """What the coordinator says of the group."""
        found: Object = httpx.get(f"{self.coordinator_url()}/v1/status", timeout=10).json()
        return found

    def url(self) -> str:
        """Base URL of the Service that clients use."""
        return f"http://{self.get('service', self.name)['spec']['clusterIP']}:8000"

    def history(self) -> list[str]:
        """`Kind from->to Result` of the operations that ended."""
        return [
            f"{one['kind']} {one['from']}->{one['to']} {one['result']}"
            for one in self.status().get("history") or []
        ]

    # --- what is waited for -----------------------------------------------------------------------

    def settled(self, size: int, limit: float = 90.0) -> Object:
        """Wait until it serves with this size and nothing goes on; returns the status."""

        def at_rest() -> Object | None:
            body = self.body()
            status: Object = body.get("status") or {}
            reasons = {one["type"]: one["reason"] for one in status.get("conditions") or []}
            rests = (
                status.get("observedGeneration") == body["metadata"]["generation"]
                and status.get("operation") is None
                and reasons.get("Progressing") in ("AsDesired", "SizeLimited")
                and status.get("replicas") == status.get("readyReplicas") == size
            )
            return status if rests else None

        try:
            return eventually(at_rest, limit, f"{self.name} settled at {size}") or {}
        except AssertionError as error:
            said = json.dumps(self.status(), indent=1)
            raise AssertionError(f"{error}\n{said}") from None

    def phase(self, *phases: str, limit: float = 60.0) -> None:
        """Wait until its operation is in one of these phases, of operator or coordinator."""

        def there() -> bool:
            operation = self.status().get("operation") or {}
            return bool({operation.get("phase"), operation.get("groupPhase")} & set(phases))

        eventually(there, limit, f"{self.name} in phase {' or '.join(phases)}")

    @contextlib.contextmanager
    def traffic(self, clients: int = 3) -> Iterator[Traffic]:
        """Users on its Service for as long as the block lasts."""
        users = Traffic(self.url(), clients)
        try:
            users.progress(clients)
            yield users
        finally:
            users.stop()


class Traffic:
    """Streaming users on a Service, in a thread of their own."""

    def __init__(self, url: str, clients: int) -> None:
        self.result = Result()
        self._url, self._clients = url, clients
        self._loop = asyncio.new_event_loop()
        self._over: asyncio.Event | None = None
        self._load: Load | None = None
        self._up = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._up.wait(10), "the users did not start"

    def progress(self, requests: int, limit: float = 60.0) -> None:
        """Wait until so many more requests were answered."""
        assert self._load is not None
        wait = asyncio.run_coroutine_threadsafe(self._load.progress(requests), self._loop)
        wait.result(limit)

    def stop(self) -> Result:
        """Wait for what runs; what the users saw."""
        if self._thread.is_alive() and self._over is not None:
            self._loop.call_soon_threadsafe(self._over.set)
            self._thread.join(60)
            assert not self._thread.is_alive(), f"requests hang:\n{self._connections()}"
        return self.result

    def _connections(self) -> str:
        """How the users' connections stand, as the kernel of this side sees it."""
        address = self._url.removeprefix("http://").partition(":")[0]
        words = ["ss", "--tcp", "--numeric", "--options", "dst", address]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            return subprocess.run(words, capture_output=True, text=True, timeout=10).stdout
        return "no ss"

    def _run(self) -> None:
        self._loop.run_until_complete(self._users())
        self._loop.close()

    async def _users(self) -> None:
        self._over = asyncio.Event()
        endpoint = Endpoint("service", self._url)
        load = Load(lambda: [endpoint], MODEL, clients=self._clients, pause_s=0.05)
        async with load:
            self._load = load
            self._up.set()
            await self._over.wait()
            self.result = await load.stop()


def processes(pod: Object, container: str, program: str) -> tuple[str, list[int]]:
    """Node, and PIDs on it, of a container's processes whose command line has this word."""
    node = pod["spec"]["nodeName"]
    every = [
        *(pod["status"].get("initContainerStatuses") or []),
        *pod["status"]["containerStatuses"],
    ]
    (identity,) = (
        one["containerID"].rpartition("/")[2] for one in every if one["name"] == container
    )
    script = (
        f"for p in /proc/[0-9]*; do grep -qs {identity} $p/cgroup && "
        f"tr '\\0' ' ' <$p/cmdline | grep -q -- {program} && echo ${{p#/proc/}}; done; true"
    )
    return node, [int(one) for one in on_node(node, "sh", "-c", script).split()]


def signal_processes(pod: Object, container: str, program: str, name: str) -> None:
    """Send a signal to a container's processes, as a node's fault would."""
    node, pids = processes(pod, container, program)
    assert pids, f"{container} of {pod['metadata']['name']} runs no {program}"
    on_node(node, "kill", f"-{name}", *map(str, pids))


def on_node(node: str, *words: str) -> str:
    """A command on a node of the kind cluster."""
    done = subprocess.run(
        ["docker", "exec", node, *words], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout


def operator_pod() -> Object:
    """The operator's pod."""
    items = listed("-n", SYSTEM, "pods", "-l", "app.kubernetes.io/name=elasticmoe-operator")
    (pod,) = [one for one in items if "deletionTimestamp" not in one["metadata"]]
    return pod


def operator_ready() -> None:
    """Wait until one operator works."""
    kubectl(
        *("-n", SYSTEM, "rollout", "status", "deployment", "-l"),
        *("app.kubernetes.io/name=elasticmoe-operator", "--timeout=90s"),
        limit=100,
    )
