"""Our staged weight-transfer engine inside vLLM's worker: receive everything first, touch the model last.

Registered in vLLM's framework through the `vllm.general_plugins` entry point (`register`). The worker-side calls
that vLLM's own interface lacks (how far is the reception, forget it) are in `WorkerExtension`. Who calls what, when,
and with which deadline is `weight_control`'s business.
"""

import hashlib
import threading
import time
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from services.contracts.weights.communicator import Communicator, TransferError, digest, join_group
from services.contracts.weights.plan import Plan
from services.contracts.weights.protocol import Join, Prepare

BACKEND = "multiattempt"
DIGEST_CHARS = 16


def register() -> None:
    """vLLM's plug-in entry point, in each of vLLM's processes; it may run several times in one.

    Asks the kernel for AMX tiles where the CPU has them: vLLM's bf16 attention uses them, but leaves the asking to
    oneDNN, and a model whose matrices are all below 1 MiB never loads that. It would die of an illegal instruction.
    """
    torch.cpu._init_amx()
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, __name__, "StagedWeightTransferEngine")


@dataclass
class JoinInfo(WeightTransferInitInfo):
    """`protocol.Join`, as vLLM carries it."""

    join: dict[str, Any]


@dataclass
class PrepareInfo(WeightTransferUpdateInfo):
    """`protocol.Prepare`, as vLLM carries it."""

    prepare: dict[str, Any]


class StagingBuffer:
    """Receives one version of the weights; nothing of the model is touched. Kept between versions: no page faults."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.digest = ""  # of what was received last, from the buckets' digests
        self._arena = torch.empty(0, dtype=torch.uint8, device=device)

    def receive(self, communicator: Communicator, plan: Plan) -> list[tuple[str, torch.Tensor]]:
        """All tensors of `plan`, as views into the buffer. Raises TransferError, digest mismatch included."""
        if self._arena.numel() < plan.num_bytes:
            self._arena = torch.empty(plan.num_bytes, dtype=torch.uint8, device=self.device)
        found = []
        for start, end in plan.buckets():
            bucket = self._arena[start:end]
            communicator.broadcast(bucket)
            found.append(digest(bucket))
        sent = torch.empty(len(found), dtype=torch.int64, device=self.device)
        communicator.broadcast(sent)
        if sent.tolist() != found:
            raise TransferError("digest mismatch: the bytes received are not the bytes sent")
        self.digest = hashlib.sha256(repr(found).encode()).hexdigest()[:DIGEST_CHARS]
        return [
            (spec.name, self._arena[offset : offset + spec.num_bytes].view(getattr(torch, spec.dtype)).view(spec.shape))
            for spec, offset in zip(plan.specs, plan.offsets, strict=True)
        ]


class Reception:
    """One PREPARE under way, on a thread of its own. Abandoned by dropping it: the thread ends at its next deadline."""

    def __init__(self, communicator: Communicator, staging: StagingBuffer, plan: Plan) -> None:
        self.staged: list[tuple[str, torch.Tensor]] | None = None
        self.error: BaseException | None = None
        self.seconds = 0.0
        self.digest = ""
        self._thread = threading.Thread(
            target=self._run, args=(communicator, staging, plan), name="weights", daemon=True
        )
        self._thread.start()

    @property
    def is_running(self) -> bool:
        """Whether bytes are still awaited."""
        return self._thread.is_alive()

    def wait(self) -> list[tuple[str, torch.Tensor]]:
        """The received tensors, once they are all there. Raises what the reception raised."""
        self._thread.join()  # bounded: each broadcast in it has a deadline
        if self.error is not None:
            raise self.error
        assert self.staged is not None
        return self.staged

    def _run(self, communicator: Communicator, staging: StagingBuffer, plan: Plan) -> None:
        started = time.monotonic()
        try:
            self.staged = staging.receive(communicator, plan)
            self.digest = staging.digest
        except Exception as error:  # noqa: BLE001 - handed to whoever asks: status, wait
            self.error = error
            communicator.close()  # at once: a member that sees an error wakes the others by leaving
        self.seconds = time.monotonic() - started


class StagedWeightTransferEngine(WeightTransferEngine[JoinInfo, PrepareInfo]):
    """PREPARE receives on a thread while generation goes on; only `finish_weight_update` changes the model."""

    init_info_cls = JoinInfo
    update_info_cls = PrepareInfo
    defers_processing = True  # update_weights returns while bytes are still arriving

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module) -> None:
        super().__init__(config, vllm_config, device, model)
        self._communicator: Communicator | None = None
        self._staging = StagingBuffer(device)  # device memory under NCCL: one more copy of the weights
        self._reception: Reception | None = None
        self._load_s = 0.0

    def init_transfer_engine(self, init_info: JoinInfo) -> None:
        """Enter the group; an earlier one is left first. Raises TransferError."""
        self.shutdown()
        join = Join(**init_info.join)
        worker = self.parallel_config.data_parallel_index * self.parallel_config.world_size + self.parallel_config.rank
        staging_device = torch.device("cpu") if join.transport == "gloo" else self.device
        if self._staging.device != staging_device:
            self._staging = StagingBuffer(staging_device)
        self._communicator = join_group(join.model_copy(update={"rank": join.rank + worker}), device=self.device)

    def start_weight_update(self) -> None:
        """Nothing yet: the model stays whole until the end."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Start receiving; `status` tells when it is done. Raises TransferError outside a group."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: PrepareInfo) -> None:
        """See update_weights."""
        if self._communicator is None:
            raise TransferError("not in a group")
        self._reception = Reception(self._communicator, self._staging, Prepare(**update_info.prepare).plan())

    def drain_pending(self) -> None:
        """Wait for the reception to end. Raises what it raised."""
        if self._reception is not None:
            self._reception.wait()

    def finish_weight_update(self) -> None:
        """Load the staged weights into the model. Raises TransferError when none are staged."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        if self._reception is None:
            raise TransferError("nothing was received: there is no version to swap in")
        staged = self._reception.wait()
        started = time.monotonic()
        self._reception = None
        initialize_layerwise_reload(self.model)
        model: Any = self.model  # vLLM's models have load_weights
        model.load_weights(staged)
        finalize_layerwise_reload(self.model, self.model_config)
        self._repack_tied_heads()
        self._load_s = time.monotonic() - started

    def status(self) -> dict[str, Any]:
        """How far a reception is: `state` is idle, receiving, staged or failed."""
        reception = self._reception
        if reception is None:
            return {"state": "idle", "error": "", "load_s": self._load_s}
        state = "receiving" if reception.is_running else "staged" if reception.error is None else "failed"
        return {
            "state": state,
            "error": str(reception.error or ""),
            "receive_s": reception.seconds,
            "digest": reception.digest,
        }

    def shutdown(self) -> None:
        """Leave the group and forget what was received, without waiting for it."""
        if self._communicator is not None:
            self._communicator.close()
            self._communicator = None
        if self._reception is not None and self._reception.is_running:
            self._staging = StagingBuffer(self._staging.device)  # the abandoned thread may still write into the old one
        self._reception = None

    def _repack_tied_heads(self) -> None:
        """A tied LM head on the CPU owns a packed copy of the embedding which no checkpoint tensor reloads (vLLM 0.32).

        Without this the logits come from the old head, silently.
        """
        if self.device.type != "cpu":
            return
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

        modules: list[Any] = list(self.model.modules())
        for module in modules:
            if isinstance(module, VocabParallelEmbedding) and hasattr(module, "cpu_linear"):
                module.quant_method.process_weights_after_loading(module)


class WorkerExtension:
    """Mixed into vLLM's worker (`worker_extension_cls`): what its weight-transfer interface lacks."""

    weight_transfer_engine: StagedWeightTransferEngine
    _weight_update_active: bool

    def weights_status(self) -> dict[str, Any]:
        """State of the reception in this worker."""
        return self.weight_transfer_engine.status()

    def weights_abort(self) -> None:
        """Leave the group, forget what was received, and clear vLLM's own note that an update is under way."""
        self.weight_transfer_engine.shutdown()
        self._weight_update_active = False
        self.weight_transfer_engine.reset_weight_update_target()
