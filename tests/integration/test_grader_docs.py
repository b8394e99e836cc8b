"""docs/grader-api.md against a live grader: every example is run, every row of the conventions is graded.

A ```bash or ```python block is run; what follows it as ```json or ```text is what it must print (times aside). ```sh
blocks install or start something: not run, but listed here, and the flags and files that they name must exist.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from live_grader import ROOT, live_grader

from services.contracts.config import load_resolved
from services.contracts.wire import Verdict
from services.grader.client import Question, SyncGraderClient

pytestmark = pytest.mark.integration

PAGE = (ROOT / "docs" / "grader-api.md").read_text(encoding="utf-8")
DOCUMENTED = "http://localhost:8000"
NOT_RUN = ("pip install ", "docker build ", "docker run ", "multiattempt serve grader", "GRADER_API_KEY=$(openssl ")
NOT_COMPARED = ("elapsed_ms", "cached")


class Block(NamedTuple):
    language: str
    text: str
    line: int


def blocks() -> list[Block]:
    found = re.finditer(r"^ *```(\w+)\n(.*?)^ *```$", PAGE, re.MULTILINE | re.DOTALL)
    return [Block(match[1], match[2], PAGE.count("\n", 0, match.start()) + 1) for match in found]


def examples() -> list[tuple[Block, Block | None]]:
    """Blocks that are run, each with the output that follows it."""
    pairs = zip(blocks(), [*blocks()[1:], None], strict=True)
    return [
        (block, follower if follower and follower.language in ("json", "text") else None)
        for block, follower in pairs
        if block.language in ("bash", "python")
    ]


def conventions() -> list[tuple[str, str, str]]:
    section = PAGE.partition("\n## Conventions\n")[2].partition("\n## ")[0]
    return re.findall(r"^\| `([^`]+)` \| `([^`]+)` \| (\w+) \|", section, re.MULTILINE)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with live_grader() as url:
        yield url


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reader")


def run(block: Block, url: str, folder: Path) -> str:
    text = block.text.replace(DOCUMENTED, url)
    command = ["bash", "-euo", "pipefail", "-c", text] if block.language == "bash" else [sys.executable, "-c", text]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    environment.pop("GRADER_API_KEY", None)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def stable(value: Any) -> Any:
    if isinstance(value, list):
        return [stable(entry) for entry in value]
    if isinstance(value, dict):
        return {key: stable(entry) for key, entry in value.items() if key not in NOT_COMPARED}
    return value


@pytest.mark.parametrize(("block", "expected"), examples(), ids=[f"line {block.line}" for block, _ in examples()])
def test_an_example_prints_what_the_page_says(block: Block, expected: Block | None, url: str, folder: Path) -> None:
    printed = run(block, url, folder)
    if expected is None:
        assert printed == ""
    elif expected.language == "json":
        assert stable(json.loads(printed)) == stable(json.loads(expected.text))
        if "elapsed_ms" in expected.text:
            assert re.findall(r'"(\w+)":', printed) == re.findall(r'"(\w+)":', expected.text)
    else:
        assert printed == expected.text


def test_the_conventions_are_the_graders(url: str) -> None:
    rows = conventions()
    with SyncGraderClient(url) as grader:
        grades = grader.grade_many([Question(rf"so \boxed{{{answer}}}", gold) for answer, gold, _ in rows])
    wrong = [(*row, grade.verdict) for row, grade in zip(rows, grades, strict=True) if grade.verdict != row[2]]
    assert len(rows) > 25 and wrong == []


def test_what_is_not_run_is_known_and_its_flags_and_files_exist() -> None:
    lines = [line for block in blocks() if block.language == "sh" for line in block.text.splitlines()]
    assert lines and all(line.strip().startswith(NOT_RUN) for line in lines)
    usage = subprocess.run(
        [sys.executable, "-m", "services.grader", "--help"], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    flags = {flag for line in lines if "serve grader" in line for flag in re.findall(r"--[a-z]+", line)}
    assert flags and all(flag in usage for flag in flags)
    [image] = {name for line in lines for name in re.findall(r"-f (\S+)", line)}
    assert (ROOT / image).exists()
    assert {block.language for block in blocks()} == {"sh", "bash", "python", "json", "text"}


def test_the_settings_shown_are_settings(url: str, folder: Path) -> None:
    [block] = [block for block, _ in examples() if "grader.json" in block.text]
    run(block, url, folder)
    assert load_resolved(folder / "grader.json").grader.reward_incorrect == -0.5


def test_every_verdict_and_route_is_documented(url: str) -> None:
    assert all(f"| `{verdict}` |" in PAGE for verdict in Verdict)
    routes = json.loads(
        subprocess.run(["curl", "-sf", f"{url}/openapi.json"], capture_output=True, timeout=20, check=True).stdout
    )["paths"]
    assert [route for route in routes if f"`{route}`" not in PAGE and f" {route}`" not in PAGE] == []
