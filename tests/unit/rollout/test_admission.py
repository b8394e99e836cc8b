"""Admission against a small model of an engine whose cache can be too small."""

import random

from hypothesis import given
from hypothesis import strategies as st

from services.rollout.admission import FULL, LAG_S, Admission


class Engine:
    """Dialogues grow by a token a step; one that finds no room is preempted and waits until there is."""

    def __init__(self, capacity: int, lengths: random.Random, longest: int) -> None:
        self.capacity, self._lengths, self._longest = capacity, lengths, longest
        self.running: list[list[int]] = []  # [tokens so far, final length]
        self.waiting: list[list[int]] = []
        self.num_completed = self.num_preemptions = self.num_admitted = 0

    @property
    def in_flight(self) -> int:
        return len(self.running) + len(self.waiting)

    @property
    def used(self) -> float:
        return sum(tokens for tokens, _ in self.running) / self.capacity

    def admit(self, count: int) -> None:
        self.num_admitted += count
        for _ in range(count):
            self.waiting.append([8, self._lengths.randint(16, self._longest)])

    def step(self) -> None:
        while self.waiting and sum(t for t, _ in self.running) + self.waiting[0][0] <= self.capacity:
            self.running.append(self.waiting.pop(0))
        for one in self.running:
            one[0] += 1
        while sum(t for t, _ in self.running) > self.capacity:
            self.waiting.insert(0, self.running.pop())
            self.num_preemptions += 1
        self.num_completed += sum(t >= end for t, end in self.running)
        self.running = [one for one in self.running if one[0] < one[1]]


def run(admission: Admission, engine: Engine, steps: int) -> list[int]:
    """In flight after each step."""
    history = []
    for step in range(steps):
        free = admission.free(
            engine.in_flight,
            num_attempts=engine.num_admitted,
            num_completed=engine.num_completed,
            num_preemptions=engine.num_preemptions,
            kv_cache_used=engine.used,
            now_s=float(step),
        )
        engine.admit(free)
        engine.step()
        history.append(engine.in_flight)
    return history


def test_with_room_for_all_the_limit_is_what_was_asked_for_at_once() -> None:
    engine = Engine(100_000, random.Random(0), longest=100)
    history = run(Admission(max_num_seqs=64, capacity_tokens=100_000, max_model_len=128), engine, 50)
    assert 64 - 8 <= min(history) <= max(history) <= 64 + 16  # some end in each step; some wait in the engine


def test_a_small_cache_is_kept_busy_with_hardly_a_preemption() -> None:
    engine = Engine(2_000, random.Random(0), longest=200)
    admission = Admission(max_num_seqs=256, capacity_tokens=2_000, max_model_len=400)
    run(admission, engine, 1_000)
    before, completed = engine.num_preemptions, engine.num_completed
    history = run(admission, engine, 4_000)
    ended = engine.num_completed - completed
    assert (engine.num_preemptions - before) / ended < 0.1
    assert sum(history) / len(history) > 0.6 * 2_000 / 66  # tokens of a dialogue on average, half way through: 66

    greedy = Engine(2_000, random.Random(0), longest=200)  # what would be without it
    for _ in range(5_000):
        greedy.admit(256 - greedy.in_flight)
        greedy.step()
    assert greedy.num_preemptions > 10 * engine.num_preemptions


def test_the_limit_rises_to_what_was_asked_for_when_dialogues_turn_out_short() -> None:
    engine = Engine(10_000, random.Random(0), longest=40)
    admission = Admission(max_num_seqs=128, capacity_tokens=10_000, max_model_len=2_000)
    assert admission.limit == 5
    run(admission, engine, 400)
    assert admission.limit == 128


def test_the_engine_has_in_stock_what_ends_before_others_come() -> None:
    admission = Admission(max_num_seqs=64, capacity_tokens=100_000, max_model_len=100)
    idle = {"num_completed": 0, "num_preemptions": 0, "kv_cache_used": 0.1}
    admission.free(64, num_attempts=0, now_s=0.0, **idle)
    assert admission.free(64, num_attempts=100, now_s=1.0, **idle) == LAG_S * 100
    assert admission.free(64, num_attempts=2000, now_s=2.0, **idle) == 64  # no more than is decoded together
    for second in range(3, 20):
        admission.free(64, num_attempts=2000, now_s=float(second), **idle)
    assert admission.free(64, num_attempts=2000, now_s=20.0, **idle) == 0


def test_a_weight_swap_that_preempts_everything_lowers_nothing() -> None:
    admission = Admission(max_num_seqs=32, capacity_tokens=100_000, max_model_len=100)
    admission.free(32, num_attempts=42, num_completed=10, num_preemptions=0, kv_cache_used=0.4, now_s=0.0)
    admission.free(32, num_attempts=42, num_completed=10, num_preemptions=32, kv_cache_used=0.5, now_s=0.1)
    assert admission.limit == 32


@given(st.integers(1, 300), st.integers(50, 5_000), st.integers(17, 400), st.integers(0, 9))
def test_dialogues_go_on_ending_whatever_the_sizes(most: int, capacity: int, longest: int, seed: int) -> None:
    engine = Engine(max(capacity, longest + 9), random.Random(seed), longest)
    admission = Admission(max_num_seqs=most, capacity_tokens=engine.capacity, max_model_len=longest + 8)
    history = run(admission, engine, 600)
    assert max(history) <= 2 * most
    assert engine.num_completed > 0
    assert 1 <= admission.limit <= most


def test_nothing_begins_while_the_cache_is_nearly_full_unless_nothing_runs() -> None:
    admission = Admission(max_num_seqs=8, capacity_tokens=1_000, max_model_len=10)
    assert admission.free(4, num_attempts=0, num_completed=0, num_preemptions=0, kv_cache_used=FULL, now_s=0.0) == 0
    assert admission.free(0, num_attempts=0, num_completed=0, num_preemptions=0, kv_cache_used=FULL, now_s=0.0) == 9
