"""The registry against a real Valkey."""

import asyncio

import msgspec
import pytest
from redis.asyncio import Redis

from services.contracts.registry import Published, Registry, Replica
from services.contracts.wire import WireError

pytestmark = pytest.mark.integration

REPLICA = Replica(
    replica_id="rollout-0",
    url="http://127.0.0.1:8000",
    world_size=1,
    version=3,
    device="cpu",
    state="ready",
    pid=17,
    started_at=1.5,
)


@pytest.fixture
def registry(redis: Redis) -> Registry:
    return Registry(redis, run="test")


async def test_announced_replicas_come_back_sorted_by_id(registry: Registry) -> None:
    second = msgspec.structs.replace(REPLICA, replica_id="rollout-1", device="cuda:GPU-7")
    await registry.announce(second, ttl_s=5)
    await registry.announce(REPLICA, ttl_s=5)
    assert await registry.replicas() == [REPLICA, second]


async def test_a_replica_that_stops_announcing_disappears_and_may_come_back(registry: Registry, redis: Redis) -> None:
    await registry.announce(REPLICA, ttl_s=0.05)
    assert len(await registry.replicas()) == 1
    await asyncio.sleep(0.1)
    assert await registry.replicas() == []
    assert await redis.keys("ma:{test}:replica*") == []  # nothing of it is left behind
    await registry.announce(REPLICA, ttl_s=5)
    assert await registry.replicas() == [REPLICA]


async def test_a_later_announcement_replaces_the_earlier_one(registry: Registry) -> None:
    await registry.announce(REPLICA, ttl_s=5)
    newer = msgspec.structs.replace(REPLICA, version=4, state="draining")
    await registry.announce(newer, ttl_s=5)
    assert await registry.replicas() == [newer]


async def test_a_withdrawn_replica_is_gone_at_once(registry: Registry) -> None:
    await registry.announce(REPLICA, ttl_s=5)
    await registry.withdraw("rollout-0")
    await registry.withdraw("nobody")
    assert await registry.replicas() == []


async def test_runs_do_not_see_each_other(registry: Registry, redis: Redis) -> None:
    await registry.announce(REPLICA, ttl_s=5)
    await registry.publish(Published(version=2, fingerprint=""))
    other = Registry(redis, run="other")
    assert (await other.replicas(), await other.version()) == ([], 0)


async def test_the_version_starts_at_0_and_is_what_the_learner_set(registry: Registry) -> None:
    assert await registry.version() == 0
    await registry.publish(Published(version=7, fingerprint="a"))
    assert await registry.version() == 7


async def test_a_replica_of_another_code_version_is_an_error_that_says_so(registry: Registry, redis: Redis) -> None:
    await registry.announce(REPLICA, ttl_s=5)
    await redis.set("ma:{test}:replica:rollout-0", b'{"replica_id": "rollout-0", "colour": "red"}')
    with pytest.raises(WireError, match="not a replica of this version"):
        await registry.replicas()
