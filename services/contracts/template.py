"""Dialogue turns -> token ids. Pure: the tokenizer is the only thing asked.

Text is tokenised once, turn by turn; ids the model sampled are never decoded and tokenised again, so the
ids of a dialogue are the concatenation of what these functions return and what the engine sampled.

`opening_ids` and `reply_ids` take any turns; `prompt_turns` and `feedback_turn` are those of the built-in tasks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Protocol

from services.contracts.config import ConfigError
from services.contracts.settings import DialogueSection
from services.contracts.wire import Verdict

# The reference's words, to the letter (paper.md section 1.2); feedback is a system turn there.
PAPER_SYSTEM = (
    "Please reason step by step, and put your final answer within \\boxed{{}}. "
    "You have {n} attempts to answer the questions, and you should provide the full reasoning steps in each attempt."
)
PAPER_FEEDBACK = "Your answer is incorrect. You have {n} attempts left. Try an alternative."
# Where the verdict is kept from the model: the same invitation, without it.
PAPER_NEUTRAL = "You have {n} attempts left. Try an alternative."
# `template = "paper"` writes ChatML literally, whatever the tokenizer's own chat template is.
PAPER_TURN = "<|im_start|>{role}\n{content}<|im_end|>\n"
PAPER_OPENED = "<|im_start|>assistant\n"
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


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn that the model reads."""

    role: Literal["system", "user", "assistant"]
    content: str


def opening_ids(tokenizer: Tokenizer, dialogue: DialogueSection, turns: Sequence[Turn]) -> list[int]:
    """Ids of everything before the first sampled token: `turns`, and the opened assistant turn.

    Raises ConfigError when `template = "chat"` and the tokenizer has no chat template.
    """
    text = _chatml(turns) if dialogue.template == "paper" else _render(tokenizer, turns, opened=True)
    return tokenizer.encode(text, add_special_tokens=False)


def reply_ids(tokenizer: Tokenizer, dialogue: DialogueSection, turn: Turn, *, turn_closed: bool) -> list[int]:
    """Ids of `turn` as spliced in after an attempt, and the next opened assistant turn.

    turn_closed: the model itself sampled the end of its turn; otherwise the end is spliced in first.
    """
    if dialogue.template == "paper":
        end, between, reply = PAPER_TURN_END, "\n", _chatml([turn])
    else:
        end, between = assistant_end(tokenizer)
        reply = _render_after_assistant(tokenizer, turn)
    return tokenizer.encode(("" if turn_closed else end) + between + reply, add_special_tokens=False)


def prompt_turns(dialogue: DialogueSection, question: str, *, max_attempts: int) -> list[Turn]:
    """What the built-in tasks say before the first attempt."""
    user = Turn("user", question)
    if dialogue.template == "paper":
        return [_say("system", PAPER_SYSTEM, max_attempts), user]
    turns = [_say("system", dialogue.system_prompt, max_attempts)] if dialogue.system_prompt else []
    for example_question, example_answer in dialogue.examples:
        turns += [Turn("user", example_question), Turn("assistant", example_answer)]
    return [*turns, user]


def feedback_turn(dialogue: DialogueSection, verdict: Verdict, *, attempts_left: int) -> Turn:
    """What the built-in tasks say after an attempt that was not right."""
    if dialogue.template == "paper":
        return _say("system", PAPER_FEEDBACK, attempts_left)
    message = {
        Verdict.NO_ANSWER: dialogue.feedback_no_answer,
        Verdict.TIMEOUT: dialogue.feedback_timeout,
    }.get(verdict, dialogue.feedback_wrong)
    return _say(dialogue.feedback_role, message, attempts_left)


def neutral_turn(dialogue: DialogueSection, *, attempts_left: int) -> Turn:
    """What the built-in tasks say after any attempt, right or wrong, where the verdict is kept from the model."""
    if dialogue.template == "paper":
        return _say("system", PAPER_NEUTRAL, attempts_left)
    return _say(dialogue.feedback_role, dialogue.feedback_none, attempts_left)


def prompt_ids(tokenizer: Tokenizer, dialogue: DialogueSection, question: str, *, max_attempts: int) -> list[int]:
    """`opening_ids` of the built-in tasks."""
    return opening_ids(tokenizer, dialogue, prompt_turns(dialogue, question, max_attempts=max_attempts))


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
    tail = _render(key.tokenizer, [Turn("user", "q"), Turn("assistant", _MARK)], opened=False).partition(_MARK)[2]
    marker = tail.rstrip()
    return marker, tail[len(marker) :]


def _render_after_assistant(tokenizer: Tokenizer, turn: Turn) -> str:
    """Text of `turn` and the assistant turn opened after it, as the template renders them mid-dialogue."""
    before = [Turn("user", "q"), Turn("assistant", _MARK)]
    tail = _render(tokenizer, [*before, turn], opened=True).partition(_MARK)[2]
    end, between = assistant_end(tokenizer)
    return tail.removeprefix(end + between)


def _say(role: Literal["system", "user"], message: str, attempts: int) -> Turn:
    return Turn(role, message.format(n=attempts, attempts=plural(attempts)))


def _chatml(turns: Sequence[Turn]) -> str:
    return "".join(PAPER_TURN.format(role=turn.role, content=turn.content) for turn in turns) + PAPER_OPENED


def _render(tokenizer: Tokenizer, turns: Sequence[Turn], *, opened: bool) -> str:
    if tokenizer.chat_template is None:
        raise ConfigError('dialogue.template: "chat" needs a tokenizer with a chat template; set template = "paper"')
    conversation = [{"role": turn.role, "content": turn.content} for turn in turns]
    text: str = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=opened)
    return text
