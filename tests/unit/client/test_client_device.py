"""Batches on a CUDA device. Without one, a stand-in plays torch's part: its device is host memory, and its copies complete only when a test
lets them, so that the tests can check which memory is written when."""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from support.client_faults import refuse_threads
from touchline import Batch, ClosedError, UnavailableError
from touchline._learner.cuda import AHEAD, STAGING_SLOTS, CudaSource, CudaStaging, sync_to_current_stream
from touchline._learner.torch_batch import as_tensor, map_batch
from touchline_protos.types.dtypes import BFLOAT16

torch = pytest.importorskip("torch")

from support.late_torch import LateTorch  # noqa: E402


def _batch(number: int, rows: int = 2) -> Batch:
    full: dict[str, Any] = {name: np.full(3, number) for name in ("episode_id", "start", "actor", "policy_version")}
    return Batch(
        obs={"rgb": np.full((rows, 3, 5), number, np.uint8), "half": np.full((rows, 3), 0x4000, np.uint16).view(BFLOAT16)},
        action=np.full((rows - 1, 3, 2), number, np.float32),
        reward=np.full((rows - 1, 3, 1), number, np.float32),
        done=np.zeros((rows - 1, 3, 1), np.bool_),
        task=None,
        extra={"wide": np.full((rows, 3), number, np.float64)},
        probability=np.full(3, 0.5),
        **full,
    )


def _matches(batch: Batch, number: int) -> bool:
    return bool(
        (batch.obs["rgb"] == number).all()
        and (batch.action == number).all()
        and (batch.extra["wide"] == number).all()
        and (batch.episode_id == number).all()
    )


def test_staged_batch_arrives_whole_with_its_dtypes_and_shapes() -> None:
    late = LateTorch()

    staged = CudaStaging(late, "device").stage(_batch(7))
    batch = sync_to_current_stream(late, staged)

    assert _matches(batch, 7)
    assert batch.obs["half"].dtype == torch.bfloat16 and (batch.obs["half"] == 2.0).all()
    assert batch.done.dtype == torch.bool and not batch.done.any()
    assert batch.obs["rgb"].shape == (2, 3, 5) and batch.reward.shape == (1, 3, 1)
    assert batch.task is None
    assert late.log == ["record_stream"]


def test_staging_memory_is_not_written_before_its_last_copy_was_made() -> None:
    late = LateTorch()
    staging = CudaStaging(late, "device")

    # Twice round the slots with no copy ever waited for by the learner: reuse itself must wait.
    staged = [staging.stage(_batch(number)) for number in range(2 * STAGING_SLOTS)]
    assert len(late.queued) == STAGING_SLOTS

    assert all(_matches(sync_to_current_stream(late, item), number) for number, item in enumerate(staged))


def test_staging_grows_with_the_batches() -> None:
    late = LateTorch()
    staging = CudaStaging(late, "device")

    staged = [staging.stage(_batch(number, rows=2 + number)) for number in range(2 * STAGING_SLOTS)]

    assert all(_matches(sync_to_current_stream(late, item), number) for number, item in enumerate(staged))


def test_host_arrays_are_free_after_staging() -> None:
    late = LateTorch()
    arrays = _batch(3)

    staged = CudaStaging(late, "device").stage(arrays)
    arrays.action[...] = 9

    assert _matches(sync_to_current_stream(late, staged), 3)


class Ring:
    """Memory of two batches, as a ring has it."""

    def __init__(self) -> None:
        self.memory = (ctypes.c_ubyte * 8192)()

    def whole_array(self) -> Any:
        return self.memory

    def batch(self, slot: int, number: int) -> Batch:
        """A batch in a slot, each array at the next multiple of 16 bytes."""
        at = 4096 * slot

        def place(array: np.ndarray) -> np.ndarray:
            nonlocal at
            placed = np.ndarray(array.shape, array.dtype, self.memory, at)
            placed[...] = array
            at += -(-array.nbytes // 16) * 16
            return placed

        return map_batch(_batch(number), place)


def test_batch_in_a_ring_is_copied_from_where_it_lies_and_held_until_then() -> None:
    late, ring = LateTorch(), Ring()
    staging = CudaStaging(late, "device")
    batch = ring.batch(1, 5)
    alive = weakref.ref(batch.action)

    staged = staging.stage(batch, ring)
    del batch
    assert alive() is not None
    ring.batch(1, 6)  # the device reads only now: what is in the slot by then is what it gets
    arrived = sync_to_current_stream(late, staged)
    staging.close()

    assert _matches(arrived, 6)
    assert alive() is None
    assert late.log == ["register", "record_stream", "unregister"]


def test_no_more_than_two_batches_of_a_ring_are_held() -> None:
    late, ring = LateTorch(), Ring()
    staging = CudaStaging(late, "device")

    staged = [staging.stage(ring.batch(number % 2, number), ring) for number in range(3)]

    assert len(late.queued) == 2  # the third one waited for the first one's copy
    assert _matches(sync_to_current_stream(late, staged[2]), 2)


def test_copy_of_a_rings_batch_goes_through_pinned_memory() -> None:
    late, ring = LateTorch(), Ring()
    staging = CudaStaging(late, "device")
    copy = _batch(4)

    staged = staging.stage(copy, ring)
    copy.action[...] = 9

    assert _matches(sync_to_current_stream(late, staged), 4)


class Host:
    """A source of numbered batches; ``fails_at`` raises once, and beyond ``last`` it waits until it is closed."""

    def __init__(self, *, fails_at: int = -1, last: int = 1000) -> None:
        self.taken = 0
        self.closed = threading.Event()
        self.ahead = threading.Event()
        self.ring = None
        self._fails_at = fails_at
        self._last = last

    def take(self) -> Batch:
        if self.taken == self._last:
            self.closed.wait(60)
            raise ClosedError("closed")
        if self.taken == self._fails_at:
            self._fails_at = -1
            raise UnavailableError("gone")
        self.taken += 1
        if self.taken == 1 + AHEAD:
            self.ahead.set()
        return _batch(self.taken - 1)

    def close(self) -> None:
        self.closed.set()


@pytest.fixture
def late() -> Iterator[LateTorch]:
    yield LateTorch()


def test_source_reads_ahead_a_bounded_number_of_batches(late: LateTorch) -> None:
    host = Host()
    source = CudaSource(host, late, "device")

    first = source.take()
    assert host.ahead.wait(60)
    rest = [source.take() for _ in range(9)]
    source.close()

    assert all(_matches(batch, number) for number, batch in enumerate([first, *rest]))
    assert host.taken <= 10 + AHEAD + 1


def test_failure_reaches_the_learner_after_the_batches_before_it_and_taking_goes_on(late: LateTorch) -> None:
    source = CudaSource(Host(fails_at=2), late, "device")

    assert [_matches(source.take(), number) for number in range(2)] == [True, True]
    with pytest.raises(UnavailableError, match="gone"):
        source.take()

    assert _matches(source.take(), 2)
    source.close()


def test_take_without_a_thread_to_read_ahead_raises_and_the_next_one_tries_again(late: LateTorch) -> None:
    source = CudaSource(Host(), late, "device")
    with pytest.MonkeyPatch.context() as patch:
        refuse_threads(patch, "touchline-cuda")
        for _ in range(2):
            with pytest.raises(RuntimeError, match="can't start new thread"):
                source.take()

    assert _matches(source.take(), 0)
    source.close()


def test_close_ends_a_take_in_progress_and_the_thread(late: LateTorch) -> None:
    host = Host(last=1)
    source = CudaSource(host, late, "device")
    source.take()
    caught: list[BaseException] = []

    def take() -> None:
        try:
            source.take()
        except BaseException as error:
            caught.append(error)

    taker = threading.Thread(target=take)
    taker.start()
    source.close()
    taker.join(60)

    assert [type(error) for error in caught] == [ClosedError]
    assert source._thread is not None
    source._thread.join(60)
    assert not source._thread.is_alive()


class Gathered(Host):
    """Numbered batches of which some were gathered on the device, and come with the thread that took them."""

    def __init__(self, late: LateTorch, gathered: set[int]) -> None:
        super().__init__()
        self._block = late.block_type
        self._gathered = gathered
        self.threads: list[str] = []

    def take(self) -> Batch:
        number = self.taken
        batch = super().take()
        self.threads.append(threading.current_thread().name)
        return map_batch(batch, lambda array: as_tensor(torch, array).as_subclass(self._block)) if number in self._gathered else batch


def test_source_of_gathered_batches_hands_them_out_without_a_thread(late: LateTorch) -> None:
    host = Gathered(late, set(range(8)))
    source = CudaSource(host, late, "device")

    batches = [source.take() for _ in range(8)]

    assert [_matches(batch, number) for number, batch in enumerate(batches)] == [True] * 8
    assert set(host.threads) == {threading.current_thread().name}
    assert host.taken == 8  # the source gathers ahead by itself


def test_source_whose_batches_are_gathered_from_some_time_on_keeps_their_order_and_ends_its_thread(late: LateTorch) -> None:
    host = Gathered(late, {0, 1, *range(5, 8), *range(10, 30)})
    source = CudaSource(host, late, "device")

    batches = [source.take() for _ in range(30)]

    assert [_matches(batch, number) for number, batch in enumerate(batches)] == [True] * 30
    # Its first batch in host memory was taken here, and the thread went on up to the next one that was gathered.
    here = threading.current_thread().name
    assert host.threads[:3] == [here] * 3 and host.threads[3:6] == ["touchline-cuda"] * 3
    assert host.threads[-1] == here
    assert source._thread is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_batches_on_a_real_device_are_those_that_were_staged() -> None:
    source = CudaSource(Host(), torch, torch.device("cuda"))

    batches = [source.take() for _ in range(100)]
    source.close()

    assert batches[0].action.device.type == "cuda"
    assert all(_matches(batch, number) for number, batch in enumerate(batches))
