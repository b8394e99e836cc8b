"""A look at a run from outside, while it is written to and when it is not there."""

import json
from pathlib import Path

import pytest

from services.cli.status import show_status
from services.contracts.config import load, to_toml_dict


@pytest.fixture
def run(tmp_path: Path) -> Path:
    flags = ["--run.dir", str(tmp_path), "--redis.url", "redis://127.0.0.1:1/0"]
    (tmp_path / "config.json").write_text(json.dumps(to_toml_dict(load(None, flags, env={}))))
    return tmp_path


async def test_a_run_that_is_not_up_says_so_after_its_last_step(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "metrics.jsonl").write_text('{"step": 1, "reward": 0.25}\n')
    assert await show_status(run) == 1
    out, err = capsys.readouterr()
    assert "step 1/100: reward 0.25" in out
    assert err == "not running: nothing answers at redis://127.0.0.1:1/0\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [('{"step": 1, "reward": 0.25}\n{"step": 2, "rew', "step 1/100"), ('{"st', "no policy update yet")],
)
async def test_a_line_that_is_still_being_written_is_left_out(
    text: str, said: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "metrics.jsonl").write_text(text)
    await show_status(run)
    assert said in capsys.readouterr().out
