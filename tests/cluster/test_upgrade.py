"""`helm upgrade` to another image: groups go on with what they run until their own restart."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from support.cluster import Group, operator_pod
from support.nodes import tagged
from support.release import install

OLD, NEW = "elasticmoe:dev", "elasticmoe:next"


@pytest.fixture
def newer(chart: None) -> Iterator[Callable[[], None]]:
    """Upgrades to an image of another name; the old one is back afterwards."""
    with tagged(OLD, NEW):
        try:
            yield lambda: install("--set", "image.tag=next")
        finally:
            install()


def images(group: Group) -> set[str]:
    """Of our containers in all pods of a group."""
    found = {group.coordinator_pod()["spec"]["containers"][0]["image"]}
    for pod in group.pods().values():
        ours = (
            one for one in pod["spec"]["initContainers"] if one["name"].startswith("elasticmoe-")
        )
        found |= {one["image"] for one in ours}
    return found


@pytest.mark.timeout(400)
def test_an_upgrade_in_the_middle_of_a_resize_touches_no_rank(
    newer: Callable[[], None], group: Callable[..., Group]
) -> None:
    moe = group(env={"SIM_PREPARE_S": "5"})
    before, coordinator = moe.uids(), moe.coordinator_pod()["metadata"]["uid"]
    with moe.traffic() as users:
        moe.scale(3)
        moe.phase("prepare")
        newer()
        moe.settled(3)
        assert operator_pod()["spec"]["containers"][0]["image"] == NEW
        # A joiner runs what the group does, not what the operator would give a new group.
        moe.scale(4)
        moe.settled(4)
        users.progress(10)
        result = users.stop()
    assert result.failed == 0, result.errors
    uids = moe.uids()
    assert {name: uids[name] for name in before} == before
    assert moe.coordinator_pod()["metadata"]["uid"] == coordinator
    assert moe.restarts() == 0
    assert images(moe) == {OLD}
    status = moe.status()
    assert (status["revision"]["image"], status["engineGeneration"]) == (OLD, 1)

    # The next restart that takes new pods anyway brings the new image to all of them.
    moe.with_engine(env=[{"name": "SIM_PREPARE_S", "value": "0.1"}])
    moe.phase("Drain", "CreatePods", "Start")
    moe.settled(4, limit=120)
    assert images(moe) == {NEW}
    assert moe.status()["revision"]["image"] == NEW


def test_an_upgrade_between_two_looks_changes_nothing(
    newer: Callable[[], None], group: Callable[..., Group]
) -> None:
    moe = group()
    before, revision = moe.uids(), moe.status()["revision"]
    newer()
    fresh = group("fresh")
    moe.settled(2)
    assert (moe.uids(), moe.status()["revision"]) == (before, revision)
    assert images(moe) == {OLD}
    assert images(fresh) == {NEW}
