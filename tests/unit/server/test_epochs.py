"""Held pins: waited for, then revoked, and never without the knowledge of who holds them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from support.store_cases import STRIDE, make_config, traced
from touchline_server import Config
from touchline_server.store.episode_store import EpisodeStore
from touchline_server.store.epochs import HeldPin, ReaderEpochs
from touchline_server.store.pinned_draw import locate


class Clock:
    """A clock that only moves when a writer waits: by as long as it would wait."""

    def __init__(self) -> None:
        self.now = 100.0


class SteppedCondition(threading.Condition):
    """Its waits with a time limit end immediately, and move the clock; before that, ``on_wait`` is called with the lock held."""

    def __init__(self, lock: threading.Lock, clock: Clock) -> None:
        super().__init__(lock)
        self.clock = clock
        self.waits: list[float] = []
        self.on_wait: Callable[[], None] = lambda: None

    def wait(self, timeout: float | None = None) -> bool:
        if timeout is None:
            return super().wait(60)
        self.waits.append(timeout)
        self.on_wait()
        self.clock.now += timeout
        return False


def stepped(max_hold_s: float = 2.5) -> tuple[threading.Lock, ReaderEpochs, SteppedCondition]:
    lock, clock = threading.Lock(), Clock()
    epochs = ReaderEpochs(lock, max_hold_s=max_hold_s, clock=lambda: clock.now)
    condition = epochs._unpinned = SteppedCondition(lock, clock)
    return lock, epochs, condition


def hold(epochs: ReaderEpochs, on_revoke: Callable[[], None]) -> HeldPin:
    return epochs.hold(epochs.pin(), on_revoke)


def test_held_pin_is_revoked_after_the_time_with_the_lock_free_and_before_the_wait_ends() -> None:
    lock, epochs, condition = stepped()
    calls: list[str] = []

    def on_revoke() -> None:
        assert not lock.locked()
        calls.append("revoked")

    with lock:
        hold(epochs, on_revoke)
        epochs.advance(10)
        epochs.wait_quiescent(5)
        calls.append("quiescent")

        assert calls == ["revoked", "quiescent"]
        assert condition.waits == [2.5]
        assert epochs.oldest == 10


def test_held_pin_that_is_released_in_time_is_not_revoked() -> None:
    lock, epochs, condition = stepped()
    with lock:
        held = hold(epochs, lambda: pytest.fail("revoked"))
        epochs.advance(10)
        condition.on_wait = lambda: epochs.release(held)

        epochs.wait_quiescent(5)
        epochs.release(held)

    assert len(condition.waits) == 1


def test_only_held_pins_that_may_see_the_rows_are_revoked() -> None:
    lock, epochs, _ = stepped()
    revoked: list[str] = []
    with lock:
        hold(epochs, lambda: revoked.append("from row 0"))
        epochs.advance(3)
        hold(epochs, lambda: revoked.append("from row 3"))
        epochs.advance(4)
        hold(epochs, lambda: revoked.append("from row 7"))

        epochs.wait_quiescent(0)
        assert revoked == []
        epochs.wait_quiescent(3)
        assert revoked == ["from row 0"]
        assert not epochs.is_held(3)
        epochs.wait_quiescent(4)
        assert revoked == ["from row 0", "from row 3"]
        assert epochs.is_held(8)
        assert epochs.oldest == 7


def test_held_pin_whose_holder_cannot_be_told_stays_and_the_writer_gets_the_error() -> None:
    lock, epochs, _ = stepped()
    working = False

    def on_revoke() -> None:
        if not working:
            raise RuntimeError("no such slot")

    with lock:
        hold(epochs, on_revoke)
        epochs.advance(1)
        with pytest.raises(RuntimeError, match="no such slot"):
            epochs.wait_quiescent(1)
        assert lock.locked()
        assert epochs.is_held(1)

        working = True
        epochs.wait_quiescent(1)
        assert not epochs.is_held(1)


def test_release_waits_for_a_revocation_in_progress_so_the_callback_never_comes_after_it() -> None:
    lock, epochs, _ = stepped()
    revoking, may_finish, order = threading.Event(), threading.Event(), []

    def on_revoke() -> None:
        revoking.set()
        assert may_finish.wait(60)
        order.append("revoked")

    def write() -> None:
        with lock:
            epochs.wait_quiescent(1)

    def release() -> None:
        with lock:
            may_finish.set()
            epochs.release(held)
            order.append("released")

    with lock:
        held = hold(epochs, on_revoke)
        epochs.advance(1)
    with ThreadPoolExecutor(2) as pool:
        writing = pool.submit(write)
        assert revoking.wait(60)
        pool.submit(release).result(60)
        writing.result(60)

    assert order == ["revoked", "released"]


def test_ordinary_pin_is_waited_for_beyond_the_time_of_held_ones() -> None:
    lock, epochs, condition = stepped()
    waiting = threading.Event()

    class Announced(SteppedCondition):
        def wait(self, timeout: float | None = None) -> bool:
            waiting.set()
            return super().wait(timeout)

    condition = epochs._unpinned = Announced(lock, condition.clock)

    def write() -> None:
        with lock:
            epochs.wait_quiescent(1)

    with lock:
        epoch = epochs.pin()
        epochs.advance(1)
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        assert waiting.wait(60)
        condition.clock.now += 1000.0
        assert not writing.done()
        with lock:
            epochs.unpin(epoch)
        writing.result(60)


def store_of(*lengths: int, capacity: int, max_hold_s: float, share: str = "off") -> EpisodeStore:
    plain = make_config(capacity, storage={"share_columns": share})
    store = EpisodeStore(Config(config=plain.config, storage=plain.storage, ring={"max_hold_s": max_hold_s}))
    for number, length in enumerate(lengths):
        store.add(traced(number, length))
    return store


def test_draw_that_is_held_outlives_its_block_and_is_revoked_by_an_add_that_needs_its_rows() -> None:
    store = store_of(10, 10, capacity=20, max_hold_s=0.0)
    revoked: list[int] = []
    with store.draw(4, 3, "episode", np.random.default_rng(0)) as drawn:
        drawn.hold(lambda: revoked.append(store.counts().episodes_added))

    assert store._ring.epochs.is_held(10)
    assert store.try_add(traced(2, 10)) is None  # it would have to wait
    store.add(traced(2, 10))

    assert revoked == [2]  # before the episode was stored
    assert not store._ring.epochs.is_held(10)
    drawn.release()
    drawn.release()
    assert store.try_add(traced(3, 10)) is not None


def test_draw_that_was_released_delays_no_add_and_is_not_revoked() -> None:
    store = store_of(10, 10, capacity=20, max_hold_s=3600.0)
    with store.draw(4, 3, "episode", np.random.default_rng(0)) as drawn:
        drawn.hold(lambda: pytest.fail("revoked"))
    with ThreadPoolExecutor(1) as pool:
        pool.submit(drawn.release).result(60)

    assert store.try_add(traced(2, 10)) is not None


def test_clearing_revokes_what_is_held() -> None:
    store = store_of(10, 10, capacity=20, max_hold_s=0.0, share="on")
    revoked: list[bool] = []
    with store.draw(4, 3, "episode", np.random.default_rng(0)) as drawn:
        drawn.hold(lambda: revoked.append(store.columns is drawn.columns))

    store.clear()

    assert revoked == [True]  # while the columns were still there
    assert store.columns is None


@pytest.mark.parametrize(("share", "spare"), [("on", 100), ("off", 0), ("auto", 0)])
def test_held_draw_delays_an_add_only_if_there_are_no_spare_rows(share: str, spare: int) -> None:
    store = store_of(*[10] * 10, capacity=100, max_hold_s=0.0, share=share)
    revoked: list[int] = []
    with store.draw(4, 3, "episode", np.random.default_rng(0)) as drawn:
        drawn.hold(lambda: revoked.append(store.counts().steps_evicted))
    assert store.physical_rows == 100 + spare
    assert drawn.columns.capacity == 100 + spare

    for number in range(20):
        store.add(traced(10 + number, 10))

    assert revoked == [spare + 10]


def test_rows_of_draws_that_were_not_revoked_are_whole_while_episodes_are_added_flat_out() -> None:
    store = store_of(*[12] * 5, capacity=60, max_hold_s=0.0)
    added, lost = threading.Event(), threading.Semaphore(0)

    def add(adder: int) -> None:
        for number in range(300):
            store.add(traced(1000 * adder + number, 5 + number % 20))

    def hold_and_gather(learner: int) -> int:
        random, whole = np.random.default_rng(learner), 0
        for number in range(100_000):
            if added.is_set():
                break
            revoked = threading.Event()
            with store.draw(16, 3, "step", random) as drawn:
                drawn.hold(revoked.set)
            if number % 10 == 0:
                while not revoked.wait(0.001) and not added.is_set():
                    pass
            rows = locate(drawn.draw, drawn.columns, batches=1, horizon=3).rows[0]
            stamps = np.empty(rows.shape, np.int64)
            drawn.columns.gather("stamp", rows, stamps)
            if revoked.is_set():
                lost.release()
            else:
                whole += 1
                assert np.array_equal(stamps, drawn.draw.policy_version * STRIDE + drawn.draw.start + np.arange(4)[:, None])
            drawn.release()
        return whole

    with ThreadPoolExecutor(4) as pool:
        learners = [pool.submit(hold_and_gather, number) for number in range(2)]
        for job in [pool.submit(add, number) for number in (1, 2)]:
            job.result(120)
        added.set()
        whole = sum(job.result(120) for job in learners)

    assert whole > 0
    assert lost.acquire(blocking=False)
    assert store.counts().episodes_added == 605
    assert not store._ring.epochs.is_held(1 << 60)
