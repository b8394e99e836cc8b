"""A published version as a safetensors file, for replicas that join: any Hugging Face reader takes it.

The order of the tensors, on which the fingerprint depends, the fingerprint and the version are in its metadata.
"""

import json
import os
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from services.contracts.weights.communicator import MismatchError
from services.contracts.weights.fingerprint import fingerprint
from services.contracts.weights.plan import TensorSpec, make_plan
from services.contracts.weights.staging import Arena, Received

_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
READ_BYTES = 16 << 20  # at a time, when the fingerprint is computed


def write(path: Path, arena: Arena, received: Received, *, version: int) -> None:
    """Write what is in the arena; the file is whole or absent. Raises OSError."""
    metadata = {
        "format": "pt",
        "version": str(version),
        "fingerprint": received.fingerprint,
        "names": json.dumps([spec.name for spec in received.plan.specs]),
    }
    partial = path.with_name(f".partial-{path.name}")
    tensors = {name: tensor.cpu() for name, tensor in arena.tensors(received.plan)}
    save_file(tensors, partial, metadata=metadata)
    with partial.open("rb") as stream:
        os.fsync(stream.fileno())
    partial.rename(path)


def read(path: Path, arena: Arena) -> Received:
    """Fill the arena (host memory). Raises MismatchError when the contents are not those that were written, OSError."""
    with safe_open(path, framework="pt") as stored:
        metadata = stored.metadata()
        names = json.loads(metadata["names"])
        slices = {name: stored.get_slice(name) for name in names}
        specs = [TensorSpec(name, _DTYPES[one.get_dtype()], tuple(one.get_shape())) for name, one in slices.items()]
        plan = make_plan(specs, bucket_bytes=READ_BYTES)
        arena.reserve(plan.num_bytes)
        for name, place in arena.tensors(plan):
            place.copy_(stored.get_tensor(name))
    found = fingerprint(arena.shares(plan))
    if found != metadata["fingerprint"]:
        raise MismatchError(f"{path}: fingerprint {found}, written as {metadata['fingerprint']}")
    return Received(plan, found, 0.0)
