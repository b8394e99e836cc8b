r"""The routes that trainers call: `/get_reward` (OpenRLHF, slime), `/verify_answer` (PipelineRL), `/verify` (NeMo-Gym).

There, text that cannot be graded is a 200 with its reward, never a 4xx: a trainer gives up on an error, and one odd
sample of a model shall not end a run. Only an envelope that is not the trainer's is a 422.
"""

import re
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, HTTPException

from services.contracts.settings import GraderSection
from services.contracts.wire import Verdict
from services.grader.answer import SPECIAL_TOKEN, Extraction
from services.grader.judge import Judge, Judgement, Question
from services.grader.problems import RESPONSES
from services.grader.protocol import (
    NemoGymRequest,
    NemoGymResult,
    OpenRlhfRequest,
    OpenRlhfResult,
    PipelineRlRequest,
    PipelineRlResult,
    SlimeRequest,
    SlimeResult,
    golds_of,
)

# What stands just before a reply, for a prompt that cannot be found in its query.
_REPLY_BEGINS = re.compile(
    r"<\|im_start\|>assistant\b|<\|start_header_id\|>assistant<\|end_header_id\|>|<start_of_turn>model\b"
    r"|<｜Assistant｜>|<\|assistant\|>|\[/INST\]"  # noqa: RUF001
)
_PIPELINE_RL_STATUS: dict[Verdict, Literal["correct", "wrong", "no_answer", "unparsable"]] = {
    Verdict.CORRECT: "correct",
    Verdict.INCORRECT: "wrong",
    Verdict.NO_ANSWER: "no_answer",
    Verdict.TIMEOUT: "unparsable",
    Verdict.UNPARSABLE_GOLD: "unparsable",
}


def trainer_routes(judge: Judge, config: GraderSection, **options: Any) -> APIRouter:
    """The router; `options` are APIRouter's."""
    router = APIRouter(tags=["trainers"], **options)

    @router.post("/get_reward", responses=RESPONSES, response_model=OpenRlhfResult | SlimeResult | float)
    async def get_reward(
        request: Annotated[OpenRlhfRequest | SlimeRequest, Body()],
        extraction: Extraction = Extraction.AUTO,
        bare: bool = False,  # noqa: FBT001, FBT002 - a query parameter
    ) -> OpenRlhfResult | SlimeResult | float:
        """Reward as OpenRLHF (query, prompts, labels) or slime (prompt, response, label) ask for it.

        `?bare=true` answers slime's form with the number alone.
        """
        if isinstance(request, OpenRlhfRequest):
            return await _open_rlhf(judge, request, extraction, config)
        [judgement] = await judge.judge([_question(request.response, request.label, extraction)])
        score = reward(judgement, config)
        return score if bare else SlimeResult(score=score, verdict=judgement.verdict, extracted=judgement.extracted)

    @router.post("/verify_answer", responses=RESPONSES)
    async def verify_answer(request: PipelineRlRequest, extraction: Extraction = Extraction.BOXED) -> PipelineRlResult:
        """The status of an answer as PipelineRL asks for it."""
        [judgement] = await judge.judge([_question(request.prediction, request.gold, extraction)])
        if judgement.extracted is not None and len(judgement.extracted) > request.max_prediction_length:
            return PipelineRlResult(answer_status="unparsable")
        return PipelineRlResult(answer_status=_PIPELINE_RL_STATUS[judgement.verdict])

    @router.post("/verify", responses=RESPONSES)
    async def verify(request: NemoGymRequest, extraction: Extraction = Extraction.BOXED) -> NemoGymResult:
        """Reward as NeMo-Gym's `math_with_judge` gives it, without the judge: the request given back with it."""
        [judgement] = await judge.judge([_question(request.text, request.expected_answer, extraction)])
        value = reward(judgement, config)
        graded = {
            "reward": value, "library_reward": value, "extracted_answer": judgement.extracted,
            "judge_evaluations": None,
        }  # fmt: skip
        return NemoGymResult.model_validate(request.model_dump() | graded)

    return router


def reward(judgement: Judgement, config: GraderSection) -> float:
    """The number that a verdict is worth, by the [grader] settings."""
    match judgement.verdict:
        case Verdict.CORRECT:
            return config.reward_correct
        case Verdict.INCORRECT:
            return config.reward_incorrect
        case Verdict.NO_ANSWER:
            return config.reward_no_answer
        case Verdict.UNPARSABLE_GOLD:
            return config.reward_ungraded
        case Verdict.TIMEOUT:  # the answer's own doing: it may not pay
            return min(config.reward_ungraded, config.reward_incorrect)


async def _open_rlhf(
    judge: Judge, request: OpenRlhfRequest, extraction: Extraction, config: GraderSection
) -> OpenRlhfResult:
    num_queries = len(request.query)
    prompts, labels = request.prompts or [None] * num_queries, request.labels or [None] * num_queries
    if not num_queries == len(prompts) == len(labels):
        raise HTTPException(
            422, f"query, prompts, labels have {num_queries}, {len(prompts)}, {len(labels)} entries: one each is wanted"
        )
    judgements = await judge.judge(
        [
            _question(response_in(query or "", prompt or ""), label, extraction)
            for query, prompt, label in zip(request.query, prompts, labels, strict=True)
        ]
    )
    logs = {
        verdict.value: [float(judgement.verdict is verdict) for judgement in judgements]
        for verdict in (Verdict.NO_ANSWER, Verdict.TIMEOUT, Verdict.UNPARSABLE_GOLD)
    }
    return OpenRlhfResult(
        rewards=[reward(judgement, config) for judgement in judgements],
        scores=[float(judgement.is_correct) for judgement in judgements],
        extra_logs=logs if judgements else {},
    )


def _question(response: str | None, label: Any, extraction: Extraction) -> Question:
    return Question(response or "", golds_of(label), extraction)


def response_in(query: str, prompt: str) -> str:
    r"""Take the prompt off a query: it often holds a `\boxed{}` of its own, and a BOS token may stand before it.

    A prompt that is not in the query ends where the last reply begins, if its chat template marks that.
    """
    plain, head = SPECIAL_TOKEN.sub("", query), SPECIAL_TOKEN.sub("", prompt).strip()
    if head and head in plain:
        return plain.partition(head)[2]
    return _REPLY_BEGINS.split(query)[-1]
