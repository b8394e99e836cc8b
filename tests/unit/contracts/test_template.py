"""Dialogue turns become the ids that a chat template would have produced, one turn at a time."""

from dataclasses import asdict

import pytest

from services.contracts.config import ConfigError
from services.contracts.settings import DialogueSection
from services.contracts.template import (
    assistant_end,
    end_of_turn_ids,
    feedback_turn,
    plural,
    prompt_ids,
    reply_ids,
)
from services.contracts.wire import Verdict
from services.learner.arithmetic_model import build_tokenizer

CHAT = DialogueSection(template="chat")
PAPER = DialogueSection(template="paper")


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def feedback_ids(tokenizer, settings, verdict, *, attempts_left, turn_closed):
    turn = feedback_turn(settings, verdict, attempts_left=attempts_left)
    return reply_ids(tokenizer, settings, turn, turn_closed=turn_closed)


def test_plural_is_right_for_one():
    assert plural(1) == "1 attempt"
    assert plural(2) == "2 attempts"


def test_chat_prompt_is_what_the_chat_template_renders(tokenizer):
    turns = [
        {"role": "system", "content": CHAT.system_prompt.format(n=1, attempts="1 attempt")},
        {"role": "user", "content": "1+1"},
    ]
    rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = prompt_ids(tokenizer, CHAT, "1+1", max_attempts=1)
    assert tokenizer.decode(ids) == rendered
    assert "1 attempt " in rendered


def test_spliced_dialogue_reads_like_one_rendered_at_once(tokenizer):
    settings = DialogueSection(template="chat", system_prompt="")
    answer = "\\boxed{3}"
    ids = prompt_ids(tokenizer, settings, "1+1", max_attempts=2)
    ids += tokenizer.encode(answer, add_special_tokens=False)
    ids += feedback_ids(tokenizer, settings, Verdict.INCORRECT, attempts_left=1, turn_closed=False)
    turns = [
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": answer},
        asdict(feedback_turn(settings, Verdict.INCORRECT, attempts_left=1)),
    ]
    whole = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert ids == tokenizer.encode(whole, add_special_tokens=False)


def test_feedback_after_a_sampled_end_of_turn_does_not_end_it_twice(tokenizer):
    closed = feedback_ids(tokenizer, CHAT, Verdict.INCORRECT, attempts_left=2, turn_closed=True)
    spliced = feedback_ids(tokenizer, CHAT, Verdict.INCORRECT, attempts_left=2, turn_closed=False)
    end = tokenizer.encode("<|im_end|>", add_special_tokens=False)
    assert spliced == end + closed


@pytest.mark.parametrize(
    ("verdict", "words"),
    [
        (Verdict.INCORRECT, "Your answer is incorrect. You have 1 attempt left."),
        (Verdict.NO_ANSWER, "No boxed answer was found. You have 1 attempt left."),
        (Verdict.TIMEOUT, "Your answer was not accepted. You have 1 attempt left."),
    ],
)
def test_feedback_says_what_happened(tokenizer, verdict, words):
    assert words in tokenizer.decode(feedback_ids(tokenizer, CHAT, verdict, attempts_left=1, turn_closed=True))


# paper.md section 1.2, copied from there: N stands for the number of attempts.
PAPER_PROMPT = (
    r"<|im_start|>system\nPlease reason step by step, and put your final answer within \boxed{}. You have {N} "
    r"attempts to answer the questions, and you should provide the full reasoning steps in each attempt.<|im_end|>\n"
    r"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
)
PAPER_FEEDBACK = (
    r"<|im_end|>\n<|im_start|>system\nYour answer is incorrect. You have {N'} attempts left. Try an alternative."
    r"<|im_end|>\n<|im_start|>assistant\n"
)


def as_written(string: str, **values: str) -> str:
    for name, value in {"\\n": "\n", **values}.items():
        string = string.replace(name, value)
    return string


@pytest.mark.parametrize("n", [1, 2, 5])  # the reference says "1 attempts"
def test_paper_strings_are_the_references_to_the_letter(tokenizer, n):
    prompt = tokenizer.decode(prompt_ids(tokenizer, PAPER, "x_{1}?", max_attempts=n))
    assert prompt == as_written(PAPER_PROMPT, **{"{N}": str(n), "{question}": "x_{1}?"})
    for verdict in (Verdict.INCORRECT, Verdict.NO_ANSWER, Verdict.TIMEOUT):  # all are "incorrect" there
        feedback = as_written(PAPER_FEEDBACK, **{"{N'}": str(n)})
        open_turn = feedback_ids(tokenizer, PAPER, verdict, attempts_left=n, turn_closed=False)
        closed_turn = feedback_ids(tokenizer, PAPER, verdict, attempts_left=n, turn_closed=True)
        assert tokenizer.decode(open_turn) == feedback
        assert tokenizer.decode(closed_turn) == feedback.removeprefix("<|im_end|>")


def test_the_papers_strings_do_not_need_a_chat_template():
    bare = build_tokenizer()
    bare.chat_template = None
    assert prompt_ids(bare, PAPER, "1+1", max_attempts=1) == prompt_ids(build_tokenizer(), PAPER, "1+1", max_attempts=1)


def test_without_a_system_prompt_the_question_comes_first(tokenizer):
    settings = DialogueSection(template="chat", system_prompt="")
    text = tokenizer.decode(prompt_ids(tokenizer, settings, "1+1", max_attempts=3))
    assert text == "<|im_start|>user\n1+1<|im_end|>\n<|im_start|>assistant\n"


def test_the_texts_are_the_users_own(tokenizer):
    settings = DialogueSection(
        system_prompt="Box it: \\boxed{{}}, {n}.",
        feedback_wrong="No ({n}, {attempts}).",
        feedback_no_answer="Nothing.",
        feedback_role="system",
    )
    assert "Box it: \\boxed{}, 3.<" in tokenizer.decode(prompt_ids(tokenizer, settings, "1+1", max_attempts=3))
    wrong = feedback_turn(settings, Verdict.INCORRECT, attempts_left=1)
    assert (wrong.role, wrong.content) == ("system", "No (1, 1 attempt).")
    assert feedback_turn(settings, Verdict.NO_ANSWER, attempts_left=1).content == "Nothing."


def test_examples_come_before_the_question(tokenizer):
    settings = DialogueSection(template="chat", system_prompt="", examples=(("2+2", "\\boxed{4}"),))
    text = tokenizer.decode(prompt_ids(tokenizer, settings, "1+1", max_attempts=1))
    assert text.index("2+2") < text.index("\\boxed{4}") < text.index("1+1")


def test_end_of_turn_is_the_templates_marker_and_eos(tokenizer):
    assert assistant_end(tokenizer) == ("<|im_end|>", "\n")
    assert end_of_turn_ids(tokenizer, CHAT) == {tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id}


def test_a_tokenizer_without_chat_template_is_refused_with_the_way_out():
    bare = build_tokenizer()
    bare.chat_template = None
    with pytest.raises(ConfigError, match='set template = "paper"'):
        prompt_ids(bare, CHAT, "1+1", max_attempts=1)
