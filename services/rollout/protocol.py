"""The HTTP bodies of a replica, and its server-sent events.

Text is cleaned before it is validated: people paste, and a lone surrogate is no reason to refuse a problem.
"""

import json
import re
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from services.contracts.wire import FinishReason, Verdict

MAX_BODY_BYTES = 2**20
MAX_PROBLEM_CHARS = 65_536
MAX_GOLDS, MAX_GOLD_CHARS = 64, 4_096
MAX_ATTEMPTS = 64
MAX_SCORED_TOKENS = 2**17
MAX_INT32 = 2**31 - 1


def _clean(value: Any) -> Any:
    """A string that every encoder takes; anything else as it came."""
    return value.encode("utf-8", errors="replace").decode("utf-8") if isinstance(value, str) else value


Gold = Annotated[str, BeforeValidator(_clean), Field(min_length=1, max_length=MAX_GOLD_CHARS)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class _Request(_Body):
    model_config = ConfigDict(strict=True)  # a text is no number, a number no truth value


class SamplingBody(_Request):
    """Overrides of the run's sampling settings."""

    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    """0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_INT32)] | None = None
    """-1: all."""


class DialogueRequest(_Request):
    """One dialogue to run now."""

    problem: Annotated[str, BeforeValidator(_clean), Field(min_length=1, max_length=MAX_PROBLEM_CHARS)]
    """The question, as the user's turn shows it."""
    gold: Annotated[list[Gold], Field(min_length=1, max_length=MAX_GOLDS)] | None = None
    """Right answers, of which any will do. Left out: whoever reads the stream judges each attempt; see `question`."""
    max_attempts: Annotated[int, Field(ge=1, le=MAX_ATTEMPTS)] = 1
    """Told to the model at the beginning."""
    seed: Annotated[int, Field(ge=0, le=MAX_INT32)] = 0
    """Of the sampling: the same weights, problem and seed give the same dialogue."""
    sampling: SamplingBody = SamplingBody()
    feedback: Literal["truth", "none"] | None = None
    """truth: the model is told whether it was right, and the dialogue ends when it is. none: after every attempt the
    model is asked for another in the same words, right or wrong, until it has made them all. Left out: the run's own,
    `dialogue.feedback`."""
    stream: bool = False
    """Answer with server-sent events; so does the header `Accept: text/event-stream`."""


class VerdictRequest(_Request):
    """A person's word on the attempt that waits for it."""

    verdict: Literal["correct", "incorrect", "no_answer"]


class TurnBody(_Body):
    """One attempt and its verdict."""

    text: str
    verdict: Verdict
    extracted: str | None
    """The answer that was judged."""
    num_tokens: int
    grading_ms: float


class DialogueResponse(_Body):
    """The finished dialogue."""

    attempts: list[TurnBody]
    reward: float
    finish_reason: FinishReason
    num_tokens: int
    """All of the dialogue's: prompt, attempts, feedback."""
    weight_versions: list[int]
    """Those that sampled the attempts, the oldest first."""
    seconds: dict[str, float]
    """Spent on generating, on grading, and in total."""


class SwapBody(_Body):
    """A version that was swapped in."""

    version: int
    loaded_at: datetime
    digest: str
    """Of the bytes received."""
    num_bytes: int
    receive_s: float
    """Generation went on meanwhile."""
    pause_s: float
    """Generation stood still."""
    swap_s: float
    """The part of the pause that loaded the weights."""


class WeightsResponse(_Body):
    """The weights in use."""

    version: int
    """Policy updates that went into them."""
    step: int
    """The same number, as the learner counts."""
    device: str
    model: str
    """Folder of the weights that the replica started with."""
    loaded_at: datetime | None
    """null: they are those that the replica started with."""
    digest: str | None
    history: list[SwapBody]
    """The last few swaps, the newest first."""


class PauseResponse(_Body):
    """Whether generation stands still."""

    paused: bool


class DrainResponse(_Body):
    """What is still to be finished."""

    in_flight: int
    """Dialogues."""


class ScoreRequest(_Request):
    """Token ids to be scored."""

    token_ids: Annotated[
        list[Annotated[int, Field(ge=0, le=MAX_INT32)]], Field(min_length=1, max_length=MAX_SCORED_TOKENS)
    ]


class ScoreResponse(_Body):
    """Log-probability of each token given those before it."""

    logprobs: list[float | None]
    """The first has none."""
    version: int
    """Of the weights that say so."""


def server_sent_event(name: str, data: dict[str, Any]) -> bytes:
    """One event. ASCII: no line break in the text, of which Unicode has many, ends the event early."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode("ascii")


EVENTS = """Server-sent events, each with JSON data. Attempts count from 1.

| event | data | when |
|---|---|---|
| `prompt` | `text`, `num_tokens`, `max_attempts`, `weight_version` | the dialogue begins |
| `text` | `attempt`, `text` | the model goes on; whole characters only |
| `question` | `attempt`, `dialogue` | without `gold`: give the verdict at `/v1/dialogues/{dialogue}/verdict` |
| `verdict` | `attempt`, and an attempt as in the plain answer | an attempt has been judged |
| `feedback` | `attempt`, `text`, `num_tokens` | what the model is told before it tries again |
| `result` | the plain answer | the end |
| `error` | a problem, as the status would have had it | the end, when something fails on the way |

A comment line comes when nothing else does for ten seconds. Hanging up ends the dialogue."""

EVENT_SCHEMA = {
    "type": "object",
    "required": ["event", "data"],
    "properties": {
        "event": {"enum": re.findall(r"^\| `(\w+)`", EVENTS, re.MULTILINE)},
        "data": {"type": "string", "contentMediaType": "application/json"},
    },
}
