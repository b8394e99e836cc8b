"""docs/grader-api.md against a live grader: every example is run, every row of the conventions is graded.

A ```bash or ```python block is run; what follows it as ```json or ```text is what it must print (times aside). ```sh
blocks install or start something: not run, but listed here, and the flags and files that they name must exist.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import docs_examples
import pytest
from docs_examples import ROOT, Block
from live_grader import live_grader

from services.contracts.config import load_resolved
from services.contracts.wire import Verdict
from services.grader.client import Question, SyncGraderClient

pytestmark = pytest.mark.integration

PAGE = docs_examples.read("grader-api.md")
BLOCKS, EXAMPLES = docs_examples.blocks(PAGE), docs_examples.examples(PAGE)
NOT_RUN = ("pip install ", "docker build ", "docker run ", "multiattempt serve grader", "GRADER_API_KEY=$(openssl ")
NOT_COMPARED = ("elapsed_ms", "cached")


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


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRADER_API_KEY", raising=False)


def run(block: Block, url: str, folder: Path) -> str:
    return docs_examples.run(block, folder, replace={"http://localhost:8000": url})


@pytest.mark.parametrize(("block", "expected"), EXAMPLES, ids=[f"line {block.line}" for block, _ in EXAMPLES])
def test_an_example_prints_what_the_page_says(block: Block, expected: Block | None, url: str, folder: Path) -> None:
    printed = run(block, url, folder)
    docs_examples.check(printed, expected, not_compared=NOT_COMPARED)
    if expected is not None and "elapsed_ms" in expected.text:
        assert re.findall(r'"(\w+)":', printed) == re.findall(r'"(\w+)":', expected.text)


def test_the_conventions_are_the_graders(url: str) -> None:
    rows = conventions()
    with SyncGraderClient(url) as grader:
        grades = grader.grade_many([Question(rf"so \boxed{{{answer}}}", gold) for answer, gold, _ in rows])
    wrong = [(*row, grade.verdict) for row, grade in zip(rows, grades, strict=True) if grade.verdict != row[2]]
    assert len(rows) > 25 and wrong == []


def test_what_is_not_run_is_known_and_its_flags_and_files_exist() -> None:
    lines = [line for block in BLOCKS if block.language == "sh" for line in block.text.splitlines()]
    assert lines and all(line.strip().startswith(NOT_RUN) for line in lines)
    usage = subprocess.run(
        [sys.executable, "-m", "services.grader", "--help"], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    flags = {flag for line in lines if "serve grader" in line for flag in re.findall(r"--[a-z]+", line)}
    assert flags and all(flag in usage for flag in flags)
    [image] = {name for line in lines for name in re.findall(r"-f (\S+)", line)}
    assert (ROOT / image).exists()
    assert {block.language for block in BLOCKS} == {"sh", "bash", "python", "json", "text"}


def test_the_settings_shown_are_settings(url: str, folder: Path) -> None:
    [block] = [block for block, _ in EXAMPLES if "grader.json" in block.text]
    run(block, url, folder)
    assert load_resolved(folder / "grader.json").grader.reward_incorrect == -0.5


def test_every_verdict_and_route_is_documented(url: str) -> None:
    assert all(f"| `{verdict}` |" in PAGE for verdict in Verdict)
    routes = json.loads(
        subprocess.run(["curl", "-sf", f"{url}/openapi.json"], capture_output=True, timeout=20, check=True).stdout
    )["paths"]
    assert [route for route in routes if f"`{route}`" not in PAGE and f" {route}`" not in PAGE] == []
