"""The watch that ranks keep over one another, on a store in memory."""

import threading
import time

from services.learner.liveness import Liveness

TIMEOUT_S = 0.5


class Memory:
    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.is_gone = False
        self.answers = threading.Event()
        self.answers.set()

    def set(self, key: str, value: str) -> None:
        if self.is_gone:
            raise RuntimeError("Connection reset by peer\nat somewhere")
        self.values[key] = value.encode()

    def get(self, key: str) -> bytes:
        self.answers.wait(20)
        return self.values[key]


class Watch:
    """A rank's watch, and what it found."""

    def __init__(self, store: Memory, rank: int, world: int = 3) -> None:
        self.lost, self.reason = threading.Event(), ""
        self.liveness = Liveness(store, rank=rank, world=world, timeout_s=TIMEOUT_S, on_loss=self._note)
        self.liveness.announce()

    def _note(self, reason: str) -> None:
        self.reason = reason
        self.lost.set()


def test_the_leader_misses_a_rank_and_the_others_miss_the_leader() -> None:
    store = Memory()
    watches = [Watch(store, rank) for rank in range(3)]
    for watch in watches:
        watch.liveness.start()
    assert not any(watch.lost.wait(2 * TIMEOUT_S) for watch in watches[:1])
    watches[2].liveness.stop()  # as a hanging rank: it counts no more
    assert watches[0].lost.wait(20) and "rank 2 gave no sign of life for 0.5 s" in watches[0].reason
    assert watches[1].lost.wait(20) and "rank 0 gave no sign" in watches[1].reason  # whose watch has ended


def test_a_store_that_is_gone_is_a_loss_but_not_once_the_watch_is_over() -> None:
    store = Memory()
    watch, over = Watch(store, 0, world=1), Watch(store, 0, world=1)
    watch.liveness.start()
    over.liveness.start()
    over.liveness.stop()
    store.is_gone = True
    assert watch.lost.wait(20) and watch.reason.endswith("(Connection reset by peer)")
    time.sleep(TIMEOUT_S)
    assert not over.lost.is_set()


def test_a_store_that_does_not_answer_is_a_loss_although_its_calls_have_no_deadline() -> None:
    store = Memory()
    watch = Watch(store, 1, world=2)
    store.set("alive/0", "0")
    store.answers.clear()  # the process that serves it is stopped
    watch.liveness.start()
    assert watch.lost.wait(10) and "store has not answered for 0.5 s" in watch.reason
    store.answers.set()
