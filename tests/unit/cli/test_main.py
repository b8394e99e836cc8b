"""What a user types: mistakes are one line on standard error and exit code 2, before anything heavy is loaded."""

import socket
from pathlib import Path

import pytest

from services.cli.__main__ import main

SMALL = ("--run.steps", "1", "--data.heldout_size", "16", "--data.digits", "1", "--model.source", "arithmetic")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "small.toml"
    path.write_text('[run]\nname = "small"\n')
    return path


def run(*words: object) -> int:
    try:
        return main([str(word) for word in words])
    except SystemExit as end:  # argparse
        return int(end.code or 0)


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    line = capsys.readouterr().err
    assert line.startswith("multiattempt: error: ") and line.count("\n") == 1, line
    return line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "a command is missing"),
        (["tarin"], "invalid choice: 'tarin'"),
        (["train"], "required: config"),
        (["serve", "learnr"], "invalid choice: 'learnr'"),
        (["doctor", "--fast"], "unrecognized arguments: --fast"),
        (["train", "missing.toml"], "missing.toml: no such configuration file"),
        (["status"], "no run under"),
        (["status", "nowhere"], "not a run"),
        (["plot", "nowhere"], "not a run"),
    ],
)
def test_a_wrong_command_is_one_line(
    words: list[str], said: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*words) == 2
    assert said in error_line(capsys)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--learner.lrr", "1"], "did you mean learner.lr?"),
        (["--run.steps", "many"], "--run.steps: run.steps:"),
        (["--run.steps"], "a value is missing"),
        (["--model.source", "pretrained"], "model.path: empty"),
        (["--model.source", "pretrained", "--model.path", "./none"], "not a Hugging Face model folder"),
        (["--data.source", "jsonl", "--data.train", "none.jsonl"], "none.jsonl: no such data file"),
        (["--redis.url", "redis://127.0.0.1:1/0"], "no Redis at redis://127.0.0.1:1/0"),
        (["--resume"], "there is no checkpoint"),
    ],
)
def test_a_wrong_setting_is_one_line_and_starts_nothing(
    flags: list[str], said: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", config, *SMALL, *flags) == 2
    assert said in error_line(capsys)
    assert not Path("runs").exists()


@pytest.mark.parametrize(("rows", "said"), [('{"question": "1+1?"}\n', "no column 'answer'"), ("", "is empty")])
def test_a_wrong_data_set_is_one_line(
    rows: str, said: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(rows)
    assert run("train", config, *SMALL, "--data.source", "jsonl", "--data.train", data) == 2
    assert said in error_line(capsys)


def test_a_port_in_use_is_one_line(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert run("train", config, *SMALL, "--grader.port", port) == 2
    assert f"grader.port: 127.0.0.1:{port}: Address already in use" in error_line(capsys)


def test_a_run_with_checkpoints_is_not_overwritten(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("runs/small/checkpoints/step-8").mkdir(parents=True)
    assert run("train", config, *SMALL) == 2
    assert "add --resume" in error_line(capsys)
