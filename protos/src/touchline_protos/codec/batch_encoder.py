"""Batches on the wire, sending side: ``SampleResponse`` and ``SampleStreamResponse``.

A batch travels in one of two forms. Whole, by itself or with others, in one message::

    SampleResponse              field 1: Batch
    SampleStreamResponse        field 1: BatchGroup          field 1 of it: Batch, repeated
    Batch                       field 1: Column, repeated    [H+1, B, ...], [H, B, ...] or [B], each payload at a multiple of 16 bytes
                                field 2: Provenance          five tensors [B]
                                field 3: ActorName, repeated
                                field 4: store generations, packed, before field 3

Or cut into pieces of about 1 MiB, if it is larger. The *body* is the concatenation of all tensors, columns first, each at a multiple of 64
bytes; the first piece also carries the header, a ``Batch`` without payloads::

    SampleStreamResponse        field 2: BatchChunk          header (first piece), size (first piece), offset, padding, data

A slot of a ring in shared memory contains exactly a body.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from touchline_protos.codec.tensors import (
    ALIGNMENT,
    MessageSkeleton,
    TensorSpec,
    body_offsets,
    check_name,
    check_shape,
    lay_out_tensors,
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
from touchline_protos.types.batch import OPTIONAL_PROVENANCE, PROVENANCE
from touchline_protos.types.episode import CodecError

PROVENANCE_PREFIX = "provenance."
"""Prefix of the names of provenance arrays, to tell them from columns."""

MAX_BATCH_DIMS = 32
"""Maximum number of dimensions of a tensor in a batch: a column's, the rows of a slice and the slices, and some to spare."""

_MAX_TEMPLATES = 64
_COLUMN_NUMBER = itertools.repeat(1)
_NO_ACTORS: Mapping[int, str] = {}


class Segment(NamedTuple):
    """The rows of one tensor in a piece.

    Rows are counted over all leading dimensions: row ``r`` of a tensor [H+1, B, ...] or [H, B, ...] is its element
    ``[r // B, r % B]``; row ``r`` of a tensor [B] is its element ``[r]``.
    """

    name: str
    """Name of the tensor."""
    first_row: int
    """Index of the first row."""
    end_row: int
    """Index after the last row."""
    offset_bytes: int
    """Offset of the first row in the piece, in bytes."""


class Piece(NamedTuple):
    """A contiguous range of the body of a batch."""

    offset_bytes: int
    """Offset of the piece in the body, in bytes."""
    size_bytes: int
    """Size of the piece, gaps for alignment included."""
    segments: tuple[Segment, ...]
    """The rows in the piece, tensor by tensor."""


@dataclass(frozen=True, slots=True)
class _Template:
    """All of a message except its payloads and its actors' names."""

    size: int
    """Size of the message, in bytes."""
    literals: list[tuple[int, int, bytes]]
    """Start, end and bytes of everything else."""
    actors_at: int
    """Position of the actors' names."""
    views: list[list[tuple[str, tuple[int, ...], np.dtype, int]]]
    """Name, shape, dtype and position of every payload, per batch."""


class BatchLayout:
    """The layout of batches of one shape on the wire. Made once for each schema, batch size and horizon. Thread-safe.

    Messages are returned with their payloads unset, together with writable arrays over them, which keep the message alive. Fill all of
    them before sharing the message. The arrays are aligned to 16 bytes.

    Args:
        columns: specs of the columns in wire order, with the leading dimensions of a batch: [H+1, B, ...], [H, B, ...] or [B]. Provenance
            is added to them.
        batch_size: number of slices, B.
        optional: names of the fields of :data:`OPTIONAL_PROVENANCE` that batches have.
        store_generations: generations of the stores that batches are from, see :attr:`Batch.store_generations`.

    Raises:
        CodecError: the wire cannot represent a column, or its shape does not have the batch size in its place.
    """

    def __init__(
        self,
        columns: Sequence[TensorSpec],
        batch_size: int,
        optional: Collection[str] = (),
        *,
        store_generations: tuple[int, ...] = (),
    ) -> None:
        self.columns = tuple(TensorSpec(s.name, little_endian(s.name, s.dtype), tuple(s.shape)) for s in columns)
        """Specs of the columns, in wire order."""
        self.batch_size = batch_size
        """Number of slices, B."""
        self.store_generations = store_generations
        """Generations of the stores that batches are from."""
        self._generations = len_field(4, b"".join(map(encode_varint, store_generations))) if store_generations else b""
        for spec in self.columns:
            _check_column(spec, batch_size)
        if len({spec.name for spec in self.columns}) != len(self.columns):
            raise CodecError(f"columns {[spec.name for spec in self.columns]}, expected each name once")
        self.optional = tuple(name for name, _ in OPTIONAL_PROVENANCE if name in optional)
        """Names of the optional fields of the provenance, in wire order."""
        provenance = _provenance_specs(self.columns, batch_size, self.optional)
        self._provenance = tuple(provenance.values())
        self._provenance_numbers = tuple(provenance)
        self.specs = self.columns + self._provenance
        """Specs of all tensors in body order: columns, then provenance as ``provenance.<field>``."""
        self.data_bytes = sum(spec.size_bytes for spec in self.specs)
        """Payload of one batch, in bytes."""
        self.offsets, self.body_bytes = body_offsets(self.specs)
        """Size of one batch's body: the payload, and the gaps that align it."""
        self._spec_of = {spec.name: spec for spec in self.specs}
        self._templates: dict[tuple[int, int], _Template] = {}

    def body_views(self, memory: Any) -> dict[str, np.ndarray]:
        """Returns writable arrays by name over the tensors of a batch whose body is in ``memory``.

        Args:
            memory: a writable buffer of at least ``body_bytes``; the arrays keep it alive.
        """
        return {spec.name: np.ndarray(spec.shape, spec.dtype, memory, at) for spec, at in zip(self.specs, self.offsets, strict=True)}

    def sample_response(self, actors: Mapping[int, str] = _NO_ACTORS) -> tuple[bytes, dict[str, np.ndarray]]:
        """Makes a ``SampleResponse`` with unset payloads.

        Args:
            actors: actors' names by index, sent along.

        Returns:
            The message, and the arrays to fill by name; provenance is under ``provenance.episode_id`` and so on.
        """
        message, views = self._make(0, actors)
        return message, views[0]

    def group(self, n: int, actors: Mapping[int, str] = _NO_ACTORS) -> tuple[bytes, list[dict[str, np.ndarray]]]:
        """Makes a ``SampleStreamResponse`` of ``n`` whole batches with unset payloads.

        Args:
            n: number of batches, at least 1.
            actors: actors' names by index, sent with the first batch.

        Returns:
            The message, and for each batch the arrays to fill by name.
        """
        if n < 1:
            raise ValueError(f"n {n}, expected at least 1")
        return self._make(n, actors)

    def message_bytes(self, n: int = 1, actors: Mapping[int, str] = _NO_ACTORS, *, unary: bool = False) -> int:
        """Returns the exact size of a message without allocating it.

        Args:
            n: number of batches in a group.
            actors: actors' names by index, as for the message.
            unary: whether the message is a ``SampleResponse``, with one batch.
        """
        return self._template(0 if unary else n, len(_encode_actors(actors))).size

    def chunk_plan(self, chunk_bytes: int = 1 << 20) -> Sequence[Piece]:
        """Returns the pieces of a body, in order.

        Args:
            chunk_bytes: maximum size of a piece. A single row is never cut, so a piece is larger if its only row is.
        """
        if chunk_bytes < 1:
            raise ValueError(f"chunk_bytes {chunk_bytes}, expected at least 1")
        pieces: list[Piece] = []
        segments: list[Segment] = []
        start = end = 0  # of the current piece, in the body
        for spec, offset in zip(self.specs, self.offsets, strict=True):
            rows, row_bytes = _rows(spec)
            first = 0
            while first < rows and row_bytes:
                at = offset + first * row_bytes  # position of the next row in the body
                fit = (start + chunk_bytes - at) // row_bytes  # whole rows that the current piece still holds
                if fit < 1 and segments:
                    # Not even one: close the piece and look at the same row again, with an empty piece.
                    pieces.append(Piece(start, end - start, tuple(segments)))
                    start, segments = end, []
                    continue
                last = min(rows, first + max(fit, 1))  # at least one row, however large, so the loop advances
                segments.append(Segment(spec.name, first, last, at - start))
                end = at + (last - first) * row_bytes
                first = last
        if segments:
            pieces.append(Piece(start, end - start, tuple(segments)))
        return pieces

    def chunk(self, piece: Piece, actors: Mapping[int, str] = _NO_ACTORS) -> tuple[bytes, list[np.ndarray]]:
        """Makes a ``SampleStreamResponse`` that carries one piece, with unset payload. The first piece also carries the header.

        Args:
            piece: one of the pieces of :meth:`chunk_plan`.
            actors: actors' names by index; only with the first piece.

        Returns:
            The message, and for each segment the array [rows, ...] to fill.
        """
        if actors and piece.offset_bytes:
            raise ValueError("actors with a later piece, expected them with the first")
        tail = _encode_actors(actors)

        def content(at: int) -> MessageSkeleton:
            head = b""
            if not piece.offset_bytes:
                head = len_field(1, self.header() + tail) + int_field(2, self.body_bytes)
            head += int_field(3, piece.offset_bytes)
            data = encode_varint(tag(5, LEN)) + encode_varint(piece.size_bytes)
            # Keep the body's alignment: the byte at offset k of the body lands at a position that is congruent to k modulo 16.
            #   position without padding:  at + len(head) + len(data)
            #   position wanted:           piece.offset_bytes, modulo 16
            # A padding field takes at least 2 bytes, so a gap of 1 becomes 17.
            gap = (piece.offset_bytes - at - len(head) - len(data)) % ALIGNMENT
            gap += ALIGNMENT if gap == 1 else 0
            head += (len_field(4, bytes(gap - 2)) if gap else b"") + data
            payload = at + len(head)
            return MessageSkeleton([(at, head)], [payload], payload + piece.size_bytes)

        skeleton = submessage(2, 0, content, at_least=piece.size_bytes)
        message, view, address = fresh_message(skeleton.end)
        for at, literal in skeleton.literals:
            view[at : at + len(literal)] = literal
        start = skeleton.payloads[0]
        storage = writable_storage(message, address)
        arrays = []
        covered = start
        for name, first, last, offset in piece.segments:
            spec = self._spec_of[name]
            _, row_bytes = _rows(spec)
            at = start + offset
            view[covered:at] = bytes(at - covered)  # the gap before the tensor; a fresh message holds arbitrary bytes
            covered = at + (last - first) * row_bytes
            arrays.append(np.ndarray((last - first, *_inner(spec)), spec.dtype, storage, at))
        return message, arrays

    def header(self) -> bytes:
        """Returns a ``Batch`` message without payloads, which describes a body: names, dtypes and shapes in order."""
        columns = lay_out_tensors(_COLUMN_NUMBER, self.columns, 0, column=True, with_data=False)
        provenance = lay_out_tensors(self._provenance_numbers, self._provenance, 0, column=False, with_data=False)
        fields = b"".join(literal for _, literal in columns.literals) + len_field(
            2, b"".join(literal for _, literal in provenance.literals)
        )
        return fields + self._generations

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
        """Returns the template of a group of n batches, or of a ``SampleResponse`` if n is 0."""
        template = self._templates.get((n, tail_bytes))
        if template is None:
            if len(self._templates) >= _MAX_TEMPLATES:
                self._templates.clear()
            template = self._templates[n, tail_bytes] = self._build_template(n, tail_bytes)
        return template

    def _build_template(self, n: int, tail_bytes: int) -> _Template:
        actors_at = 0

        def first_batch(at: int) -> MessageSkeleton:
            # The names are the last field of the first batch, so that only their size, not they, is part of the template.
            nonlocal actors_at
            skeleton = self._lay_out_batch(at)
            actors_at = skeleton.end
            return MessageSkeleton(skeleton.literals, skeleton.payloads, skeleton.end + tail_bytes)

        def batches(at: int) -> MessageSkeleton:
            literals: list[tuple[int, bytes]] = []
            payloads: list[int] = []
            for index in range(n):
                batch = self._lay_out_batch if index else first_batch
                skeleton = submessage(1, at, batch, at_least=self.data_bytes)
                literals += skeleton.literals
                payloads += skeleton.payloads
                at = skeleton.end
            return MessageSkeleton(literals, payloads, at)

        build, count = (batches, n) if n else (first_batch, 1)
        skeleton = submessage(1, 0, build, at_least=self.data_bytes * count)
        width = len(self.specs)
        return _Template(
            size=skeleton.end,
            literals=_join(skeleton.literals),
            actors_at=actors_at,
            views=[
                [
                    (spec.name, spec.shape, spec.dtype, at)
                    for spec, at in zip(self.specs, skeleton.payloads[first : first + width], strict=True)
                ]
                for first in range(0, count * width, width)
            ],
        )

    def _lay_out_batch(self, at: int) -> MessageSkeleton:
        """Lays out the content of a ``Batch`` without actors, from position ``at`` on."""
        columns = lay_out_tensors(_COLUMN_NUMBER, self.columns, at, column=True, with_data=True)

        def provenance(at: int) -> MessageSkeleton:
            return lay_out_tensors(self._provenance_numbers, self._provenance, at, column=False, with_data=True)

        rest = submessage(2, columns.end, provenance, at_least=sum(spec.size_bytes for spec in self._provenance))
        literals = [*columns.literals, *rest.literals, (rest.end, self._generations)]
        return MessageSkeleton(literals, columns.payloads + rest.payloads, rest.end + len(self._generations))


@lru_cache(maxsize=4096)
def _encode_actor(index: int, name: str) -> bytes:
    return len_field(3, int_field(1, index) + text_field(2, name, "actor"))


def _encode_actors(actors: Mapping[int, str]) -> bytes:
    return b"".join(_encode_actor(index, name) for index, name in actors.items())


def _provenance_specs(columns: Sequence[TensorSpec], batch_size: int, optional: Collection[str]) -> dict[int, TensorSpec]:
    """Returns the specs of the provenance by the numbers of their fields: all required ones, and the optional ones of these names."""
    horizon = next((spec.shape[0] for spec in columns if spec.name == "reward"), 0)
    return {
        number: TensorSpec(PROVENANCE_PREFIX + name, dtype, (horizon, batch_size, 1) if name == "valid" else (batch_size,))
        for number, (name, dtype) in enumerate((*PROVENANCE, *OPTIONAL_PROVENANCE), start=1)
        if number <= len(PROVENANCE) or name in optional
    }


def _check_column(spec: TensorSpec, batch_size: int) -> None:
    check_name(spec.name)
    check_shape(spec, MAX_BATCH_DIMS)
    if spec.name.startswith(PROVENANCE_PREFIX):
        raise CodecError(f"{spec.name}: names that begin with {PROVENANCE_PREFIX!r} are reserved for provenance")
    if not spec.shape or spec.shape[: 2 if len(spec.shape) > 1 else 1][-1] != batch_size:
        raise CodecError(f"{spec.name}: shape {spec.shape}, expected (rows, {batch_size}, ...) or ({batch_size},)")


def _rows(spec: TensorSpec) -> tuple[int, int]:
    """Returns the number of a tensor's rows (see :class:`Segment`), and the size of one in bytes."""
    rows = spec.shape[0] if len(spec.shape) == 1 else spec.shape[0] * spec.shape[1]
    return rows, spec.size_bytes // rows if rows else 0


def _inner(spec: TensorSpec) -> tuple[int, ...]:
    return spec.shape[2:]


def _join(literals: list[tuple[int, bytes]]) -> list[tuple[int, int, bytes]]:
    """Joins adjacent literals, and returns start, end and bytes of each: fewer slices to assign per message."""
    joined: list[tuple[int, int, bytes]] = []
    for at, literal in literals:
        if joined and joined[-1][1] == at:
            start, end, before = joined[-1]
            joined[-1] = start, end + len(literal), before + literal
        else:
            joined.append((at, at + len(literal), literal))
    return joined
