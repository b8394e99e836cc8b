"""Our weight-transfer engines inside vLLM's worker: receive everything first, touch the model last; or vLLM's own.

Registered in vLLM's framework through the `vllm.general_plugins` entry point (`register`). The worker-side calls
that vLLM's own interface lacks (how far is the reception, forget it, a file instead of a sender) are in
`WorkerExtension`. Who calls what, when, and with which deadline is `weight_control`'s business.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine, NCCLWeightTransferUpdateInfo

from services.contracts.weights.fingerprint import fingerprint, share
from services.contracts.weights.plan import Plan, TensorSpec, make_plan
from services.contracts.weights.protocol import Join, Prepare
from services.contracts.weights.receiver import Receiver
from services.rollout.draw import draw

STAGED = "multiattempt"
DIRECT = "multiattempt-direct"


def register() -> None:
    """vLLM's plug-in entry point, in each of vLLM's processes; it may run several times in one.

    Asks the kernel for AMX tiles where the CPU has them: vLLM's bf16 attention uses them, but leaves the asking to
    oneDNN, and a model whose matrices are all below 1 MiB never loads that. It would die of an illegal instruction.
    """
    torch.cpu._init_amx()
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    for backend, engine in ((STAGED, "StagedWeightTransferEngine"), (DIRECT, "DirectWeightTransferEngine")):
        if backend not in WeightTransferEngineFactory._registry:
            WeightTransferEngineFactory.register_engine(backend, __name__, engine)


@dataclass
class JoinInfo(WeightTransferInitInfo):
    """`protocol.Join`, as vLLM carries it."""

    join: dict[str, Any]


@dataclass
class PrepareInfo(WeightTransferUpdateInfo):
    """`protocol.Prepare`, as vLLM carries it."""

    prepare: dict[str, Any]


class StagedWeightTransferEngine(WeightTransferEngine[JoinInfo, PrepareInfo]):
    """Joins and receives on threads while generation goes on; only `finish_weight_update` changes the model."""

    init_info_cls = JoinInfo
    update_info_cls = PrepareInfo
    defers_processing = True  # update_weights returns while bytes are still arriving

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module) -> None:
        super().__init__(config, vllm_config, device, model)
        parallel = self.parallel_config
        self._receiver = Receiver(device, rank=parallel.data_parallel_index * parallel.world_size + parallel.rank)

    def init_transfer_engine(self, init_info: JoinInfo) -> None:
        """Begin to enter the group; an earlier one is left first. `status` tells when it has formed."""
        self._receiver.join(Join(**init_info.join))

    def start_weight_update(self) -> None:
        """Nothing yet: the model stays whole until the end."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Begin to receive; `status` tells when it is done. Raises TransferError outside a group."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: PrepareInfo) -> None:
        """See update_weights."""
        self._receiver.prepare(Prepare(**update_info.prepare))

    def stage_file(self, path: str) -> None:
        """Begin to read a published version instead of receiving it."""
        self._receiver.read_file(Path(path))

    def drain_pending(self) -> None:
        """Wait for the reception to end. Raises what it raised."""
        self._receiver.wait()

    def finish_weight_update(self) -> None:
        """Load the staged weights into the model. Raises TransferError when none are staged."""
        load(self.model, self.model_config, self._receiver.take(), on_cpu=self.device.type == "cpu")

    finish_file = finish_weight_update

    def status(self) -> dict[str, Any]:
        """See Receiver."""
        return self._receiver.status()

    def shutdown(self) -> None:
        """Leave the group and forget what was received, without waiting for it."""
        self._receiver.leave()


class DirectWeightTransferEngine(NCCLWeightTransferEngine):
    """vLLM's `nccl` engine: it loads while it receives, so nothing is staged, and a failed update spoils the model.

    Added to it: the fingerprint of what was loaded, and versions out of files.
    """

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module) -> None:
        super().__init__(config, vllm_config, device, model)
        self._fingerprint = ""
        self._files = Receiver(device, rank=0)

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        """See vLLM's; all it does with the model is to call its `load_weights`."""
        specs = map(TensorSpec, update_info.names, update_info.dtype_names, map(tuple, update_info.shapes))
        model = self.model
        reader = _Reader(model, make_plan(list(specs), bucket_bytes=1))
        self.model, self._fingerprint = reader, ""  # type: ignore[assignment]
        try:
            super().receive_weights(update_info)
        finally:
            self.model = model
        self._fingerprint = fingerprint([int(part) for part in reader.shares])

    def stage_file(self, path: str) -> None:
        """Begin to read a published version into host memory."""
        self._files.read_file(Path(path))

    def finish_file(self) -> None:
        """Load it. Raises what the reading raised."""
        load(self.model, self.model_config, self._files.take(), on_cpu=False)

    def status(self) -> dict[str, Any]:
        """See Receiver: how far the reading of a file is; otherwise the fingerprint of the last update."""
        status = self._files.status()
        return status | {"fingerprint": self._fingerprint} if status["state"] == "idle" else status

    def shutdown(self) -> None:
        """Leave the group."""
        super().shutdown()
        self._files.leave()


class _Reader:
    """Stands where the model stands while weights come in: takes their fingerprint, then passes them on."""

    def __init__(self, model: Any, plan: Plan) -> None:
        self._model = model
        self._offsets = {spec.name: offset for spec, offset in zip(plan.specs, plan.offsets, strict=True)}
        self.shares: list[torch.Tensor] = []

    def load_weights(self, weights: Sequence[tuple[str, torch.Tensor]]) -> Any:
        """See the model's."""
        for name, tensor in weights:
            self.shares.append(share(tensor.contiguous().view(-1).view(torch.uint8), self._offsets[name]))
        return self._model.load_weights(weights)


def load(model: Any, model_config: Any, tensors: Sequence[tuple[str, torch.Tensor]], *, on_cpu: bool) -> None:
    """Put a whole version into the model, layer by layer."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    initialize_layerwise_reload(model)
    model.load_weights(tensors)
    finalize_layerwise_reload(model, model_config)
    if on_cpu:
        _repack_tied_heads(model)


def _repack_tied_heads(model: Any) -> None:
    """A tied LM head on the CPU owns a packed copy of the embedding which no checkpoint tensor reloads (vLLM 0.32).

    Without this the logits come from the old head, silently.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    for module in list(model.modules()):
        if isinstance(module, VocabParallelEmbedding) and hasattr(module, "cpu_linear"):
            module.quant_method.process_weights_after_loading(module)


def _no_ranks(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(values), dtype=torch.int64, device=x.device)


def _draw_in_groups(
    logits: torch.Tensor, generators: dict[int, torch.Generator], k: torch.Tensor | None, p: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What vLLM's `TopKTopPSampler.forward` does when `logprobs_mode` is "processed_logprobs"."""
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

    return draw(apply_top_k_top_p(logits, k, p), generators)


class WorkerExtension:
    """Mixed into vLLM's worker (`worker_extension_cls`): what its weight-transfer interface lacks."""

    weight_transfer_engine: StagedWeightTransferEngine | DirectWeightTransferEngine
    vllm_config: Any
    device: torch.device
    model_runner: Any
    _weight_update_active: bool

    def leave_out_ranks(self) -> None:
        """Do not compute the rank of each sampled token, which vLLM gives with its log-probability and nobody reads.

        It costs a pass over all logits in every step, and seconds of compiling at the first.
        """
        from vllm.v1.sample import sampler

        sampler.batched_count_greater_than = _no_ranks

    def draw_in_groups(self) -> None:
        """On a CPU, draw tokens as `draw` does, in a tenth of the time that vLLM takes."""
        if self.device.type == "cpu":
            self.model_runner.sampler.topk_topp_sampler.forward = _draw_in_groups

    def weights_status(self) -> dict[str, Any]:
        """State of the reception in this worker."""
        return self.weight_transfer_engine.status()

    def weights_abort(self) -> None:
        """Leave the group, forget what was received, and clear vLLM's own note that an update is under way."""
        self.weight_transfer_engine.shutdown()
        self._weight_update_active = False
        self.weight_transfer_engine.reset_weight_update_target()

    def weights_stage_file(self, path: str) -> None:
        """Begin to read a version that the learner published as a file."""
        self.weight_transfer_engine.stage_file(path)

    def weights_finish_file(self) -> None:
        """Load it into the model."""
        from vllm.config import set_current_vllm_config

        with set_current_vllm_config(self.vllm_config):
            self.weight_transfer_engine.finish_file()
