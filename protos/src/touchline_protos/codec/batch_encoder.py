"""Batches on the wire, sending side: ``SampleResponse`` and ``SampleStreamResponse``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from touchline_protos.codec.tensors import (
    ALIGNMENT,
    Frame,
    TensorSpec,
    body_offsets,
    check_name,
    check_shape,
    frame_tensors,
    little_endian,
    submessage,
)
from touchline_protos.codec.wire import (
    LEN,
    encode_varint,
    fresh_message,
    int_field,
    len_field,
    tag,
    text_field,
    writable_storage,
)
from touchline_protos.types.batch import PROVENANCE
from touchline_protos.types.episode import CodecError

PROVENANCE_PREFIX = "provenance."
"""What the names of provenance arrays begin with where they stand beside the columns."""

MAX_BATCH_DIMS = 32
"""Dimensions of a batch's tensor: one more than the episode's column has."""

_MAX_TEMPLATES = 64
_NO_ACTORS: Mapping[int, str] = {}


class Segment(NamedTuple):
    """The rows of one tensor that a piece carries.

    Rows are flat leading rows: row ``r`` of a ``[H+1, B, ...]`` or ``[H, B, ...]`` tensor is ``[r // B, r % B]``, that
    of a ``[B]`` tensor is ``[r]``.
    """

    name: str
    first_row: int
    end_row: int
    """The row after the last one."""
    offset_bytes: int
    """Where in the piece the rows begin."""


class Piece(NamedTuple):
    """A contiguous range of the body of a batch that travels in chunks."""

    offset_bytes: int
    """Where in the body it begins."""
    size_bytes: int
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class _Template:
    """All of a message but its payloads and its actors' names."""

    size: int
    literals: list[tuple[int, int, bytes]]
    actors_at: int
    views: list[list[tuple[str, tuple[int, ...], np.dtype, int]]]
    """For each batch: name, shape, dtype and position of every payload."""


class BatchLayout:
    """How batches of one shape look on the wire. Made once for a schema, batch size and horizon.

    Messages come with their payloads unset, as writable views: fill all of them before the message is shown to anyone.
    The views keep the message alive. Payloads begin at multiples of 16 bytes from the message's first byte, and a bytes
    object's data does as well.

    Thread-safe: threads may call it at once.

    Args:
        columns: in wire order; shapes with their leading dimensions, ``[H+1, B, ...]``, ``[H, B, ...]`` or ``[B]``.
            Provenance is added to them.
        batch_size: B, slices.

    Raises:
        CodecError: a column that the wire cannot carry, or whose shape does not have the batch size in its place.
    """

    def __init__(self, columns: Sequence[TensorSpec], batch_size: int) -> None:
        self.columns = tuple(TensorSpec(s.name, little_endian(s.name, s.dtype), tuple(s.shape)) for s in columns)
        """The columns, in wire order."""
        self.batch_size = batch_size
        """B, slices."""
        for spec in self.columns:
            _check_column(spec, batch_size)
        if len({spec.name for spec in self.columns}) != len(self.columns):
            raise CodecError(f"columns {[spec.name for spec in self.columns]}, expected each name once")
        self._provenance = tuple(TensorSpec(PROVENANCE_PREFIX + name, dtype, (batch_size,)) for name, dtype in PROVENANCE)
        self.specs = self.columns + self._provenance
        """Columns, then provenance as ``provenance.<field>``: the tensors in body order."""
        self.data_bytes = sum(spec.size_bytes for spec in self.specs)
        """Payload of one batch."""
        self.offsets, self.body_bytes = body_offsets(self.specs)
        """Size of one batch's body in chunks: the payload and the gaps that align it."""
        self._spec_of = {spec.name: spec for spec in self.specs}
        self._templates: dict[tuple[int, int], _Template] = {}

    def body_views(self, memory: Any) -> dict[str, np.ndarray]:
        """Returns writable views, by name, of a batch's tensors in a body.

        Args:
            memory: a writable buffer of at least ``body_bytes``; the views keep it alive.
        """
        return {spec.name: np.ndarray(spec.shape, spec.dtype, memory, at) for spec, at in zip(self.specs, self.offsets, strict=True)}

    def sample_response(self, actors: Mapping[int, str] = _NO_ACTORS) -> tuple[bytes, dict[str, np.ndarray]]:
        """Makes a ``SampleResponse`` with an unset payload.

        Args:
            actors: names by index, to be sent along.

        Returns:
            The message, and the arrays to fill by name (provenance under ``provenance.episode_id`` and so on).
        """
        message, views = self._make(0, actors)
        return message, views[0]

    def group(self, n: int, actors: Mapping[int, str] = _NO_ACTORS) -> tuple[bytes, list[dict[str, np.ndarray]]]:
        """Makes a ``SampleStreamResponse`` of ``n`` whole batches with unset payloads.

        Args:
            n: batches, at least 1.
            actors: names by index; they go with the first batch.

        Returns:
            The message, and for each batch the arrays to fill by name.
        """
        if n < 1:
            raise ValueError(f"n {n}, expected at least 1")
        return self._make(n, actors)

    def message_bytes(self, n: int = 1, actors: Mapping[int, str] = _NO_ACTORS, *, unary: bool = False) -> int:
        """Returns the exact size of a message without allocating it.

        Args:
            n: batches of a group.
            actors: as they would be sent along.
            unary: asks for a ``sample_response`` instead (n is 1).
        """
        return self._template(0 if unary else n, len(_encode_actors(actors))).size

    def chunk_plan(self, chunk_bytes: int = 1 << 20) -> Sequence[Piece]:
        """Returns how the body is cut into pieces, in order.

        Args:
            chunk_bytes: a piece has at most this many bytes, unless a single row is larger: cuts are only between rows.
        """
        if chunk_bytes < 1:
            raise ValueError(f"chunk_bytes {chunk_bytes}, expected at least 1")
        pieces: list[Piece] = []
        segments: list[Segment] = []
        start = end = 0
        for spec, offset in zip(self.specs, self.offsets, strict=True):
            rows, row_bytes = _rows(spec)
            first = 0
            while first < rows and row_bytes:
                at = offset + first * row_bytes
                fit = (start + chunk_bytes - at) // row_bytes
                if fit < 1 and segments:
                    pieces.append(Piece(start, end - start, tuple(segments)))
                    start, segments = end, []
                    continue
                last = min(rows, first + max(fit, 1))
                segments.append(Segment(spec.name, first, last, at - start))
                end = at + (last - first) * row_bytes
                first = last
        if segments:
            pieces.append(Piece(start, end - start, tuple(segments)))
        return pieces

    def chunk(self, piece: Piece, actors: Mapping[int, str] = _NO_ACTORS) -> tuple[bytes, list[np.ndarray]]:
        """Makes a ``SampleStreamResponse`` with one piece and an unset payload. The first piece carries the header.

        Args:
            piece: of :meth:`chunk_plan`.
            actors: names by index, only with the first piece.

        Returns:
            The message, and for each segment the array to fill, ``[rows, ...]``.
        """
        if actors and piece.offset_bytes:
            raise ValueError("actors with a later piece, expected them with the first")
        tail = _encode_actors(actors)

        def content(at: int) -> Frame:
            head = b""
            if not piece.offset_bytes:
                head = len_field(1, self.header() + tail) + int_field(2, self.body_bytes)
            head += int_field(3, piece.offset_bytes)
            data = encode_varint(tag(5, LEN)) + encode_varint(piece.size_bytes)
            # The body's own alignment is kept: byte k of it lands at a multiple of 16 where k is one.
            short = (piece.offset_bytes - at - len(head) - len(data)) % ALIGNMENT
            short += ALIGNMENT if short == 1 else 0
            head += (len_field(4, bytes(short - 2)) if short else b"") + data
            payload = at + len(head)
            return Frame([(at, head)], [payload], payload + piece.size_bytes)

        frame = submessage(2, 0, content, at_least=piece.size_bytes)
        message, view, address = fresh_message(frame.end)
        for at, literal in frame.literals:
            view[at : at + len(literal)] = literal
        start = frame.payloads[0]
        storage = writable_storage(message, address)
        arrays = []
        covered = start
        for name, first, last, offset in piece.segments:
            spec = self._spec_of[name]
            _, row_bytes = _rows(spec)
            at = start + offset
            view[covered:at] = bytes(at - covered)
            covered = at + (last - first) * row_bytes
            arrays.append(np.ndarray((last - first, *_inner(spec)), spec.dtype, storage, at))
        return message, arrays

    def header(self) -> bytes:
        """Returns a ``Batch`` message with every payload left out: what a body consists of."""
        columns = frame_tensors(1, self.columns, 0, column=True, with_data=False)
        provenance = frame_tensors(1, self._provenance, 0, column=False, with_data=False)
        return b"".join(literal for _, literal in columns.literals) + len_field(2, b"".join(literal for _, literal in provenance.literals))

    def _make(self, n: int, actors: Mapping[int, str]) -> tuple[bytes, list[dict[str, np.ndarray]]]:
        tail = _encode_actors(actors) if actors else b""
        template = self._template(n, len(tail))
        message, view, address = fresh_message(template.size)
        for start, end, literal in template.literals:
            view[start:end] = literal
        if tail:
            view[template.actors_at : template.actors_at + len(tail)] = tail
        storage = writable_storage(message, address)
        array = np.ndarray
        return message, [{name: array(shape, dtype, storage, at) for name, shape, dtype, at in batch} for batch in template.views]

    def _template(self, n: int, tail_bytes: int) -> _Template:
        """Returns the template of a group of n batches, or of a ``SampleResponse`` for n = 0."""
        template = self._templates.get((n, tail_bytes))
        if template is None:
            if len(self._templates) >= _MAX_TEMPLATES:
                self._templates.clear()
            template = self._templates[n, tail_bytes] = self._build_template(n, tail_bytes)
        return template

    def _build_template(self, n: int, tail_bytes: int) -> _Template:
        actors_at = 0

        def first_batch(at: int) -> Frame:
            nonlocal actors_at
            frame = self._frame_batch(at)
            actors_at = frame.end
            return Frame(frame.literals, frame.payloads, frame.end + tail_bytes)

        def batches(at: int) -> Frame:
            literals: list[tuple[int, bytes]] = []
            payloads: list[int] = []
            for index in range(n):
                batch = self._frame_batch if index else first_batch
                frame = submessage(1, at, batch, at_least=self.data_bytes)
                literals += frame.literals
                payloads += frame.payloads
                at = frame.end
            return Frame(literals, payloads, at)

        build, count = (batches, n) if n else (first_batch, 1)
        frame = submessage(1, 0, build, at_least=self.data_bytes * count)
        width = len(self.specs)
        return _Template(
            size=frame.end,
            literals=_join(frame.literals),
            actors_at=actors_at,
            views=[
                [
                    (spec.name, spec.shape, spec.dtype, at)
                    for spec, at in zip(self.specs, frame.payloads[first : first + width], strict=True)
                ]
                for first in range(0, count * width, width)
            ],
        )

    def _frame_batch(self, at: int) -> Frame:
        """Returns the frame of a ``Batch`` whose content begins at a position, without actors."""
        columns = frame_tensors(1, self.columns, at, column=True, with_data=True)

        def provenance(at: int) -> Frame:
            return frame_tensors(1, self._provenance, at, column=False, with_data=True)

        rest = submessage(2, columns.end, provenance, at_least=sum(spec.size_bytes for spec in self._provenance))
        return Frame(columns.literals + rest.literals, columns.payloads + rest.payloads, rest.end)


@lru_cache(maxsize=4096)
def _encode_actor(index: int, name: str) -> bytes:
    return len_field(3, int_field(1, index) + text_field(2, name, "actor"))


def _encode_actors(actors: Mapping[int, str]) -> bytes:
    return b"".join(_encode_actor(index, name) for index, name in actors.items())


def _check_column(spec: TensorSpec, batch_size: int) -> None:
    check_name(spec.name)
    check_shape(spec, MAX_BATCH_DIMS)
    if spec.name.startswith(PROVENANCE_PREFIX):
        raise CodecError(f"{spec.name}: names that begin with {PROVENANCE_PREFIX!r} are the batch's own")
    if not spec.shape or spec.shape[: 2 if len(spec.shape) > 1 else 1][-1] != batch_size:
        raise CodecError(f"{spec.name}: shape {spec.shape}, expected (rows, {batch_size}, ...) or ({batch_size},)")


def _rows(spec: TensorSpec) -> tuple[int, int]:
    """Returns a tensor's number of flat leading rows and the bytes of one."""
    rows = spec.shape[0] if len(spec.shape) == 1 else spec.shape[0] * spec.shape[1]
    return rows, spec.size_bytes // rows if rows else 0


def _inner(spec: TensorSpec) -> tuple[int, ...]:
    return spec.shape[2:]


def _join(literals: list[tuple[int, bytes]]) -> list[tuple[int, int, bytes]]:
    """Returns the literals with adjacent ones made one, as first position, position after the last, bytes."""
    joined: list[tuple[int, int, bytes]] = []
    for at, literal in literals:
        if joined and joined[-1][1] == at:
            start, end, before = joined[-1]
            joined[-1] = start, end + len(literal), before + literal
        else:
            joined.append((at, at + len(literal), literal))
    return joined
