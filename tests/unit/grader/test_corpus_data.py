"""The corpus itself: valid, without duplicates, right and wrong lines everywhere, two halves of like size."""

import json
from collections import Counter, defaultdict

import pytest
from corpus import HALVES, Case, half, load


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return load()


def test_size(cases):
    assert len(cases) >= 600


def test_every_line_has_a_reason(cases):
    assert all(case.reason.strip() for case in cases)


def test_no_duplicates(cases):
    seen = defaultdict(list)
    for case in cases:
        seen[case.golds, case.response, case.extraction].append(f"{case.category}:{case.line}")
    assert [places for places in seen.values() if len(places) > 1] == []


def test_each_category_has_right_and_wrong_lines(cases):
    verdicts = defaultdict(set)
    for case in cases:
        verdicts[case.category].add(case.verdict == "correct")
    assert sorted(category for category, kinds in verdicts.items() if kinds != {True, False}) == []


def test_halves_are_of_like_size(cases):
    sizes = Counter(map(half, cases))
    assert set(sizes) == set(HALVES)
    assert all(0.4 <= size / len(cases) <= 0.6 for size in sizes.values())


def test_half_depends_on_the_question_only():
    case = Case("a", 1, ("5",), r"\boxed{5}", "boxed", "correct", "identical")
    other = Case("b", 9, ("5",), r"\boxed{5}", "boxed", "incorrect", "a corrected label")
    assert half(case) == half(other)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "Expecting"),
        ("[]", "not a JSON object"),
        ('{"gold": "5"}', "missing reason, response, verdict"),
        ({"note": "x"}, "unknown note"),
        ({"gold": []}, "gold is neither"),
        ({"gold": 5}, "gold is neither"),
        ({"response": None}, "response is not a string"),
        ({"extraction": "json"}, "extraction is not one of boxed, auto"),
        ({"verdict": "right"}, "verdict is not one of"),
        ({"reason": " "}, "reason is empty"),
    ],
)
def test_bad_line_is_named(tmp_path, line, message):
    good = {"gold": "5", "response": r"\boxed{5}", "verdict": "correct", "reason": "identical"}
    bad = line if isinstance(line, str) else json.dumps(good | line)
    path = tmp_path / "numbers.jsonl"
    path.write_text(f"{json.dumps(good)}\n{bad}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert "\n" not in str(caught.value)
