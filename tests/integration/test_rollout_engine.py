"""What the engine wrapper asks of vLLM, with vLLM's own parameter and detokenizer classes around a script."""

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.logprobs import FlatLogprobs
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.engine.detokenizer import IncrementalDetokenizer
from vllm.v1.engine.logprobs import LogprobsProcessor
from vllm.v1.outputs import LogprobsLists

from services.contracts.config import ConfigError, load
from services.contracts.wire import Sampling
from services.rollout import vllm_engine
from services.rollout.runner import GenerationAborted
from services.rollout.vllm_engine import VllmEngine

pytestmark = pytest.mark.integration


class ScriptedLlm:
    """AsyncLLM's manners: a request's detokenizer is given each step's tokens, and any string from it ends the request.

    early: tokens that were sampled before `add_request` returned. finish_reason: how the request ends by itself.
    """

    errored = False
    vllm_config = SimpleNamespace(model_config=SimpleNamespace(get_vocab_size=lambda: 1000))

    def __init__(
        self, *steps: list[int], early: int = 0, finish_reason: str | None = "length", swap_at: int = 99
    ) -> None:
        self._steps, self._early, self._finish_reason, self._swap_at = steps, early, finish_reason, swap_at
        self.output_processor = SimpleNamespace(request_states={})
        self.requests: list[tuple[Any, Any, str]] = []
        self.aborted: list[str] = []
        self._over = asyncio.Event()
        self._reason = "abort"

    async def add_request(self, request_id: str, prompt: Any, parameters: Any) -> "ScriptedLlm":
        self.requests.append((prompt, parameters, request_id))
        self.request_id = f"{request_id}-internal"
        processor = LogprobsProcessor(None, FlatLogprobs(), None, 0.0, 0, None)
        self._state = SimpleNamespace(detokenizer=IncrementalDetokenizer(), logprobs_processor=processor)
        self.output_processor.request_states[self.request_id] = self._state
        for step in self._steps[: self._early]:
            self._process(step)
        self.sampling = asyncio.create_task(self._sample(self._steps[self._early :]))
        return self

    async def _sample(self, steps) -> None:
        for step in steps:
            await asyncio.sleep(0)
            if self._over.is_set():
                return
            if self._process(step):
                self._reason = "stop"
                self._over.set()
        if self._finish_reason is not None and not self._over.is_set():
            self._reason = self._finish_reason
            self._over.set()

    def _process(self, step: list[int]) -> bool:
        """As vLLM's output processor; the log-probability of token t is -t. Whether the request is to end."""
        column = np.array(step).reshape(-1, 1)
        logprobs = LogprobsLists(column, -column.astype(np.float32), np.zeros(len(step), np.int64))
        is_over = self._state.detokenizer.update(list(step), False)
        self._state.logprobs_processor.update_from_output(EngineCoreOutput("", step, new_logprobs=logprobs))
        return bool(is_over)

    async def get(self) -> Any:
        await self._over.wait()
        tokens, logprobs = self._state.detokenizer.output_token_ids, self._state.logprobs_processor.logprobs
        ends = [(3, 0, min(self._swap_at, len(tokens))), (4, min(self._swap_at, len(tokens)), len(tokens))]
        versions = [SimpleNamespace(version=str(v), start=start, end=end) for v, start, end in ends if start < end]
        completion = SimpleNamespace(
            token_ids=tokens, logprobs=logprobs, finish_reason=self._reason, weight_versions=versions
        )
        return SimpleNamespace(outputs=[completion], finished=True)

    async def abort(self, request_id: str, *, internal: bool) -> None:
        assert internal
        self.aborted.append(request_id)
        self._over.set()


def make_engine(llm: ScriptedLlm, tmp_path) -> VllmEngine:
    engine = VllmEngine(load(None, ["--sampling.temperature=0.7"], env={}), tmp_path)
    engine.async_llm = llm
    return engine


async def sample(engine: VllmEngine, is_last=lambda _: False, **overrides: float):
    stops = frozenset({7, 3})
    return await engine.sample(
        [1, 2], max_tokens=5, seed=9, sampling=Sampling(**overrides), stop_ids=stops, is_last=is_last
    )


async def ask(engine: VllmEngine, **overrides: float):
    await sample(engine, **overrides)
    return engine.async_llm.requests[-1]


async def test_no_cached_prefix_outlives_its_weights(tmp_path) -> None:
    engine, salts = make_engine(ScriptedLlm([5]), tmp_path), []
    for version in (3, 3, 4):
        engine.version = version
        salts.append((await ask(engine))[0]["cache_salt"])
    assert salts[0] == salts[1] != salts[2]


async def test_a_tasks_sampling_goes_over_the_runs(tmp_path) -> None:
    engine = make_engine(ScriptedLlm([5]), tmp_path)
    assert (await ask(engine))[1].temperature == 0.7
    parameters = (await ask(engine, temperature=0.0))[1]
    assert (parameters.temperature, parameters.max_tokens, parameters.seed) == (0.0, 5, 9)
    assert sorted(parameters.stop_token_ids) == [3, 7]


async def test_each_request_has_a_name_of_its_own(tmp_path) -> None:
    engine = make_engine(ScriptedLlm([5]), tmp_path)
    assert (await ask(engine))[2] != (await ask(engine))[2]


@pytest.mark.parametrize("early", [0, 1, 2, 3])
@pytest.mark.parametrize("steps", [([5], [6], [8], [9]), ([5, 6], [8, 9]), ([5, 6, 8, 9],), ([5], [6, 8], [9])])
async def test_every_token_is_shown_once_and_none_after_the_last_is_kept(tmp_path, steps, early) -> None:
    shown: list[int] = []

    def is_last(token: int) -> bool:
        shown.append(token)
        return token == 8

    llm = ScriptedLlm(*steps, early=min(early, len(steps)), swap_at=1)
    completion = await sample(make_engine(llm, tmp_path), is_last)
    assert shown == list(completion.token_ids) == [5, 6, 8]
    assert completion.logprobs == [-5.0, -6.0, -8.0]
    assert completion.versions == [(3, 0, 1), (4, 1, 3)]


async def test_a_request_that_ends_by_itself_is_whole(tmp_path) -> None:
    llm = ScriptedLlm([5], [6, 9], finish_reason="stop")
    completion = await sample(make_engine(llm, tmp_path))
    assert (completion.token_ids, completion.versions) == ([5, 6, 9], [(3, 0, 3)])
    assert llm.aborted == []


@pytest.mark.parametrize("reason", ["abort", "error"])
async def test_half_an_attempt_is_not_passed_off_as_a_whole_one(tmp_path, reason) -> None:
    with pytest.raises(GenerationAborted, match=reason):
        await sample(make_engine(ScriptedLlm([5], [6], finish_reason=reason), tmp_path))


async def test_what_is_raised_while_a_token_is_looked_at_concerns_that_request_alone(tmp_path) -> None:
    llm = ScriptedLlm([5], [6], [9])
    with pytest.raises(ZeroDivisionError):
        await sample(make_engine(llm, tmp_path), lambda token: 1 // (token - 6) > 5)
    await llm.sampling  # vLLM's loop saw nothing of it


async def test_a_cancelled_request_is_aborted_in_the_engine(tmp_path) -> None:
    llm = ScriptedLlm([5], finish_reason=None)
    sampling = asyncio.create_task(sample(make_engine(llm, tmp_path)))
    await asyncio.sleep(0.01)
    sampling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sampling
    assert llm.aborted == [llm.request_id]


def test_log_probabilities_are_the_same_without_the_ranks_that_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.sample import sampler

    from services.rollout.weights import WorkerExtension

    def counted(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        raise AssertionError("ranks were computed")

    monkeypatch.setattr(sampler, "batched_count_greater_than", counted)  # set back afterwards
    WorkerExtension().leave_out_ranks()
    logprobs = torch.randn(3, 11).log_softmax(-1)
    chosen = torch.tensor([2, 0, 10])
    found = sampler.Sampler.gather_logprobs(logprobs, 0, chosen)
    assert torch.equal(found.logprobs[:, 0], logprobs[torch.arange(3), chosen])
    assert found.selected_token_ranks.shape == (3,)


def test_vllms_sampler_with_our_draw_minds_temperature_and_top_k_and_tells_the_log_probabilities_drawn_from() -> None:
    from vllm.v1.sample.logits_processor import LogitsProcessors
    from vllm.v1.sample.metadata import SamplingMetadata
    from vllm.v1.sample.sampler import Sampler

    from services.rollout.weights import WorkerExtension

    worker: Any = WorkerExtension()
    sampler = Sampler(logprobs_mode="processed_logprobs")
    worker.device, worker.model_runner = torch.device("cpu"), SimpleNamespace(sampler=sampler)
    worker.draw_in_groups()
    logits, nothing = torch.randn(3, 300), torch.zeros(3)
    metadata = SamplingMetadata(
        temperature=torch.tensor([0.0, 0.5, 0.5]),
        all_greedy=False,
        all_random=False,
        top_p=None,
        top_k=torch.tensor([300, 1, 300]),
        generators={row: torch.Generator().manual_seed(row) for row in range(3)},
        max_num_logprobs=0,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=nothing,
        presence_penalties=nothing,
        repetition_penalties=nothing,
        output_token_ids=[[], [], []],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors(),
    )
    found = sampler.sample(logits.clone(), metadata)
    tokens, logprobs = found[0].tolist(), found[1]
    assert logprobs is not None
    assert tokens[:2] == logits.argmax(-1).tolist()[:2]
    assert logprobs[1, tokens[1]] == 0.0
    torch.testing.assert_close(logprobs[2], (logits[2] / 0.5).log_softmax(-1), rtol=0, atol=1e-5)


def test_a_library_that_vllm_would_do_without_is_asked_for_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    vllm_engine._check_libraries()  # it is here
    monkeypatch.setattr(vllm_engine, "NUMA", "libnone.so.1")
    with pytest.raises(ConfigError, match=r"need libnone\.so\.1: .*; apt install libnuma1"):
        vllm_engine._check_libraries()
