"""Real dialogues in a process of their own: VllmEngine and DialogueRunner, the same tasks in one or more passes.

Answers are judged by their spelling; no ledger, no HTTP: what is looked at are the tokens and their log-probabilities.
"""

import asyncio
import base64
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from services.contracts.config import RunConfig, load_resolved, to_toml_dict
from services.contracts.wire import Sampling, Task, Trajectory, Verdict, decode_trajectory, encode
from services.grader.answer import extract
from services.grader.client import Grade

ROOT = Path(__file__).parents[1]
NUM_PREFIX = 97  # tokens of the prompt that shows what is cached: three blocks and one


@dataclass(frozen=True, slots=True)
class Pass:
    """All tasks once, so many at a time, in this order. The prefix cache is empty at its beginning."""

    concurrency: int
    backwards: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run found."""

    passes: list[dict[int, Trajectory]]
    """By task id, one for each pass."""
    cached_again: int
    """Tokens found in the prefix cache when a prompt came a second time."""
    cached_after_swap: int
    """The same, when it came once more after new weights."""


class DialogueRun:
    """The process; it begins at once. `wait` for what it found."""

    def __init__(
        self, config: RunConfig, model: Path, tasks: Sequence[Task], passes: Sequence[Pass], folder: Path
    ) -> None:
        """folder: a new one, of this run alone."""
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(to_toml_dict(config)))
        (folder / "tasks.json").write_bytes(msgspec.json.encode(list(tasks)))
        (folder / "passes.json").write_text(json.dumps([asdict(one) for one in passes]))
        self._folder = folder
        self._log = folder / "log.txt"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.dialogue_run", str(folder), str(model)],
                cwd=ROOT,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
                stdout=log,
                stderr=log,
            )

    def wait(self, timeout_s: float) -> Outcome:
        """Until it has ended. Raises RuntimeError with the end of its log when it failed."""
        try:
            if self._process.wait(timeout_s):
                raise RuntimeError(self._log.read_text()[-3000:])
        finally:
            self._process.kill()
        found = json.loads((self._folder / "outcome.json").read_text())
        passes = [[decode_trajectory(base64.b64decode(one)) for one in lines] for lines in found.pop("passes")]
        return Outcome(passes=[{one.task_id: one for one in each} for each in passes], **found)


class SpellingGrader:
    """An answer is right when it is spelled like a gold answer."""

    async def grade(self, response: str, gold: tuple[str, ...]) -> Grade:
        found = extract(response)
        verdict = Verdict.NO_ANSWER if found is None else Verdict.CORRECT if found in gold else Verdict.INCORRECT
        await asyncio.sleep(0)
        return Grade(verdict, found in gold, found, None, elapsed_ms=0.0, cached=False)


async def run(config: RunConfig, model: Path, tasks: Sequence[Task], passes: Sequence[Pass]) -> dict[str, Any]:
    """`Outcome` as JSON."""
    from services.rollout.engine_stats import CACHED_TOKENS
    from services.rollout.runner import DialogueRunner
    from services.rollout.vllm_engine import VllmEngine

    engine = VllmEngine(config, model)
    await engine.start()
    runner = DialogueRunner(
        config, engine=engine, grader=SpellingGrader(), tokenizer=engine.tokenizer, replica_id="one"
    )

    async def one_pass(order: Pass) -> list[str]:
        await engine.async_llm.reset_prefix_cache()
        waiting = iter(tasks[::-1] if order.backwards else tasks)
        found: list[str] = []

        async def place() -> None:
            for task in waiting:
                found.append(base64.b64encode(encode(await runner.run(task))).decode())

        await asyncio.gather(*(place() for _ in range(order.concurrency)))
        return found

    async def cached() -> int:
        """Tokens of one and the same prompt that were found in the prefix cache."""
        before = CACHED_TOKENS._value.get()
        prompt = [5 + i % 7 for i in range(NUM_PREFIX)]
        nothing: dict[str, Any] = {"sampling": Sampling(), "stop_ids": frozenset(), "is_last": lambda _: False}
        await engine.sample(prompt, max_tokens=1, seed=0, **nothing)
        return int(CACHED_TOKENS._value.get() - before)

    try:
        outcome: dict[str, Any] = {"passes": [await one_pass(order) for order in passes]}
        await cached()
        outcome["cached_again"] = await cached()
        engine.version += 1
        outcome["cached_after_swap"] = await cached()
        return outcome
    finally:
        engine.stop()


def main() -> None:
    folder, model = Path(sys.argv[1]), Path(sys.argv[2])
    tasks = msgspec.json.decode((folder / "tasks.json").read_bytes(), type=list[Task])
    passes = [Pass(**one) for one in json.loads((folder / "passes.json").read_text())]
    outcome = asyncio.run(run(load_resolved(folder / "config.json"), model, tasks, passes))
    (folder / "outcome.json").write_text(json.dumps(outcome))


if __name__ == "__main__":
    main()
