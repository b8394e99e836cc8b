"""`POST /v1/dialogues`: one dialogue now, in one answer or as it happens, graded or judged by whoever watches."""

from typing import Any

from fastapi import APIRouter, HTTPException, Request, Response

from services.contracts.web import Problem
from services.contracts.wire import Attempt, Sampling, Task, Trajectory, Verdict
from services.grader.client import GraderError, GraderUnavailableError
from services.rollout.environment import Grader
from services.rollout.events import Event, FedBack, Judged, Prompted, Said
from services.rollout.protocol import EVENT_SCHEMA, EVENTS, DialogueRequest, DialogueResponse, TurnBody, VerdictRequest
from services.rollout.replica import ReplicaProcess
from services.rollout.runner import EngineDead, GenerationAborted, UnrunnableTask
from services.rollout.streaming import Emit, EventStream, People, PersonAsGrader, unless, while_connected

MAX_DIALOGUES = 1024  # under way at once, the ledger's among them
RETRY_AFTER_S = 1
MALFORMED: dict[int | str, dict[str, Any]] = {
    400: {"model": Problem, "description": "The body is not UTF-8, or holds a number that is too long"},
    413: {"model": Problem, "description": "The body is too long"},
    415: {"model": Problem, "description": "Content-Type is not application/json"},
    422: {"model": Problem, "description": "A field is missing, wrong or too long; or the dialogue cannot be run"},
}
FAILURES: dict[int | str, dict[str, Any]] = {
    502: {"model": Problem, "description": "The grader refuses the attempt"},
    503: {"model": Problem, "description": "Not ready, draining or full; or the grader or the engine failed"},
}


def dialogue_routes(replica: ReplicaProcess, *, patience_s: float) -> APIRouter:
    """The routes; patience_s: how long a person may think about a verdict."""
    router = APIRouter(prefix="/v1/dialogues", tags=["dialogues"])
    people = People(patience_s=patience_s)

    streamed = {"description": "The dialogue", "content": {"text/event-stream": {"itemSchema": EVENT_SCHEMA}}}

    @router.post(
        "",
        response_model=DialogueResponse,
        responses={200: streamed, **MALFORMED, **FAILURES},
        description=f"Run one dialogue now, beside those of the ledger.\n\n{EVENTS}",
    )
    async def run_dialogue(body: DialogueRequest, request: Request) -> Response | DialogueResponse:
        _check_open(replica)
        is_streamed = body.stream or "text/event-stream" in request.headers.get("accept", "")
        if body.gold is None and not is_streamed:
            raise HTTPException(422, "body.gold: missing; without it a person judges, which needs `stream`")

        async def work(emit: Emit) -> dict[str, Any]:
            return (await _run(replica, body, emit, people)).model_dump(mode="json")

        if is_streamed:
            return EventStream(work)
        return await while_connected(request.receive, _run(replica, body, lambda name, data: None, people))

    @router.post(
        "/{dialogue}/verdict",
        status_code=204,
        responses={**MALFORMED, 404: {"model": Problem, "description": "No attempt of that name waits for a verdict"}},
    )
    async def give_verdict(dialogue: str, body: VerdictRequest) -> None:
        """Judge the attempt that a `question` event asked about; the dialogue goes on."""
        if not people.answer(dialogue, Verdict(body.verdict)):
            raise HTTPException(404, "no attempt of that name waits for a verdict; a name is for one attempt")

    return router


def _check_open(replica: ReplicaProcess) -> None:
    reason = replica.refusal
    if reason is None and replica.runner.num_running >= MAX_DIALOGUES:
        reason = f"{MAX_DIALOGUES} dialogues are under way"
    if reason is not None:
        raise HTTPException(503, reason, headers={"Retry-After": str(RETRY_AFTER_S)})


async def _run(replica: ReplicaProcess, body: DialogueRequest, emit: Emit, people: People) -> DialogueResponse:
    """Run it to the end. Raises HTTPException for what a dialogue may fail of."""
    task = Task(
        task_id=0,
        batch=0,
        problem=body.problem,
        gold=tuple(body.gold or ()),
        max_attempts=body.max_attempts,
        seed=body.seed,
        kind="eval",
        sampling=Sampling(**body.sampling.model_dump()),
    )
    narrator = _Narrator(replica, task, emit)
    grader: Grader | None = None if body.gold else PersonAsGrader(people, narrator.put_question)
    running = replica.runner.run(task, listen=narrator.tell, grader=grader, feedback=body.feedback)
    try:
        trajectory = await unless(replica.done.wait(), running, HTTPException(503, "the replica is stopping"))
    except UnrunnableTask as error:
        raise HTTPException(422, str(error)) from error
    except (GraderUnavailableError, GenerationAborted, EngineDead) as error:
        raise HTTPException(503, str(error)) from error
    except GraderError as error:
        raise HTTPException(502, str(error)) from error
    return _response(replica, trajectory)


class _Narrator:
    """Turns what happens in a dialogue into events for its client."""

    def __init__(self, replica: ReplicaProcess, task: Task, emit: Emit) -> None:
        self._replica, self._task, self._emit = replica, task, emit
        self._attempt = 1

    def tell(self, event: Event) -> None:
        """Emit one event."""
        text = self._replica.runner.text
        match event:
            case Prompted(token_ids):
                counts = {"num_tokens": len(token_ids), "max_attempts": self._task.max_attempts}
                self._emit(
                    "prompt", {"text": text(token_ids), **counts, "weight_version": self._replica.engine.version}
                )
            case Said(said):
                self._emit("text", {"attempt": self._attempt, "text": said})
            case Judged(attempt, said):
                self._emit("verdict", {"attempt": self._attempt, **_turn(attempt, said).model_dump(mode="json")})
            case FedBack(token_ids):
                told = {"text": text(token_ids), "num_tokens": len(token_ids)}
                self._emit("feedback", {"attempt": self._attempt, **told})
                self._attempt += 1

    def put_question(self, name: str) -> None:
        """Ask for the verdict on the attempt that has just ended."""
        self._emit("question", {"attempt": self._attempt, "dialogue": name})


def _turn(attempt: Attempt, text: str) -> TurnBody:
    return TurnBody(
        text=text,
        verdict=attempt.verdict,
        extracted=attempt.extracted,
        num_tokens=attempt.end - attempt.start,
        grading_ms=attempt.grading_ms,
    )


def _response(replica: ReplicaProcess, trajectory: Trajectory) -> DialogueResponse:
    texts = [replica.runner.attempt_text(trajectory, index) for index in range(len(trajectory.attempts))]
    timings = trajectory.timings
    return DialogueResponse(
        attempts=[_turn(attempt, text) for attempt, text in zip(trajectory.attempts, texts, strict=True)],
        reward=trajectory.reward,
        finish_reason=trajectory.finish_reason,
        num_tokens=len(trajectory.token_ids),
        weight_versions=sorted({span.version for span in trajectory.versions}),
        seconds={"generate": timings.generate_s, "grade": timings.grade_s, "total": timings.total_s},
    )
