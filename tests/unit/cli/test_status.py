"""A look at a run from outside, when it is not there; and the page itself."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from services.cli.status import View, render, show_status, sparkline
from services.contracts.config import RunConfig, load, to_toml_dict
from services.contracts.ledger import Depth
from services.contracts.observations import Notice, Vitals
from services.contracts.registry import Replica


@pytest.fixture
def run(tmp_path: Path) -> Path:
    flags = ["--run.dir", str(tmp_path), "--redis.url", "redis://127.0.0.1:1/0"]
    (tmp_path / "config.json").write_text(json.dumps(to_toml_dict(load(None, flags, env={}))))
    return tmp_path


async def test_a_run_that_is_not_up_says_so_after_its_last_step(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "metrics.jsonl").write_text('{"step": 1, "reward": 0.25}\n')
    assert await show_status(run) == 1
    out, err = capsys.readouterr()
    assert out == "run  step 1 of 100: reward +0.250\n"
    assert err == "not running: nothing answers at redis://127.0.0.1:1/0\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [('{"step": 1, "reward": 0.25}\n{"step": 2, "rew', "step 1 of 100"), ('{"st', "no policy update yet")],
)
async def test_a_line_that_is_still_being_written_is_left_out(
    text: str, said: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "metrics.jsonl").write_text(text)
    await show_status(run)
    assert said in capsys.readouterr().out


def test_a_sparkline_spans_its_values_and_leaves_blanks() -> None:
    assert sparkline([0.0, None, 0.5, 1.0]) == "▁ ▅█"
    assert sparkline([2.0, 2.0]) == "▄▄"
    assert sparkline([None]) == ""


def page(view: View) -> str:
    console = Console(width=140, color_system=None, highlight=False)
    with console.capture() as captured:
        console.print(render(view, RunConfig()))
    return captured.get()


def make_view(**changes: object) -> View:
    replica = Replica(
        replica_id="rollout-0", url="http://10.0.0.7:8100", world_size=1, version=6, device="cpu", state="ready",
        pid=1, started_at=0.0,
    )  # fmt: skip
    seen = {
        "learner": {"phase": "waiting", "collected": 12.0, "wanted": 64.0, "share_waiting": 0.25, "trouble": None},
        "rollout-0": {"tokens_per_s": 812.4, "dialogues_per_s": 40.0, "share_idle_tasks": 0.5, "grading_ms": None},
    }
    values: dict[str, object] = {
        "at": 100.0,
        "version": 7,
        "steps": [{"step": step, "reward": step / 10, "step_s": 6.0, "accuracy_first": None} for step in range(1, 8)],
        "depth": Depth(5, 60, 1, 128, 0),
        "replicas": [replica],
        "vitals": {name: Vitals(name=name, service="x", at=99.0, figures=figures) for name, figures in seen.items()},
        "notices": [Notice(at=40.0, name="rollout-0", level="warning", message="task\nreleased", task_id=3)],
    }
    return View(**(values | changes))  # type: ignore[arg-type]


def test_the_page_has_step_curves_queues_shares_versions_and_the_last_errors() -> None:
    shown = page(make_view())
    for said in (
        "step 7 of 100, version 7, about 9 min left",
        "+0.700  ▁▂▃▅▆▇█",
        "tasks: 5 waiting, 60 running   trajectories: 1 ready, 128 taken   dead letters: 0",
        "learner: waiting, batch 12/64; of the last minute: waiting 25%",
        "6 (-1)",
        "812",
        "60 s ago  rollout-0: task released (task 3)",
    ):
        assert said in shown
    assert "right at first" not in shown  # it has no value


def test_the_page_says_what_is_missing() -> None:
    shown = page(make_view(steps=[], replicas=[], vitals={}, notices=[]))
    for said in ("no policy update yet", "nothing heard of it", "no replica is there"):
        assert said in shown
