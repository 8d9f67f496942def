"""The parts in pods: engine and sidecar of different users, keys in a Secret, read-only roots."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from elasticmoe_protocol import keys
from support.contract import free_port
from support.gate import until
from support.pod import (
    ELASTICMOE,
    FS_GROUP,
    NON_ROOT,
    Pod,
    Processes,
    Secret,
    as_user,
    empty_dir,
    possible,
    processes,
    read_only,
)

pytestmark = pytest.mark.skipif(not possible(), reason="only root can be several users")
LIMIT_S = 40


class Group:
    """A coordinator and pods. users: of engine and sidecar, for each pod."""

    def __init__(self, folder: Path, running: Processes, *users: tuple[int, int]) -> None:
        self.files = keys.make()
        self.secret = Secret(folder / "coordinator-keys", self.files)
        only = {keys.SIDECAR_FILE: self.files[keys.SIDECAR_FILE]}
        self.sidecar_secret = Secret(folder / "sidecar-keys", only)
        self.running = running
        self._scratch = empty_dir(folder / "scratch")
        self._port, self._http_port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self._http_port}"
        self.start_coordinator(len(users))
        self.pods = [
            Pod(folder, f"moe-{at}", engine, sidecar, running)
            for at, (engine, sidecar) in enumerate(users)
        ]
        for pod in self.pods:
            pod.start_launcher(free_port())
        for at, pod in enumerate(self.pods):
            address = f"tcp://127.0.0.1:{self._port}"
            pod.start_sidecar(address, self.sidecar_secret.path, at, free_port())

    def start_coordinator(self, size: int) -> None:
        self.coordinator = self.running.start(
            "coordinator",
            *read_only(self._scratch),
            *as_user(NON_ROOT, FS_GROUP),
            *(ELASTICMOE, "coordinator", "--keys", str(self.secret.path), "--size", str(size)),
            *("--bind", f"tcp://0.0.0.0:{self._port}", "--lame-duck", "0.5"),
            *("--http-host", "0.0.0.0", "--http-port", str(self._http_port)),
        )
        until(self.answers, LIMIT_S)

    def answers(self) -> bool:
        assert self.coordinator.poll() is None, self.running.log("coordinator")
        with contextlib.suppress(httpx.HTTPError):
            return bool(self.status())
        return False

    def stop_coordinator(self) -> None:
        """As the kubelet does: it ends soon, and says that all was well."""
        began = time.monotonic()
        self.coordinator.terminate()
        assert self.coordinator.wait(10) == 0
        assert time.monotonic() - began < 5

    def status(self) -> dict[str, Any]:
        return dict(httpx.get(f"{self.url}/v1/status", trust_env=False).json())

    def until(self, state: str) -> dict[str, Any]:
        """Await a state of the group."""
        try:
            found = until(lambda: (s := self.status())["state"] == state and s, LIMIT_S)
        except AssertionError:
            logs = [self.running.log(f"{pod.name}-sidecar")[-1500:] for pod in self.pods]
            raise AssertionError(f"{self.status()}\n" + "\n".join(logs)) from None
        return dict(found)

    def change(self, token: str) -> int:
        """What asking for the size that there is gets as a status."""
        return httpx.put(
            f"{self.url}/v1/target",
            json={"operationId": f"t{time.monotonic_ns()}", "size": 2},
            headers={"Authorization": f"Bearer {token.strip()}"},
            trust_env=False,
        ).status_code


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that other users may enter; pytest's own are root's alone."""
    with tempfile.TemporaryDirectory(prefix="pods-") as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.fixture
def running(place: Path) -> Iterator[Processes]:
    with processes(place) as made:
        yield made


@pytest.mark.parametrize(
    "users",
    [
        pytest.param([(0, NON_ROOT), (1234, NON_ROOT)], id="root and non-root engine"),
        pytest.param([(NON_ROOT, NON_ROOT), (1234, 4321)], id="same and other user"),
    ],
)
def test_engine_and_sidecar_of_any_users_form_a_group_and_leave_it(
    place: Path, running: Processes, users: list[tuple[int, int]]
) -> None:
    group = Group(place, running, *users)
    status = group.until("Serving")
    assert [one["incarnation"] for one in status["instances"]] == [pod.uid for pod in group.pods]
    for pod in group.pods:
        modes = {path.name: path.stat().st_mode & 0o777 for path in pod.run_dir.glob("*.sock")}
        assert modes == dict.fromkeys(("launcher.sock", "gate.sock", "sidecar.sock"), 0o660)
        assert {path.stat().st_gid for path in pod.run_dir.glob("*.sock")} == {FS_GROUP}
    assert group.pods[1].leave(30).startswith("elasticmoe leave: released after")
    gone = {one["instance"]: one for one in group.status()["instances"]}[group.pods[1].name]
    assert gone["safeToDelete"]
    assert gone["leaving"]
    group.stop_coordinator()


def test_a_rotated_secret_takes_effect_in_all_that_run(place: Path, running: Processes) -> None:
    group = Group(place, running, (1234, NON_ROOT), (1234, NON_ROOT))
    group.until("Serving")
    old = group.files[keys.TOKEN_FILE]
    assert group.change(old) == 200
    both = keys.rotated(group.files)
    group.secret.update(both)
    assert [group.change(one) for one in (old, both[keys.TOKEN_FILE], "x")] == [200, 200, 401]
    group.sidecar_secret.update({keys.SIDECAR_FILE: both[keys.SIDECAR_FILE]})
    only = keys.finished(both)
    group.secret.update(only)
    assert [group.change(one) for one in (old, only[keys.TOKEN_FILE])] == [401, 200]
    # Connections are made anew, by sidecars that have the new key by now and run on.
    group.stop_coordinator()
    group.start_coordinator(2)
    status = group.until("Serving")
    assert (status["generation"], status["term"]) == (1, 2)
    assert not any(one["suspect"] for one in status["instances"])
