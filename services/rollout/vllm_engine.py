"""The engine: vLLM's AsyncLLM with the settings that were measured to be right here. Token ids in, token ids out.

`logprobs` are those of the distribution that was sampled from (after temperature). Every sampled token carries the
weight version that produced it. Weights come in through `weights` and `weight_control`.

A request's random numbers come from its own seed; its probabilities depend, in their last bits, on what is computed
beside it (docs/results/rollout-exactness.md): in bf16 the same task may be another dialogue on another replica.
"""

import asyncio
import contextlib
import ctypes
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from services.contracts.config import ConfigError, RunConfig
from services.contracts.wire import Sampling
from services.rollout.engine_stats import EngineStats
from services.rollout.runner import Completion, EngineDead, GenerationAborted, UnrunnableTask

BLOCK_TOKENS = 32  # prefix-cache granularity; vLLM's CPU default of 128 is longer than many prompts
BATCHED_TOKENS = 8192  # prefilled in one step on a CPU
RPC_TIMEOUT_S = 10.0
NUMA = "libnuma.so.1"
# Read by vLLM when it is imported. The worker lives in the engine's process: no busy-waiting between the two. Threads
# are not pinned: "auto" would pin every replica to the same core.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_PLUGINS": "multiattempt",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CONFIGURE_LOGGING": "0",
    "DO_NOT_TRACK": "1",
    "GOMP_SPINCOUNT": "10000",  # libgomp's default spinning collapses under any competitor on the same cores
    "TOKENIZERS_PARALLELISM": "false",
}


class Watcher:
    """Stands where vLLM has a request's detokenizer: it is given the tokens of each step, and may end the request.

    So nothing is woken up for a token: the caller hears of the request once, when it is over. It also stands where vLLM
    gathers log-probabilities, with all that might have been asked for beside them.
    """

    prompt_logprobs = prompt_token_id_logprobs = cumulative_logprob = None  # for vLLM: not asked for

    def __init__(self, is_last: Callable[[int], bool]) -> None:
        self._is_last = is_last
        self.output_token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.has_ended = False
        self.error: Exception | None = None

    def num_output_tokens(self) -> int:
        """Tokens of the request so far."""
        return len(self.output_token_ids)

    def take(self, token_ids: Sequence[int]) -> None:
        """Take the next tokens. Those after the last are not kept."""
        for token_id in token_ids:
            if self.has_ended:
                break
            self.output_token_ids.append(token_id)
            try:
                self.has_ended = self._is_last(token_id)
            except Exception as error:  # noqa: BLE001 - it is this request's; raised here, it would be every request's
                self.error, self.has_ended = error, True

    def update(self, new_token_ids: Sequence[int], stop_terminated: bool) -> str | None:  # noqa: FBT001 - vLLM's form
        """For vLLM: take new tokens; any string ends the request."""
        self.take(new_token_ids)
        return "seen enough" if self.has_ended else None

    def update_from_output(self, output: Any) -> None:
        """For vLLM: take the log-probabilities of new tokens."""
        if output.new_logprobs is not None:
            self.logprobs += output.new_logprobs.logprobs[:, 0].tolist()

    def get_next_output_text(self, finished: bool, delta: bool) -> str:  # noqa: FBT001 - vLLM's form
        """For vLLM: no text; whoever watches reads the tokens."""
        return ""


class VllmEngine:
    """One AsyncLLM. `start` before anything else."""

    def __init__(self, config: RunConfig, model: Path) -> None:
        self._config, self._model = config, model
        self._ids = itertools.count()
        self.stats = EngineStats()
        self.async_llm: Any = None
        self.tokenizer: Any = None
        self.version = 0
        self.broken = ""
        self.phases: dict[str, float] = {}
        """What the start took, in seconds."""

    @property
    def device(self) -> str:
        """`cpu`, or `cuda:` and the UUIDs of its GPUs with commas between."""
        import torch

        if not self._on_gpu():
            return "cpu"
        count = self._config.rollout.tensor_parallel_size
        return "cuda:" + ",".join(str(torch.cuda.get_device_properties(i).uuid) for i in range(count))

    @property
    def capacity_tokens(self) -> int:
        """Of the KV cache."""
        cache = self.async_llm.vllm_config.cache_config
        return int(cache.num_gpu_blocks * cache.block_size)

    async def start(self) -> None:
        """Load the model, then generate once: the first request is slow, and that is not the first dialogue's fault."""
        began = time.monotonic()
        await asyncio.to_thread(self._import)  # elsewhere: /healthz answers meanwhile
        imported = time.monotonic()
        self.async_llm, self.tokenizer = await asyncio.to_thread(self._load)
        loaded = time.monotonic()
        for method in ("leave_out_ranks", "draw_in_groups"):
            await self.rpc(method, {}, RPC_TIMEOUT_S)
        await self.async_llm.update_weight_version(str(self.version))
        nothing: dict[str, Any] = {"sampling": Sampling(), "stop_ids": frozenset(), "is_last": lambda _: False}
        await self.sample([0, 1], max_tokens=4, seed=0, **nothing)
        self.phases = {"import": imported - began, "load": loaded - imported, "warm up": time.monotonic() - loaded}

    def _import(self) -> None:
        if self._config.rollout.threads:
            os.environ["OMP_NUM_THREADS"] = str(self._config.rollout.threads)
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        if not self._on_gpu():
            _check_libraries()
            if self._config.model.dtype == "bfloat16":
                _check_amx()
        import vllm.v1.engine.async_llm  # noqa: F401 - seconds

        from services.rollout.weights import register

        register()

    def _load(self) -> tuple[Any, Any]:
        """The engine, its process started and its model loaded; and the tokenizer."""
        from transformers import AutoTokenizer
        from vllm import envs
        from vllm.config import WeightTransferConfig
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.metrics.prometheus import unregister_vllm_metrics

        from services.rollout.weights import DIRECT, STAGED

        settings, on_gpu = self._config.rollout, self._on_gpu()
        where: dict[str, Any] = (
            {"gpu_memory_utilization": settings.gpu_memory_utilization}
            if on_gpu
            else cpu_arguments(kv_cache_mb=settings.kv_cache_mb, max_model_len=self._config.model.max_model_len)
        )
        arguments = AsyncEngineArgs(
            model=str(self._model),
            dtype=self._config.model.dtype,
            hf_overrides={"head_dtype": "float32"} if self._config.model.fp32_head else {},
            max_model_len=self._config.model.max_model_len,
            max_num_seqs=settings.max_num_seqs,
            tensor_parallel_size=settings.tensor_parallel_size,
            enforce_eager=settings.enforce_eager,
            enable_prefix_caching=True,
            skip_tokenizer_init=True,
            generation_config="vllm",  # the model's own generation settings would alter sampling
            logprobs_mode="processed_logprobs",
            distributed_executor_backend="uni" if settings.tensor_parallel_size == 1 else None,
            weight_transfer_config=WeightTransferConfig(
                backend=DIRECT if self._config.weights.staging == "direct" else STAGED
            ),
            worker_extension_cls="services.rollout.weights.WorkerExtension",
            seed=self._config.run.seed,
            disable_log_stats=True,
            **where,
        )
        stats: Any = lambda config, index: self.stats  # noqa: E731
        async_llm: Any = AsyncLLM.from_engine_args(arguments, stat_loggers=[stats])
        # vLLM always adds its own logger, the last: some forty metrics, which cost time in every step.
        async_llm.logger_manager.stat_loggers.pop()
        unregister_vllm_metrics()  # type: ignore[no-untyped-call]
        envs.enable_envs_cache()  # else vLLM looks into the environment at each token
        return async_llm, AutoTokenizer.from_pretrained(self._model)

    async def sample(
        self,
        token_ids: Sequence[int],
        *,
        max_tokens: int,
        seed: int,
        sampling: Sampling,
        stop_ids: frozenset[int],
        is_last: Callable[[int], bool],
    ) -> Completion:
        """See runner.Engine."""
        watcher = Watcher(is_last)
        with _death_told(self.async_llm):
            output = await self._watch(
                self._prompt(token_ids),
                self._parameters(max_tokens=max_tokens, seed=seed, sampling=sampling, stop_ids=stop_ids),
                watcher,
            )
        completion = output.outputs[0]
        watcher.take(completion.token_ids[watcher.num_output_tokens() :])  # sampled before it could watch
        if watcher.error is not None:
            raise watcher.error
        if completion.finish_reason not in ("stop", "length") and not watcher.has_ended:
            # An abort at a swap, or a fault of the engine's: half an attempt, which must not be judged.
            raise GenerationAborted(f"the engine ended the request: {completion.finish_reason}")
        kept = watcher.num_output_tokens()
        spans = [(int(span.version), span.start, min(span.end, kept)) for span in completion.weight_versions or []]
        return Completion(
            watcher.output_token_ids,
            _sampled(completion.logprobs)[:kept],
            [(version, start, end) for version, start, end in spans if start < end],
        )

    async def _watch(self, prompt: dict[str, Any], parameters: Any, watcher: Watcher) -> Any:
        """Have a request sampled under a watcher's eyes; its last output."""
        llm = self.async_llm
        queue = await llm.add_request(str(next(self._ids)), prompt, parameters)
        try:
            state = llm.output_processor.request_states.get(queue.request_id)
            if state is not None:  # else it is over already
                watcher.take(state.detokenizer.output_token_ids)
                if watcher.has_ended:
                    await llm.abort(queue.request_id, internal=True)
                else:
                    watcher.logprobs = _sampled(state.logprobs_processor.logprobs)
                    state.detokenizer = state.logprobs_processor = watcher
            return await queue.get()
        except asyncio.CancelledError:
            await llm.abort(queue.request_id, internal=True)
            raise

    def _prompt(self, token_ids: Sequence[int]) -> dict[str, Any]:
        """vLLM's own form of a prompt, which it takes without a detour over a thread.

        A swap clears the prefix cache; the salt says so once more: other weights' keys and values never match.
        """
        self._check_known(token_ids)
        return {"type": "token", "prompt_token_ids": list(token_ids), "cache_salt": f"version {self.version}"}

    def _parameters(self, *, max_tokens: int, seed: int, sampling: Sampling, stop_ids: frozenset[int]) -> Any:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        defaults = self._config.sampling
        return SamplingParams(
            temperature=defaults.temperature if sampling.temperature is None else sampling.temperature,
            top_p=defaults.top_p if sampling.top_p is None else sampling.top_p,
            top_k=defaults.top_k if sampling.top_k is None else sampling.top_k,
            max_tokens=max_tokens,
            seed=seed,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            stop_token_ids=sorted(stop_ids),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probability of each token given those before it, at temperature 1; the first has none (NaN).

        Raises ValueError for tokens that the model does not have, or too many of them; EngineDead.
        """
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        parameters = SamplingParams(
            temperature=1.0,
            max_tokens=1,
            prompt_logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        prompt = {"prompt_token_ids": list(token_ids)}
        self._check_known(token_ids)
        room = self._config.model.max_model_len - 1  # vLLM samples one token after them
        if len(token_ids) > room:
            raise ValueError(f"{len(token_ids)} tokens, {room} fit the context (model.max_model_len less one)")
        with _death_told(self.async_llm):
            async for output in self.async_llm.generate(prompt, parameters, str(next(self._ids))):
                flat = output.prompt_logprobs
        spans = zip(flat.start_indices, flat.end_indices, strict=True)
        return [float("nan") if start == end else flat.logprobs[start] for start, end in spans]

    def _check_known(self, token_ids: Sequence[int]) -> None:
        """A tokenizer may know more tokens than its model; vLLM does not look here, and the engine would die of one."""
        num_tokens = self.async_llm.vllm_config.model_config.get_vocab_size()
        if max(token_ids) >= num_tokens:
            raise UnrunnableTask(f"token id {max(token_ids)}: the model has {num_tokens}, from 0")

    async def rpc(self, method: str, kwargs: dict[str, Any], timeout_s: float) -> list[Any]:
        """Call a method of every worker. Raises TimeoutError, EngineDead."""
        with _death_told(self.async_llm):
            async with asyncio.timeout(timeout_s):
                results: list[Any] = await self.async_llm.collective_rpc(method, timeout=timeout_s, kwargs=kwargs)
        return results

    async def check(self) -> str:
        """Why the engine cannot work, or nothing. Raises EngineDead. Reaches the worker: a hung one does not answer."""
        if self.async_llm is None:
            return "the model is being loaded"
        if not self.broken:
            try:
                await self.rpc("weights_status", {}, RPC_TIMEOUT_S)
            except TimeoutError:
                return f"the engine did not answer within {RPC_TIMEOUT_S:g} s"
        return self.broken

    def stop(self) -> None:
        """End the engine's processes."""
        if self.async_llm is not None:
            self.async_llm.shutdown()

    def _on_gpu(self) -> bool:
        import torch

        choice = self._config.rollout.device
        return choice == "cuda" or (choice == "auto" and torch.cuda.is_available())


def _sampled(logprobs: Any) -> list[float]:
    """The log-probabilities of sampled tokens, as a watcher gathered them or as vLLM did."""
    return logprobs if isinstance(logprobs, list) else [logprobs.logprobs[i] for i in logprobs.start_indices]


def cpu_arguments(*, kv_cache_mb: int, max_model_len: int) -> dict[str, Any]:
    """What vLLM's CPU engine is told beside the rest."""
    return {
        "kv_cache_memory_bytes": kv_cache_mb << 20,
        "block_size": BLOCK_TOKENS,
        # Prompts are prefilled whole: after part of one, vLLM 0.32 rewinds a seeded request's generator, and a CPU
        # generator cannot be rewound ("CPU Generator does not use offset"): the engine would die.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(BATCHED_TOKENS, max_model_len),
    }


def _check_libraries() -> None:
    """Raises ConfigError where vLLM's CPU kernels cannot be loaded: it would go on without, to an obscure end."""
    try:
        ctypes.CDLL(NUMA)
    except OSError as error:
        raise ConfigError(f"vLLM's CPU kernels need {NUMA}: {error}; apt install libnuma1") from error


def _check_amx() -> None:
    """Raises ConfigError where vLLM would choose AMX kernels, by what the CPU can do, and the kernel forbids them."""
    import torch

    if torch.cpu._is_amx_tile_supported() and not torch.cpu._init_amx():
        raise ConfigError(
            'model.dtype: "bfloat16" needs the AMX tiles of this CPU, and its kernel (or sandbox) does not grant them '
            'to a process; set model.dtype = "float32", or run on Linux 5.16 or newer'
        )


@contextlib.contextmanager
def _death_told(async_llm: Any) -> Iterator[None]:
    """Whatever vLLM raises once its engine process has died is EngineDead; other errors concern the one request."""
    try:
        yield
    except Exception as error:
        if async_llm.errored:
            raise EngineDead("the engine's process has died") from error
        raise
