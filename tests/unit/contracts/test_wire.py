"""Tasks and trajectories over the wire: everything comes back, and nothing else gets in."""

import contextlib

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from services.contracts.wire import (
    SCHEMA_VERSION,
    Attempt,
    FinishReason,
    Progress,
    Sampling,
    Task,
    Timings,
    Trajectory,
    Verdict,
    VersionSpan,
    WireError,
    decode_progress,
    decode_task,
    decode_trajectory,
    encode,
    spans_cover_actions,
)

INT64 = st.integers(-(2**63), 2**63 - 1)
FLOATS = st.floats(allow_nan=False)

TASKS = st.builds(
    Task,
    task_id=INT64,
    batch=INT64,
    problem=st.text(),
    gold=st.lists(st.text(), max_size=3).map(tuple),
    max_attempts=INT64,
    seed=INT64,
    min_version=INT64,
    kind=st.sampled_from(["train", "eval"]),
    sampling=st.builds(Sampling, temperature=st.none() | FLOATS, top_p=st.none() | FLOATS, top_k=st.none() | INT64),
)
ATTEMPTS = st.builds(
    Attempt,
    start=INT64,
    end=INT64,
    extracted=st.none() | st.text(),
    verdict=st.sampled_from(Verdict),
    grading_ms=FLOATS,
)


def spans_of(mask: NDArray[np.bool_]) -> tuple[VersionSpan, ...]:
    """One span for each run of True, of versions 0, 1, ..."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    return tuple(VersionSpan(i, int(a), int(b)) for i, (a, b) in enumerate(edges.reshape(-1, 2)))


@st.composite
def trajectories(draw: st.DrawFn) -> Trajectory:
    mask = np.array(draw(st.lists(st.booleans(), max_size=40)), dtype=bool)
    logprobs = draw(st.lists(st.floats(width=32), min_size=len(mask), max_size=len(mask)))
    tokens = draw(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=len(mask), max_size=len(mask)))
    return Trajectory(
        task_id=draw(INT64),
        batch=draw(INT64),
        token_ids=np.array(tokens, dtype=np.int32),
        action_mask=mask,
        logprobs=np.array(logprobs, dtype=np.float32),
        versions=spans_of(mask),
        attempts=tuple(draw(st.lists(ATTEMPTS, max_size=3))),
        max_attempts=draw(INT64),
        reward=draw(FLOATS),
        finish_reason=draw(st.sampled_from(FinishReason)),
        replica_id=draw(st.text()),
        timings=draw(st.builds(Timings, generate_s=FLOATS, grade_s=FLOATS, total_s=FLOATS)),
    )


def sample(**changes: object) -> Trajectory:
    base = Trajectory(
        task_id=1,
        batch=0,
        token_ids=np.array([5, 6, 7], dtype=np.int32),
        action_mask=np.array([False, True, True]),
        logprobs=np.array([np.nan, -0.5, -1.0], dtype=np.float32),
        versions=(VersionSpan(3, 1, 2), VersionSpan(4, 2, 3)),
        attempts=(Attempt(start=1, end=3, extracted="2", verdict=Verdict.CORRECT, grading_ms=1.0),),
        max_attempts=2,
        reward=1.0,
        finish_reason=FinishReason.SOLVED,
        replica_id="rollout-0",
        timings=Timings(generate_s=0.1, grade_s=0.1, total_s=0.2),
    )
    return msgspec.structs.replace(base, **changes)


ARRAYS = ("token_ids", "action_mask", "logprobs")


@given(task=TASKS)
def test_a_task_comes_back_equal(task: Task) -> None:
    assert decode_task(encode(task)) == task


@given(sent=trajectories())
def test_a_trajectory_comes_back_bit_for_bit(sent: Trajectory) -> None:
    received = decode_trajectory(encode(sent))
    for field in sent.__struct_fields__:
        before, after = getattr(sent, field), getattr(received, field)
        if field in ARRAYS:
            assert (after.dtype, after.tobytes()) == (before.dtype, before.tobytes())  # NaN payloads too
        else:
            assert after == before


@given(sent=trajectories())
def test_encoding_is_a_pure_function(sent: Trajectory) -> None:
    assert encode(decode_trajectory(encode(sent))) == encode(sent)


@given(data=st.binary(max_size=200))
def test_garbage_raises_wire_error_and_nothing_else(data: bytes) -> None:
    for decode in (decode_task, decode_trajectory):
        with pytest.raises(WireError):
            decode(data)


@given(position=st.integers(0, 10_000), value=st.integers(0, 255))
def test_a_damaged_trajectory_decodes_or_raises_wire_error(position: int, value: int) -> None:
    data = bytearray(encode(sample()))
    data[position % len(data)] = value
    with contextlib.suppress(WireError):
        decode_trajectory(bytes(data))


@given(length=st.integers(0, 10_000))
def test_a_truncated_message_raises_wire_error(length: int) -> None:
    data = encode(sample())
    with pytest.raises(WireError):
        decode_trajectory(data[: length % len(data)])


@pytest.mark.parametrize("schema", [0, SCHEMA_VERSION + 1])
def test_another_schema_is_refused_by_number(schema: int) -> None:
    with pytest.raises(WireError, match=f"schema {schema}, this code reads {SCHEMA_VERSION}"):
        decode_trajectory(encode(sample(schema=schema)))


def test_a_task_is_no_trajectory_and_an_unknown_field_is_refused() -> None:
    task = Task(task_id=0, batch=0, problem="1+1", gold=("2",), max_attempts=1, seed=0)
    with pytest.raises(WireError):
        decode_trajectory(encode(task))
    fields = msgspec.msgpack.decode(encode(task)) | {"colour": "red"}
    with pytest.raises(WireError, match="colour"):
        decode_task(msgspec.msgpack.encode(fields))


@pytest.mark.parametrize("dtype", ["int64", "float64", "float16", "uint8", "complex64", "object", "<U3", "M8[s]"])
def test_arrays_of_other_dtypes_are_not_sent(dtype: str) -> None:
    with pytest.raises(WireError, match="arrays on the wire"):
        encode(sample(token_ids=np.zeros(3, dtype=dtype)))


@pytest.mark.parametrize("array", [np.zeros((3, 1), dtype=np.int32), np.zeros((), dtype=np.int32)])
def test_only_one_dimensional_arrays_are_sent(array: NDArray[np.int32]) -> None:
    with pytest.raises(WireError):
        encode(sample(token_ids=array))


def test_big_endian_and_strided_arrays_arrive_as_values() -> None:
    sent = sample(
        token_ids=np.array([5, 6, 7], dtype=">i4"),
        logprobs=np.array([np.nan, 9, -0.5, 9, -1.0], dtype=np.float32)[::2],
    )
    received = decode_trajectory(encode(sent))
    assert received.token_ids.tolist() == [5, 6, 7]
    assert received.logprobs.tolist()[1:] == [-0.5, -1.0]


@pytest.mark.parametrize(
    "array",
    [
        ["<i8", b"\0" * 24],
        ["|O", b"\0" * 24],
        ["<i4", b"\0" * 13],
        ["<i4", "text"],
        ["<i4", 3],
        ["<i4", None],
        ["<i4"],
        [["<i4"], b""],
        {"<i4": b""},
        "<i4",
        None,
    ],
)
def test_received_arrays_of_another_shape_are_refused(array: object) -> None:
    fields = msgspec.msgpack.decode(encode(sample())) | {"token_ids": array}
    with pytest.raises(WireError):
        decode_trajectory(msgspec.msgpack.encode(fields))


@pytest.mark.parametrize(
    "changes",
    [
        {"token_ids": np.array([5, 6], dtype=np.int32)},  # lengths differ
        {"token_ids": np.array([5, 6, 7], dtype=np.float32)},  # a dtype of another field
        {"logprobs": np.array([0, 1, 2], dtype=np.int32)},
        {"versions": ()},
        {"versions": (VersionSpan(0, 0, 3),)},  # covers the prompt
        {"versions": (VersionSpan(0, 1, 2),)},  # leaves one out
        {"versions": (VersionSpan(0, 1, 4),)},  # beyond the end
        {"versions": (VersionSpan(0, 2, 3), VersionSpan(0, 1, 2))},  # out of order
        {"versions": (VersionSpan(0, 1, 3), VersionSpan(1, 2, 3))},  # overlap
        {"versions": (VersionSpan(0, 1, 1), VersionSpan(0, 1, 3))},  # empty
    ],
)
def test_a_trajectory_that_contradicts_itself_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(WireError):
        decode_trajectory(encode(sample(**changes)))


@given(mask=st.lists(st.booleans(), max_size=30))
def test_the_runs_of_a_mask_cover_it_and_any_fewer_do_not(mask: list[bool]) -> None:
    spans = spans_of(np.array(mask, dtype=bool))
    assert spans_cover_actions(spans, np.array(mask, dtype=bool))
    if spans:
        assert not spans_cover_actions(spans[:-1], np.array(mask, dtype=bool))


def test_a_trajectory_knows_its_oldest_weights_and_whether_it_was_solved() -> None:
    assert sample().oldest_version == 3
    assert sample().is_solved
    wrong = Attempt(start=1, end=3, extracted="3", verdict=Verdict.INCORRECT, grading_ms=1.0)
    assert not sample(attempts=(wrong,)).is_solved
    assert not sample(attempts=()).is_solved


def progress(**changed) -> Progress:
    fields = {
        "task_id": 3,
        "token_ids": np.array([1, 2, 3, 9], dtype=np.int32),
        "logprobs": np.array([np.nan, -0.5, -1.5, np.nan], dtype=np.float32),
        "versions": (VersionSpan(4, 1, 2), VersionSpan(5, 2, 3)),
        "attempts": (Attempt(start=1, end=3, extracted=None, verdict=Verdict.NO_ANSWER, grading_ms=1.0),),
        "timings": Timings(generate_s=1.0, grade_s=1.0, total_s=2.0),
    }
    return Progress(**(fields | changed))


def test_progress_comes_back_byte_for_byte():
    back = decode_progress(encode(progress()))
    assert encode(back) == encode(progress())
    assert back.oldest_version == 4


@pytest.mark.parametrize(
    "changed",
    [
        {"logprobs": np.zeros(3, dtype=np.float32)},
        {"logprobs": np.zeros(4, dtype=np.int32)},
        {"versions": (VersionSpan(4, 1, 2),)},
        {"attempts": ()},
        {"schema": SCHEMA_VERSION + 1},
    ],
    ids=["length", "dtype", "spans", "attempts", "schema"],
)
def test_progress_that_does_not_fit_together_is_refused(changed):
    with pytest.raises(WireError):
        decode_progress(encode(progress(**changed)))
