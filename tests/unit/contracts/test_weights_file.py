"""Published files: what is read is what was written, or refused; and who may speak NCCL to whom."""

import pytest
import torch
from safetensors.torch import load_file

from services.contracts.weights.communicator import MismatchError
from services.contracts.weights.file import read, write
from services.contracts.weights.fingerprint import fingerprint
from services.contracts.weights.plan import TensorSpec, make_plan
from services.contracts.weights.protocol import Patience, choose_transport
from services.contracts.weights.staging import Arena, Received

CPU = torch.device("cpu")


@pytest.fixture
def written(tmp_path):
    plan = make_plan([TensorSpec("z", "bfloat16", (3, 5)), TensorSpec("a", "float32", (7,))], bucket_bytes=1 << 20)
    arena = Arena(CPU)
    arena.reserve(plan.num_bytes)
    for _, tensor in arena.tensors(plan):
        tensor.copy_(torch.randn(tensor.shape))
    received = Received(plan, fingerprint(arena.shares(plan)), 0.0)
    write(tmp_path / "v1.safetensors", arena, received, version=1)
    return tmp_path / "v1.safetensors", arena, received


def test_a_file_gives_back_the_version_and_its_fingerprint(written):
    path, arena, received = written
    target = Arena(CPU)
    assert read(path, target).fingerprint == received.fingerprint
    assert torch.equal(target.data, arena.data)
    assert not list(path.parent.glob(".partial-*"))


def test_any_reader_of_safetensors_takes_it(written):
    path, arena, received = written
    tensors = load_file(path)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in arena.tensors(received.plan))


def test_a_damaged_file_is_refused(written):
    path, _, _ = written
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(MismatchError, match="written as"):
        read(path, Arena(CPU))


@pytest.mark.parametrize(
    ("devices", "transport"),
    [
        (["cuda:A", "cuda:B", "cuda:C,D"], "nccl"),
        (["cuda:A", "cuda:B", "cuda:A"], "gloo"),  # learner and replica on one GPU
        (["cuda:A", "cuda:B", "cuda:B"], "gloo"),  # two replicas
        (["cuda:A", "cuda:C,A"], "gloo"),  # in the middle of a tensor-parallel one
        (["cpu", "cuda:B"], "gloo"),
        (["cuda:A", "cpu"], "gloo"),
    ],
)
def test_nccl_is_for_ends_with_a_gpu_each(devices, transport):
    assert choose_transport(devices) == transport


def test_deadlines_follow_the_bytes():
    patience = Patience(10, 50e6)
    assert patience.of(0) == 10 and patience.of(16_000_000_000) == 330
