"""The control messages of a weight transfer, as HTTP bodies under `/control/weights/`, and their deadlines.

Every message carries the membership generation; a replica refuses any but its own with 409.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from services.contracts.weights.plan import Plan, TensorSpec, make_plan

Seconds = Annotated[float, Field(gt=0)]
Transport = Literal["gloo", "nccl"]
Staging = Literal["device", "host", "direct"]


def choose_transport(devices: Sequence[str]) -> Transport:
    """NCCL between different GPUs; gloo where an end has none, or two ends share one (NCCL refuses that).

    devices: each end's, "cpu", or "cuda:" and the UUIDs of its GPUs with commas between.
    """
    gpus = [gpu for device in devices for gpu in device.removeprefix("cuda:").split(",")]
    has_gpus = all(device.startswith("cuda:") for device in devices)
    return "nccl" if has_gpus and len(set(gpus)) == len(gpus) else "gloo"


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a step may take: `base_s`, and the time that its bytes need at `bytes_per_s`."""

    base_s: float
    bytes_per_s: float

    def of(self, num_bytes: int) -> float:
        """Deadline in seconds of a step that moves so many bytes."""
        return self.base_s + num_bytes / self.bytes_per_s


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    generation: int


class Join(_Message):
    """Enter the group: meet the learner's sender at host:port."""

    host: str
    port: int
    rank: int  # of the replica's first worker; the sender is rank 0
    world_size: int
    transport: Transport
    staging: Staging = "device"  # where the bytes wait for the swap; "direct": nowhere, vLLM loads while it receives
    nccl_id: str | None = None  # base64 of the NCCL unique id, for "nccl"
    direct_bytes: int = 0  # of a packed broadcast, for "direct"
    rendezvous_s: Seconds  # deadline for all members to arrive
    bucket_s: Seconds  # deadline of each broadcast


class Prepare(_Message):
    """Receive version `version` into the staging buffer; answered when all bytes are there and intact."""

    version: int
    names: list[str]
    dtypes: list[str]
    shapes: list[list[Annotated[int, Field(ge=0)]]]
    bucket_bytes: int
    deadline_s: Seconds  # of the whole reception

    @model_validator(mode="after")
    def _has_a_plan(self) -> Self:
        self.plan()
        return self

    def plan(self) -> Plan:
        """Where the bytes belong. Raises ValueError."""
        specs = [
            TensorSpec(name, dtype, tuple(shape))
            for name, dtype, shape in zip(self.names, self.dtypes, self.shapes, strict=True)
        ]
        return make_plan(specs, bucket_bytes=self.bucket_bytes)


class Commit(_Message):
    """Swap the staged weights in, under the version they were prepared for."""

    version: int
    mode: Literal["keep", "wait", "abort"]  # what happens to running requests
    fingerprint: str  # of the version: what is staged must have it
    drain_s: Seconds  # for running requests to end, in mode "wait"
    load_s: Seconds  # deadline of the load itself


class Abort(_Message):
    """Leave the group and forget what was received; the weights in use stay."""
