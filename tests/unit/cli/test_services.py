"""Commands, environments and addresses of a run's processes, and the pauses between crashes."""

from pathlib import Path

import pytest

from services.cli.doctor import Finding, gpu_finding, table
from services.cli.launcher import resolve
from services.cli.services import Plan, environment, replica_gpus
from services.cli.supervisor import backoff_s
from services.cli.watchdog import watch
from services.contracts.config import RunConfig, load


def config(*flags: str) -> RunConfig:
    return load(None, ["--model.source", "arithmetic", *flags], env={})


def test_pauses_double_up_to_half_a_minute() -> None:
    assert [backoff_s(crashes) for crashes in range(1, 8)] == [1, 2, 4, 8, 16, 30, 30]


def test_what_was_left_open_is_filled_in() -> None:
    resolved, ports = resolve(config("--rollout.replicas", "2"), redis_url="redis://here:1/0")
    assert resolved.redis.url == "redis://here:1/0"
    assert resolved.grader.url == f"http://127.0.0.1:{resolved.grader.port}" and resolved.grader.port > 0
    assert resolved.rollout.control_token and resolved.learner.metrics_port
    assert len(set(ports)) == 2


def test_what_was_given_is_kept() -> None:
    given = config("--grader.url", "http://there:9", "--rollout.port", "7000", "--rollout.replicas", "2")
    resolved, ports = resolve(given, redis_url="redis://here:1/0")
    assert resolved.grader.url == "http://there:9"
    assert ports == [7000, 7001]


def test_every_rank_of_the_learner_knows_its_place() -> None:
    plan = Plan(config("--learner.processes", "2"), Path("c.json"))
    ranks = plan.learners(master_port=5, resume=True)
    assert [rank.name for rank in ranks] == ["learner-0", "learner-1"]
    assert [(r.environment["RANK"], r.environment["WORLD_SIZE"]) for r in ranks] == [("0", "2"), ("1", "2")]
    assert ranks[0].command[-3:] == ("--config", "c.json", "--resume")


def test_only_the_learner_chooses_how_its_threads_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    plan = Plan(config(), Path("c.json"))
    assert plan.rollouts([1])[0].environment["GOMP_SPINCOUNT"] == "10000"
    assert "GOMP_SPINCOUNT" not in plan.learners(master_port=5, resume=False)[0].environment


def test_what_the_user_exported_wins_over_a_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    assert environment(config())["TOKENIZERS_PARALLELISM"] == "true"


def test_services_are_offline_unless_the_run_uses_a_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert environment(config())["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in environment(config("--data.source", "hub"))
    assert "HF_HUB_OFFLINE" not in environment(config("--model.source", "pretrained", "--model.path", "Qwen/any"))


@pytest.mark.parametrize(
    ("gpus", "num_learners", "per_replica", "expected"),
    [
        ((), 1, 1, ["", ""]),
        (("0", "1", "2"), 1, 1, ["1", "2"]),
        (("0", "1", "2", "3", "4"), 1, 2, ["1,2", "3,4"]),
        (("0",), 1, 1, ["0", "0"]),
        (("5", "6"), 0, 1, ["5", "6"]),
    ],
)
def test_replicas_get_the_gpus_that_the_learner_leaves(
    gpus: tuple[str, ...], num_learners: int, per_replica: int, expected: list[str]
) -> None:
    assert replica_gpus(gpus, num_learners=num_learners, num_replicas=2, per_replica=per_replica) == expected


def test_the_watchdog_keeps_the_groups_that_were_not_ended() -> None:
    assert watch(["+1\n", "+22\n", "-1\n", "+3\n"]) == {22, 3}


def test_a_finding_says_what_to_do_only_when_it_is_bad() -> None:
    lines = table([Finding("disk", good=True, result="9 GB", remedy="no"), Finding("gpu", False, "0 of 1", "do")])
    assert lines == "ok   disk  9 GB\nFAIL gpu   0 of 1  -> do"


@pytest.mark.parametrize(("present", "usable", "good"), [(0, 0, True), (2, 2, True), (2, 0, False)])
def test_a_gpu_that_torch_cannot_use_is_a_finding(present: int, usable: int, good: bool) -> None:
    assert gpu_finding(num_present=present, num_usable=usable).good is good
