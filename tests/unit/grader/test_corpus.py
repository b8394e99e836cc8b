"""How often the grader agrees with the labelled corpus; nobody looked at the check half while writing the grader."""

import json
from pathlib import Path

import corpus
import pytest

from services.contracts.wire import Verdict
from services.grader.answer import Extraction, extract
from services.grader.equivalence import compare

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
BENCHMARKS = {
    "math500": 500, "aime24": 30, "amc23": 40, "minerva_math": 272, "olympiadbench": 675, "gsm8k": 1_319,
    "asdiv": 2_215,
}  # fmt: skip
LEAST_AGREEMENT = 0.97
MOST_WRONGLY_ACCEPTED = 0.005


def verdict(case: corpus.Case) -> str:
    answer = extract(case.response, mode=Extraction(case.extraction))
    return Verdict.NO_ANSWER if answer is None else compare(answer, case.golds, alarm_s=5).verdict


@pytest.mark.parametrize("half", corpus.HALVES)
def test_the_grader_agrees_with_the_labels(half: str) -> None:
    cases = [case for case in corpus.load() if corpus.half(case) == half]
    verdicts = [(case, verdict(case)) for case in cases]
    wrongly_accepted = [case for case, found in verdicts if found == "correct" != case.verdict]
    disagreeing = [case for case, found in verdicts if found != case.verdict]
    assert len(wrongly_accepted) <= MOST_WRONGLY_ACCEPTED * len(cases)
    assert len(disagreeing) <= (1 - LEAST_AGREEMENT) * len(cases)


def golds(name: str) -> list[str]:
    rows = [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    if name == "minerva_math":
        return [extract(row["solution"]) or "" for row in rows]
    if name == "olympiadbench":
        return [", ".join(row["final_answer"]) for row in rows]
    if name == "gsm8k":
        return [row["answer"].rpartition("####")[2].strip() for row in rows]
    return [str(row["answer"]) for row in rows]


@pytest.mark.skipif(not DATA.exists(), reason=f"{DATA} is not here")
@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_gold_answer_of_the_benchmarks_equals_itself(name: str) -> None:
    answers = golds(name)
    assert len(answers) == BENCHMARKS[name]
    for gold in answers:
        answer = extract(rf"So it is $\boxed{{{gold}}}$.")
        assert answer is not None, gold
        assert compare(answer, [gold], alarm_s=5).verdict is Verdict.CORRECT, gold


@pytest.mark.skipif(not DATA.exists(), reason=f"{DATA} is not here")
@pytest.mark.parametrize("name", BENCHMARKS)
def test_nearly_every_gold_answer_of_the_benchmarks_can_be_read(name: str) -> None:
    unreadable = [
        gold for gold in golds(name) if compare("x^2+7919", [gold], alarm_s=5).verdict is Verdict.UNPARSABLE_GOLD
    ]
    assert len(unreadable) <= BENCHMARKS[name] / 100
