"""The HTTP bodies: our own, OpenRLHF's and slime's.

Text is cleaned before it is validated: a response is model output, and a lone surrogate or a NUL in it is no reason
to refuse it.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from services.contracts.wire import Verdict
from services.grader.answer import Extraction
from services.grader.judge import Judgement

MAX_BATCH_ITEMS = 4_096


def _clean(value: Any) -> Any:
    """A string that every encoder takes; anything else as it came."""
    return value.encode("utf-8", errors="replace").decode("utf-8") if isinstance(value, str) else value


Text = Annotated[str, BeforeValidator(_clean)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class GradeRequest(_Body):
    """One response to be graded."""

    response: Text
    """The model's whole output; only its final answer counts."""
    gold: Text | Annotated[list[Text], Field(min_length=1)]
    r"""The right answer, bare (`\frac{1}{2}`), in `$..$` or in `\boxed{}`; or several, of which any is right."""
    extraction: Extraction = Extraction.BOXED
    """boxed: the last closed box. auto: else the stated answer, else a bare last line."""
    id: Text | None = None
    """Given back with the result."""


class GradeResult(_Body):
    """What the grader says of one response."""

    id: str | None
    correct: bool
    verdict: Verdict
    extracted: str | None
    """The final answer as found; null when there is none."""
    method: Literal["exact", "numeric", "symbolic"] | None
    """The layer that decided."""
    elapsed_ms: float
    """Time spent on this item, queue time left out."""
    cached: bool

    @classmethod
    def of(cls, judgement: Judgement, id: str | None) -> "GradeResult":
        """The wire form of a judgement."""
        return cls.model_validate(
            {
                "id": id,
                "correct": judgement.is_correct,
                "verdict": judgement.verdict,
                "extracted": judgement.extracted,
                "method": judgement.method,
                "elapsed_ms": round(judgement.elapsed_ms, 3),
                "cached": judgement.is_cached,
            }
        )


class BatchRequest(_Body):
    """Many responses at once."""

    items: Annotated[list[GradeRequest], Field(max_length=MAX_BATCH_ITEMS)]


class BatchResult(_Body):
    """The results, in the order of the items."""

    results: list[GradeResult]


class _ForeignBody(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, use_attribute_docstrings=True)


Label = Text | bool | int | float | None | list[Text | bool | int | float | None]


class OpenRlhfRequest(_ForeignBody):
    """OpenRLHF's remote reward request; the lists are equally long."""

    query: Annotated[list[Text], Field(max_length=MAX_BATCH_ITEMS)]
    """Prompt and response in one, special tokens kept."""
    prompts: list[Text] = []
    """The prompts, to be taken off the queries; may be left out."""
    labels: list[Label]
    """The gold answers."""


class OpenRlhfResult(_Body):
    """OpenRLHF's remote reward answer: numbers per query."""

    rewards: list[float]
    scores: list[float]
    extra_logs: dict[str, list[float]]


class SlimeRequest(_ForeignBody):
    """slime's remote reward request: one sample."""

    prompt: Any = None
    """Not used: the response comes on its own."""
    response: Text
    label: Label
    """The gold answer, or a list of them."""


class SlimeResult(_Body):
    """slime's answer: `--reward-key score` picks the number."""

    score: float
    verdict: Verdict
    extracted: str | None


def golds_of(label: Label) -> tuple[str, ...]:
    """The gold answers in a label of any form; none when it holds none."""
    labels = label if isinstance(label, list) else [label]
    return tuple(str(entry) for entry in labels if entry is not None)
