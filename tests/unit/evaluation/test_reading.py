"""Dialogues as text, and the search for evaluation problems among those that are trained on."""

from evaluation_data import make_dialogue

from services.contracts.problems import Problem
from services.evaluation.contamination import overlaps, report
from services.evaluation.show import Filter, readable, select

LONG = "A robe takes 2 bolts of blue fiber and half that much white fiber. How many bolts in total does it take?"


def problem(question):
    return Problem(question, ("3",))


def test_a_dialogue_is_readable_and_cannot_command_a_terminal():
    text = readable(make_dialogue("a", "wc", question="one\x1b[2J\ntwo"))
    assert "=== amc23 a, 2 attempts allowed, seed 0, temperature 1\none\ufffd[2J\ntwo\nright: 7\n" in text
    assert "--- attempt 1: - incorrect: 0 (10 tokens)\nit is 0\n--- attempt 2: + correct: 1 (10 tokens)" in text


def test_dialogues_are_chosen_by_what_became_of_them():
    dialogues = [make_dialogue("b", "ww"), make_dialogue("a", "ww"), make_dialogue("a", "wc"), make_dialogue("c", "w")]
    assert [d.problem_id for d in select(dialogues, Filter(is_wrong=True, attempts_made=2))] == ["a", "b"]
    assert [d.problem_id for d in select(dialogues, Filter(is_solved=True))] == ["a"]
    assert [d.problem_id for d in select(dialogues, Filter(max_attempts=1))] == ["c"]
    assert select(dialogues, Filter(benchmark="gsm8k")) == []
    assert [d.problem_id for d in select(dialogues, Filter(problem="WHAT is b"))] == ["b"]


def test_the_same_question_in_other_dress_is_met_exactly():
    [found] = overlaps([problem("what is $X+Y$ ?")], {"mine": [problem("What is x + y?"), problem("What is x - y?")]})
    assert (found.exact, found.similar) == (("What is x + y?",), ())


def test_ten_words_in_a_row_are_similar_and_nine_are_not():
    words = LONG.split()
    ten, nine = " ".join(["First,", *words[3:13], "and"]), " ".join(["First,", *words[3:12], "and"])
    [found] = overlaps([problem(ten)], {"mine": [problem(LONG)]})
    assert found.similar == (LONG,) and found.exact == ()
    assert overlaps([problem(nine)], {"mine": [problem(LONG)]})[0].num_found == 0


def test_a_short_question_within_a_longer_one_is_not_met():
    [found] = overlaps([problem("What is 1+1, and what is 2+2?")], {"mine": [problem("What is 2+2?"), problem("?!")]})
    assert found.num_found == 0


def test_the_report_has_a_line_for_each_benchmark():
    found = overlaps([problem(LONG)], {"mine": [problem(LONG)], "other": [problem("1+1")]})
    assert report(found, num_train=1) == [
        "contamination: mine: 1 of 1 problems are among the 1 training problems (1 exactly, 0 by 10 words in a row)",
        f"  exactly: {LONG[:97]}...",
        "contamination: other: none of 1 problems is among the 1 training problems",
    ]
