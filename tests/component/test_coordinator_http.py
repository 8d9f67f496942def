"""The coordinator's HTTP API, with the real rules and a whole group in virtual time behind it."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from elasticmoe_coordinator import http, models
from elasticmoe_coordinator.core.status import (
    GroupStatus,
    InstanceStatus,
    OperationStatus,
    PhaseTime,
)
from elasticmoe_coordinator.metrics import Metrics
from elasticmoe_protocol import keys
from elasticmoe_protocol.messages import Load
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families
from pydantic.alias_generators import to_camel
from support.virtual import World, small_config

DROPPED = {"malformed": 3, "wrong_key": 1}


class Api:
    """The app over `World`'s group, spoken to without a server."""

    def __init__(self, world: World, folder: Path) -> None:
        assert world.group is not None
        self.world = world
        self.folder = folder
        self.metrics = Metrics(lambda: world.status, lambda: DROPPED)
        self.stopping = asyncio.Event()
        self.app: FastAPI = http.app(world.group, folder, self.metrics, "1.2.3", self.stopping)
        transport = httpx.ASGITransport(self.app)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://coordinator")
        self.headers = {"Authorization": f"Bearer {keys.load_token(folder)}"}

    async def get(self, path: str) -> httpx.Response:
        return await self.client.get(path)

    async def status(self) -> dict[str, Any]:
        response = await self.client.get("/v1/status")
        assert response.status_code == 200
        found: dict[str, Any] = response.json()
        return found

    async def target(self, size: Any, operation: Any = "op", **more: Any) -> httpx.Response:
        body = {"operationId": operation, "size": size} | more
        return await self.client.put("/v1/target", json=body, headers=self.headers)

    async def restart(self, operation: str = "op", **more: Any) -> httpx.Response:
        body = {"operationId": operation} | more
        return await self.client.post("/v1/restart", json=body, headers=self.headers)


def serving(hosts: int = 2, **changes: Any) -> World:
    """A group of two ranks that serves, and the other hosts as standby."""
    world = World(small_config(**changes))
    for number in range(hosts):
        world.add(f"h{number}", number)
    assert world.until(lambda: world.serving(2))
    return world


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "keys"
    keys.ensure_keys(made)
    return made


@pytest.fixture
def world() -> World:
    return serving(3)


@pytest.fixture
def clock(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """The API's clock is the world's."""
    monkeypatch.setattr(http, "time", SimpleNamespace(time=lambda: world.now))
    return world


@pytest.fixture
async def api(clock: World, folder: Path) -> AsyncIterator[Api]:
    made = Api(clock, folder)
    async with made.client:
        yield made


def failure(response: httpx.Response, status: int, code: str) -> str:
    """Every error has one form; returns its line."""
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) <= {"code", "message", "operation"}
    assert error["code"] == code
    line: str = error["message"]
    assert line
    assert "\n" not in line
    return line


def names(source: type) -> set[str]:
    return {to_camel(field.name) for field in fields(source)}


# --- GET /v1/status ------------------------------------------------------------------------------


async def test_the_status_has_every_field_that_the_rules_know(api: Api):
    api.world.put(3, "grow")
    status = await api.status()
    assert set(status) == names(GroupStatus)
    assert [set(one) for one in status["instances"]] == [names(InstanceStatus)] * 3
    assert set(status["operation"]) == names(OperationStatus)
    assert set(status["operation"]["phases"][0]) == names(PhaseTime)
    assert set(status["history"][0]) == names(OperationStatus)


async def test_a_group_that_serves_says_so_rank_by_rank(api: Api):
    status = await api.status()
    assert (status["state"], status["size"], status["desired"]) == ("Serving", 2, 2)
    assert (status["minSize"], status["maxSize"], status["policy"]) == (2, 4, "declared")
    assert (status["numExperts"], status["slotsPerRank"], status["redundantExperts"]) == (8, 4, 0)
    assert status["generation"] >= 1
    assert status["term"] >= 1
    assert status["elastic"] is True
    assert status["operation"] is None
    ranks = {one["instance"]: one for one in status["instances"]}
    for name, rank in (("h0", 0), ("h1", 1)):
        one = ranks[name]
        assert (one["rank"], one["ordinal"], one["state"]) == (rank, rank, "active")
        assert {key: one[key] for key in ("desired", "registered", "active", "ready")} == {
            "desired": True,
            "registered": True,
            "active": True,
            "ready": True,
        }
        assert not any(one[key] for key in ("standby", "fenced", "retired", "safeToDelete"))
    spare = ranks["h2"]
    assert (spare["rank"], spare["state"], spare["standby"]) == (None, "standby", True)
    assert spare["safeToDelete"] is True
    assert not any(spare[key] for key in ("desired", "active", "ready"))


async def test_requests_and_load_are_those_of_each_rank(api: Api):
    api.world.long_request_until = api.world.now + 60
    assert api.world.until(lambda: any(one.in_flight for one in api.world.status.instances))
    status = await api.status()
    assert [one["inFlight"] for one in status["instances"]] == [
        one.in_flight for one in api.world.status.instances
    ]
    assert all(isinstance(one["waiting"], float) for one in status["instances"])


async def test_a_running_resize_is_told_with_phase_start_and_attempt(api: Api):
    began = api.world.now
    await api.target(3, "grow")
    api.world.run(1)
    operation = (await api.status())["operation"]
    assert operation["id"] == "grow"
    assert (operation["kind"], operation["fromSize"], operation["toSize"]) == ("scale_up", 2, 3)
    assert (operation["state"], operation["ended"], operation["attempt"]) == ("running", None, 1)
    assert operation["started"] == began
    assert operation["phases"][-1]["phase"] == operation["phase"]
    assert (operation["reason"], operation["error"]) == ("", "")


async def test_a_leaving_rank_is_fenced_then_retired_and_only_then_safe_to_delete(
    clock: World, folder: Path
):
    api = Api(clock, folder)
    async with api.client:
        await api.target(3, "grow")
        assert api.world.until(lambda: api.world.serving(3))
        await api.target(2, "shrink")
        seen: list[tuple[bool, bool, bool]] = []
        while not api.world.serving(2) or not seen[-1][2]:
            one = next(i for i in (await api.status())["instances"] if i["instance"] == "h2")
            seen.append((one["fenced"], one["active"], one["safeToDelete"]))
            api.world.step()
            assert len(seen) < 400
    assert seen[0] == (False, False, False)  # it serves, but it is not counted any more
    assert any(fenced and not safe for fenced, _, safe in seen)
    assert not any(active and safe for _, active, safe in seen)
    assert [safe for _, _, safe in seen] == sorted(safe for _, _, safe in seen)


async def test_the_last_ten_operations_are_kept_with_their_phases(api: Api):
    for number in range(12):
        size = 3 - number % 2
        assert (await api.target(size, f"op{number}")).status_code == 202
        assert api.world.until(lambda size=size: api.world.serving(size))
    history = (await api.status())["history"]
    assert [one["id"] for one in history] == [f"op{number}" for number in range(2, 12)]
    for one in history:
        assert one["state"] == "succeeded"
        took = sum(phase["seconds"] for phase in one["phases"])
        assert took == pytest.approx(one["ended"] - one["started"])
        assert len(one["phases"]) > 2


async def test_a_failed_operation_tells_its_error(api: Api):
    api.world.faults.preflight = "no GPU: give the pod one"
    await api.target(3, "grow")
    assert api.world.until(lambda: api.world.status.operation is None)
    last = (await api.status())["history"][-1]
    assert last["id"] == "grow"
    assert last["state"] in ("failed", "withdrawn")
    assert "no GPU" in last["error"]


async def test_a_figure_that_is_no_number_does_not_break_the_status(
    api: Api, monkeypatch: pytest.MonkeyPatch
):
    """An engine's gauge may be NaN or Inf."""
    assert api.world.group is not None
    for one in api.world.group._roster:
        one.report = type(one.report)(
            deployment="moe",
            instance=one.name,
            boot=one.boot,
            seq=1 << 40,
            load=Load(waiting=float("nan"), running=float("inf"), kv_cache=float("-inf")),
        )

    def strict(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    response = await api.get("/v1/status")
    assert response.status_code == 200
    json.loads(response.text, parse_constant=strict)


# --- GET /v1/status, when it changes --------------------------------------------------------------


async def unlike(api: Api, tag: str, prefer: str) -> httpx.Response:
    """The status when it is not the one with this tag."""
    return await api.client.get("/v1/status", headers={"If-None-Match": tag, "Prefer": prefer})


async def test_a_status_that_did_not_change_is_not_sent_again(api: Api):
    tag = (await api.get("/v1/status")).headers["ETag"]
    api.world.long_request_until = api.world.now + 60
    assert api.world.until(lambda: any(one.in_flight for one in api.world.status.instances))
    response = await unlike(api, tag, "")
    assert (response.status_code, response.content) == (304, b"")
    assert response.headers["ETag"] == tag


@pytest.mark.parametrize("prefer", ["wait=30", "respond-async, wait=30"])
async def test_one_waits_for_a_change(api: Api, prefer: str):
    tag = (await api.get("/v1/status")).headers["ETag"]
    asked = asyncio.create_task(unlike(api, tag, prefer))
    assert not (await asyncio.wait({asked}, timeout=0.3))[0]
    api.world.kill_engine("h1")
    api.world.run(1)
    response = await asyncio.wait_for(asked, 5)
    assert (response.status_code, response.json()["state"]) == (200, "Recovering")
    assert response.headers["ETag"] != tag


@pytest.mark.parametrize("prefer", ["", "wait=0", "wait=", "wait=-1", "await=9", "wait=x"])
async def test_without_a_wait_that_can_be_read_nobody_waits(api: Api, prefer: str):
    tag = (await api.get("/v1/status")).headers["ETag"]
    response = await asyncio.wait_for(unlike(api, tag, prefer), 5)
    assert response.status_code == 304


async def test_who_waits_does_not_keep_the_coordinator_from_ending(api: Api):
    tag = (await api.get("/v1/status")).headers["ETag"]
    asked = asyncio.create_task(unlike(api, tag, "wait=30"))
    assert not (await asyncio.wait({asked}, timeout=0.3))[0]
    api.stopping.set()
    assert (await asyncio.wait_for(asked, 5)).status_code == 304


async def test_a_wait_ends(api: Api, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(http, "LONGEST_WAIT_S", 0.3)
    tag = (await api.get("/v1/status")).headers["ETag"]
    response = await asyncio.wait_for(unlike(api, tag, "wait=9999"), 5)
    assert response.status_code == 304


# --- PUT /v1/target ------------------------------------------------------------------------------


async def test_a_target_begins_an_operation_once(api: Api):
    first = await api.target(3, "grow")
    assert first.status_code == 202
    assert first.json()["operation"]["id"] == "grow"
    again = await api.target(3, "grow")
    assert again.status_code == 200
    assert again.json()["operation"]["id"] == "grow"
    assert api.world.until(lambda: api.world.serving(3))
    starts = api.world.starts
    ended = await api.target(3, "grow")
    assert ended.status_code == 200
    assert ended.json()["operation"]["state"] == "succeeded"
    api.world.run(20)
    assert api.world.starts == starts
    assert [one.id for one in api.world.status.history].count("grow") == 1


async def test_a_size_that_is_there_needs_no_operation(api: Api):
    response = await api.target(2, "same")
    assert response.status_code == 200
    assert response.json() == {"operation": None}


async def test_the_same_size_asked_for_by_another_joins_the_running_operation(api: Api):
    await api.target(3, "first")
    response = await api.target(3, "second")
    assert response.status_code == 200
    assert response.json()["operation"]["id"] == "first"


async def test_another_size_while_one_runs_is_a_conflict_that_names_it(api: Api):
    await api.target(3, "grow")
    for operation in ("other", "grow"):
        response = await api.target(4, operation)
        line = failure(response, 409, "conflict")
        assert "grow" in line
        assert "wait until it ended" in line
        assert response.json()["error"]["operation"] == "grow"
    assert (await api.status())["desired"] == 3


async def test_an_operation_id_means_one_size_for_ever(api: Api):
    await api.target(3, "grow")
    assert api.world.until(lambda: api.world.serving(3))
    assert "use another one" in failure(await api.target(2, "grow"), 409, "conflict")


@pytest.mark.parametrize("size", [-1, 0, 1, 5, 10**30])
async def test_a_size_outside_the_limits_is_told_with_them(api: Api, size: int):
    line = failure(await api.target(size), 422, "invalid")
    assert f"size {size} is not between 2 and 4" in line
    assert (await api.status())["desired"] == 2


@pytest.mark.parametrize("size", ["3", 3.0, 3.5, True, None, [3], {"n": 3}])
async def test_a_size_that_is_no_integer_is_refused(api: Api, size: Any):
    line = failure(await api.target(size), 422, "invalid")
    assert line.startswith("size: ")
    assert (await api.status())["desired"] == 2


@pytest.mark.parametrize("operation", ["", "x" * 129, "a b", "a/b", "a\n", 3, None])
async def test_an_operation_id_is_a_plain_word(api: Api, operation: Any):
    line = failure(await api.target(3, operation), 422, "invalid")
    assert line.startswith("operationId: ")


@pytest.mark.parametrize("limit", [-1, 86401, "soon", 1.5])
async def test_a_drain_limit_is_seconds_within_a_day(api: Api, limit: Any):
    response = await api.target(3, drainTimeoutSeconds=limit)
    assert failure(response, 422, "invalid").startswith("drainTimeoutSeconds: ")


async def test_a_word_that_is_not_known_is_refused(api: Api):
    """A misspelt option must not be lost silently."""
    response = await api.target(3, drainTimeoutSecond=1)
    line = failure(response, 422, "invalid")
    assert line == "drainTimeoutSecond: there is no such field, leave it out"
    assert api.world.status.operation is None


@pytest.mark.parametrize(
    "body", [b"", b"{", b"3", b"[]", b"null", b'"x"', b"\xff\xfe", b'{"size": 3}']
)
async def test_a_body_that_is_no_target_is_refused_in_words(api: Api, body: bytes):
    headers = api.headers | {"Content-Type": "application/json"}
    response = await api.client.put("/v1/target", content=body, headers=headers)
    line = failure(response, 422, "invalid")
    assert re.match(r"(the body|operationId|size): \D", line), line


async def test_a_group_that_follows_takes_no_target(folder: Path, monkeypatch: pytest.MonkeyPatch):
    world = serving(2, policy="follow", size=None)
    monkeypatch.setattr(http, "time", SimpleNamespace(time=lambda: world.now))
    api = Api(world, folder)
    async with api.client:
        line = failure(await api.target(3), 422, "invalid")
    assert "start or stop instances instead" in line


# --- POST /v1/restart ----------------------------------------------------------------------------


async def test_a_restart_is_done_once_and_keeps_the_size(api: Api):
    generation = (await api.status())["generation"]
    first = await api.restart("again")
    assert first.status_code == 202
    assert first.json()["operation"]["kind"] == "restart"
    assert (await api.restart("again")).status_code == 200
    assert failure(await api.restart("other"), 409, "conflict")
    assert api.world.until(lambda: api.world.serving(2) and not api.world.status.operation)
    assert (await api.restart("again")).json()["operation"]["state"] == "succeeded"
    status = await api.status()
    assert status["size"] == 2
    assert status["generation"] == generation + 1


async def test_a_restart_to_a_size_outside_the_limits_is_refused(api: Api):
    assert "not between 2 and 4" in failure(await api.restart(size=5), 422, "invalid")


# --- who may -------------------------------------------------------------------------------------


def changing(api: Api) -> Iterator[tuple[str, str]]:
    for path, methods in api.app.openapi()["paths"].items():
        for method in methods:
            if method not in ("get", "head"):
                yield method, path


async def test_all_that_changes_something_needs_the_token(api: Api):
    before = api.world.status
    body = {"operationId": "op", "size": 3}
    token = keys.load_token(api.folder)
    seen = list(changing(api))
    assert seen == [("put", "/v1/target"), ("post", "/v1/restart")]
    for method, path in seen:
        for value in (
            None,
            "",
            "Bearer",
            "Bearer ",
            "Bearer wrong",
            f"Bearer {token}x",
            f"Basic {token}",
            token,
            "Bearer \xff\xfe",
        ):
            headers = {} if value is None else {"Authorization": value.encode("latin-1")}
            response = await api.client.request(method, path, json=body, headers=headers)
            line = failure(response, 401, "unauthorized")
            assert "token" in line
            assert response.headers["WWW-Authenticate"] == "Bearer"
    assert api.world.status == before


@pytest.mark.parametrize("body", [b"{", b'{"size": "x"}', b""])
async def test_a_stranger_learns_nothing_about_the_body(api: Api, body: bytes):
    headers = {"Content-Type": "application/json"}
    for method, path in changing(api):
        response = await api.client.request(method, path, content=body, headers=headers)
        failure(response, 401, "unauthorized")


async def test_a_body_past_all_bounds_is_not_read(api: Api):
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(1000):
            yield b"x" * 65536
        raise AssertionError("all of it was read")

    for headers in ({}, api.headers):
        response = await api.client.put("/v1/target", content=endless(), headers=headers)
        assert response.status_code in (401, 413)
    assert failure(response, 413, "too_large")


async def test_reading_needs_no_token(api: Api):
    for path, methods in api.app.openapi()["paths"].items():
        if "get" in methods:
            response = await api.get(path.replace("{operation_id}", "none"))
            assert response.status_code in (200, 404), path


async def test_in_a_rotation_both_tokens_are_taken(api: Api):
    old = dict(api.headers)
    keys.rotate(api.folder)
    new = {"Authorization": f"Bearer {keys.load_token(api.folder)}"}
    for api.headers in (old, new):
        assert (await api.target(2)).status_code == 200
    keys.finish(api.folder)
    api.headers = old
    failure(await api.target(2), 401, "unauthorized")
    api.headers = new
    assert (await api.target(2)).status_code == 200


async def test_without_a_token_file_nobody_may_and_the_log_says_why(api: Api):
    (api.folder / keys.TOKEN_FILE).unlink()
    assert "there is no" in failure(await api.target(3), 503, "keys")
    assert api.world.status.operation is None


# --- GET /v1/operations/{id} ---------------------------------------------------------------------


async def test_an_operation_is_found_while_it_runs_and_afterwards(api: Api):
    await api.target(3, "grow")
    running = await api.get("/v1/operations/grow")
    assert running.json()["state"] == "running"
    assert running.json() == (await api.status())["operation"]
    assert api.world.until(lambda: api.world.serving(3))
    ended = await api.get("/v1/operations/grow")
    assert ended.json()["state"] == "succeeded"
    assert ended.json() == (await api.status())["history"][-1]


@pytest.mark.parametrize("name", ["none", "a%2Fb", "%00", "x" * 2000])
async def test_an_operation_that_is_not_known_is_404(api: Api, name: str):
    failure(await api.get(f"/v1/operations/{name}"), 404, "not_found")


async def test_what_is_not_there_has_the_same_form(api: Api):
    assert "/docs" in failure(await api.get("/v2/status"), 404, "not_found")
    failure(await api.client.delete("/v1/target"), 405, "method_not_allowed")


# --- health --------------------------------------------------------------------------------------


async def test_it_is_ready_once_it_knows_its_group(folder: Path, monkeypatch: pytest.MonkeyPatch):
    world = World(small_config())
    monkeypatch.setattr(http, "time", SimpleNamespace(time=lambda: world.now))
    api = Api(world, folder)
    async with api.client:
        assert (await api.get("/healthz")).text == "ok"
        ready = await api.get("/readyz")
        assert (ready.status_code, ready.text) == (503, "learning")
        assert (await api.status())["state"] == "Learning"
        line = failure(await api.target(3), 409, "not_ready")
        assert "ask again soon" in line
        failure(await api.restart(), 409, "not_ready")
        assert world.until(lambda: world.status.state != "Learning")
        ready = await api.get("/readyz")
        assert (ready.status_code, ready.text) == (200, "ok")


# --- metrics -------------------------------------------------------------------------------------


async def samples(api: Api) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    response = await api.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def labelled(**labels: str) -> frozenset[tuple[str, str]]:
    return frozenset(labels.items())


async def test_metrics_can_be_parsed_and_say_what_the_status_says(api: Api):
    found = await samples(api)
    none = labelled()
    assert found["elasticmoe_group_size", none] == 2
    assert found["elasticmoe_group_desired_size", none] == 2
    assert found["elasticmoe_group_slots_per_rank", none] == 4
    assert found["elasticmoe_group_state", labelled(state="Serving")] == 1
    assert sum(value for (name, _), value in found.items() if name == "elasticmoe_group_state") == 1
    for instance, ready in (("h0", 1), ("h1", 1), ("h2", 0)):
        assert found["elasticmoe_instance_ready", labelled(instance=instance)] == ready
        assert ("elasticmoe_instance_in_flight_requests", labelled(instance=instance)) in found
    assert found["elasticmoe_messages_dropped_total", labelled(reason="malformed")] == 3
    assert found["elasticmoe_messages_dropped_total", labelled(reason="wrong_key")] == 1


async def test_an_ended_operation_is_counted_with_its_phases(api: Api):
    await api.target(3, "grow")
    assert api.world.until(lambda: api.world.serving(3))
    grown = api.world.status.history[-1]
    api.metrics.ended(grown)
    found = await samples(api)
    counted = labelled(kind="scale_up", state="succeeded")
    assert found["elasticmoe_operations_total", counted] == 1
    for phase in {one.phase for one in grown.phases}:
        label = labelled(kind="scale_up", phase=phase)
        took = sum(one.seconds for one in grown.phases if one.phase == phase)
        assert found["elasticmoe_operation_phase_seconds_sum", label] == pytest.approx(took)


# --- the description -----------------------------------------------------------------------------


async def test_the_api_describes_itself(api: Api):
    described = (await api.get("/openapi.json")).json()
    assert described["info"] == {"title": "Elastic MoE coordinator", "version": "1.2.3"}
    answers = {
        (method, path): set(about["responses"])
        for path, methods in described["paths"].items()
        for method, about in methods.items()
    }
    assert answers == {
        ("get", "/v1/status"): {"200", "304"},
        ("put", "/v1/target"): {"200", "202", "401", "409", "413", "422", "503"},
        ("post", "/v1/restart"): {"200", "202", "401", "409", "413", "422", "503"},
        ("get", "/v1/operations/{operation_id}"): {"200", "404", "422"},
        ("get", "/metrics"): {"200"},
        ("get", "/healthz"): {"200"},
        ("get", "/readyz"): {"200", "503"},
    }
    for path, methods in described["paths"].items():
        for method, about in methods.items():
            assert about["summary"], path
            assert bool(about.get("security")) == (method != "get"), path


async def test_every_answer_fits_its_description(api: Api):
    described = api.app.openapi()["components"]["schemas"]
    await api.target(3, "grow")
    status = await api.status()
    for name, found in (
        ("Group", status),
        ("Instance", status["instances"][0]),
        ("Operation", status["operation"]),
        ("Phase", status["operation"]["phases"][0]),
    ):
        assert set(described[name]["properties"]) == set(found), name
        assert set(described[name]["required"]) == set(found), name
    assert set(described["Problem"]["properties"]) == {"code", "message", "operation"}
    models.Group.model_validate(status)


async def test_the_page_needs_nothing_from_elsewhere(api: Api):
    response = await api.get("/docs")
    assert response.headers["content-type"].startswith("text/html")
    page = response.text
    assert not re.search(r"(https?:)?//", page)
    assert not re.search(r"<(script|link|img|iframe)|@import|url\(", page)
    assert set(re.findall(r'(?:href|src)="([^"]*)"', page)) == {"openapi.json"}
    for path in api.app.openapi()["paths"]:
        assert path in page
