"""`multiattempt prepare`: a run's folder for services that are started one by one."""

import json
import subprocess
from pathlib import Path

import pytest

from services.cli.__main__ import main
from services.cli.prepare import run_prepare
from services.contracts.config import ConfigError, load_resolved


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands that would have been run."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        commands.append(list(command))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def toml(folder: Path, extra: str = "") -> Path:
    path = folder / "run.toml"
    path.write_text(f'[run]\ndir = "{folder}"\nname = "r"\n[model]\nsource = "arithmetic"\n{extra}', encoding="utf-8")
    return path


def test_it_writes_the_configuration_for_its_owner_alone_and_makes_the_model(
    tmp_path: Path, started: list[list[str]]
) -> None:
    config = toml(tmp_path)
    assert main(["prepare", str(config), "--redis.url", "redis://:word@there:6379/0"]) == 0
    written = tmp_path / "r" / "config.json"
    assert load_resolved(written).redis.url == "redis://:word@there:6379/0"
    assert written.stat().st_mode & 0o077 == 0
    assert [command[1:] for command in started] == [["-m", "services.learner.prepare", "--config", str(written)]]


def test_again_beside_a_run_it_changes_nothing_else(tmp_path: Path, started: list[list[str]]) -> None:
    checkpoint = tmp_path / "r" / "checkpoints" / "version-00000008"
    checkpoint.mkdir(parents=True)
    for _ in range(2):
        assert run_prepare(toml(tmp_path), ["--redis.url", "redis://there:6379/0"]) == 0
    assert checkpoint.is_dir() and len(started) == 2
    assert [path.name for path in sorted((tmp_path / "r").iterdir())] == ["checkpoints", "config.json"]
    assert json.loads((tmp_path / "r" / "config.json").read_text(encoding="utf-8"))["run"]["name"] == "r"


def test_mistakes_are_told_before_anything_is_written(tmp_path: Path, started: list[list[str]]) -> None:
    with pytest.raises(ConfigError, match=r"redis\.url: empty"):
        run_prepare(toml(tmp_path), [])
    with pytest.raises(ConfigError, match=r"gone\.jsonl: no such data file"):
        run_prepare(
            toml(tmp_path, '[data]\nsource = "jsonl"\ntrain = "gone.jsonl"\n'), ["--redis.url", "redis://there:6379/0"]
        )
    assert not started and not (tmp_path / "r").exists()
