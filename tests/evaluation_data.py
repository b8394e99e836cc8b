"""Dialogues and headers for tests of what is computed of them."""

from services.evaluation.journal import Attempt, Dialogue
from services.evaluation.plan import Header, Settings

VERDICTS = {"c": "correct", "w": "incorrect", "n": "no_answer", "t": "timeout"}


def make_header(benchmarks=("amc23",), *, model="m", **settings) -> Header:
    values = {"attempts": (1, 2), "seeds": 1, **settings}
    return Header(
        model=model,
        weights={"sha256": "00"},
        settings=Settings(benchmarks=tuple(benchmarks), **values),
        data=dict.fromkeys(benchmarks, "d"),
        dialogue=None,
    )


def make_dialogue(problem, verdicts, *, n=None, seed=0, benchmark="amc23", temperature=1.0, **fields) -> Dialogue:
    """verdicts: a letter for each attempt, which says `answers`' word (its number by default) in 10 tokens."""
    answers = fields.pop("answers", None) or [str(i) for i in range(len(verdicts))]
    attempts = tuple(
        Attempt(text=f"it is {answer}", verdict=VERDICTS[letter], extracted=answer if letter in "cw" else None,
                num_tokens=10)
        for letter, answer in zip(verdicts, answers, strict=True)
    )  # fmt: skip
    values = {"question": f"what is {problem}?", "gold": ("7",), "seed": 1, "finish_reason": "attempts", **fields}
    return Dialogue(
        benchmark=benchmark, problem_id=problem, max_attempts=n or len(verdicts), seed_index=seed,
        temperature=temperature, attempts=attempts, num_tokens=50, **values,
    )  # fmt: skip
