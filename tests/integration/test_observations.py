"""What people see of a run goes through a real Redis: bounded, in order, and never in the writer's way."""

import asyncio
import logging
import math
import time
from collections.abc import Mapping

import pytest
from redis.asyncio import Redis

from services.contracts import observations as module
from services.contracts.observations import Figure, Notice, Observations, Reporter, Vitals
from services.contracts.store import connect
from services.contracts.valkey import EmbeddedValkey

pytestmark = pytest.mark.integration


async def quiet() -> Mapping[str, Figure]:
    return {"phase": "waiting", "share_waiting": 0.5}


async def test_the_newest_steps_are_kept_in_order_and_one_done_again_replaces_the_first(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "KEPT_STEPS", 3)
    seen = Observations(redis, run="r")
    for step in (1, 2, 3, 10):
        await seen.add_step(step, {"reward": float(step), "loss": math.nan})
    await seen.add_step(3, {"reward": 0.25})
    assert await seen.steps() == [
        {"step": 2, "reward": 2.0, "loss": None},
        {"step": 3, "reward": 0.25},
        {"step": 10, "reward": 10.0, "loss": None},
    ]
    await seen.forget_steps_after(2)
    assert [row["step"] for row in await seen.steps()] == [2]


async def test_the_last_notices_are_kept_newest_first(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT_NOTICES", 3)
    seen = Observations(redis, run="r")
    await seen.add_notices([Notice(at=i, name="x", level="warning", message=str(i)) for i in range(5)])
    assert [notice.message for notice in await seen.notices()] == ["4", "3", "2"]


async def test_a_process_that_falls_silent_is_no_longer_listed(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Observations(redis, run="r")
    monkeypatch.setattr(module, "EXPIRY_S", 0.05)
    await seen.put_vitals(Vitals(name="rollout-1", service="rollout", at=time.time(), figures={}))
    monkeypatch.setattr(module, "EXPIRY_S", 60.0)
    await seen.put_vitals(Vitals(name="rollout-0", service="rollout", at=time.time(), figures={"a": 1.0, "b": None}))
    while len(found := await seen.vitals()) > 1:
        await asyncio.sleep(0.01)
    assert found[0].name == "rollout-0" and found[0].figures == {"a": 1.0, "b": None}


async def test_a_reporter_tells_steps_warnings_and_vital_signs_and_what_ended_it(redis: Redis) -> None:
    seen = Observations(redis, run="r")
    log = logging.getLogger("somewhere")
    with pytest.raises(RuntimeError):  # noqa: PT012
        async with Reporter(seen, name="learner", service="learner", vitals=quiet) as reporter:
            reporter.log({"reward": 0.5}, step=1)
            log.info("not worth telling")
            log.warning("lost", extra={"task_id": 7})
            raise RuntimeError("out of memory")
    log.warning("after its end")
    assert await seen.steps() == [{"step": 1, "reward": 0.5}]
    assert [(n.level, n.message, n.task_id) for n in await seen.notices()] == [
        ("error", "ends: RuntimeError: out of memory", None), ("warning", "lost", 7),
    ]  # fmt: skip


async def test_while_redis_is_away_the_writer_goes_on_and_tells_it_later(mortal_valkey: EmbeddedValkey) -> None:
    client = await connect(mortal_valkey.url, patience_s=0.2)
    seen = Observations(client, run="r")
    async with Reporter(seen, name="learner", service="learner", vitals=quiet) as reporter:
        mortal_valkey.kill()
        for step in range(module.PENDING + 10):
            reporter.log({"reward": 0.0}, step=step)
        await asyncio.sleep(module.PERIOD_S)
        mortal_valkey.start()
        while not await seen.vitals():
            await asyncio.sleep(0.05)
    assert [row["step"] for row in await seen.steps()] == list(range(10, module.PENDING + 10))
    await client.aclose()
