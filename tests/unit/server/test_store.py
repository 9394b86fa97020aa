"""The store's concurrency: no torn batch, no visible half of an episode, and a writer that waits for the gathers it must wait for."""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.store_cases import check_traced, make_config, read_episode, traced, traced_columns
from touchline_protos.codec import EpisodeKey
from touchline_server import InvalidEpisodeError, NotReadyError, ReplayBuffer
from touchline_server.store.columns import Columns
from touchline_server.store.episode_store import EpisodeStore
from touchline_server.store.pinned_draw import DrawnSlices, locate


@pytest.fixture
def eager_switching() -> Iterator[None]:
    """Has threads change places a hundred times as often as usual."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(5e-5)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.parametrize("clearing", [False, True], ids=["adding", "adding and clearing"])
def test_add_and_sample_from_many_threads_gives_no_torn_batch(eager_switching: None, clearing: bool) -> None:
    """On a ring that is overwritten some 180 times, every row of every batch is the one that its provenance names."""
    adders, samplers, episodes, batches, horizon = 3, 3, 400, 1000, 4
    buffer = ReplayBuffer(make_config(200, horizon=horizon, batch_size=32))
    buffer.add_episode(traced(999_999, 50))
    together = threading.Barrier(adders + samplers + 1)

    def add(adder: int) -> None:
        lengths = np.random.default_rng(adder).integers(1, 60, episodes).tolist()
        together.wait()
        for number, length in enumerate(lengths):
            buffer.add_episode(traced(adder * 1000 + number, length, actor=f"adder {adder}"))

    def sample(sampler: int) -> int:
        together.wait()
        drawn = 0
        for number in range(batches):
            try:
                batch = buffer.sample(law=("episode", "step")[number % 2], seed=number if sampler == 0 else None)
            except NotReadyError:
                continue
            drawn += 1
            check_traced(batch, horizon=horizon)
            for actor, version in zip(batch.actor.tolist(), batch.policy_version.tolist(), strict=True):
                assert batch.actor_names[actor] == ("" if version == 999_999 else f"adder {version // 1000}")
        return drawn

    def watch() -> None:
        together.wait()
        for number in range(2000):
            counts = buffer.clear() if clearing and number % 50 == 0 else buffer.counts()
            assert counts.episodes_added == counts.episodes_stored + counts.episodes_evicted
            assert counts.steps_added == counts.steps_stored + counts.steps_evicted
            assert counts.steps_stored <= 200

    with ThreadPoolExecutor(adders + samplers + 1) as pool:
        watching = pool.submit(watch)
        adding = [pool.submit(add, adder) for adder in range(adders)]
        sampling = [pool.submit(sample, sampler) for sampler in range(samplers)]
        for job in [watching, *adding]:
            job.result()
        drawn = sum(job.result() for job in sampling)

    counts = buffer.counts()
    assert counts.episodes_added == adders * episodes + 1
    assert counts.episodes_evicted > 1000
    assert drawn >= (1 if clearing else samplers * batches * 0.9)
    assert len(set(buffer.store.entries()[:, 0].tolist())) == buffer.num_eps
    for entry in buffer.store.entries():
        expected = traced_columns(int(entry[4]), int(entry[2]))
        assert all(np.array_equal(array, expected[name]) for name, array in read_episode(buffer.store, entry).items())


def test_retries_from_many_threads_store_each_episode_once(eager_switching: None) -> None:
    buffer = ReplayBuffer(make_config(10_000))
    together = threading.Barrier(4)

    def send() -> list[bool]:
        together.wait()
        return [buffer.add_episode(traced(number, 5, key=EpisodeKey("robot", 1, number))).duplicate for number in range(100)]

    with ThreadPoolExecutor(4) as pool:
        answers = [job.result() for job in [pool.submit(send) for _ in range(4)]]

    assert [sum(duplicates) for duplicates in zip(*answers, strict=True)] == [3] * 100
    assert (buffer.num_eps, buffer.counts().episodes_duplicate) == (100, 300)


@pytest.mark.parametrize("copies", range(6))
def test_copy_that_fails_leaves_nothing_visible_and_later_adds_work(monkeypatch: pytest.MonkeyPatch, copies: int) -> None:
    buffer = ReplayBuffer(make_config(20))
    for number in range(3):
        buffer.add_episode(traced(number, 6))
    write_rows, left = Columns._write_rows, itertools.count(copies, -1)

    def fail(*arguments: Any) -> None:
        if not next(left):
            raise MemoryError("planned failure")
        write_rows(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Columns, "_write_rows", fail)
        with pytest.raises(MemoryError):
            buffer.add_episode(traced(3, 8, key=EpisodeKey("robot", 1, 3)))

    counts = buffer.counts()
    assert (counts.episodes_added, counts.episodes_stored, counts.episodes_evicted, counts.episodes_refused) == (3, 2, 1, 1)
    assert set(buffer.sample(batch_size=100).policy_version.tolist()) == {1, 2}
    assert not buffer.add_episode(traced(3, 8, key=EpisodeKey("robot", 1, 3))).duplicate
    # The id of the failed copy is not used again.
    assert buffer.store.entries()[:, [0, 4]].tolist() == [[1, 1], [2, 2], [4, 3]]
    check_traced(buffer.sample(batch_size=100), horizon=3)


class ObservedCondition(threading.Condition):
    """A condition that sets ``waited`` when a thread begins to wait."""

    def __init__(self, lock: threading.Lock) -> None:
        super().__init__(lock)
        self.waited = threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        self.waited.set()
        return super().wait(timeout)


def store_of(*lengths: int, capacity: int) -> tuple[EpisodeStore, ObservedCondition]:
    store = EpisodeStore(make_config(capacity))
    for number, length in enumerate(lengths):
        store.add(traced(number, length))
    condition = store._ring.epochs._unpinned = ObservedCondition(store._ring.lock)
    return store, condition


def stamps(store: EpisodeStore, rows: np.ndarray, columns: Columns) -> np.ndarray:
    out = np.empty(rows.shape, np.int64)
    columns.gather("stamp", rows, out)
    return out


@contextmanager
def drawn_from(store: EpisodeStore, slices: int, random: np.random.Generator) -> Iterator[DrawnSlices]:
    """Slices of one batch, pinned within the block."""
    with store.draw(slices, 3, "episode", random) as pinned:
        yield locate(pinned.draw, pinned.columns, batches=1, horizon=3).slices(1)[0]


def test_pinned_draw_delays_only_the_writer() -> None:
    store, condition = store_of(10, 5, 5, capacity=20)
    random = np.random.default_rng(0)
    with ThreadPoolExecutor(1) as pool:
        with drawn_from(store, 50, random) as slices:
            before = stamps(store, slices.rows, slices.columns)
            adding = pool.submit(store.add, traced(7, 10))
            assert condition.waited.wait(60)

            assert not adding.done()
            with drawn_from(store, 20, random) as later:
                assert set(later.draw.episode_id.tolist()) == {1, 2}
            assert store.counts().episodes_stored == 2
            assert not adding.done()
            assert np.array_equal(stamps(store, slices.rows, slices.columns), before)
        adding.result(60)

    assert [entry[4] for entry in store.entries()] == [1, 2, 7]
    for number in range(8, 20):
        store.add(traced(number, 10))
    assert store.counts().episodes_added == 3 + 13


def test_writer_does_not_wait_for_gathers_that_were_drawn_after_it_evicted() -> None:
    store, condition = store_of(10, 5, 5, capacity=20)
    random = np.random.default_rng(0)
    with ThreadPoolExecutor(1) as pool:
        with store.draw(1, 3, "episode", random):
            adding = pool.submit(store.add, traced(7, 10))
            assert condition.waited.wait(60)
            later = store.draw(1, 3, "episode", random)
        adding.result(60)
        later.release()

    assert store.counts().episodes_stored == 3


def test_writer_that_evicts_nothing_does_not_wait() -> None:
    store, condition = store_of(5, capacity=20)

    with store.draw(4, 3, "episode", np.random.default_rng(0)):
        store.add(traced(1, 15))

    assert not condition.waited.is_set()


def test_try_add_stores_as_add_does() -> None:
    one, _ = store_of(5, 8, capacity=20)
    other, _ = store_of(5, 8, capacity=20)
    for number in range(2, 9):
        key = EpisodeKey("a", 1, number // 2)
        stored = one.try_add(traced(number // 2, 6, key=key))
        assert stored is not None and stored == other.add(traced(number // 2, 6, key=key))
    with pytest.raises(InvalidEpisodeError, match="expected at most the buffer's capacity"):
        one.try_add(traced(9, 21))
    with pytest.raises(InvalidEpisodeError):
        other.add(traced(9, 21))

    assert np.array_equal(one.entries(), other.entries()) and one.counts() == other.counts()
    for entry in one.entries():
        assert all(
            np.array_equal(a, b, equal_nan=True)
            for a, b in zip(read_episode(one, entry).values(), read_episode(other, entry).values(), strict=True)
        )


def test_try_add_that_would_wait_stores_nothing() -> None:
    empty = EpisodeStore(make_config(20))
    assert empty.try_add(traced(1, 5)) is None  # the columns are to be allocated
    store, condition = store_of(5, 8, capacity=20)
    before = store.counts()

    with store.draw(1, 3, "episode", np.random.default_rng(0)):
        assert store.try_add(traced(2, 6)) is None
    with ThreadPoolExecutor(1) as pool:
        store.writes.lock.acquire()
        try:
            assert pool.submit(store.try_add, traced(2, 6)).result(60) is None
        finally:
            store.writes.lock.release()

    assert store.counts() == before and not condition.waited.is_set()
    assert store.try_add(traced(2, 6)) is not None


def test_try_add_does_not_wait_for_a_reader_between_its_check_and_its_eviction(monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = store_of(10, 10, capacity=20)
    check, readers = store._ring.check, ExitStack()

    def meanwhile(*arguments: Any, **options: Any) -> Any:
        schema = check(*arguments, **options)
        readers.enter_context(store.draw(4, 3, "episode", np.random.default_rng(0)))
        return schema

    monkeypatch.setattr(store._ring, "check", meanwhile)
    with ThreadPoolExecutor(1) as pool, readers:
        assert pool.submit(store.try_add, traced(2, 6)).result(60) is None

    assert [entry[4] for entry in store.entries()] == [0, 1]
    monkeypatch.undo()
    assert store.try_add(traced(2, 6)) is not None


def test_try_add_does_not_allocate_if_the_table_is_cleared_before_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = store_of(10, capacity=20)

    class OvertakenLock:
        """The write lock, which a clear takes first."""

        def __init__(self, lock: Any) -> None:
            self._lock = lock

        def acquire(self, *, blocking: bool) -> bool:
            monkeypatch.undo()
            store.clear()
            return bool(self._lock.acquire(blocking=blocking))

        def release(self) -> None:
            self._lock.release()

    monkeypatch.setattr(store.writes, "lock", OvertakenLock(store.writes.lock))
    assert store.try_add(traced(2, 6)) is None
    assert store.columns is None


def test_try_add_never_writes_to_a_disk(tmp_path: Path) -> None:
    store = EpisodeStore(make_config(20, storage={"device": "disk", "scratch_dir": str(tmp_path)}))
    store.add(traced(0, 5))

    assert store.try_add(traced(1, 5)) is None


def test_clear_waits_for_gathers_and_leaves_them_their_rows() -> None:
    store, condition = store_of(10, 5, capacity=20)
    with ThreadPoolExecutor(1) as pool:
        with drawn_from(store, 20, np.random.default_rng(0)) as slices:
            before = stamps(store, slices.rows, slices.columns)
            clearing = pool.submit(store.clear)
            assert condition.waited.wait(60)

            assert not clearing.done()
            assert not store.can_sample(3)
            assert np.array_equal(stamps(store, slices.rows, slices.columns), before)
        counts = clearing.result(60)

    assert (counts.episodes_stored, counts.episodes_evicted) == (0, 2)


def test_draw_whose_block_raises_releases_its_rows() -> None:
    store, condition = store_of(10, 10, capacity=20)
    with pytest.raises(KeyError), store.draw(4, 3, "episode", np.random.default_rng(0)):
        raise KeyError

    store.add(traced(2, 20))

    assert not condition.waited.is_set()
    assert store.counts().episodes_stored == 1


def test_draw_of_several_batches_equals_draws_in_sequence() -> None:
    store, _ = store_of(10, 7, capacity=20)

    with store.draw(16, 3, "episode", np.random.default_rng(5), batches=3) as pinned:
        together = locate(pinned.draw, pinned.columns, batches=3, horizon=3)
    random = np.random.default_rng(5)
    alone = []
    for _ in range(3):
        with drawn_from(store, 16, random) as slices:
            alone.append(slices)

    assert together.rows.tolist() == [one.rows.tolist() for one in alone]
    assert alone[0].rows.tolist() != alone[1].rows.tolist()


def test_draw_nothing_long_enough_raises_with_the_counts_and_pins_nothing() -> None:
    store, condition = store_of(3, 2, capacity=6)

    with (
        pytest.raises(NotReadyError, match="5 steps in 2 episodes are stored, none of the episodes has the 4 steps that horizon 3 needs"),
        store.draw(1, 3, "step", np.random.default_rng(0)),
    ):
        pass

    store.add(traced(9, 6))
    assert not condition.waited.is_set()


def test_subscribe_reports_every_change_until_it_ends() -> None:
    store, _ = store_of(capacity=20)
    seen: list[int] = []
    unsubscribe = store.subscribe(lambda: seen.append(store.counts().episodes_stored))

    store.add(traced(0, 5))
    store.add(traced(1, 5))
    store.clear()
    unsubscribe()
    store.add(traced(2, 5))

    assert seen == [1, 2, 0]


def test_read_episode_names_only_returns_those_columns() -> None:
    store, _ = store_of(5, capacity=20)

    episode = read_episode(store, store.entries()[0], ["reward", "stamp"])

    assert set(episode) == {"reward", "stamp"}
