"""The HTTP bodies: our own, and those of OpenRLHF, slime, PipelineRL and NeMo-Gym.

Text is cleaned before it is validated: a response is model output, and a lone surrogate or a NUL in it is no reason
to refuse it.
"""

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictInt

from services.contracts.wire import Verdict
from services.grader.answer import Extraction
from services.grader.judge import MAX_GOLDS, Judgement

MAX_BATCH_ITEMS = 10_000
MAX_NESTING = 64  # of JSON that is given back


def _clean(value: Any) -> Any:
    """A string that every encoder takes; anything else as it came."""
    return value.encode("utf-8", errors="replace").decode("utf-8") if isinstance(value, str) else value


def _clean_json(value: Any, depth: int = MAX_NESTING) -> Any:
    """JSON that every encoder takes: as `_clean`, through and through, with null for NaN and the infinities."""
    if depth == 0:
        raise ValueError(f"nested more than {MAX_NESTING} levels deep")
    match value:
        case float():
            return value if math.isfinite(value) else None
        case list():
            return [_clean_json(entry, depth - 1) for entry in value]
        case dict():
            return {_clean(key): _clean_json(entry, depth - 1) for key, entry in value.items()}
        case _:
            return _clean(value)


Text = Annotated[str, BeforeValidator(_clean)]
Json = Annotated[Any, BeforeValidator(_clean_json)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class GradeRequest(_Body):
    """One response to be graded."""

    response: Text
    """The model's whole output; only its final answer counts."""
    gold: Text | Annotated[list[Text], Field(min_length=1, max_length=MAX_GOLDS)]
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


class ExplainResult(GradeResult):
    """A verdict, and what a person wants to see of it; null where a text is too long, too deep or no LaTeX."""

    normalised_answer: str | None
    """The answer in the spelling that is compared."""
    normalised_golds: list[str | None]
    """The first golds likewise."""
    answer_mathml: str | None
    """The answer as a MathML element, without anything that acts."""
    gold_mathml: list[str | None]
    """The first golds likewise."""


class BatchRequest(_Body):
    """Many responses at once."""

    items: Annotated[list[GradeRequest], Field(max_length=MAX_BATCH_ITEMS)]


class BatchResult(_Body):
    """The results, in the order of the items."""

    results: list[GradeResult]


class _ForeignBody(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, use_attribute_docstrings=True)


class OpenRlhfRequest(_ForeignBody):
    """OpenRLHF's remote reward request; the lists are equally long, or absent."""

    query: Annotated[list[Text | None], Field(max_length=MAX_BATCH_ITEMS)]
    """Prompt and response in one, special tokens kept."""
    prompts: list[Text | None] | None = None
    """The prompts, to be taken off the queries."""
    labels: list[Json] | None = None
    """The gold answers; without them every reward is `reward_ungraded`."""


class OpenRlhfResult(_Body):
    """OpenRLHF's remote reward answer: numbers per query."""

    rewards: list[float]
    """As the [grader] settings map verdicts."""
    scores: list[float]
    """1 for correct, else 0."""
    extra_logs: dict[str, list[float]]
    """1 where the verdict is the one named."""


class SlimeRequest(_ForeignBody):
    """slime's remote reward request: one sample."""

    prompt: Any = None
    """Not used: the response comes on its own."""
    response: Text | None
    label: Json = None
    """The gold answer, or a list of them."""


class SlimeResult(_Body):
    """slime's answer: `--reward-key score` picks the number."""

    score: float
    """As the [grader] settings map verdicts."""
    verdict: Verdict
    extracted: str | None


class PipelineRlRequest(_ForeignBody):
    """PipelineRL's verification request."""

    prediction: Text | None
    gold: Json = None
    strict: StrictBool = True
    """Not used: variables always matter, and sets are never tuples."""
    max_prediction_length: StrictInt = 1_000
    """A longer answer, in characters, is unparsable."""


class PipelineRlResult(_Body):
    """PipelineRL's verification answer."""

    answer_status: Literal["correct", "wrong", "no_answer", "unparsable"]


class NemoGymOutputs(BaseModel):
    """A Responses-API object; of its output, the `output_text` parts of messages are graded."""

    model_config = ConfigDict(extra="allow", frozen=True)
    __pydantic_extra__: dict[str, Json]

    output: list[Json]


class NemoGymRequest(BaseModel):
    """NeMo-Gym's verification request (its `math_with_judge`); whatever else it holds is given back."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)
    __pydantic_extra__: dict[str, Json]

    responses_create_params: Json = None
    response: NemoGymOutputs
    question: Json = None
    """Not used."""
    expected_answer: Json = None
    """The gold answer."""

    @property
    def text(self) -> str:
        """All that the assistant said."""
        contents = [
            item.get("content")
            for item in self.response.output
            if isinstance(item, dict) and item.get("type") == "message"
        ]
        parts = [
            part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)
        ]
        return "".join(str(part.get("text") or "") for part in parts if part.get("type") == "output_text")


class NemoGymResult(BaseModel):
    """NeMo-Gym's verification answer: the request, and the reward."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    reward: float
    """As the [grader] settings map verdicts."""
    extracted_answer: str | None
    library_reward: float
    """The same: there is no judge model here."""
    judge_evaluations: None


def golds_of(label: Any) -> tuple[str, ...]:
    """The gold answers in a label of any form: text, a number, an object that names one, a list of those; or none."""
    entries = label if isinstance(label, list) else [label]
    return tuple(gold for entry in entries if (gold := _gold(entry)) is not None)


def _gold(entry: Any) -> str | None:
    if isinstance(entry, dict):  # veRL's data sets keep it so
        entry = entry.get("ground_truth", entry.get("answer"))
    return str(entry) if isinstance(entry, str | int | float) else None
