"""Batches on the wire, receiving side. The messages are those of :mod:`touchline_protos.codec.batch_encoder`.

gRPC owns the messages, and they are read-only. So each batch is copied once, into a buffer of a pool (see
:mod:`touchline_protos.codec.buffer_pool`): all its tensors in one copy, since they are adjacent in the message. Its arrays are views of
that buffer, writable, and the buffer returns to the pool when the last of them has died.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from touchline_protos.codec.batch_parser import ParsedBatch, parse_batch, parse_names
from touchline_protos.codec.buffer_pool import BufferPool
from touchline_protos.codec.tensors import ALIGNMENT, body_offsets
from touchline_protos.codec.wire import LEN, VARINT, read_fields, tag, to_int64
from touchline_protos.types.batch import Batch, BatchOrigin, assemble_batch
from touchline_protos.types.episode import CodecError, OversizeError

_MAX_PLANS = 16
_MAX_LITERAL_BYTES = 1 << 20

_FIELD_1 = tag(1, LEN)
_GROUP = tag(1, LEN)
_CHUNK = tag(2, LEN)
_RING = tag(3, LEN)
_ACTOR_NAMES = tag(4, LEN)
_FRAMES = (_GROUP, _CHUNK, _RING, _ACTOR_NAMES)
_CHUNK_HEADER = tag(1, LEN)
_CHUNK_SIZE = tag(2, VARINT)
_CHUNK_OFFSET = tag(3, VARINT)
_CHUNK_DATA = tag(5, LEN)

_View = tuple[str, tuple[int, ...], np.dtype, int]
"""Name, shape, dtype and offset of an array in a batch's buffer."""


@dataclass(frozen=True, slots=True)
class _BatchPlan:
    """How to get one batch out of a message: the bytes to copy, and its arrays in the copy."""

    start: int
    """Position of the first byte to copy: a multiple of 16, so that what is aligned in the message is aligned in the copy."""
    end: int
    """Position after the last byte to copy."""
    views: list[_View]
    """The batch's arrays; offsets are in the copy."""
    pieces: list[tuple[int, int, int]]
    """Begin and end of each payload and its offset in the copy, if they are copied one by one to lie as in a body; empty otherwise."""
    actors: dict[int, str]
    """Actors' names that the batch brings, by index."""
    store_generations: tuple[int, ...]
    """See :attr:`Batch.store_generations`."""


@dataclass(frozen=True, slots=True)
class _MessagePlan:
    """How to decode a message. Valid for every message of the same length with the same bytes around its payloads."""

    literals: list[tuple[int, int, bytes]]
    """Start, end and content of everything but the payloads."""
    batches: list[_BatchPlan]
    """The batches in the message, in order."""

    def fits(self, message: bytes) -> bool:
        """Returns whether the plan is valid for ``message``, which must have the right length."""
        for start, end, literal in self.literals:  # noqa: SIM110, a generator would take twice the time
            if message[start:end] != literal:
                return False
        return True


@dataclass(slots=True)
class _Partial:
    """A batch that is arriving in chunks."""

    storage: Any
    """Buffer for its body, of the pool."""
    view: memoryview
    """Bytes of the buffer."""
    views: list[_View]
    """Arrays of the batch; offsets are in the body."""
    actors: dict[int, str]
    """Actors' names that its header brought, by index."""
    store_generations: tuple[int, ...]
    """See :attr:`Batch.store_generations`."""
    size: int
    """Size of the body, in bytes."""
    filled: int = 0
    """Bytes that have arrived: chunks come in order, so these are the first."""


class BatchDecoder:
    """Decodes the messages of one sampling stream, or of ``Sample`` calls, into batches. Not thread-safe.

    Each batch is copied once, out of the message. Its arrays are writable and belong to the caller; their buffer is reused for a later
    batch only after the last view of it has died. Messages of one stream differ only in their payloads, so the plan for decoding one is
    kept and reused for every message of the same length with the same bytes around the payloads: comparing them is all the parsing then.

    Args:
        max_batch_bytes: maximum size of a batch in chunks; a larger one is refused before its memory is allocated.
        max_idle_bytes: maximum size of the buffers that are kept for later batches, not counting those in use.
        as_bodies: lay out every batch as a body, its arrays aligned to 64 bytes; otherwise small ones, copied as they are, to 16. A copy
            for each array takes longer than one for all of them.
    """

    def __init__(self, *, max_batch_bytes: int = 4 << 30, max_idle_bytes: int = 256 << 20, as_bodies: bool = False) -> None:
        self._max_batch_bytes = max_batch_bytes
        self._as_bodies = as_bodies
        self._pool = BufferPool(max_idle_bytes)
        self._group_plans: dict[int, _MessagePlan] = {}
        self._unary_plans: dict[int, _MessagePlan] = {}
        self._partial: _Partial | None = None
        self._actor_names: dict[int, str] = {}

    def feed(self, message: bytes) -> list[Batch]:
        """Decodes one ``SampleStreamResponse``.

        Returns:
            The batches that this message completes: all of a group, or one with its last chunk. Their ``actor_names`` are all names that
            the stream has sent so far, except those that it said to forget.

        Raises:
            CodecError: the message is malformed, or not one that may come next; no later message of the stream can be understood.
            OversizeError: the announced batch exceeds ``max_batch_bytes``.
        """
        plan = self._group_plans.get(len(message))
        if plan is None or not plan.fits(message):
            frame = None
            for key, a, b in read_fields(message, 0, len(message)):
                if key in _FRAMES:
                    if frame is not None:
                        raise CodecError("more than one frame in a message, expected one")
                    frame = key, a, b
            if frame is None:
                return []
            if frame[0] == _RING:
                raise CodecError("a ring setup, which was not requested")
            if frame[0] == _CHUNK:
                return self._feed_chunk(message, frame[1], frame[2])
            if frame[0] == _ACTOR_NAMES:
                names, forgotten = parse_names(message, frame[1], frame[2])
                self._forget_names(forgotten)
                self._add_names(names)
                return []
            batches = [(a, b) for key, a, b in read_fields(message, frame[1], frame[2]) if key == _FIELD_1]
            plan = _make_plan(self._group_plans, message, batches, as_bodies=self._as_bodies)
        if self._partial is not None:
            self._partial = None
            raise CodecError("a group of batches before the last chunk of the batch in progress")
        done = []
        for batch in plan.batches:
            self._add_names(batch.actors)
            done.append(self._build(message, batch, self._actor_names))
        return done

    def sample_response(self, message: bytes) -> Batch:
        """Decodes a ``SampleResponse``. The batch's ``actor_names`` are those in the message.

        Raises:
            CodecError: the message is malformed.
        """
        plan = self._unary_plans.get(len(message))
        if plan is None or not plan.fits(message):
            batches = [(a, b) for key, a, b in read_fields(message, 0, len(message)) if key == _FIELD_1]
            if len(batches) != 1:
                raise CodecError(f"{len(batches)} batches in a response, expected one")
            plan = _make_plan(self._unary_plans, message, batches, as_bodies=self._as_bodies)
        batch = plan.batches[0]
        return self._build(message, batch, dict(batch.actors))

    def _add_names(self, actors: Mapping[int, str]) -> None:
        """Adds actors' names. Makes a new mapping, as earlier batches keep the one they were given."""
        if actors and any(self._actor_names.get(index) != name for index, name in actors.items()):
            self._actor_names = {**self._actor_names, **actors}

    def _forget_names(self, forgotten: set[int]) -> None:
        """Drops actors' names; in a new mapping, too."""
        if forgotten:
            self._actor_names = {index: name for index, name in self._actor_names.items() if index not in forgotten}

    def _build(self, message: bytes, plan: _BatchPlan, actor_names: Mapping[int, str]) -> Batch:
        """Copies a batch out of a message into a buffer of the pool."""
        size = plan.end - plan.start
        storage = self._pool.lease(size)
        if plan.pieces:
            target, source = memoryview(storage).cast("B"), memoryview(message)
            for start, end, at in plan.pieces:
                target[at : at + end - start] = source[start:end]
        else:
            memoryview(storage).cast("B")[:size] = memoryview(message)[plan.start : plan.end]
        return _assemble(storage, plan.views, actor_names, plan.store_generations)

    def _feed_chunk(self, message: bytes, start: int, end: int) -> list[Batch]:
        # Until the chunk is accepted there is no batch in progress, so an error leaves none behind.
        partial, self._partial = self._partial, None
        header, announced, offset = None, 0, 0
        first = last = end
        for key, a, b in read_fields(message, start, end):
            if key == _CHUNK_HEADER:
                if header is not None:
                    raise CodecError("more than one header in a chunk, expected at most one")
                header = a, b
            elif key == _CHUNK_SIZE:
                announced = to_int64(a)
            elif key == _CHUNK_OFFSET:
                offset = to_int64(a)
            elif key == _CHUNK_DATA:
                first, last = a, b
        if header is not None:
            if partial is not None:
                raise CodecError("a chunk with a header before the last chunk of the batch in progress")
            partial = self._begin(parse_batch(message, *header), announced)
        if partial is None:
            raise CodecError("a chunk without a header before it")
        if offset != partial.filled:
            raise CodecError(f"chunk at byte {offset} of the body, expected byte {partial.filled}")
        filled = offset + last - first  # checked against the size before anything is copied
        if filled > partial.size:
            raise CodecError(f"chunks of {filled} bytes, expected {partial.size}")
        partial.view[offset:filled] = memoryview(message)[first:last]
        partial.filled = filled
        if filled < partial.size:
            self._partial = partial
            return []
        self._add_names(partial.actors)
        return [_assemble(partial.storage, partial.views, self._actor_names, partial.store_generations)]

    def _begin(self, parsed: ParsedBatch, announced: int) -> _Partial:
        """Checks a batch's header, and takes a buffer for its body.

        The size follows from the header; that the sender announces the same shows that both lay out the body alike. The limit is checked
        last, before the buffer is taken.
        """
        specs = [tensor.spec for tensor in parsed.tensors]
        for tensor in parsed.tensors:
            if tensor.start != tensor.end:
                raise CodecError(f"{tensor.spec.name}: data in the header of a batch in chunks, expected none")
        offsets, size = body_offsets(specs)
        if announced != size:
            raise CodecError(f"body of {announced} bytes announced, expected {size} for the tensors of the header")
        if size > self._max_batch_bytes:
            raise OversizeError(f"batch of {size} bytes announced, expected at most {self._max_batch_bytes}")
        storage = self._pool.lease(size)
        views = [(spec.name, spec.shape, spec.dtype, at) for spec, at in zip(specs, offsets, strict=True)]
        return _Partial(storage, memoryview(storage).cast("B"), views, parsed.actors, parsed.store_generations, size)


class BodyLayout:
    """The positions of a batch's tensors in a body. Immutable, so thread-safe.

    Args:
        header: a ``Batch`` message without payloads, as a chunked batch and a ring have it.

    Raises:
        CodecError: the header is malformed, or contains a payload.
    """

    def __init__(self, header: bytes) -> None:
        parsed = parse_batch(header, 0, len(header))
        self._store_generations, tensors = parsed.store_generations, parsed.tensors
        for tensor in tensors:
            if tensor.start != tensor.end:
                raise CodecError(f"{tensor.spec.name}: data in the header of a body, expected none")
        offsets, self.size_bytes = body_offsets([tensor.spec for tensor in tensors])
        self._views = [(t.spec.name, t.spec.shape, t.spec.dtype, at) for t, at in zip(tensors, offsets, strict=True)]

    @property
    def tensors(self) -> Sequence[tuple[str, tuple[int, ...], np.dtype, int]]:
        """Name, shape, dtype and offset in bytes of each tensor: columns, then the provenance as ``provenance.<field>``."""
        return self._views

    def batch(self, memory: Any, actor_names: Mapping[int, str], origin: BatchOrigin | None = None) -> Batch:
        """Returns the batch whose body is in ``memory``.

        Args:
            memory: a writable buffer of at least ``size_bytes``. The batch's arrays are writable views of it and keep it alive.
            actor_names: actors' names by index.
            origin: origin of the batch.
        """
        return self.assemble(_arrays(memory, self._views), actor_names, origin)

    def arrays(self, memory: Any) -> dict[str, np.ndarray]:
        """Returns the arrays of the batch whose body is in ``memory``, by the names of :attr:`tensors`: views, as in :meth:`batch`."""
        return _arrays(memory, self._views)

    def assemble(self, arrays: Mapping[str, Any], actor_names: Mapping[int, str], origin: BatchOrigin | None = None) -> Batch:
        """Returns the batch of these arrays, or of tensors, by the names of :attr:`tensors`."""
        return assemble_batch(arrays, actor_names, store_generations=self._store_generations, origin=origin)


def _assemble(storage: Any, views: list[_View], actor_names: Mapping[int, str], store_generations: tuple[int, ...]) -> Batch:
    return assemble_batch(_arrays(storage, views), actor_names, store_generations=store_generations)


def _arrays(storage: Any, views: list[_View]) -> dict[str, np.ndarray]:
    array = np.ndarray
    return {name: array(shape, dtype, storage, at) for name, shape, dtype, at in views}


def _make_plan(plans: dict[int, _MessagePlan], message: bytes, batches: Sequence[tuple[int, int]], *, as_bodies: bool) -> _MessagePlan:
    """Parses the batches of a message, and returns the plan for decoding it, which is also put into ``plans``.

    Args:
        plans: plans by the length of the message.
        message: the message.
        batches: start and end of each batch in it.
        as_bodies: see :class:`BatchDecoder`.
    """
    parsed = [parse_batch(message, start, end) for start, end in batches]
    built = []
    for batch in parsed:
        for tensor in batch.tensors:
            tensor.check_size()
        if as_bodies:
            offsets, size = body_offsets([tensor.spec for tensor in batch.tensors])
            start, end = 0, size
            pieces = [(t.start, t.end, at) for t, at in zip(batch.tensors, offsets, strict=True)]
        else:
            # Copy from the first payload, rounded down to a multiple of 16, to the last. An empty tensor has no position that matters.
            start = min(tensor.start for tensor in batch.tensors if tensor.start < tensor.end) // ALIGNMENT * ALIGNMENT
            end = max(tensor.end for tensor in batch.tensors)
            offsets, pieces = [max(tensor.start - start, 0) for tensor in batch.tensors], []
        views = [(t.spec.name, t.spec.shape, t.spec.dtype, at) for t, at in zip(batch.tensors, offsets, strict=True)]
        built.append(_BatchPlan(start, end, views, pieces, batch.actors, batch.store_generations))
    literals, at = [], 0
    for tensor in sorted((t for batch in parsed for t in batch.tensors), key=lambda tensor: tensor.start):
        if tensor.start > at:
            literals.append((at, tensor.start, message[at : tensor.start]))
        at = max(at, tensor.end)
    literals.append((at, len(message), message[at:]))
    plan = _MessagePlan(literals, built)
    if sum(len(literal) for _, _, literal in literals) <= _MAX_LITERAL_BYTES:
        if len(plans) >= _MAX_PLANS:
            plans.clear()
        plans[len(message)] = plan
    return plan
