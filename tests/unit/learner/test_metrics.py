"""What a step's figures say, and that they arrive everywhere."""

import json
import math
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest
from learner_data import make_trajectory
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from services.contracts.config import ConfigError, RunConfig, load
from services.contracts.wire import Trajectory, Verdict
from services.learner.metrics import Metrics, summarise, weights_and_biases

RIGHT, WRONG, NONE = Verdict.CORRECT, Verdict.INCORRECT, Verdict.NO_ANSWER


def judged(task_id: int, *verdicts: Verdict, allowed: int, reward: float) -> Trajectory:
    trajectory = make_trajectory(task_id, attempts=len(verdicts))
    attempts = tuple(msgspec.structs.replace(a, verdict=v) for a, v in zip(trajectory.attempts, verdicts, strict=True))
    return msgspec.structs.replace(trajectory, attempts=attempts, max_attempts=allowed, reward=reward)


def test_rewards_by_allowed_attempts_and_by_attempt() -> None:
    batch = [
        judged(0, RIGHT, allowed=1, reward=1.0),
        judged(1, WRONG, allowed=1, reward=-0.5),
        judged(2, WRONG, NONE, RIGHT, allowed=3, reward=1.0),
        judged(3, WRONG, RIGHT, allowed=3, reward=0.5),
    ]
    figures = summarise(batch, version=4)
    assert (figures["reward_of_1"], figures["reward_of_3"]) == (0.25, 0.75)
    assert [figures[f"accuracy_attempt_{k}"] for k in (1, 2, 3)] == [0.25, 0.5, 1.0]
    assert [figures[f"reward_attempt_{k}"] for k in (1, 2, 3)] == [-0.125, 0.0, 1.0]
    assert figures["staleness_4"] == 1.0 and "reward_of_2" not in figures


class Page:
    """A run of Weights & Biases."""

    def __init__(self, **arguments: Any) -> None:
        self.arguments, self.lines, self.finished = arguments, [], False  # type: ignore[var-annotated]

    def log(self, figures: Mapping[str, float], *, step: int) -> None:
        self.lines.append((step, dict(figures)))

    def finish(self) -> None:
        self.finished = True


def test_every_sink_gets_every_step_and_a_resumed_run_forgets_later_ones(tmp_path: Path) -> None:
    page = Page()
    metrics = Metrics(tmp_path, version=0, sinks=[page])
    for step in (1, 2, 3):
        metrics.write(step, {"loss": step / 2, "odd": math.nan})
    metrics.close()
    resumed = Metrics(tmp_path, version=1)
    resumed.write(2, {"loss": 7.0})
    resumed.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 0.5), (2, 7.0)] and lines[0]["odd"] is None
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [(1, 0.5), (2, 7.0)]
    assert [step for step, _ in page.lines] == [1, 2, 3] and page.finished


def asked_for(tmp_path: Path, project: str) -> RunConfig:
    flags = [f"--learner.wandb_project={project}", f"--run.dir={tmp_path}", "--rollout.control_token=secret"]
    return load(None, flags, env={})


def test_weights_and_biases_is_used_when_configured_and_is_told_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("wandb")
    module.init = Page  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    page = weights_and_biases(asked_for(tmp_path, "attempts"))
    assert isinstance(page, Page) and page.arguments["project"] == "attempts" and page.arguments["resume"] == "allow"
    assert page.arguments["config"]["learner"]["lr"] == 5e-7 and "secret" not in str(page.arguments)
    assert weights_and_biases(asked_for(tmp_path, "")) is None


def test_without_its_package_it_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"learner.wandb_project: .* pip install wandb"):
        weights_and_biases(asked_for(tmp_path, "attempts"))


def test_a_disk_without_room_takes_a_whole_line_later_or_none(tmp_path: Path) -> None:
    metrics, path = Metrics(tmp_path, version=0), tmp_path / "metrics.jsonl"
    metrics.write(1, {"reward": 0.5})
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, hard))  # half a line has room
    try:
        with pytest.raises(OSError, match=r"No space left|too large"):
            metrics.write(2, {"reward": 0.75})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    metrics.write(2, {"reward": 0.75})
    metrics.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["reward"]) for line in lines] == [(1, 0.5), (2, 0.75)]


def test_what_tensorboard_cannot_write_is_missing_there_alone(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, version=0)

    class Full:
        def add_scalar(self, *_: object) -> None:
            raise OSError(28, "No space left on device")

    metrics._board.close()
    metrics._board = Full()
    metrics.write(1, {"reward": 0.5})
    metrics.write(2, {"reward": 0.75})
    metrics.close()
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 2
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("reward")] == [2]
