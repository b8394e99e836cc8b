"""A run's version, measured through its replicas: those that have it, and only their word on it."""

from pathlib import Path

import pytest
from live_replica import live_replica
from redis.asyncio import Redis

from services.contracts.config import RunConfig, load
from services.contracts.registry import Registry, Replica
from services.evaluation.during import folder_of, measure
from services.evaluation.journal import read_dialogues
from services.evaluation.run import EvaluationError

pytestmark = pytest.mark.integration


@pytest.fixture
def config(tmp_path: Path, redis_url: str) -> RunConfig:
    (tmp_path / "mine.jsonl").write_text('{"question": "1+1", "answer": 72}\n{"question": "1+2", "answer": 72}\n')
    flags = {
        "run.name": "measured", "run.dir": str(tmp_path), "redis.url": redis_url, "data.source": "jsonl",
        "data.train": str(tmp_path / "mine.jsonl"), "data.heldout_size": "1", "evaluation.every": "1",
        "evaluation.attempts": "[1, 2]", "evaluation.sets": f'["heldout", "mine={tmp_path}/mine.jsonl"]',
    }  # fmt: skip
    return load(None, [f"--{name}={value}" for name, value in flags.items()], env={})


async def announce(redis: Redis, url: str, name: str) -> None:
    replica = Replica(
        replica_id=name, url=url, world_size=1, version=0, device="cpu", state="ready", pid=1, started_at=0
    )
    await Registry(redis, run="measured").announce(replica, 30.0)


async def test_the_figures_have_their_names_and_the_dialogues_are_kept(
    redis: Redis, config: RunConfig, grader_url: str
) -> None:
    with (
        live_replica(["\\boxed{62}", "\\boxed{72}"], grader_url=grader_url) as live,
        live_replica(["\\boxed{62}"], grader_url=grader_url) as behind,
    ):
        behind.engine.version = 7  # another version: not asked
        for name, url in (("a", live.url), ("b", behind.url), ("gone", "http://127.0.0.1:9")):
            await announce(redis, url, name)
        figures = await measure(config, 0)
        again = await measure(config, 0)  # a learner that died there and resumed
        assert behind.engine.seeds == []
    assert figures.keys() == {
        "evaluation_s", "dev_accuracy", "dev_accuracy_first", "eval_mine_accuracy", "eval_mine_accuracy_first"
    }  # fmt: skip
    assert (figures["dev_accuracy"], figures["eval_mine_accuracy"]) == (1.0, 1.0)
    assert again["eval_mine_accuracy_first"] == figures["eval_mine_accuracy_first"]
    kept = read_dialogues(folder_of(config.run_dir, 0))
    assert len(kept) == 3 and {dialogue.max_attempts for dialogue in kept} == {2}


async def test_a_version_that_nobody_has_is_an_error(redis: Redis, config: RunConfig, grader_url: str) -> None:
    with live_replica(["\\boxed{72}"], grader_url=grader_url) as live:
        await announce(redis, live.url, "a")
        with pytest.raises(EvaluationError, match="no replica that is ready has version 3"):
            await measure(config, 3)
