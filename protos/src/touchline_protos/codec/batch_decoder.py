"""Batches on the wire, receiving side: messages into batches over pooled, writable memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from touchline_protos.codec.batch_encoder import MAX_BATCH_DIMS, PROVENANCE_PREFIX
from touchline_protos.codec.buffer_pool import BufferPool
from touchline_protos.codec.tensors import ALIGNMENT, TensorSlice, TensorSpec, body_offsets, read_column, read_tensor
from touchline_protos.codec.wire import LEN, VARINT, read_fields, read_text, tag, to_int64
from touchline_protos.types.batch import PROVENANCE, Batch, assemble_batch
from touchline_protos.types.dtypes import dtype_name
from touchline_protos.types.episode import CodecError, CodecLimits, OversizeError

MAX_ACTOR_CHARS = 128
"""Characters of an actor's name."""

_LIMITS = CodecLimits(max_dims=MAX_BATCH_DIMS)
_MAX_BATCH_FIELDS = 1 << 17  # each slice may bring the name of an actor
_MAX_PLANS = 16
_MAX_SKELETON_BYTES = 1 << 20

_FIELD_1 = tag(1, LEN)
_COLUMNS = tag(1, LEN)
_PROVENANCE = tag(2, LEN)
_ACTORS = tag(3, LEN)
_ACTOR_INDEX = tag(1, VARINT)
_ACTOR_NAME = tag(2, LEN)
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


@dataclass(frozen=True, slots=True)
class _Parsed:
    """A ``Batch`` that was read: its tensors in body order, provenance last, and its actors' names."""

    tensors: list[TensorSlice]
    actors: dict[int, str]


@dataclass(frozen=True, slots=True)
class _BatchPlan:
    """Which bytes of a message one batch needs, and its arrays' places in them."""

    start: int
    end: int
    views: list[_View]
    actors: dict[int, str]


@dataclass(frozen=True, slots=True)
class _MessagePlan:
    """How a message was read: holds for each of the same length with the same bytes around its payloads."""

    skeleton: list[tuple[int, int, bytes]]
    batches: list[_BatchPlan]

    def fits(self, message: bytes) -> bool:
        for start, end, literal in self.skeleton:  # noqa: SIM110, a generator would take twice the time
            if message[start:end] != literal:
                return False
        return True


@dataclass(slots=True)
class _Partial:
    """A batch that arrives in chunks."""

    storage: Any
    view: memoryview
    views: list[_View]
    actors: dict[int, str]
    size: int
    filled: int = 0


class BatchDecoder:
    """Turns the messages of one sampling stream (or of ``Sample`` calls) into batches. Not thread-safe.

    Each batch is copied once, out of the message into memory of its own; its arrays are writable and the caller's. The
    memory is used again for a later batch when the last view of it has died, not before. A message that looks like one
    before (same length, same bytes around the payloads) is not parsed again.

    Args:
        max_batch_bytes: a larger batch in chunks is refused before its memory is allocated.
        max_idle_bytes: memory kept for later batches, besides what the caller holds.
    """

    def __init__(self, *, max_batch_bytes: int = 4 << 30, max_idle_bytes: int = 256 << 20) -> None:
        self._max_batch_bytes = max_batch_bytes
        self._pool = BufferPool(max_idle_bytes)
        self._group_plans: dict[int, _MessagePlan] = {}
        self._unary_plans: dict[int, _MessagePlan] = {}
        self._partial: _Partial | None = None
        self._actor_names: dict[int, str] = {}

    def feed(self, message: bytes) -> list[Batch]:
        """Takes one ``SampleStreamResponse``.

        Returns:
            The batches that are complete with it: those of a group, or one with the last chunk of a batch. Their
            ``actor_names`` are all that the stream has told so far.

        Raises:
            CodecError: malformed, or not what has to come next in the stream; the stream is of no use after that.
            OversizeError: the announced batch is over ``max_batch_bytes``.
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
                raise CodecError("a ring setup, which was not asked for")
            if frame[0] == _CHUNK:
                return self._feed_chunk(message, frame[1], frame[2])
            if frame[0] == _ACTOR_NAMES:
                told = read_fields(message, frame[1], frame[2], max_fields=_MAX_BATCH_FIELDS)
                self._learn(dict(_read_actor(message, a, b) for key, a, b in told if key == _FIELD_1))
                return []
            batches = [(a, b) for key, a, b in read_fields(message, frame[1], frame[2]) if key == _FIELD_1]
            plan = _remember(self._group_plans, message, batches)
        if self._partial is not None:
            self._partial = None
            raise CodecError("a group of batches before the last chunk of the batch in progress")
        done = []
        for batch in plan.batches:
            self._learn(batch.actors)
            done.append(self._build(message, batch, self._actor_names))
        return done

    def sample_response(self, message: bytes) -> Batch:
        """Reads a ``SampleResponse``; its ``actor_names`` are those that came with it.

        Raises:
            CodecError: malformed.
        """
        plan = self._unary_plans.get(len(message))
        if plan is None or not plan.fits(message):
            batches = [(a, b) for key, a, b in read_fields(message, 0, len(message)) if key == _FIELD_1]
            if len(batches) != 1:
                raise CodecError(f"{len(batches)} batches in a response, expected one")
            plan = _remember(self._unary_plans, message, batches)
        batch = plan.batches[0]
        return self._build(message, batch, dict(batch.actors))

    def _learn(self, actors: Mapping[int, str]) -> None:
        """Adds names; earlier batches keep the mapping that they were given."""
        if actors and any(self._actor_names.get(index) != name for index, name in actors.items()):
            self._actor_names = {**self._actor_names, **actors}

    def _build(self, message: bytes, plan: _BatchPlan, actor_names: Mapping[int, str]) -> Batch:
        size = plan.end - plan.start
        storage = self._pool.lease(size)
        memoryview(storage).cast("B")[:size] = memoryview(message)[plan.start : plan.end]
        return _assemble(storage, plan.views, actor_names)

    def _feed_chunk(self, message: bytes, start: int, end: int) -> list[Batch]:
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
            partial = self._begin(_read_batch(message, *header), announced)
        if partial is None:
            raise CodecError("a chunk without a header before it")
        if offset != partial.filled:
            raise CodecError(f"chunk at byte {offset} of the body, expected byte {partial.filled}")
        filled = offset + last - first
        if filled > partial.size:
            raise CodecError(f"chunks of {filled} bytes, expected {partial.size}")
        partial.view[offset:filled] = memoryview(message)[first:last]
        partial.filled = filled
        if filled < partial.size:
            self._partial = partial
            return []
        self._learn(partial.actors)
        return [_assemble(partial.storage, partial.views, self._actor_names)]

    def _begin(self, parsed: _Parsed, announced: int) -> _Partial:
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
        return _Partial(storage, memoryview(storage).cast("B"), views, parsed.actors, size)


class BodyLayout:
    """Where the tensors of a batch stand in a body, as the header of a chunked batch or of a ring tells.

    Args:
        header: a ``Batch`` message with every payload left out.

    Raises:
        CodecError: it is no such message.
    """

    def __init__(self, header: bytes) -> None:
        tensors = _read_batch(header, 0, len(header)).tensors
        for tensor in tensors:
            if tensor.start != tensor.end:
                raise CodecError(f"{tensor.spec.name}: data in the header of a body, expected none")
        offsets, self.size_bytes = body_offsets([tensor.spec for tensor in tensors])
        self._views = [(t.spec.name, t.spec.shape, t.spec.dtype, at) for t, at in zip(tensors, offsets, strict=True)]

    def batch(self, memory: Any, actor_names: Mapping[int, str]) -> Batch:
        """Returns the batch that stands in a writable buffer of at least ``size_bytes``: views that keep the buffer alive."""
        return _assemble(memory, self._views, actor_names)


def _assemble(storage: Any, views: list[_View], actor_names: Mapping[int, str]) -> Batch:
    array = np.ndarray
    return assemble_batch({name: array(shape, dtype, storage, at) for name, shape, dtype, at in views}, actor_names)


def _remember(plans: dict[int, _MessagePlan], message: bytes, batches: Sequence[tuple[int, int]]) -> _MessagePlan:
    """Reads the batches of a message and keeps how it was done."""
    parsed = [_read_batch(message, start, end) for start, end in batches]
    built = []
    for batch in parsed:
        for tensor in batch.tensors:
            tensor.check_size()
        start = min(tensor.start for tensor in batch.tensors if tensor.start < tensor.end) // ALIGNMENT * ALIGNMENT
        end = max(tensor.end for tensor in batch.tensors)
        views = [(t.spec.name, t.spec.shape, t.spec.dtype, max(t.start - start, 0)) for t in batch.tensors]
        built.append(_BatchPlan(start, end, views, batch.actors))
    skeleton, at = [], 0
    for tensor in sorted((t for batch in parsed for t in batch.tensors), key=lambda tensor: tensor.start):
        if tensor.start > at:
            skeleton.append((at, tensor.start, message[at : tensor.start]))
        at = max(at, tensor.end)
    skeleton.append((at, len(message), message[at:]))
    plan = _MessagePlan(skeleton, built)
    if sum(len(literal) for _, _, literal in skeleton) <= _MAX_SKELETON_BYTES:
        if len(plans) >= _MAX_PLANS:
            plans.clear()
        plans[len(message)] = plan
    return plan


def _read_batch(message: bytes, start: int, end: int) -> _Parsed:
    """Reads a ``Batch`` and checks that it is one; its payloads' sizes are not checked."""
    columns: list[TensorSlice] = []
    provenance: list[TensorSlice] | None = None
    actors: dict[int, str] = {}
    for key, a, b in read_fields(message, start, end, max_fields=_MAX_BATCH_FIELDS):
        if key == _COLUMNS:
            if len(columns) == _LIMITS.max_columns:
                raise OversizeError(f"more than {_LIMITS.max_columns} columns in a batch")
            columns.append(read_column(message, a, b, _LIMITS))
        elif key == _PROVENANCE:
            if provenance is not None:
                raise CodecError("more than one provenance in a batch, expected one")
            provenance = _read_provenance(message, a, b)
        elif key == _ACTORS:
            index, name = _read_actor(message, a, b)
            actors[index] = name
    if provenance is None:
        raise CodecError("no provenance in a batch, expected one")
    _check_batch([column.spec for column in columns], provenance[0].spec.shape)
    return _Parsed(columns + provenance, actors)


def _read_provenance(message: bytes, start: int, end: int) -> list[TensorSlice]:
    found: dict[int, TensorSlice] = {}
    for key, a, b in read_fields(message, start, end):
        number = key >> 3
        if number > len(PROVENANCE) or key != tag(number, LEN):
            continue
        name, dtype = PROVENANCE[number - 1]
        if number in found:
            raise CodecError(f"{PROVENANCE_PREFIX}{name}: appears twice, expected once")
        tensor = read_tensor(message, a, b, PROVENANCE_PREFIX + name, max_dims=1)
        if tensor.spec.dtype != dtype:
            raise CodecError(f"{tensor.spec.name}: {dtype_name(tensor.spec.dtype)}, expected {dtype_name(dtype)}")
        found[number] = tensor
    if len(found) != len(PROVENANCE):
        raise CodecError(f"provenance has {len(found)} of its {len(PROVENANCE)} fields")
    tensors = [tensor for _, tensor in sorted(found.items())]
    for tensor in tensors:
        if len(tensor.spec.shape) != 1 or not tensor.spec.shape[0] or tensor.spec.shape != tensors[0].spec.shape:
            raise CodecError(f"{tensor.spec.name}: shape {tensor.spec.shape}, expected (B,), the same for all of the provenance")
    return tensors


def _read_actor(message: bytes, start: int, end: int) -> tuple[int, str]:
    index, name = 0, ""
    for key, a, b in read_fields(message, start, end):
        if key == _ACTOR_INDEX:
            index = to_int64(a)
        elif key == _ACTOR_NAME:
            name = read_text(message, a, b, "actor", max_chars=MAX_ACTOR_CHARS)
    return index, name


def _check_batch(columns: list[TensorSpec], batch_shape: tuple[int, ...]) -> None:
    """Raises CodecError unless the columns have the names and shapes that the .proto gives a batch."""
    shape_of = {spec.name: spec.shape for spec in columns}
    if len(shape_of) != len(columns):
        raise CodecError(f"columns {[spec.name for spec in columns]} in a batch, expected each name once")
    for name in ("action", "reward", "done"):
        if name not in shape_of:
            raise CodecError(f"{name}: not in the batch, which has {list(shape_of)}")
    if not any(name == "obs" or name.startswith("obs.") for name in shape_of):
        raise CodecError(f"obs: not in the batch, which has {list(shape_of)}")
    for name in shape_of:
        if name.startswith(PROVENANCE_PREFIX):
            raise CodecError(f"{name}: names that begin with {PROVENANCE_PREFIX!r} are the batch's own")
        parts = name.split(".")
        if parts[0] == "obs":
            for depth in range(1, len(parts)):
                if ".".join(parts[:depth]) in shape_of:
                    raise CodecError(f"{name}: {'.'.join(parts[:depth])} is a column as well, expected one of them")
    batch_size = batch_shape[0]
    horizon = shape_of["reward"][0] if shape_of["reward"] else -1
    # The reward comes first, for its length is what the others are held against.
    for name in ("reward", *shape_of):
        shape = shape_of[name]
        if name == "task":
            good, expected = shape == (batch_size,), f"({batch_size},)"
        elif name in ("reward", "done"):
            good, expected = shape == (horizon, batch_size, 1), f"({horizon}, {batch_size}, 1)"
        else:
            rows = horizon if name == "action" else horizon + 1
            good, expected = shape[:2] == (rows, batch_size), f"({rows}, {batch_size}, ...)"
        if not good:
            raise CodecError(f"{name}: shape {shape}, expected {expected}")
