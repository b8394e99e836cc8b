"""The plan covers every byte of every tensor exactly once, and both ends agree on it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.contracts.weights.plan import ALIGNMENT_BYTES, ITEM_BYTES, TensorSpec, make_plan
from services.contracts.weights.protocol import Prepare

specs = st.lists(
    st.builds(
        TensorSpec,
        name=st.text(min_size=1, max_size=5),
        dtype=st.sampled_from(sorted(ITEM_BYTES)),
        shape=st.lists(st.integers(1, 9), max_size=3).map(tuple),
    ),
    min_size=1,
    max_size=12,
)


@given(specs, st.integers(1, 700))
def test_tensors_are_aligned_in_order_and_do_not_overlap(tensors, bucket_bytes):
    plan = make_plan(tensors, bucket_bytes=bucket_bytes)
    end = 0
    for spec, offset in zip(plan.specs, plan.offsets, strict=True):
        assert offset % ALIGNMENT_BYTES == 0
        assert end <= offset < end + ALIGNMENT_BYTES
        end = offset + spec.num_bytes
    assert plan.num_bytes == end


@given(specs, st.integers(1, 700))
def test_bytes_sent_bucket_by_bucket_arrive_as_they_were(tensors, bucket_bytes):
    plan = make_plan(tensors, bucket_bytes=bucket_bytes)
    sent = np.random.default_rng(0).integers(0, 256, plan.num_bytes, dtype=np.uint8)
    received = np.zeros_like(sent)
    for start, end in plan.buckets():
        assert 0 < end - start <= bucket_bytes
        assert not received[start:end].any()
        received[start:end] = sent[start:end]
    assert np.array_equal(sent, received)


@given(specs, st.integers(1, 700))
def test_a_replica_makes_the_same_plan_from_the_message(tensors, bucket_bytes):
    plan = make_plan(tensors, bucket_bytes=bucket_bytes)
    message = Prepare(
        generation=1,
        version=2,
        names=[s.name for s in tensors],
        dtypes=[s.dtype for s in tensors],
        shapes=[list(s.shape) for s in tensors],
        bucket_bytes=bucket_bytes,
        deadline_s=1.0,
    )
    assert Prepare.model_validate_json(message.model_dump_json()).plan() == plan


def test_what_cannot_travel_is_refused():
    with pytest.raises(ValueError, match="dtype int8 cannot be transferred"):
        make_plan([TensorSpec("w", "int8", (1,))], bucket_bytes=8)
    with pytest.raises(ValueError, match="no tensors"):
        make_plan([], bucket_bytes=8)
    with pytest.raises(ValueError, match="bucket_bytes"):
        make_plan([TensorSpec("w", "float32", (1,))], bucket_bytes=0)
