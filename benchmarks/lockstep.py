"""The reference for `benchmarks.rollout`: bare `vllm.LLM`, driven as a lock-step trainer drives it.

Reads the names of plans, a line each, and answers each with a line: the seconds it took. A plan holds dialogues that
our rollout service has already run. `single` generates all first attempts in one call of `LLM.generate`. `chunks` is
the loop of the paper's code: every unfinished dialogue of a batch gets at most CHUNK_TOKENS more tokens, all wait for
the slowest, ended attempts are graded, feedback is appended, and again.

Prompts, feedback and the number of tokens of each attempt are those of the plan, so both sides do the same work. Three
of the original's costs are left out, in its favour: it goes on sampling to the end of the chunk in which a box closes,
it sends text that is tokenised again, and it compares answers one at a time in the training process.
"""

import argparse
import asyncio
import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from services.grader.client import GraderClient
from services.rollout.vllm_engine import ENVIRONMENT, cpu_arguments

CHUNK_TOKENS = 64
GRADER_DEADLINE_S = 60.0


@dataclass
class Planned:
    """A dialogue to be repeated: before attempt k `spliced[k]` is appended, then `lengths[k]` tokens are sampled."""

    spliced: list[list[int]]
    lengths: list[int]
    texts: list[str]
    """What our service sampled in each attempt: the grader's work must be the same."""
    gold: list[str]
    ids: list[int] = field(default_factory=list)
    attempt: int = 0
    sampled: int = 0

    def restart(self) -> None:
        self.ids, self.attempt, self.sampled = list(self.spliced[0]), 0, 0

    @property
    def is_over(self) -> bool:
        return self.attempt == len(self.lengths)

    @property
    def missing(self) -> int:
        """Tokens that the attempt still lacks."""
        return self.lengths[self.attempt] - self.sampled

    def end_attempt(self) -> None:
        self.attempt, self.sampled = self.attempt + 1, 0
        if not self.is_over:
            self.ids += self.spliced[self.attempt]


class Reference:
    """One `vllm.LLM` with the engine settings of the replica, in this process: its fastest form on a CPU."""

    def __init__(self, settings: dict[str, Any]) -> None:
        os.environ |= ENVIRONMENT | {"OMP_NUM_THREADS": str(settings["threads"] or os.cpu_count())}
        from vllm import LLM

        self._llm = LLM(
            model=settings["model"],
            dtype=settings["dtype"],
            max_model_len=settings["max_model_len"],
            max_num_seqs=settings["max_num_seqs"],
            enforce_eager=True,
            enable_prefix_caching=True,
            skip_tokenizer_init=True,
            generation_config="vllm",
            logprobs_mode="processed_logprobs",
            disable_log_stats=True,
            distributed_executor_backend="uni",
            **cpu_arguments(kv_cache_mb=settings["kv_cache_mb"], max_model_len=settings["max_model_len"]),
        )

    def sample(self, prompts: list[list[int]], lengths: list[int], seed: int) -> list[list[int]]:
        """Exactly so many tokens for each prompt, with the sampling settings of the service."""
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        parameters = [
            SamplingParams(
                temperature=1.0,
                max_tokens=length,
                ignore_eos=True,
                seed=seed + i,
                logprobs=0,
                flat_logprobs=True,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            for i, length in enumerate(lengths)
        ]
        outputs = self._llm.generate([{"prompt_token_ids": ids} for ids in prompts], parameters, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def forget(self) -> None:
        """Empty the prefix cache."""
        self._llm.reset_prefix_cache()

    def single(self, dialogues: list[Planned]) -> float:
        """Seconds for all first attempts in one call."""
        prompts, lengths = [one.spliced[0] for one in dialogues], [one.lengths[0] for one in dialogues]
        started = time.perf_counter()
        self.sample(prompts, lengths, 0)
        return time.perf_counter() - started

    def chunks(self, dialogues: list[Planned], batch: int, grader_url: str) -> float:
        """Seconds for whole dialogues, a batch after the other."""
        started, calls = time.perf_counter(), 0
        with asyncio.Runner() as runner:
            grader = GraderClient(grader_url, deadline_s=GRADER_DEADLINE_S)
            for first in range(0, len(dialogues), batch):  # as in the paper's runs: a batch is decoded together
                unfinished = dialogues[first : first + batch]
                for dialogue in unfinished:
                    dialogue.restart()
                while unfinished:
                    wanted = [min(CHUNK_TOKENS, dialogue.missing) for dialogue in unfinished]
                    sampled = self.sample([dialogue.ids for dialogue in unfinished], wanted, 1000 * calls)
                    calls += 1
                    for dialogue, ids in zip(unfinished, sampled, strict=True):
                        dialogue.ids += ids
                        dialogue.sampled += len(ids)
                    ended = [dialogue for dialogue in unfinished if dialogue.missing == 0]
                    runner.run(_grade(grader, ended))
                    for dialogue in ended:
                        dialogue.end_attempt()
                    unfinished = [dialogue for dialogue in unfinished if not dialogue.is_over]
            runner.run(grader.close())
        return time.perf_counter() - started


async def _grade(grader: GraderClient, ended: list[Planned]) -> None:
    await asyncio.gather(*(grader.grade(one.texts[one.attempt], tuple(one.gold)) for one in ended))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("settings", type=Path, help="JSON: model and engine settings")
    settings = json.loads(parser.parse_args().settings.read_text())
    reference = Reference(settings)
    reference.sample([[1, 2]] * settings["max_num_seqs"], [4] * settings["max_num_seqs"], 0)
    print("ready", flush=True)
    for line in sys.stdin:
        plan = json.loads(Path(line.strip()).read_text())
        dialogues = [Planned(**one) for one in plan["dialogues"]]
        reference.forget()
        if plan["case"] == "single":
            seconds = reference.single(dialogues)
        else:
            seconds = reference.chunks(dialogues, settings["max_num_seqs"], settings["grader_url"])
        print(seconds, flush=True)


if __name__ == "__main__":
    main()
