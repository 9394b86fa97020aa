"""Batches on a CUDA device: pinned staging, a copy on a side stream, one batch ahead of the learner."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from touchline.errors import ClosedError
from touchline.stream import BatchSource
from touchline.tensors import map_batch
from touchline_protos import Batch
from touchline_protos.dtypes import BFLOAT16

STAGING_SLOTS = 3
"""Pinned buffers: one that is filled, and two whose copies may be under way."""
AHEAD = 2
"""Batches on the device that the learner has not taken yet."""
_ALIGNMENT = 256


@dataclass(slots=True)
class _Slot:
    """A pinned buffer and the event that tells when its last copy was complete."""

    copied: Any
    buffer: Any = None
    bytes: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint8))


@dataclass(frozen=True, slots=True)
class StagedBatch:
    """A batch on its way to the device."""

    batch: Batch
    """Views of ``block``."""
    block: Any
    """uint8 [n] on the device: the whole batch, moved by one copy."""
    copied: Any
    """Event that tells when it is there."""


class CudaStaging:
    """Moves batches from host arrays to a CUDA device. For one thread.

    A slot's pinned memory is written again only after the event of its last copy has completed. The block on the device is allocated
    on the side stream, so that the copy waits for nothing of the learner's; :func:`hand_over` ties it to the learner's stream.

    Args:
        torch: the module.
        device: a ``torch.device`` of type ``cuda``.
    """

    def __init__(self, torch: Any, device: Any) -> None:
        self._torch = torch
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._slots = [_Slot(torch.cuda.Event()) for _ in range(STAGING_SLOTS)]
        self._next = 0

    def stage(self, batch: Batch) -> StagedBatch:
        """Copies the batch's arrays into pinned memory and starts their copy to the device; the arrays are free afterwards."""
        torch = self._torch
        slot = self._slots[self._next]
        self._next = (self._next + 1) % len(self._slots)
        slot.copied.synchronize()  # returns at once for an event that was never recorded
        size_bytes = _size_bytes(batch)
        if slot.bytes.nbytes < size_bytes:
            slot.buffer = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)
            slot.bytes = slot.buffer.numpy()
        with torch.cuda.stream(self._stream):
            block = torch.empty(size_bytes, dtype=torch.uint8, device=self._device)
            offset = 0

            def place(array: np.ndarray) -> Any:
                nonlocal offset
                first, last = offset, offset + array.nbytes
                offset += _padded(array.nbytes)
                slot.bytes[first:last] = array.reshape(-1).view(np.uint8)
                dtype = torch.bfloat16 if array.dtype == BFLOAT16 else getattr(torch, array.dtype.name)
                return block[first:last].view(dtype).view(array.shape)

            placed = map_batch(batch, place)
            block.copy_(slot.buffer[:size_bytes], non_blocking=True)
            slot.copied.record(self._stream)
            # The slot's own event may be recorded again before the learner has looked at this batch's.
            copied = torch.cuda.Event()
            copied.record(self._stream)
        return StagedBatch(placed, block, copied)


def hand_over(torch: Any, staged: StagedBatch) -> Batch:
    """Returns a staged batch to the thread and stream that will use it; work queued there from now on sees the whole batch."""
    stream = torch.cuda.current_stream(staged.block.device)
    stream.wait_event(staged.copied)
    # Without this the allocator could give the block's memory away while the learner's stream still reads it.
    staged.block.record_stream(stream)
    return staged.batch


def _padded(size_bytes: int) -> int:
    return -(-size_bytes // _ALIGNMENT) * _ALIGNMENT


def _size_bytes(batch: Batch) -> int:
    total = 0

    def add(array: np.ndarray) -> None:
        nonlocal total
        total += _padded(array.nbytes)

    map_batch(batch, add)
    return total


class CudaSource:
    """Batches on a CUDA device, from a source of host batches that a thread of its own reads ahead. One thread takes, any closes.

    Args:
        source: of host batches as numpy arrays.
        torch: the module.
        device: a ``torch.device`` of type ``cuda``.
    """

    def __init__(self, source: BatchSource, torch: Any, device: Any) -> None:
        self._source = source
        self._torch = torch
        self._device = device
        self._changed = threading.Condition()
        self._ahead: deque[StagedBatch] = deque()
        self._failure: BaseException | None = None
        self._closed = False
        self._thread: threading.Thread | None = None

    def take(self) -> Batch:
        """Returns the next batch; see :class:`~touchline.stream.BatchStream` for what it raises."""
        with self._changed:
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._work, name="touchline-cuda", daemon=True)
                self._thread.start()
            self._changed.wait_for(lambda: self._ahead or self._failure is not None or self._closed)
            if self._closed:
                raise ClosedError("the stream was closed")
            if not self._ahead:
                failure, self._failure, self._thread = self._failure, None, None  # the next take starts another thread
                assert failure is not None
                raise failure
            staged = self._ahead.popleft()
            self._changed.notify_all()
        return hand_over(self._torch, staged)

    @property
    def transport(self) -> str:
        """How batches come to this host; see :class:`~touchline.stream.BatchSource`."""
        return self._source.transport

    def close(self) -> None:
        """Ends it; a ``take`` under way raises ClosedError."""
        with self._changed:
            self._closed = True
            self._ahead.clear()
            self._changed.notify_all()
        self._source.close()

    def _work(self) -> None:
        try:
            with self._torch.cuda.device(self._device):
                staging = CudaStaging(self._torch, self._device)
                while True:
                    staged = staging.stage(self._source.take())
                    with self._changed:
                        self._ahead.append(staged)
                        self._changed.notify_all()
                        self._changed.wait_for(lambda: len(self._ahead) < AHEAD or self._closed)
                        if self._closed:
                            return
        except BaseException as error:
            with self._changed:
                self._failure = error
                self._changed.notify_all()
