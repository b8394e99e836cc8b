"""Dialogue turns -> token ids. Pure: the tokenizer is the only thing asked.

Text is tokenised once, turn by turn; ids the model sampled are never decoded and tokenised again, so the
ids of a dialogue are the concatenation of what these functions return and what the engine sampled.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol

from services.contracts.config import ConfigError
from services.contracts.settings import DialogueSection
from services.contracts.wire import Verdict

# The reference's strings, to the letter (paper.md section 1.2); feedback is a system turn there.
PAPER_PROMPT = (
    "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{{}}. "
    "You have {n} attempts to answer the questions, and you should provide the full reasoning steps in each attempt."
    "<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
)
PAPER_FEEDBACK = (
    "{turn_end}\n<|im_start|>system\nYour answer is incorrect. You have {n} attempts left. Try an alternative."
    "<|im_end|>\n<|im_start|>assistant\n"
)
PAPER_TURN_END = "<|im_end|>"

_MARK = "\N{OBJECT REPLACEMENT CHARACTER}"  # stands for the assistant's turn while its surroundings are found


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that is used here."""

    chat_template: str | None
    eos_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Text -> ids."""

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
        """Turns -> text, when called with `tokenize=False`."""


def plural(attempts: int) -> str:
    """ "1 attempt", "2 attempts"."""
    return f"{attempts} attempt" if attempts == 1 else f"{attempts} attempts"


def prompt_ids(tokenizer: Tokenizer, dialogue: DialogueSection, question: str, *, max_attempts: int) -> list[int]:
    """Ids of everything before the first sampled token, the opened assistant turn included.

    Raises ConfigError when `template = "chat"` and the tokenizer has no chat template.
    """
    if dialogue.template == "paper":
        text = PAPER_PROMPT.format(n=max_attempts, question=question)
        return tokenizer.encode(text, add_special_tokens=False)
    turns = [_turn("system", dialogue.system_prompt, max_attempts)] if dialogue.system_prompt else []
    for example_question, example_answer in dialogue.examples:
        turns.append({"role": "user", "content": example_question})
        turns.append({"role": "assistant", "content": example_answer})
    turns.append({"role": "user", "content": question})
    return tokenizer.encode(_render(tokenizer, turns, opened=True), add_special_tokens=False)


def feedback_ids(
    tokenizer: Tokenizer, dialogue: DialogueSection, verdict: Verdict, *, attempts_left: int, turn_closed: bool
) -> list[int]:
    """Ids spliced in after a failed attempt, the next opened assistant turn included.

    turn_closed: the model itself sampled the end of its turn; otherwise the end is spliced in first.
    """
    if dialogue.template == "paper":
        text = PAPER_FEEDBACK.format(n=attempts_left, turn_end="" if turn_closed else PAPER_TURN_END)
        return tokenizer.encode(text, add_special_tokens=False)
    message = {
        Verdict.NO_ANSWER: dialogue.feedback_no_answer,
        Verdict.TIMEOUT: dialogue.feedback_timeout,
    }.get(verdict, dialogue.feedback_wrong)
    turn = _turn(dialogue.feedback_role, message, attempts_left)
    end, between = assistant_end(tokenizer)
    opened = _render_after_assistant(tokenizer, turn)
    return tokenizer.encode(("" if turn_closed else end) + between + opened, add_special_tokens=False)


def end_of_turn_ids(tokenizer: Tokenizer, dialogue: DialogueSection) -> frozenset[int]:
    """Ids whose sampling ends an attempt: the template's end of turn and the tokenizer's EOS."""
    end = PAPER_TURN_END if dialogue.template == "paper" else assistant_end(tokenizer)[0]
    ids = tokenizer.encode(end, add_special_tokens=False)
    stops = {ids[0]} if len(ids) == 1 else set()
    if tokenizer.eos_token_id is not None:
        stops.add(tokenizer.eos_token_id)
    return frozenset(stops)


def assistant_end(tokenizer: Tokenizer) -> tuple[str, str]:
    """(end-of-turn marker, text up to the next turn) of the chat template: `("<|im_end|>", "\\n")` in ChatML."""
    return _assistant_end(_Key(tokenizer))


def render_feedback_turn(dialogue: DialogueSection, message: str, attempts_left: int) -> dict[str, str]:
    """The feedback as a chat turn, for readers of dialogues."""
    return _turn(dialogue.feedback_role, message, attempts_left)


class _Key:
    """A tokenizer as a cache key: by identity."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    def __hash__(self) -> int:
        return id(self.tokenizer)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.tokenizer is other.tokenizer


@lru_cache(maxsize=8)
def _assistant_end(key: _Key) -> tuple[str, str]:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": _MARK}]
    tail = _render(key.tokenizer, turns, opened=False).partition(_MARK)[2]
    marker = tail.rstrip()
    return marker, tail[len(marker) :]


def _render_after_assistant(tokenizer: Tokenizer, turn: dict[str, str]) -> str:
    """Text of `turn` and the assistant turn opened after it, as the template renders them mid-dialogue."""
    before = [{"role": "user", "content": "q"}, {"role": "assistant", "content": _MARK}]
    tail = _render(tokenizer, [*before, turn], opened=True).partition(_MARK)[2]
    end, between = assistant_end(tokenizer)
    return tail.removeprefix(end + between)


def _turn(role: str, message: str, attempts: int) -> dict[str, str]:
    return {"role": role, "content": message.format(n=attempts, attempts=plural(attempts))}


def _render(tokenizer: Tokenizer, turns: Sequence[dict[str, str]], *, opened: bool) -> str:
    if tokenizer.chat_template is None:
        raise ConfigError('dialogue.template: "chat" needs a tokenizer with a chat template; set template = "paper"')
    text: str = tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=opened)
    return text
