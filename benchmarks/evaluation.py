"""How fast an evaluation is against bare vLLM: `make bench-evaluation`.

Ours: single attempts asked for as `multiattempt eval` asks, over HTTP, graded and written to its journal, through the
replicas of `benchmarks.rollout`. The reference samples as many tokens for the same prompts in one call of
`LLM.generate`, and neither grades nor writes. The two take turns, NUM_ROUNDS times; the claim compares medians.

The last line printed is one JSON object.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.rollout import MODELS, NUM_ROUNDS, REPLICAS, Reference, System, system
from services.contracts.problems import Problem, load_problems
from services.contracts.template import prompt_ids
from services.evaluation.asking import Asker, Tally
from services.evaluation.journal import Dialogue, Journal
from services.evaluation.plan import Header, Settings, asks, problem_id

NAME = "train"  # there are enough problems
PATIENCE_S = 60.0


def evaluate(
    running: System, problems: dict[str, Problem], *, seed: int, concurrency: int
) -> tuple[list[Dialogue], Tally]:
    """One evaluation of these problems with one attempt each, its journal included."""
    settings = Settings(benchmarks=(NAME,), attempts=(1,), seeds=1, seed=seed)
    header = Header(model="bench", weights={}, settings=settings, data={}, dialogue=None)
    urls = [replica.url for replica in running.replicas]
    with tempfile.TemporaryDirectory(prefix="bench-evaluation-") as folder, Journal(Path(folder), header) as journal:
        asker = Asker(urls, journal, settings, {NAME: problems}, patience_s=PATIENCE_S)
        wanted = asks(settings, {NAME: problems})
        tally = asyncio.run(asker.run(wanted, version=0, concurrency=concurrency))
        return list(journal.done.values()), tally


def planned(tokenizer: Any, running: System, dialogue: Dialogue) -> dict[str, Any]:
    """The same dialogue, for `lockstep.Planned`."""
    [attempt] = dialogue.attempts
    ids = prompt_ids(tokenizer, running.config.dialogue, dialogue.question, max_attempts=1)
    return {"spliced": [ids], "lengths": [attempt.num_tokens], "texts": [attempt.text], "gold": list(dialogue.gold)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="tinyqwen")
    name = parser.parse_args().model
    model = MODELS[name]
    rates: list[tuple[float, float]] = []
    with system(model, (), replicas=REPLICAS) as running:
        running.start_replicas(REPLICAS)
        some = load_problems(running.config).train[: model.num_single]
        problems = {problem_id(problem): problem for problem in some}
        tokenizer = AutoTokenizer.from_pretrained(running.model)
        bare = Reference(running, num_seqs=model.num_seqs)
        try:
            for round_ in range(NUM_ROUNDS):
                found, tally = evaluate(running, problems, seed=round_, concurrency=2 * model.num_seqs)
                seconds = bare.repeat("single", [planned(tokenizer, running, dialogue) for dialogue in found])
                rates.append((tally.num_tokens / tally.seconds, tally.num_tokens / seconds))
                print(f"{name}: tokens/s: ours {rates[-1][0]:.0f}, bare {rates[-1][1]:.0f}")
        finally:
            bare.stop()
    ours, reference = (statistics.median(side) for side in zip(*rates, strict=True))
    claim = {"benchmark": "evaluation", "case": f"{name}: single attempt over HTTP", "ours": round(ours, 1)}
    print(
        json.dumps({**claim, "reference": round(reference, 1), "ratio": round(ours / reference, 3), "unit": "tokens/s"})
    )


if __name__ == "__main__":
    main()
