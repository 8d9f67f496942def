"""`gate.sock`, resizes that run once, and the paths that only the sidecar may call."""

from __future__ import annotations

import asyncio
import json
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from support.gate import TOKEN, GatedServer, until

ADMIN = [
    "/scale_elastic_ep",
    "/is_scaling_elastic_ep",
    "/pause",
    "/resume",
    "/is_paused",
    "/sleep",
    "/wake_up",
    "/is_sleeping",
    "/collective_rpc",
    "/abort_requests",
    "/reset_prefix_cache",
    "/reset_mm_cache",
    "/reset_encoder_cache",
    "/init_weight_transfer_engine",
    "/start_weight_update",
    "/update_weights",
    "/finish_weight_update",
    "/fault_tolerance/apply",
    "/fault_tolerance/status",
    "/server_info",
    "/start_profile",
    "/stop_profile",
    "/scale_elastic_ep/",
    "/%70ause",
]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[GatedServer]:
    with GatedServer(tmp_path) as server:
        yield server


def put(server: GatedServer, name: str, target: int = 3) -> tuple[int, dict[str, object]]:
    return server.call("PUT", f"/operations/{name}", {"target": target, "drain_timeout_s": 9})


# --- admin paths --------------------------------------------------------------------------------


async def test_nobody_but_the_sidecar_gets_to_an_admin_path(server: GatedServer) -> None:
    async with server.client() as client:
        for path in ADMIN:
            for method in ("POST", "GET"):
                for headers in ({}, {"X-ElasticMoE-Token": "guess"}, {"X-ElasticMoE-Token": ""}):
                    answer = await client.request(method, path, headers=headers)
                    assert answer.status_code == 403, path
                    assert "sidecar" in answer.json()["error"]["message"]
    assert not server.calls
    assert server.state()["completed"] == 0


async def test_the_token_opens_them(server: GatedServer) -> None:
    async with server.client(headers={"X-ElasticMoE-Token": TOKEN}) as client:
        assert (await client.post("/is_scaling_elastic_ep")).json()["phase"] == "idle"
        assert (await client.post("/pause")).status_code == 200
    assert server.calls == {"/is_scaling_elastic_ep": 1, "/pause": 1}


async def test_without_a_token_of_a_launch_nothing_opens_them(tmp_path: Path) -> None:
    with GatedServer(tmp_path) as server:
        assert server.gate is not None
        server.gate._token = b""
        async with server.client(headers={"X-ElasticMoE-Token": ""}) as client:
            assert (await client.post("/pause")).status_code == 403


# --- resizes ------------------------------------------------------------------------------------


def test_an_operation_runs_once_and_answers_repeats(server: GatedServer) -> None:
    running = {"operation": "a", "target": 3, "state": "running", "status": None, "error": ""}
    assert put(server, "a") == (200, running)
    until(lambda: server.calls["/scale_elastic_ep"])
    assert put(server, "a") == (200, running)
    assert server.call("GET", "/operations/a") == (200, running)
    assert server.state()["operation"] == running
    server.go.set()
    done = {**running, "state": "succeeded", "status": 200}
    until(lambda: server.state()["operation"] == done)
    assert put(server, "a") == (200, done)
    assert server.calls["/scale_elastic_ep"] == 1
    assert json.loads(server.bodies[0]) == {"new_data_parallel_size": 3, "drain_timeout": 9}


def test_two_at_once_are_refused_and_the_next_one_may_come(server: GatedServer) -> None:
    put(server, "a")
    status, answer = put(server, "b", 2)
    assert (status, answer["error"]) == (409, "operation a runs")
    server.go.set()
    until(lambda: server.state()["operation"]["state"] == "succeeded")
    assert put(server, "b", 2)[0] == 200
    until(lambda: server.call("GET", "/operations/b")[1]["state"] == "succeeded")
    assert put(server, "a")[1]["state"] == "succeeded"
    assert server.calls["/scale_elastic_ep"] == 2


def test_what_the_engine_says_of_a_failure_is_kept(server: GatedServer) -> None:
    server.scale_answer = (408, {"error": {"message": "Scale failed due to\ndrain"}})
    server.go.set()
    put(server, "a")
    failed = until(lambda: (o := server.state()["operation"])["state"] == "failed" and o)
    assert (failed["status"], failed["error"]) == (408, "Scale failed due to drain")
    assert put(server, "a")[1] == failed


def test_a_caller_that_hangs_up_ends_nothing(server: GatedServer) -> None:
    body = json.dumps({"target": 3}).encode()
    with socket.socket(socket.AF_UNIX) as caller:
        caller.connect(str(server.run_dir / "gate.sock"))
        head = f"PUT /operations/a HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        caller.sendall(head.encode() + body)
    until(lambda: server.calls["/scale_elastic_ep"])
    server.go.set()
    until(lambda: server.call("GET", "/operations/a")[1].get("state") == "succeeded")


async def test_callers_that_all_ask_at_once_start_it_once(server: GatedServer) -> None:
    transport = httpx.AsyncHTTPTransport(uds=str(server.run_dir / "gate.sock"))
    async with httpx.AsyncClient(transport=transport, base_url="http://gate") as client:
        answers = await asyncio.gather(
            *(client.put("/operations/a", json={"target": 3}) for _ in range(20))
        )
    assert {one.status_code for one in answers} == {200}
    server.go.set()
    until(lambda: server.state()["operation"]["state"] == "succeeded")
    assert server.calls["/scale_elastic_ep"] == 1


# --- the socket ---------------------------------------------------------------------------------


def test_it_tells_of_the_engine(server: GatedServer) -> None:
    assert server.state() | {"idle_s": 0, "lag_s": 0} == {
        "launch": "launch-1",
        "fence": "open",
        "in_flight": 0,
        "held": 0,
        "open_connections": 0,
        "idle_s": 0,
        "lag_s": 0,
        "progress": 0,
        "completed": 0,
        "late_refused": 0,
        "hold_refused": 0,
        "hold_timed_out": 0,
        "scaling": False,
        "retired": False,
        "dp_size": 3,
        "dp_rank": 1,
        "pause_mode": "keep",
        "operation": None,
    }
    httpx.get(server.url + "/v1/models")
    state = server.state()
    assert (state["completed"], state["progress"] > 0) == (1, True)
    assert server.call("GET", "/phase")[1]["phase"] == "idle"


def test_it_is_this_users_alone_and_goes_with_the_engine(tmp_path: Path) -> None:
    with GatedServer(tmp_path):
        mode = (tmp_path / "gate.sock").stat().st_mode
        assert stat.S_ISSOCK(mode)
        assert stat.S_IMODE(mode) == 0o600
    assert not (tmp_path / "gate.sock").exists()


def test_it_answers_while_the_event_loop_stands_still(
    server: GatedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("elasticmoe_engine.gate.control.LOOP_LIMIT_S", 0.1)
    assert server.loop is not None
    go_on = threading.Event()
    server.loop.call_soon_threadsafe(go_on.wait, 10)
    try:
        assert until(lambda: server.state()["lag_s"] > 0.5)
        assert put(server, "a")[1]["state"] == "running"
        assert server.call("PUT", "/fence", {"mode": "closed"})[0] == 504
        assert server.call("GET", "/phase")[0] == 504
        assert server.call("GET", "/phase")[0] == 504
    finally:
        go_on.set()
    server.go.set()
    until(lambda: server.state()["operation"]["state"] == "succeeded")
    until(lambda: server.calls["/is_scaling_elastic_ep"])
    assert server.calls["/is_scaling_elastic_ep"] == 1, "one call in flight"


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("PUT", "/operations/a", None, 400),
        ("PUT", "/operations/a", {"target": "many"}, 400),
        ("PUT", "/fence", {"mode": "ajar"}, 400),
        ("PUT", "/fence", ["open"], 400),
        ("GET", "/operations/a", None, 404),
        ("GET", "/nothing", None, 404),
        ("DELETE", "/state", None, 404),
    ],
)
def test_what_it_does_not_understand_it_says(
    server: GatedServer, method: str, path: str, body: object, status: int
) -> None:
    answer = server.call(method, path, body)
    assert answer[0] == status
    assert answer[1]["error"]
