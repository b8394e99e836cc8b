"""docs/rollout-api.md and docs/environments.md: every example is run, every table is held against the code."""

import asyncio
import re
import subprocess
import sys
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path

import docs_examples
import httpx
import pytest
from docs_examples import ROOT, Block
from fakes import FakeGrader
from live_replica import TOKEN, LiveReplica, ScriptedEngine, live_replica

from services.contracts.config import ConfigError, RunConfig, load
from services.contracts.problems import load_problems
from services.contracts.wire import FinishReason, Task, Trajectory, Verdict
from services.rollout.environment import load_environment
from services.rollout.events import Event, FedBack, Prompted
from services.rollout.protocol import EVENTS
from services.rollout.runner import DialogueRunner

pytestmark = pytest.mark.integration

PAGE = docs_examples.read("rollout-api.md")
EXAMPLES = docs_examples.examples(PAGE)
TASK_PAGE = docs_examples.read("environments.md")
NOT_COMPARED = ("grading_ms", "seconds")
NOT_RUN = ("multiattempt serve rollout --config ", "TOKEN=$(python3 -c ")


@pytest.fixture(scope="module")
def live(grader_url: str) -> Iterator[LiveReplica]:
    with live_replica(["\\boxed{62}", "\\boxed{72}"], grader_url=grader_url) as replica:
        yield replica


@pytest.mark.parametrize(("block", "expected"), EXAMPLES, ids=[f"line {block.line}" for block, _ in EXAMPLES])
def test_an_example_prints_what_the_page_says(
    block: Block, expected: Block | None, live: LiveReplica, tmp_path: Path
) -> None:
    live.replica.worker.is_draining = False  # one of the examples drains it
    printed = docs_examples.run(block, tmp_path, replace={"http://localhost:8100": live.url}, env={"TOKEN": TOKEN})
    docs_examples.check(printed, expected, not_compared=NOT_COMPARED)


def test_what_is_not_run_is_known_and_its_flags_exist() -> None:
    lines = [line for block in docs_examples.blocks(PAGE) if block.language == "sh" for line in block.text.splitlines()]
    assert lines and all(line.startswith(NOT_RUN) for line in lines)
    usage = subprocess.run(
        [sys.executable, "-m", "services.rollout", "--help"], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    flags = {flag for line in lines for flag in re.findall(r"--[a-z-]+", line)} | {"--replica-id"}
    assert all(flag in usage for flag in flags)


def test_every_metric_of_a_replica_is_documented_with_its_type_and_no_other(live: LiveReplica) -> None:
    text = httpx.get(f"{live.url}/metrics", timeout=10).text
    kinds = {
        (name, kind)
        for name, kind in re.findall(r"^# TYPE (multiattempt_rollout_\w+) (\w+)$", text, re.MULTILINE)
        if not name.endswith("_created")
    }
    assert set(re.findall(r"^\| `(multiattempt_rollout_\w+)` \| (\w+) \|", PAGE, re.MULTILINE)) == kinds


def test_every_route_event_and_finish_reason_is_documented(live: LiveReplica) -> None:
    routes = httpx.get(f"{live.url}/openapi.json", timeout=10).json()["paths"]
    assert [route for route in routes if f"`{route}`" not in PAGE and f" {route}`" not in PAGE] == []
    rows = [line for line in EVENTS.splitlines() if line.startswith("| `")]
    assert len(rows) == 7 and all(f"\n{row}\n" in PAGE for row in rows)
    assert all(f"`{reason}`" in PAGE for reason in FinishReason)


def test_every_status_of_the_document_is_documented_and_no_other(live: LiveReplica) -> None:
    routes = httpx.get(f"{live.url}/openapi.json", timeout=10).json()["paths"]
    statuses = {int(status) for route in routes.values() for one in route.values() for status in one["responses"]}
    documented = {int(status) for status in re.findall(r"^\| (\d{3}) \|", PAGE, re.MULTILINE)}
    assert documented == {status for status in statuses if status >= 400} | {404, 500}
    assert documented <= set(HTTPStatus)


@pytest.mark.parametrize("name", ["rollout-api.md", "environments.md"])
def test_the_settings_and_files_named_exist(name: str) -> None:
    page = docs_examples.read(name)
    sections = {section: type(getattr(RunConfig(), section)).model_fields for section in RunConfig.model_fields}
    settings = re.findall(rf"`({'|'.join(sections)})\.(\w+)`", page)
    assert settings and [pair for pair in settings if pair[1] not in sections[pair[0]]] == []
    assert [
        path for path in re.findall(r"`((?:tests|services|docs)/[\w/.-]+)`", page) if not (ROOT / path).exists()
    ] == []


WORD = Task(task_id=0, batch=0, problem="lamp", gold=("pmal",), max_attempts=3, seed=0)


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with the files that docs/environments.md shows."""
    for block in docs_examples.blocks(TASK_PAGE):
        name = "words.jsonl" if block.language == "json" else block.text.partition("\n")[0].removeprefix("# ")
        if "." in name.partition(" ")[0] and " " not in name:
            (tmp_path / name).write_text(block.text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    modules = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def run_words(reader: Path, script: list[str], *flags: str) -> tuple[Trajectory, list[str]]:
    """The dialogue on the word, and the prompts of its attempts."""
    config = load(reader / "words.toml", flags, env={})
    engine = ScriptedEngine(script)
    prompts: list[str] = []

    def listen(event: Event) -> None:
        if isinstance(event, Prompted | FedBack):
            prompts.append(engine.tokenizer.decode(event.token_ids))

    runner = DialogueRunner(config, engine=engine, grader=FakeGrader(), tokenizer=engine.tokenizer, replica_id="r")
    return asyncio.run(runner.run(WORD, listen=listen)), prompts


def test_the_task_of_the_page_runs(reader: Path) -> None:
    trajectory, (first, *feedback) = run_words(reader, ["It is pmla.", "", "Pmal!"])
    assert first.endswith(
        "user\nSpell the word lamp backwards, and say nothing else. You have 3 attempts.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert ["2 of 4 letters" in feedback[0], "That was no word. You have 1 attempt left." in feedback[1]] == [True] * 2
    assert [attempt.verdict for attempt in trajectory.attempts] == ["incorrect", "no_answer", "correct"]
    assert [attempt.extracted for attempt in trajectory.attempts] == ["pmla", None, "pmal"]
    assert trajectory.reward == 1 / 3


def test_the_tasks_data_is_read_and_the_example_prints_what_the_page_says(reader: Path) -> None:
    config = load(reader / "words.toml", [], env={})
    problems = load_problems(config)
    assert {problem.question for problem in (*problems.train, *problems.heldout)} == {"lamp", "stone"}
    [(block, expected)] = [pair for pair in docs_examples.examples(TASK_PAGE) if pair[1] and pair[1].language == "text"]
    docs_examples.check(docs_examples.run(block, reader, replace={}), expected)


def test_a_mistake_in_a_task_is_the_line_that_the_page_shows(reader: Path) -> None:
    rows = re.findall(r"^\| `([\w:]+)` \| `{1,2}('.+?) ?`{1,2} \|$", TASK_PAGE, re.MULTILINE)
    assert len(rows) == 7
    for name, line in rows:
        with pytest.raises(ConfigError) as found:
            load_environment(load(None, [f"--dialogue.environment={name}"], env={}).dialogue)
        assert str(found.value) == f"dialogue.environment: {line}"


def test_a_reward_that_is_no_number_fails_the_dialogue(reader: Path) -> None:
    grader_says = "the reward of ['correct'] is nan"
    assert grader_says in TASK_PAGE
    config = load(None, ["--dialogue.environment=broken:Dividing"], env={})
    engine = ScriptedEngine(["\\boxed{2}"])
    runner = DialogueRunner(
        config, engine=engine, grader=FakeGrader(Verdict.CORRECT), tokenizer=engine.tokenizer, replica_id="r"
    )
    with pytest.raises(ValueError, match=re.escape(grader_says)):
        asyncio.run(runner.run(WORD))
