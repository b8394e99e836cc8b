"""The control messages of a weight transfer, as HTTP bodies under `/control/weights/`.

Every message carries the membership generation; a replica refuses any but its own with 409.
"""

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from services.contracts.weights.plan import Plan, TensorSpec, make_plan


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    generation: int


class Join(_Message):
    """Enter the group: meet the learner's sender at host:port."""

    host: str
    port: int
    rank: int  # of the replica's first worker; the sender is rank 0
    world_size: int
    transport: str  # "gloo" or "nccl"
    nccl_id: str | None = None  # base64 of the NCCL unique id, for "nccl"
    rendezvous_s: Annotated[float, Field(gt=0)]  # deadline for all members to arrive
    timeout_s: Annotated[float, Field(gt=0)]  # deadline of each broadcast


class Prepare(_Message):
    """Receive version `version` into the staging buffer; answered when all bytes are there and intact."""

    version: int
    names: list[str]
    dtypes: list[str]
    shapes: list[list[Annotated[int, Field(ge=0)]]]
    bucket_bytes: int

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
    mode: str  # what happens to running requests: "keep", "wait" or "abort"


class Abort(_Message):
    """Leave the group and forget what was received; the weights in use stay."""
