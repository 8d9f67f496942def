import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
from elasticmoe_sim.store import STALLED, StoreClient, StoreServer


@dataclass
class Place:
    server: StoreServer
    port: int

    async def client(self) -> StoreClient:
        client = StoreClient()
        await client.connect("127.0.0.1", self.port, 5)
        return client


@pytest.fixture
async def place() -> AsyncIterator[Place]:
    server = StoreServer()
    port = await server.start("127.0.0.1", 0)
    yield Place(server, port)
    server.close()


async def test_keys_are_shared(place: Place) -> None:
    one, two = await place.client(), await place.client()
    await one.set("a", "x")
    assert await two.get("a") == "x"
    await two.delete("a")
    assert await one.get("a") is None


async def test_waits_for_every_key_or_for_some(place: Place) -> None:
    one, two = await place.client(), await place.client()
    waiting = asyncio.create_task(one.wait(["a", "b"], ["error"], timeout=5))
    await two.set("a")
    assert not waiting.done()
    await two.set("b", "2")
    assert await waiting == {"a": "1", "b": "2"}
    waiting = asyncio.create_task(one.wait(["c"], ["error"], timeout=5))
    await two.set("error", "bad")
    assert await waiting == {"error": "bad"}


async def test_a_wait_ends_at_its_limit(place: Place) -> None:
    with pytest.raises(TimeoutError):
        await (await place.client()).wait(["never"], timeout=0.05)


async def test_a_broken_membership_stalls_the_group(place: Place) -> None:
    member, other = await place.client(), await place.client()
    await member.join(1)
    waiting = asyncio.create_task(other.wait(some=[STALLED], timeout=5))
    member.close()
    assert await waiting == {STALLED: "rank 1 is gone"}


async def test_a_member_that_left_may_break(place: Place) -> None:
    member, other = await place.client(), await place.client()
    await member.join(1)
    await member.leave()
    member.close()
    await member.lost.wait()
    assert await other.get(STALLED) is None


async def test_without_rank_0_every_call_fails(place: Place) -> None:
    client = await place.client()
    waiting = asyncio.create_task(client.wait(["never"], timeout=60))
    await client.set("a")
    place.server.close()
    with pytest.raises(ConnectionError):
        await waiting
    with pytest.raises(ConnectionError):
        await client.get("a")


async def test_a_client_waits_for_rank_0(unused_tcp_port: int) -> None:
    client, server = StoreClient(), StoreServer()
    connecting = asyncio.create_task(client.connect("127.0.0.1", unused_tcp_port, 5))
    await asyncio.sleep(0)
    await server.start("127.0.0.1", unused_tcp_port)
    await connecting
    await client.set("a")
    server.close()


async def test_rank_0_is_not_waited_for_for_ever(unused_tcp_port: int) -> None:
    with pytest.raises(TimeoutError):
        await StoreClient().connect("127.0.0.1", unused_tcp_port, 0.1)
