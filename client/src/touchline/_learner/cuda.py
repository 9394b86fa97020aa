"""Batches on a CUDA device: pinned staging, copies on a side stream, up to two batches ahead of the learner.

The copy of a batch and the learner's kernels run on two streams. Three things tie them together, each commented where it happens: the event
that a copy records, the learner's stream waiting for it, and ``record_stream``, which keeps the allocator from reusing the memory.
"""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from touchline._learner.fixed_bodies import FixedBodies
from touchline._learner.ring_reader import RingBatches
from touchline._learner.stream import BatchSource
from touchline._learner.torch_batch import load_torch, map_batch
from touchline.errors import ClosedError, InvalidArgumentError
from touchline_protos import Batch
from touchline_protos.shm.ring_slots import PinnedRegion
from touchline_protos.types.dtypes import BFLOAT16

STAGING_SLOTS = 3
"""Number of pinned buffers: one that is being filled, and two whose copies may be in progress."""
AHEAD = 2
"""Number of batches on the device that the learner has not taken yet."""
HELD = 2
"""Number of the ring's slots that copies may be reading."""
_ALIGNMENT = 16
_MAX_GAP = 64
"""Bytes between arrays that are moved as one span of memory; arrays further apart are not of one allocation."""


@dataclass(slots=True)
class _Slot:
    """A pinned buffer and the event that completes with its last copy."""

    copied: Any
    buffer: Any = None
    bytes: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint8))


@dataclass(frozen=True, slots=True)
class StagedBatch:
    """A batch on its way to the device."""

    batch: Batch
    """The batch, its tensors being views of ``block``."""
    block: Any
    """Memory of the whole batch on the device, moved by one copy: uint8 [n]. Or a tensor in that memory."""
    copied: Any
    """Event that completes with the copy; None if the batch was complete before."""


@dataclass(frozen=True, slots=True)
class _Span:
    """One span of memory that contains all arrays of a batch."""

    address: int
    size_bytes: int

    @classmethod
    def of(cls, arrays: list[np.ndarray]) -> _Span | None:
        """Returns the span of arrays that lie closely one after another, as those of a received batch do; None for other arrays."""
        pieces = sorted((_address(array), array.nbytes, array.itemsize) for array in arrays if array.nbytes)
        if not pieces or any(not array.flags.c_contiguous for array in arrays):
            return None
        begin = end = pieces[0][0]
        for address, size_bytes, itemsize in pieces:
            # Each array begins where the one before it ends, up to padding, and aligned to its items within the span.
            if not 0 <= address - end <= _MAX_GAP or (address - begin) % itemsize:
                return None
            end = address + size_bytes
        return cls(begin, end - begin)


class CudaStaging:
    """Copies batches from host arrays to a CUDA device. For one thread.

    The device reads a batch that came through a ring straight from the ring's slot: the ring's memory is pinned, and the slot is held until
    the copy is complete. Any other batch is first copied into a slot of pinned memory, which is overwritten only after the event of its
    last copy has completed. The block on the device is allocated on the side stream, so the copy does not wait for the learner's work;
    :func:`sync_to_current_stream` ties it to the learner's stream.

    Args:
        torch: the torch module.
        device: ``torch.device`` of type ``cuda``.
        host_fields: fields of which each batch gets a copy in host memory instead of a tensor on the device.
    """

    def __init__(self, torch: Any, device: Any, host_fields: tuple[str, ...] = ()) -> None:
        self._torch = torch
        self._device = device
        self._host_fields = host_fields
        self._stream = torch.cuda.Stream(device)
        self._slots = [_Slot(torch.cuda.Event()) for _ in range(STAGING_SLOTS)]
        self._next = 0
        self._ring: Any = None
        self._region: PinnedRegion | None = None
        self._held: deque[tuple[Any, Batch]] = deque()

    def stage(self, batch: Batch, ring: RingBatches | None = None) -> StagedBatch:
        """Starts the copy of a batch to the device.

        Args:
            batch: batch of numpy arrays. Held until its copy is complete if it lies in ``ring``; otherwise not needed after the call.
            ring: ring that the batch came through; None if it came in a message.
        """
        if ring is not self._ring:
            self._enter(ring)
        arrays: list[np.ndarray] = []
        map_batch(batch, arrays.append)
        span = _Span.of(arrays)
        direct = self._in_ring(span) if span is not None else None
        offsets = _offsets(arrays, span)
        size_bytes = span.size_bytes if span is not None else offsets[-1]
        source, slot = (direct, None) if direct is not None else self._copy(arrays, offsets, span, size_bytes)
        torch = self._torch
        with torch.cuda.stream(self._stream):
            block = torch.empty(_padded(size_bytes), dtype=torch.uint8, device=self._device)
            block[:size_bytes].copy_(source, non_blocking=True)
            if slot is not None:
                slot.copied.record(self._stream)
            # An event of this batch's own: the slot's may be recorded again before the learner waits for this one.
            copied = torch.cuda.Event()
            copied.record(self._stream)
        if direct is not None:
            self._held.append((copied, batch))
        return StagedBatch(keep_on_host(batch, self._views(batch, block, offsets), self._host_fields), block, copied)

    def close(self) -> None:
        """Waits for the copies that read the ring, and unpins its memory."""
        self._enter(None)

    def _enter(self, ring: RingBatches | None) -> None:
        self._release(0)
        if self._region is not None:
            self._region.close()
        self._ring = ring
        self._region = PinnedRegion(self._torch, ring.whole_array()) if ring is not None else None

    def _release(self, left: int) -> None:
        """Releases batches in the ring whose copies are complete, and waits until at most ``left`` are held."""
        while self._held and (len(self._held) > left or self._held[0][0].query()):
            copied, _ = self._held.popleft()
            copied.synchronize()

    def _in_ring(self, span: _Span) -> Any:
        """Returns a span of the ring's pinned memory as a tensor; None if the span lies elsewhere or the ring is not pinned."""
        region = self._region
        if region is None or not region.pinned:
            return None
        first = span.address - region.address  # byte offset within the ring
        if not 0 <= first <= region.size_bytes - span.size_bytes:
            return None  # the batch is a copy, since the learner holds all slots but one
        self._release(HELD - 1)
        return region.tensor[first : first + span.size_bytes]

    def _copy(self, arrays: list[np.ndarray], offsets: list[int], span: _Span | None, size_bytes: int) -> tuple[Any, _Slot]:
        """Copies arrays into the next slot; returns the part of its buffer that holds them, and the slot."""
        slot = self._slots[self._next]
        self._next = (self._next + 1) % len(self._slots)
        slot.copied.synchronize()  # returns immediately for an event that was never recorded
        if slot.bytes.nbytes < size_bytes:
            slot.buffer = self._torch.empty(size_bytes, dtype=self._torch.uint8, pin_memory=True)
            slot.bytes = slot.buffer.numpy()
        if span is not None:
            ctypes.memmove(_address(slot.bytes), span.address, size_bytes)
        else:
            for array, offset in zip(arrays, offsets, strict=False):
                slot.bytes[offset : offset + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        return slot.buffer[:size_bytes], slot

    def _views(self, batch: Batch, block: Any, offsets: list[int]) -> Batch:
        torch = self._torch
        typed: dict[Any, Any] = {}
        at = iter(offsets)

        def view(array: np.ndarray) -> Any:
            offset = next(at)
            dtype = torch.bfloat16 if array.dtype == BFLOAT16 else getattr(torch, array.dtype.name)
            if not array.size:
                return block[:0].view(dtype).view(array.shape)
            elements = typed.get(dtype)
            if elements is None:
                elements = typed[dtype] = block.view(dtype)
            strides = [1] * array.ndim
            # Row-major: a stride counts elements, and is the product of the extents behind its axis.
            for axis in range(array.ndim - 1, 0, -1):
                strides[axis - 1] = strides[axis] * array.shape[axis]
            return torch.as_strided(elements, array.shape, strides, offset // array.itemsize)

        return map_batch(batch, view)


def sync_to_current_stream(torch: Any, staged: StagedBatch) -> Batch:
    """Returns a staged batch for the calling thread's current stream; work that is queued there from now on sees the whole batch."""
    stream = torch.cuda.current_stream(staged.block.device)
    if staged.copied is not None:
        stream.wait_event(staged.copied)
    # The block was allocated on the side stream. Without this the allocator could reuse its memory while this stream still reads it.
    staged.block.record_stream(stream)
    return staged.batch


def keep_on_host(batch: Batch, staged: Batch, fields: tuple[str, ...]) -> Batch:
    """Returns the staged batch with copies of some fields of the host's batch, whose memory may be reused after the staging."""
    values = {name: getattr(batch, name) for name in fields}
    return replace(staged, **{name: value.copy() for name, value in values.items() if value is not None}) if fields else staged


def _padded(size_bytes: int) -> int:
    return -(-size_bytes // _ALIGNMENT) * _ALIGNMENT


def _address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def _offsets(arrays: list[np.ndarray], span: _Span | None) -> list[int]:
    """Returns the byte offset of each array in the block; without a span also, as the last item, the end of the last array."""
    if span is not None:
        return [_address(array) - span.address if array.nbytes else 0 for array in arrays]
    offsets = [0]
    for array in arrays:
        offsets.append(offsets[-1] + _padded(array.nbytes))
    return offsets


def is_on_host(batch: Batch) -> bool:
    """Returns whether a batch is of numpy arrays, in contrast to one that was gathered on a device."""
    return isinstance(batch.reward, np.ndarray)


class CudaSource:
    """Batches on a CUDA device. One thread takes, any closes.

    Batches that are gathered on the device come straight from the source, which gathers ahead by itself. Batches in host memory are read
    ahead and copied by a thread, which runs from the first of them to the next one that was gathered.

    Args:
        source: source of batches: of numpy arrays, or of tensors on the device.
        torch: the torch module.
        device: ``torch.device`` of type ``cuda``.
        host_fields: see :class:`CudaStaging`.
        bodies: memory that batches come in by turns; None leaves each batch in memory of its own.
    """

    def __init__(
        self, source: BatchSource, torch: Any, device: Any, host_fields: tuple[str, ...] = (), *, bodies: FixedBodies | None = None
    ) -> None:
        self._bodies = bodies
        self._source = source
        self._torch = torch
        self._device = device
        self._host_fields = host_fields
        self._closed = False
        self._changed = threading.Condition()
        self._ahead: deque[StagedBatch] = deque()
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._first: Batch | None = None
        """Batch in host memory with which the thread begins."""

    def take(self) -> Batch:
        """Returns the next batch; raises as :meth:`~touchline._learner.stream.BatchStream.__next__` does."""
        bodies = self._bodies
        if bodies is None:
            return self._take()[0]
        bodies.begin_take()
        return bodies.place(*self._take(), self._torch.cuda.current_stream(self._device))

    def _take(self) -> tuple[Batch, Any]:
        """Returns the next batch, and memory on the device that it lies in or a tensor of it."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ahead or self._failure is not None or self._closed or self._thread is None)
                if self._closed:
                    raise ClosedError("the stream was closed")
                if self._ahead:
                    staged = self._ahead.popleft()
                    self._changed.notify_all()
                    break
                if self._failure is not None:
                    failure, self._failure, self._thread = self._failure, None, None
                    raise failure
            batch = self._first if self._first is not None else self._source.take()
            if not is_on_host(batch):
                return batch, batch.reward
            self._first = batch  # kept if the thread cannot start
            thread = threading.Thread(target=self._work, name="touchline-cuda", daemon=True)
            self._thread = thread
            try:
                thread.start()
            except BaseException:  # the system has no thread left; the next take tries again
                self._thread = None
                raise
        return sync_to_current_stream(self._torch, staged), staged.block

    @property
    def transport(self) -> str:
        """How batches come to this process: ``device``, ``ring``, ``stream``, or empty while there is no session."""
        return self._source.transport

    @property
    def transport_reason(self) -> str:
        """Why batches do not come as was asked for; empty while they do or there is no session."""
        return self._source.transport_reason

    def close(self) -> None:
        """Ends the source; a ``take`` in progress raises ClosedError."""
        with self._changed:
            self._closed = True
            self._first = None
            self._ahead.clear()
            self._changed.notify_all()
        self._source.close()

    @property
    def ring(self) -> RingBatches | None:
        """None, since the batches lie on the device."""
        return None

    def _stage_ahead(self, staging: CudaStaging) -> None:
        """Copies batches until one comes that was gathered on the device."""
        while True:
            batch, self._first = self._first, None
            batch = self._source.take() if batch is None else batch
            gathered = not is_on_host(batch)
            staged = StagedBatch(batch, batch.reward, None) if gathered else staging.stage(batch, self._source.ring)
            del batch  # the ring's slot is free once the copy is complete
            with self._changed:
                self._ahead.append(staged)
                if gathered:
                    self._thread = None
                self._changed.notify_all()
                if not gathered:
                    self._changed.wait_for(lambda: len(self._ahead) < AHEAD or self._closed)
                if gathered or self._closed:
                    return

    def _work(self) -> None:
        try:
            with self._torch.cuda.device(self._device):
                staging = CudaStaging(self._torch, self._device, self._host_fields)
                try:
                    self._stage_ahead(staging)
                finally:
                    staging.close()
        except BaseException as error:
            with self._changed:
                self._failure = error
                self._changed.notify_all()


def cuda_place(device: Any, *, as_numpy: bool) -> tuple[Any, Any]:
    """Returns the torch module and the ``torch.device`` that a caller named.

    Raises:
        InvalidArgumentError: torch is not installed, the device does not exist or is not a CUDA device, or numpy arrays are asked for.
    """
    torch = load_torch()
    if torch is None:
        raise InvalidArgumentError(f"device: {str(device)!r} needs torch, which is not installed")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise InvalidArgumentError(f"device: {device!r} ({error})") from None
    if place.type != "cuda" or as_numpy:
        raise InvalidArgumentError(f"device: {str(device)!r}, expected None, 'cpu' or 'cuda' with tensors")
    if not torch.cuda.is_available():
        raise InvalidArgumentError(f"device: {str(device)!r}, but torch finds no CUDA device")
    return torch, place
