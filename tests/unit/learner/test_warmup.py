"""The supervised warm-up shows dialogues as the run will hold them, and trains the last attempt alone."""

from types import SimpleNamespace

import pytest
import torch

from services.contracts.config import load
from services.contracts.problems import Problem
from services.learner.arithmetic_model import build_tokenizer
from services.learner.warmup import warm_up

PROBLEM = Problem("47+25", ("72",), "12,7")


class Reader(torch.nn.Module):
    """A model that learns nothing and remembers what it was shown."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.bias, self.shown = torch.nn.Parameter(torch.zeros(vocabulary)), []

    def forward(self, input_ids):
        self.shown += input_ids.tolist()
        return SimpleNamespace(logits=self.bias.expand(*input_ids.shape, -1))


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def dialogues(tokenizer, *flags):
    """Texts of what a warm-up shows."""
    config = load(
        None, ["--model.warmup_steps=8", "--model.warmup_batch=64", "--dialogue.system_prompt=", *flags], env={}
    )
    model = Reader(len(tokenizer))
    warm_up(model, tokenizer, [PROBLEM], config)
    return [tokenizer.decode(ids).replace("<|endoftext|>", "") for ids in model.shown]


def test_a_wrong_attempt_is_followed_by_its_feedback(tokenizer):
    later = [text for text in dialogues(tokenizer) if text.count("\\boxed") > 1]
    assert later
    for text in later:
        earlier, _, last = text.rpartition("<|im_start|>assistant")
        assert "incorrect" in earlier and "\\boxed{72}" not in earlier
        assert last.endswith("\\boxed{72}")


def test_where_verdicts_are_kept_earlier_attempts_are_right_or_wrong_and_asked_for_alike(tokenizer):
    texts = dialogues(tokenizer, "--dialogue.feedback=none", "--dialogue.feedback_none=You have {attempts} left.")
    later = [text for text in texts if text.count("\\boxed") > 1]
    earlier = [text.rpartition("<|im_start|>assistant")[0] for text in later]
    assert all("incorrect" not in text and "left." in text for text in earlier)
    assert {"\\boxed{72}" in text for text in earlier} == {True, False}
    assert all(text.endswith("\\boxed{72}") for text in later)
