"""DeepSpeed: engines for actor, critic and reference. The only file that imports it.

Two things are not left to DeepSpeed. The learning rate is set from outside at every step (`schedule`). And the mean
over tokens is exact: DeepSpeed divides gradients by the number of ranks, so losses arrive here as shares of one
global sum and are multiplied by it; micro-batches accumulate without a factor, and as many as a minibatch needs.
"""

import contextlib
import io
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from services.contracts.settings import LearnerSection
from services.learner.host_copy import HostCopies
from services.learner.offload import offloaded_activations
from services.learner.ranks import Command, Ranks

GATHER_BYTES = 64 << 20  # weights gathered at once under ZeRO-3
MAX_BUCKET = 200_000_000  # elements of one gradient reduction
TAG = "engine"  # DeepSpeed's name of the folder in an engine's folder of a checkpoint

_M = TypeVar("_M")

log = logging.getLogger(__name__)


class Engine:
    """One model under DeepSpeed, trained with AdamW, or frozen: `lr` None, and ZeRO-3 where its weights are sharded."""

    def __init__(
        self, module: nn.Module, *, config: LearnerSection, dtype: torch.dtype, ranks: Ranks, lr: float | None
    ) -> None:
        deepspeed = _import_deepspeed()
        self.device = torch.device("cuda", ranks.local_rank) if _backend(config) == "nccl" else torch.device("cpu")
        self._world = ranks.world
        self._grad_clip = config.grad_clip
        frozen_stage = 3 if _is_sharded(config) else 0
        self.stage = frozen_stage if lr is None else config.zero_stage
        self._offloads = config.offload_activations and lr is not None
        # Without ZeRO and bf16 DeepSpeed clips but does not say what it clipped: then it is done here.
        self._clips_itself = lr is not None and (self.stage > 0 or dtype is torch.bfloat16)
        settings = _settings(module, config=config, dtype=dtype, stage=self.stage, clip=self._clips_itself)
        if lr is None and config.reference_weights == "host":
            settings["zero_optimization"]["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        module.to(self.device)
        trained: dict[str, Any] = {}
        if lr is None:
            module.requires_grad_(requires_grad=False)
        elif config.offload_optimizer and self.stage > 0:
            params = {"lr": lr, "betas": list(config.betas), "weight_decay": config.weight_decay}
            settings["optimizer"] = {"type": "AdamW", "params": params}
            trained = {"model_parameters": list(module.parameters())}
        else:  # torch's own fused kernel: DeepSpeed's would compile for a minute at first use
            trained["model_parameters"] = list(module.parameters())
            trained["optimizer"] = torch.optim.AdamW(
                trained["model_parameters"], lr=lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
            )
        self.engine: Any = None
        self.module = module
        if lr is not None or self.stage == 3:
            with contextlib.redirect_stdout(io.StringIO()):  # bf16 under ZeRO-1 prints how much memory there is
                self.engine = deepspeed.initialize(model=module, config=settings, **trained)[0]
            self.module = self.engine.module
        module.train(mode=lr is not None)  # gradient checkpointing asks for it; there is no dropout

    def __call__(self, *inputs: Tensor | bool, **where: Tensor) -> Tensor:
        """Forward pass on this rank; every rank must do it equally often."""
        model = self.module if self.engine is None else self.engine
        output: Tensor = model(*inputs, **where)
        return output

    def step(
        self,
        micros: Sequence[_M],
        loss_of: Callable[[_M], Tensor],
        *,
        lr: float,
        enter: Callable[[str], None] = lambda _part: None,
    ) -> float:
        """One optimiser step. Returns the global gradient norm before clipping.

        micros: the same number on every rank, at least one. loss_of: runs the forward pass; its results add up, over
        micro-batches and ranks, to the loss whose gradient is applied. When a loss or the norm is not finite on any
        rank the step is skipped on all: parameters and moments stay as they are, and infinity is returned.
        """
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        for i, micro in enumerate(micros):
            self.engine.set_gradient_accumulation_boundary(is_boundary=i == len(micros) - 1)
            enter("forward")
            with offloaded_activations() if self._offloads else contextlib.nullcontext():
                loss = loss_of(micro)
            enter("backward")
            # DeepSpeed divides by the number of ranks. A loss that is not finite spoils its gradient too, so that the
            # one check that all ranks make together, of the norm, finds both.
            self.engine.backward(loss * torch.where(loss.detach().isfinite(), float(self._world), math.nan))
        enter("optimiser")
        if self._clips_itself:
            self.engine.step()
            if self.engine.was_step_applied():
                return float(self.engine.get_global_grad_norm())
            self._drop_gradients()
            return math.inf
        norm = float(nn.utils.clip_grad_norm_(self.module.parameters(), self._grad_clip))
        if not math.isfinite(norm):
            self.module.zero_grad(set_to_none=True)  # AdamW passes over what has no gradient
        self.engine.step()
        return norm if math.isfinite(norm) else math.inf

    def _drop_gradients(self) -> None:
        """With the optimiser on the host, ZeRO-1 and 2 skip a step but keep its gradients and add the next to them."""
        if self.stage in (1, 2) and self.engine.zero_cpu_offload():
            averaged = self.engine.optimizer.averaged_gradients
            averaged.update(dict.fromkeys(averaged))

    def save(self, folder: Path, copies: HostCopies) -> None:
        """Copy parameters and optimiser state, as files below `folder` that are yet to be written; all ranks."""
        writer, self.engine.checkpoint_engine = self.engine.checkpoint_engine, copies
        try:
            self.engine.save_checkpoint(str(folder), tag=TAG)
        finally:
            self.engine.checkpoint_engine = writer

    def load(self, folder: Path, *, is_universal: bool = False) -> None:
        """Restore what `save` left in files; all ranks together.

        As many ranks, with the same ZeRO stage, as wrote them; is_universal: any, out of what `universal.convert` made.
        """
        self.engine._config.load_universal_checkpoint = is_universal
        path, _ = self.engine.load_checkpoint(str(folder), tag=TAG)
        self.engine._config.load_universal_checkpoint = False
        if path is None:
            raise FileNotFoundError(f"{folder}: no DeepSpeed checkpoint there")

    @property
    def checkpoint_bytes(self) -> int:
        """About how many bytes `save` writes on all ranks: parameters, fp32 master copy, two fp32 moments."""
        return sum(_numel(p) * (p.element_size() + 12) for p in self.module.parameters())


class ParamMeta(NamedTuple):
    """One tensor of the model as it is sent; the same fields as vLLM's class of this name."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class WeightSource:
    """The actor's full weights under Hugging Face names, for publishing and export. Re-iterable.

    Rank 0 iterates, as often as it likes and not necessarily to the end; under ZeRO-3 each group of tensors is
    gathered by all ranks, the others on command (`Trainer.follow`). A tied head is absent. The tensors are the live
    parameters (ZeRO-3: copies): use them before the next step.
    """

    def __init__(self, engine: Engine, ranks: Ranks) -> None:
        prefix = "model."  # of Actor
        self._params = [(name.removeprefix(prefix), p) for name, p in engine.module.named_parameters()]
        self._ranks = ranks
        self._partitioned = engine.stage == 3
        self._groups = list(_grouped(self._params)) if self._partitioned else []

    def metadata(self) -> list[ParamMeta]:
        """Name, dtype and full shape of what iteration yields, in its order; transfers nothing."""
        return [ParamMeta(name, p.dtype, tuple(getattr(p, "ds_shape", p.shape))) for name, p in self._params]

    @property
    def num_bytes(self) -> int:
        """Size of the whole."""
        return sum(_numel(p) * p.element_size() for _, p in self._params)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        if not self._partitioned:
            yield from ((name, p.detach()) for name, p in self._params)
            return
        for number in range(len(self._groups)):
            self._ranks.command(Command.GATHER, number)
            yield from self.gather(number)

    def gather(self, number: int) -> list[tuple[str, Tensor]]:
        """All ranks: make group `number` whole. Copies, because ZeRO-3 frees the tensors again; [] on followers."""
        group = self._groups[number]
        with _import_deepspeed().zero.GatheredParameters([p for _, p in group], modifier_rank=None):
            return [(name, p.detach().clone()) for name, p in group] if self._ranks.leads else []


def choose_backend(config: LearnerSection) -> str:
    """Transport of the gradients: nccl on GPUs, gloo on CPUs. Tells DeepSpeed: call it before that is imported."""
    backend = _backend(config)
    if backend == "gloo":
        os.environ["DS_ACCELERATOR"] = "cpu"
    return backend


def _is_sharded(config: LearnerSection) -> bool:
    """Whether the reference's weights are."""
    if config.reference_weights == "auto":
        return config.zero_stage == 3
    return config.reference_weights != "device"


def _backend(config: LearnerSection) -> str:
    has_cuda = torch.cuda.is_available()
    return "nccl" if config.device == "cuda" or (config.device == "auto" and has_cuda) else "gloo"


def _settings(
    module: nn.Module, *, config: LearnerSection, dtype: torch.dtype, stage: int, clip: bool
) -> dict[str, Any]:
    size = max(1, sum(p.numel() for p in module.parameters()))
    zero: dict[str, Any] = {
        "stage": stage,
        # DeepSpeed reserves a buffer of this many elements, by default 2 GB even for a tiny model.
        "reduce_bucket_size": min(MAX_BUCKET, size),
        "allgather_bucket_size": min(MAX_BUCKET, size),
    }
    if config.offload_optimizer and stage > 0:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # only DeepSpeed's own throughput log reads it
        "gradient_accumulation_steps": 1,  # the boundary is set by hand
        "bf16": {"enabled": dtype is torch.bfloat16},
        "zero_optimization": zero,
        "gradient_clipping": config.grad_clip if clip else 0.0,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    if dtype is torch.bfloat16 and stage > 0:
        # By default micro-batches add up in bf16: over 64 of them the gradient's norm was 0.4 % off. ZeRO-0 cannot.
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def _grouped(params: list[tuple[str, nn.Parameter]]) -> Iterator[list[tuple[str, nn.Parameter]]]:
    group: list[tuple[str, nn.Parameter]] = []
    size = 0
    for name, param in params:
        num_bytes = _numel(param) * param.element_size()
        if group and size + num_bytes > GATHER_BYTES:
            yield group
            group, size = [], 0
        group.append((name, param))
        size += num_bytes
    if group:
        yield group


def _numel(param: nn.Parameter) -> int:
    return math.prod(getattr(param, "ds_shape", param.shape))


def _import_deepspeed() -> Any:
    import deepspeed
    from deepspeed import ops

    # It calls collectives by names that torch 2.13 wants to rename, and is told so at every call.
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
    # Compiled with g++ at first use, and of use only between several ranks on one CPU.
    ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logger = logging.getLogger("DeepSpeed")
    if logger.handlers:  # it prints every setting on stdout; ours go to stderr as JSON
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.WARNING)
    return deepspeed
