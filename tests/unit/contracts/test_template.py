"""Dialogue turns become the ids that a chat template would have produced, one turn at a time."""

import pytest

from services.contracts.config import ConfigError
from services.contracts.settings import DialogueSection
from services.contracts.template import (
    assistant_end,
    end_of_turn_ids,
    feedback_ids,
    plural,
    prompt_ids,
    render_feedback_turn,
)
from services.contracts.wire import Verdict
from services.learner.arithmetic_model import build_tokenizer

CHAT = DialogueSection(template="chat")
PAPER = DialogueSection(template="paper")


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


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
        render_feedback_turn(settings, settings.feedback_wrong, 1),
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


def test_paper_strings_are_the_references_to_the_letter(tokenizer):
    assert tokenizer.decode(prompt_ids(tokenizer, PAPER, "1+1", max_attempts=1)) == (
        "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}. You have 1 "
        "attempts to answer the questions, and you should provide the full reasoning steps in each attempt.<|im_end|>\n"
        "<|im_start|>user\n1+1<|im_end|>\n<|im_start|>assistant\n"
    )
    feedback = feedback_ids(tokenizer, PAPER, Verdict.NO_ANSWER, attempts_left=3, turn_closed=False)
    assert tokenizer.decode(feedback) == (
        "<|im_end|>\n<|im_start|>system\nYour answer is incorrect. You have 3 attempts left. Try an alternative."
        "<|im_end|>\n<|im_start|>assistant\n"
    )


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


def test_question_braces_are_left_alone(tokenizer):
    assert "x_{1}" in tokenizer.decode(prompt_ids(tokenizer, PAPER, "x_{1}", max_attempts=1))
