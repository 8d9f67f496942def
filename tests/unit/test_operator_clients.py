"""The two APIs that the operator calls, byte by byte, and what its executor does with them."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.abc import AbstractResolver, ResolveResult
from elasticmoe_operator import names
from elasticmoe_operator.builders.common import Platform
from elasticmoe_operator.clients import coordinator, kubernetes
from elasticmoe_operator.clients.coordinator import CoordinatorError, Coordinators
from elasticmoe_operator.clients.kubernetes import ApiError, Kubernetes
from elasticmoe_operator.core import actions
from elasticmoe_operator.core.observed import Observed
from elasticmoe_operator.executor import AGAIN_S, OVERLAP_S, Executor
from elasticmoe_operator.settings import Settings
from elasticmoe_protocol import keys
from support.operator_world import NOW, look, other_template, ranks, spec
from yarl import URL

PLATFORM = Platform(image="elasticmoe:1", namespace="operators")


@dataclass(frozen=True)
class Asked:
    """What came."""

    method: str
    url: URL
    headers: Mapping[str, str]
    content: bytes


Answer = Callable[[Asked], web.Response]
Break = Callable[[web.Request], Awaitable[None]]

opened: list[Callable[[], Awaitable[None]]] = []


@pytest.fixture(autouse=True)
async def closed() -> AsyncIterator[None]:
    """Servers and clients end with the test."""
    yield
    while opened:
        await opened.pop()()


class Wire(AbstractResolver):
    """A server under every name: keeps what was asked and answers as it is told."""

    def __init__(self, answer: Answer | None = None, breaks: Break | None = None) -> None:
        self.asked: list[Asked] = []
        self._answer = answer or says(200)
        self._breaks = breaks
        self._port = 0

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        if not self._port:
            runner = web.ServerRunner(web.Server(self._serve), shutdown_timeout=0.01)
            await runner.setup()
            opened.append(runner.cleanup)
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            self._port = runner.addresses[0][1]
        found = ResolveResult(
            hostname=host,
            host="127.0.0.1",
            port=self._port,
            family=socket.AF_INET,
            proto=0,
            flags=socket.AI_NUMERICHOST,
        )
        return [found]

    async def close(self) -> None:
        pass

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        content = await request.read()
        asked = Asked(request.method, request.url, request.headers, content)
        self.asked.append(asked)
        if self._breaks is not None:
            await self._breaks(request)
        return self._answer(asked)

    @property
    def lines(self) -> list[str]:
        return [f"{one.method} {one.url.path}" for one in self.asked]

    @property
    def last(self) -> Asked:
        return self.asked[-1]

    @property
    def body(self) -> Any:
        return json.loads(self.last.content)

    def kubernetes(self, token: Path | None = None) -> Kubernetes:
        made = Kubernetes("http://api", token=token, resolver=self)
        opened.append(made.close)
        return made

    def coordinators(self) -> Coordinators:
        made = Coordinators(self)
        opened.append(made.close)
        return made


def says(status: int, **body: Any) -> Answer:
    return lambda _: web.json_response(body, status=status)


# --- what may be in the place of an answer -------------------------------------------------------


async def hangs_up(request: web.BaseRequest) -> None:
    assert request.transport is not None
    request.transport.abort()


async def is_silent(request: web.BaseRequest) -> None:
    await asyncio.sleep(60)


def writes(text: bytes, again: bytes = b"") -> Break:
    async def broken(request: web.BaseRequest) -> None:
        assert request.transport is not None
        request.transport.write(text)
        while again:
            await asyncio.sleep(0.05)
            request.transport.write(again)
        request.transport.close()

    return broken


class Nobody(Wire):
    """No server: nothing listens, or there is no such name."""

    def __init__(self, name: bool) -> None:
        super().__init__()
        self._name = name
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        if not self._name:
            raise OSError("no such name")
        return await super().resolve(host, port, family)


HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{"
BREAKS: dict[str, tuple[Callable[[], Wire], str]] = {
    "no such name": (lambda: Nobody(name=False), "ClientConnectorDNSError"),
    "nothing listens": (lambda: Nobody(name=True), "ClientConnectorError"),
    "hangs up": (lambda: Wire(breaks=hangs_up), "ServerDisconnectedError"),
    "is silent": (lambda: Wire(breaks=is_silent), "TimeoutError"),
    "trickles": (lambda: Wire(breaks=writes(HEAD, b" ")), "TimeoutError"),
    "ends amid": (lambda: Wire(breaks=writes(HEAD)), "ClientPayloadError"),
    "no HTTP": (lambda: Wire(breaks=writes(b"220 mail\r\n\r\n")), "ClientResponseError"),
}


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    for one in (kubernetes, coordinator):
        monkeypatch.setattr(one, "LIMIT_S", 0.5)


# --- Kubernetes ----------------------------------------------------------------------------------

PATHS = {
    ("Secret", "v1"): "/api/v1/namespaces/ns/secrets/x",
    ("Pod", "v1"): "/api/v1/namespaces/ns/pods/x",
    ("StatefulSet", "apps/v1"): "/apis/apps/v1/namespaces/ns/statefulsets/x",
    ("NetworkPolicy", "networking.k8s.io/v1"): (
        "/apis/networking.k8s.io/v1/namespaces/ns/networkpolicies/x"
    ),
    (names.KIND, names.API_VERSION): (
        "/apis/elasticmoe.io/v1alpha1/namespaces/ns/elasticmoedeployments/x"
    ),
}


@pytest.mark.parametrize(("kind", "path"), PATHS.items(), ids=lambda one: one[0])
async def test_where_an_object_is(kind: tuple[str, str], path: str):
    wire = Wire(says(200, kind=kind[0]))
    assert await wire.kubernetes().get(*kind, "ns", "x") == {"kind": kind[0]}
    assert wire.lines == [f"GET {path}"]


async def test_an_object_that_is_not_there_is_none():
    assert await Wire(says(404)).kubernetes().get("Pod", "v1", "ns", "x") is None


async def test_apply_is_server_side_and_takes_fields_over():
    wire = Wire()
    manifest = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "x", "namespace": "ns"},
    }
    await wire.kubernetes().apply(manifest)
    assert wire.lines == ["PATCH /api/v1/namespaces/ns/services/x"]
    assert wire.last.headers["Content-Type"] == "application/apply-patch+yaml"
    assert dict(wire.last.url.query) == {"fieldManager": names.FIELD_MANAGER, "force": "true"}
    assert wire.body == manifest


@pytest.mark.parametrize(("subresource", "end"), [("", "/x"), ("status", "/x/status")])
async def test_a_merge_patch(subresource: str, end: str):
    wire = Wire()
    patch = {"status": {"message": None}}
    await wire.kubernetes().merge("Pod", "v1", "ns", "x", patch, subresource)
    assert wire.last.url.path.endswith(end)
    assert wire.last.headers["Content-Type"] == "application/merge-patch+json"
    assert wire.last.url.query["fieldManager"] == names.FIELD_MANAGER
    assert wire.body == patch


async def test_a_merge_patch_of_what_is_gone_is_no_error():
    assert await Wire(says(404)).kubernetes().merge("Pod", "v1", "ns", "x", {}) is None


async def test_a_deletion_names_the_uid_and_the_grace():
    wire = Wire()
    await wire.kubernetes().delete("Pod", "v1", "ns", "x", uid="u", grace_s=0)
    assert wire.lines == ["DELETE /api/v1/namespaces/ns/pods/x"]
    assert wire.body == {
        "propagationPolicy": "Background",
        "preconditions": {"uid": "u"},
        "gracePeriodSeconds": 0,
    }


@pytest.mark.parametrize("status", [404, 409])
async def test_a_deletion_of_what_is_gone_or_another_by_now_is_no_error(status: int):
    await Wire(says(status)).kubernetes().delete("Pod", "v1", "ns", "x", uid="u")


CALLS: dict[str, Callable[[Kubernetes], Any]] = {
    "get": lambda one: one.get("Pod", "v1", "ns", "x"),
    "apply": lambda one: one.apply(
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x", "namespace": "ns"}}
    ),
    "merge": lambda one: one.merge("Pod", "v1", "ns", "x", {}),
    "delete": lambda one: one.delete("Pod", "v1", "ns", "x"),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("status", [403, 422, 500, 503])
async def test_a_refusal_is_said_with_its_status(call: Callable[[Kubernetes], Any], status: int):
    with pytest.raises(ApiError, match="no such right") as caught:
        await call(Wire(says(status, message="no such right")).kubernetes())
    assert caught.value.status == status
    assert "/pods/x" in str(caught.value)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("broken", BREAKS)
@pytest.mark.usefixtures("hasty")
async def test_no_answer_is_an_error_without_a_status(
    call: Callable[[Kubernetes], Any], broken: str
):
    wire, error = BREAKS[broken]
    with pytest.raises(ApiError, match=rf"^[A-Z]+ /api/v1/namespaces/ns/pods/x: {error}") as caught:
        await call(wire().kubernetes())
    assert caught.value.status == 0
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("hasty")
async def test_hundreds_of_calls_without_an_answer_end_too():
    made = Wire(breaks=is_silent).kubernetes()
    calls = [CALLS["get"](made) for _ in range(300)]
    found = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 30)
    assert {type(one) for one in found} == {ApiError}


async def test_after_a_failure_the_next_call_is_made():
    wire = Wire()
    made = wire.kubernetes()
    wire._breaks = hangs_up
    with pytest.raises(ApiError):
        await CALLS["apply"](made)
    wire._breaks = None
    await CALLS["apply"](made)


async def test_the_token_is_read_at_each_call(tmp_path: Path):
    wire, file = Wire(), tmp_path / "token"
    made = wire.kubernetes(file)
    for token in ("first", "second"):
        file.write_text(f"{token}\n")
        await CALLS["get"](made)
        assert wire.last.headers["Authorization"] == f"Bearer {token}"


async def test_a_token_that_is_not_there_is_an_error(tmp_path: Path):
    with pytest.raises(ApiError, match="FileNotFoundError"):
        await CALLS["get"](Wire().kubernetes(tmp_path / "token"))


async def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    wire = Wire()
    await CALLS["get"](wire.kubernetes())
    assert str(wire.last.url) == "http://api/api/v1/namespaces/ns/pods/x"


async def test_nobody_is_sent_elsewhere_with_the_token():
    def elsewhere(_: Asked) -> web.Response:
        return web.json_response({}, status=302, headers={"Location": "http://elsewhere/"})

    wire = Wire(elsewhere)
    with pytest.raises(ApiError) as caught:
        await CALLS["get"](wire.kubernetes())
    assert (caught.value.status, len(wire.asked)) == (302, 1)


async def test_a_conflict_of_an_apply_is_an_error():
    with pytest.raises(ApiError) as caught:
        await CALLS["apply"](Wire(says(409)).kubernetes())
    assert caught.value.status == 409


@pytest.mark.parametrize("status", [200, 502])
async def test_an_answer_that_is_no_json_is_an_error(status: int):
    """Of a proxy in between."""
    wire = Wire(lambda _: web.Response(status=status, text="<html>"))
    with pytest.raises(ApiError):
        await wire.kubernetes().get("Pod", "v1", "ns", "x")


def test_outside_a_cluster_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(ApiError, match="not in a pod"):
        Kubernetes.in_cluster()


# --- the coordinator -----------------------------------------------------------------------------


async def test_a_target_is_put_with_the_token():
    wire = Wire(says(202, operation={}))
    await wire.coordinators().set_target("ns", "moe", "secret", "op", 4)
    assert wire.last.method == "PUT"
    assert str(wire.last.url) == "http://moe-coordinator.ns.svc:7411/v1/target"
    assert wire.last.headers["Authorization"] == "Bearer secret"
    assert wire.last.headers["Content-Type"] == "application/json"
    assert wire.body == {"operationId": "op", "size": 4}


async def test_a_restart_is_posted_with_the_token():
    wire = Wire(says(202, operation={}))
    await wire.coordinators().restart("ns", "moe", "secret", "op")
    assert wire.last.method == "POST"
    assert wire.last.url.path == "/v1/restart"
    assert wire.last.headers["Authorization"] == "Bearer secret"
    assert wire.body == {"operationId": "op"}


@pytest.mark.parametrize(("limit", "wait"), [(15.0, "wait=15"), (0.5, "wait=1")])
async def test_a_change_is_waited_for_at_least_as_long_as_asked(limit: float, wait: str):
    wire = Wire(lambda _: web.Response(status=304))
    await wire.coordinators().changed("ns", "moe", 'W/"one"', limit)
    headers = wire.last.headers
    assert (headers["If-None-Match"], headers["Prefer"]) == ('W/"one"', wait)


@pytest.mark.parametrize("status", [401, 409, 422, 503])
async def test_a_refusal_is_said_in_the_coordinators_words(status: int):
    wire = Wire(says(status, error={"code": "conflict", "message": "another one runs"}))
    with pytest.raises(CoordinatorError, match=r"^another one runs$"):
        await wire.coordinators().set_target("ns", "moe", "t", "op", 4)


@pytest.mark.parametrize("broken", BREAKS)
@pytest.mark.usefixtures("hasty")
async def test_a_coordinator_that_does_not_answer_is_named(broken: str):
    wire, error = BREAKS[broken]
    line = rf"^moe-coordinator.ns.svc does not answer \({error}\)$"
    with pytest.raises(CoordinatorError, match=line):
        await wire().coordinators().status("ns", "moe")


@pytest.mark.parametrize(
    "answer",
    [
        lambda _: web.Response(status=502, text="<html>"),
        lambda _: web.Response(status=200, text="<html>"),
        lambda _: web.json_response([], status=500),
        lambda _: web.json_response({}, status=500),
        lambda _: web.json_response({}, status=200),
        lambda _: web.json_response([], status=200),
        lambda _: web.json_response({"state": "Serving"}, status=200),
    ],
)
async def test_an_answer_of_something_else_is_an_error(answer: Answer):
    with pytest.raises(CoordinatorError):
        await Wire(answer).coordinators().status("ns", "moe")


# --- the executor --------------------------------------------------------------------------------


class Cluster(Wire):
    """Keeps Secrets, and what was applied."""

    def __init__(self) -> None:
        super().__init__(self._answer_as_a_cluster)
        self.secret: dict[str, Any] | None = None
        self.pods: list[str] = []
        self.refuses = ""

    def _answer_as_a_cluster(self, request: Asked) -> web.Response:
        if self.refuses and self.refuses in request.url.path:
            return web.json_response({"message": "refused"}, status=500)
        if "/secrets/" in request.url.path:
            if request.method == "GET":
                found = self.secret
                return web.json_response(found or {}, status=200 if found else 404)
            self.secret = json.loads(request.content)
        if request.method == "GET" and request.url.path.endswith("/pods"):
            there = [{"metadata": {"name": one, "uid": f"uid-{one}"}} for one in self.pods]
            return web.json_response({"items": there})
        return web.json_response({})

    def executor(self, platform: Platform = PLATFORM) -> Executor:
        return Executor(self.kubernetes(), self.coordinators(), platform)

    @property
    def files(self) -> dict[str, str]:
        assert self.secret is not None
        return {key: base64.b64decode(one).decode() for key, one in self.secret["data"].items()}


async def test_children_are_applied_once_and_then_what_changed():
    cluster = Cluster()
    executor = cluster.executor()
    await executor.keep_children(spec(3), look(3))
    kinds = {one.url.path.split("/")[-2] for one in cluster.asked if one.method == "PATCH"}
    assert kinds == {
        "configmaps",
        "deployments",
        "networkpolicies",
        "poddisruptionbudgets",
        "secrets",
        "serviceaccounts",
        "services",
    }
    cluster.asked.clear()
    await executor.keep_children(spec(3), look(3))
    assert cluster.lines == []
    await executor.keep_children(spec(3, service={"port": 80}), look(3))
    assert cluster.lines == ["PATCH /api/v1/namespaces/ns/services/moe"]


async def test_a_forgotten_child_is_applied_again():
    cluster = Cluster()
    executor = cluster.executor()
    await executor.keep_children(spec(3), look(3))
    cluster.asked.clear()
    executor.forget("Deployment", "moe-coordinator")
    await executor.keep_children(spec(3), look(3))
    assert cluster.lines == ["PATCH /apis/apps/v1/namespaces/ns/deployments/moe-coordinator"]


async def test_a_child_that_was_refused_is_applied_again():
    cluster = Cluster()
    executor = cluster.executor()
    cluster.refuses = "deployments"
    with pytest.raises(ApiError, match="refused"):
        await executor.keep_children(spec(3), look(3))
    cluster.refuses = ""
    cluster.asked.clear()
    await executor.keep_children(spec(3), look(3))
    assert cluster.lines == ["PATCH /apis/apps/v1/namespaces/ns/deployments/moe-coordinator"]


async def test_children_are_applied_again_now_and_then():
    cluster = Cluster()
    executor = cluster.executor()
    await executor.keep_children(spec(3), look(3))
    cluster.asked.clear()
    await executor.keep_children(spec(3), look(3, now=NOW + AGAIN_S + 1))
    assert len(cluster.asked) >= 8
    assert not [one for one in cluster.lines if "secrets" in one]


async def test_an_operator_upgrade_changes_no_child_of_a_group_that_runs():
    cluster = Cluster()
    await cluster.executor().keep_children(spec(3), look(3))
    before = {one.url.path: one.content for one in cluster.asked if one.method == "PATCH"}
    cluster.asked.clear()
    await cluster.executor(replace(PLATFORM, image="elasticmoe:2")).keep_children(spec(3), look(3))
    after = {one.url.path: one.content for one in cluster.asked if one.method == "PATCH"}
    secret = next(path for path in before if "secrets" in path)
    del before[secret]
    assert after == before


async def test_the_budget_waits_for_a_group_and_is_not_lowered_while_it_is_unknown():
    cluster = Cluster()
    executor = cluster.executor()
    await executor.keep_children(spec(3), Observed(now=NOW))
    assert not [one for one in cluster.lines if "poddisruptionbudgets" in one]
    await executor.keep_children(spec(3), look(3))
    cluster.asked.clear()
    await executor.keep_children(spec(3), look(3, group=None))
    assert cluster.lines == []


async def test_without_network_policies_none_is_made():
    cluster = Cluster()
    await cluster.executor(replace(PLATFORM, network_policy=False)).keep_children(spec(3), look(3))
    assert not [one for one in cluster.lines if "networkpolicies" in one]


async def test_the_command_is_kept_only_while_the_group_runs_it():
    cluster = Cluster()
    newer = spec(3, template=other_template("vllm:1", ["some/model", "--seed=1"]))
    await cluster.executor().keep_children(newer, look(3))
    assert not [one for one in cluster.lines if "configmaps" in one]


async def test_keys_are_made_once_whatever_operator_looks():
    cluster = Cluster()
    await cluster.executor().keep_children(spec(3), look(3))
    made = cluster.files
    assert keys.TOKEN_FILE in made
    await cluster.executor().keep_children(spec(3), look(3))
    assert cluster.files == made
    assert [one for one in cluster.lines if "PATCH" in one and "secrets" in one] == [
        "PATCH /api/v1/namespaces/ns/secrets/moe-keys"
    ]


async def test_the_token_of_the_secret_is_sent():
    cluster = Cluster()
    executor = cluster.executor()
    await executor.keep_children(spec(3), look(3))
    await executor.do(spec(3), actions.SetTarget(operation_id="op", size=4))
    token = cluster.files[keys.TOKEN_FILE].strip()
    assert cluster.last.headers["Authorization"] == f"Bearer {token}"


async def test_a_rotation_takes_old_and_new_keys_for_a_while():
    cluster = Cluster()
    executor = cluster.executor()
    await executor.keep_children(spec(3), look(3))
    first = cluster.files
    asked = spec(3, meta={"annotations": {names.ROTATE: "2"}})
    await executor.keep_children(asked, look(3))
    both = cluster.files
    assert both != first
    # Another operator goes on where this one ended.
    other = cluster.executor()
    await other.keep_children(asked, look(3, now=NOW + OVERLAP_S - 1))
    assert cluster.files == both
    await other.keep_children(asked, look(3, now=NOW + OVERLAP_S + 1))
    assert cluster.files not in (first, both)
    assert cluster.secret is not None
    assert cluster.secret["metadata"]["annotations"] == {names.ROTATE: "2", names.ROTATED_AT: ""}


async def test_new_keys_are_brought_to_all_pods_at_once_and_once():
    cluster = Cluster()
    cluster.pods = ["moe-0", "moe-coordinator-x"]
    executor = cluster.executor()
    await executor.keep_children(spec(3), look(3))
    assert not [one for one in cluster.lines if "/pods" in one]
    cluster.asked.clear()
    asked = spec(3, meta={"annotations": {names.ROTATE: "2"}})
    for _ in range(2):
        await executor.keep_children(asked, look(3))
    secret, listed, *nudges = cluster.asked
    assert (secret.method, secret.url.name) == ("PATCH", "moe-keys")
    assert listed.url.query["labelSelector"] == f"{names.DEPLOYMENT}=moe"
    assert [one.url.name for one in nudges] == cluster.pods
    assert [json.loads(one.content)["metadata"] for one in nudges] == [
        {"uid": f"uid-{name}", "annotations": {names.KEYS: "2"}} for name in cluster.pods
    ]


async def test_pods_that_get_no_word_of_new_keys_are_not_given_others():
    cluster = Cluster()
    executor = cluster.executor()
    await executor.keep_children(spec(3), look(3))
    asked = spec(3, meta={"annotations": {names.ROTATE: "2"}})
    cluster.refuses = "/pods"
    with pytest.raises(ApiError, match="refused"):
        await executor.keep_children(asked, look(3))
    made = cluster.files
    await executor.keep_children(asked, look(3))
    assert cluster.files == made


async def done(action: actions.Action, cluster: Cluster | None = None) -> list[Asked]:
    cluster = cluster or Cluster()
    executor = cluster.executor(replace(PLATFORM, image="elasticmoe:2"))
    await executor.keep_children(spec(3), look(3, ranks=ranks(3, image="elasticmoe:1")))
    cluster.asked.clear()
    await executor.do(spec(3), action)
    return cluster.asked


@pytest.mark.parametrize(("same", "image"), [(False, "elasticmoe:2"), (True, "elasticmoe:1")])
async def test_a_new_stateful_set_has_the_newest_image_unless_its_pods_go_on(
    same: bool, image: str
):
    command, applied = await done(actions.ApplyRanks(replicas=4, same_pods=same))
    assert command.url.path.endswith("/configmaps/moe-command")
    body = json.loads(applied.content)
    assert (body["kind"], body["spec"]["replicas"]) == ("StatefulSet", 4)
    assert body["metadata"]["annotations"][names.IMAGE] == image
    inits = body["spec"]["template"]["spec"]["initContainers"]
    assert {one["image"] for one in inits} == {image}


PATCHES: dict[str, tuple[actions.Action, str, Any]] = {
    "scale": (
        actions.ScaleRanks(replicas=2),
        "/apis/apps/v1/namespaces/ns/statefulsets/moe",
        {"spec": {"replicas": 2}},
    ),
    "label": (
        actions.LabelPod(name="moe-1", uid="u", active=True),
        "/api/v1/namespaces/ns/pods/moe-1",
        {"metadata": {"uid": "u", "labels": {names.ACTIVE: "true"}}},
    ),
    "unlabel": (
        actions.LabelPod(name="moe-1", uid="u", active=False),
        "/api/v1/namespaces/ns/pods/moe-1",
        {"metadata": {"uid": "u", "labels": {names.ACTIVE: None}}},
    ),
    "nudge": (
        actions.NudgePod(name="moe-1", uid="u", command="r"),
        "/api/v1/namespaces/ns/pods/moe-1",
        {"metadata": {"uid": "u", "annotations": {names.COMMAND: "r"}}},
    ),
}


@pytest.mark.parametrize("name", PATCHES)
async def test_what_changes_one_field_patches_that_field_only(name: str):
    action, path, body = PATCHES[name]
    (asked,) = await done(action)
    assert (asked.method, asked.url.path, json.loads(asked.content)) == ("PATCH", path, body)


async def test_a_forgotten_pod_is_deleted_at_once_if_it_is_that_one():
    (asked,) = await done(actions.ForgetPod(name="moe-1", uid="u"))
    body = json.loads(asked.content)
    assert (asked.method, body["preconditions"], body["gracePeriodSeconds"]) == (
        "DELETE",
        {"uid": "u"},
        0,
    )


async def test_a_deletion_deletes_the_stateful_set():
    (asked,) = await done(actions.DeleteRanks())
    assert (asked.method, asked.url.path) == (
        "DELETE",
        "/apis/apps/v1/namespaces/ns/statefulsets/moe",
    )


def test_settings_say_how_often_to_look():
    settings = Settings(platform=PLATFORM)
    assert 0 < settings.busy < settings.calm
