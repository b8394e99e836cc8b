"""A request under way, against vLLM's habit of telling weight versions in the last output alone."""

import asyncio
from types import SimpleNamespace

import pytest

from services.rollout.runner import GenerationAborted
from services.rollout.vllm_engine import VllmGeneration


class StreamingLlm:
    """AsyncLLM's manners: a queue of outputs; an abort puts a last one, without tokens, behind what is there."""

    def __init__(self, *deltas: list[int], finish_reason: str | None = None) -> None:
        self.queue: asyncio.Queue = asyncio.Queue()
        self.num_tokens, self.is_over, self.aborted = 0, False, []
        for number, tokens in enumerate(deltas, start=1):
            self._put(tokens, finish_reason if number == len(deltas) else None)

    def _put(self, tokens: list[int], finish_reason: str | None) -> None:
        self.num_tokens += len(tokens)
        self.is_over = finish_reason is not None
        versions = [SimpleNamespace(version="3", start=0, end=self.num_tokens)] if self.is_over else None
        flat = SimpleNamespace(logprobs=[-float(t) for t in tokens], start_indices=list(range(len(tokens))))
        completion = SimpleNamespace(
            token_ids=tokens, logprobs=flat, finish_reason=finish_reason, weight_versions=versions
        )
        self.queue.put_nowait(SimpleNamespace(outputs=[completion], finished=self.is_over))

    async def generate(self, prompt, parameters, request_id):
        while True:
            output = await self.queue.get()
            yield output
            if output.finished:
                return

    async def abort(self, request_id):
        self.aborted.append(request_id)
        if not self.is_over:
            self._put([], "abort")


def begin(llm: StreamingLlm) -> VllmGeneration:
    return VllmGeneration(llm, {"prompt_token_ids": [1, 2]}, None, "r1")


async def test_a_request_that_is_ended_early_still_has_its_versions():
    llm = StreamingLlm([5], [6, 7])
    generation = begin(llm)
    assert (await anext(generation)).token_ids == [5]
    assert await generation.end() == [(3, 0, 3)]
    assert llm.aborted == ["r1"]


async def test_a_request_that_ended_by_itself_is_not_aborted():
    llm = StreamingLlm([5], [6, 7], finish_reason="stop")
    generation = begin(llm)
    deltas = [delta async for delta in generation]
    assert [(d.token_ids, d.logprobs) for d in deltas] == [([5], [-5.0]), ([6, 7], [-6.0, -7.0])]
    assert await generation.end() == [(3, 0, 3)]
    assert llm.aborted == []


async def test_ending_a_request_that_has_just_finished_is_no_error():
    generation = begin(StreamingLlm([5], [6], finish_reason="length"))
    await anext(generation)
    assert await generation.end() == [(3, 0, 2)]


@pytest.mark.parametrize("reason", ["abort", "error"])
async def test_half_an_attempt_is_not_passed_off_as_a_whole_one(reason):
    generation = begin(StreamingLlm([5], [6], finish_reason=reason))
    with pytest.raises(GenerationAborted, match=reason):
        [delta async for delta in generation]
