"""Tensors and columns on the wire: their specs, the bytes around their payloads, and how they are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from math import prod
from typing import NamedTuple

import numpy as np

from touchline_protos.codec.wire import (
    LEN,
    VARINT,
    Buffer,
    encode_varint,
    int_field,
    len_field,
    read_fields,
    read_text,
    read_varint,
    tag,
    text_field,
    to_int32,
    to_int64,
    varint_size,
)
from touchline_protos.types.dtypes import dtype_name, to_numpy, to_wire
from touchline_protos.types.episode import CodecError, CodecLimits, OversizeError

ALIGNMENT = 16
"""Payloads begin at a multiple of this from the message's first byte. A bytes object's data begins at one as well."""

BODY_ALIGNMENT = 64
"""Tensors of a chunked batch begin at a multiple of this in the body."""

DEFAULT_LIMITS = CodecLimits()

MAX_HEADS = 1024
"""Beginnings of columns that are remembered, by the column's size."""

MAX_HEAD_BYTES = 1024
"""Longest beginning that is."""

_MAX_EXTENT = 1 << 62


class TensorSpec(NamedTuple):
    """What a tensor holds, without its values."""

    name: str
    dtype: np.dtype
    """Little-endian."""
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of the payload."""
        return prod(self.shape) * self.dtype.itemsize


class TensorSlice(NamedTuple):
    """A tensor that was read: its spec and where in the message its payload is."""

    spec: TensorSpec
    start: int
    end: int

    def check_size(self) -> None:
        """Raises CodecError unless the payload has the size that dtype and shape ask for."""
        found, expected = self.end - self.start, self.spec.size_bytes
        if found != expected:
            raise CodecError(
                f"{self.spec.name}: {found} bytes of data, expected {expected} for {dtype_name(self.spec.dtype)} of shape {self.spec.shape}"
            )


class Frame(NamedTuple):
    """The bytes of a message around its payloads. Positions count from the message's first byte."""

    literals: list[tuple[int, bytes]]
    """Position and bytes of everything that is no payload."""
    payloads: list[int]
    """Where each payload begins."""
    end: int
    """The position after the last byte."""


def little_endian(name: str, dtype: np.dtype) -> np.dtype:
    """Returns the dtype that a column of ``dtype`` has on the wire.

    Raises:
        CodecError: the dtype is not supported; the message names the column.
    """
    little = dtype.newbyteorder("<") if dtype.kind in "biufV" else dtype  # other kinds may have no byte order to change
    try:
        to_wire(little)
    except ValueError as error:
        raise CodecError(f"{name}: {error}") from None
    return little


def check_name(name: str, limits: CodecLimits = DEFAULT_LIMITS) -> None:
    """Raises CodecError unless the column's name is of an allowed length and depth."""
    if not name:
        raise CodecError("a column without a name, expected 1 to 256 characters")
    if len(name) > limits.max_name_chars:
        raise OversizeError(f"column name of {len(name)} characters, expected at most {limits.max_name_chars}")
    if name.count(".") > limits.max_nesting:
        raise OversizeError(f"{name}: nested {name.count('.')} levels deep, expected at most {limits.max_nesting}")


def check_shape(spec: TensorSpec, max_dims: int) -> None:
    """Raises CodecError unless an array of this dtype and shape can exist."""
    if len(spec.shape) > max_dims:
        raise OversizeError(f"{spec.name}: {len(spec.shape)} dimensions, expected at most {max_dims}")
    if any(size < 0 for size in spec.shape):
        raise CodecError(f"{spec.name}: negative dimension in shape {spec.shape}")
    # numpy refuses what no address space holds, even where another dimension is 0 and nothing would be allocated.
    if prod(size for size in spec.shape if size) * spec.dtype.itemsize > _MAX_EXTENT:
        raise OversizeError(f"{spec.name}: shape {spec.shape} is larger than any memory")


def body_offsets(specs: Sequence[TensorSpec]) -> tuple[list[int], int]:
    """Returns where each tensor begins in the body of a chunked batch, and the size of the body; in bytes."""
    offsets, end = [], 0
    for spec in specs:
        offsets.append(-(-end // BODY_ALIGNMENT) * BODY_ALIGNMENT)
        end = offsets[-1] + spec.size_bytes
    return offsets, end


def submessage(number: int, at: int, build: Callable[[int], Frame], *, at_least: int) -> Frame:
    """Returns the frame of a sub-message field that begins at position ``at``.

    The content's padding depends on where it begins, and that on how long the length of the content is: the first
    length that fits is taken (stretched, in the rare case that one byte more or less makes it cross a boundary; readers
    accept that).

    Args:
        build: makes the content's frame, given where the content begins.
        at_least: a lower bound of the content's size in bytes; saves attempts.
    """
    head = encode_varint(tag(number, LEN))
    for width in range(varint_size(at_least), 10):
        start = at + len(head) + width
        frame = build(start)
        if varint_size(frame.end - start) <= width:
            break
    return Frame([(at, head + encode_varint(frame.end - start, width)), *frame.literals], frame.payloads, frame.end)


@lru_cache(maxsize=4096)
def tensor_field(number: int, spec: TensorSpec, phase: int, column: bool, with_data: bool) -> bytes:
    """Returns a tensor field, up to its payload.

    Args:
        number: of the field.
        spec: of the tensor.
        phase: position of the field modulo :data:`ALIGNMENT`; padding is chosen so that the payload is aligned.
        column: wraps the tensor in a ``Column`` with the spec's name; without, it stands alone (as in ``Provenance``).
        with_data: whether the payload follows.
    """
    head = int_field(1, to_wire(spec.dtype))
    if spec.shape:
        head += len_field(2, b"".join(encode_varint(size) for size in spec.shape))
    size = spec.size_bytes if with_data else 0
    data_head = encode_varint(tag(4, LEN)) + encode_varint(size) if size else b""
    name = text_field(1, spec.name, "column name") if column else b""

    def assemble(padding: int) -> bytes:
        pad = len_field(3, bytes(padding - 2)) if padding else b""
        tensor = head + pad + data_head
        if not column:
            return encode_varint(tag(number, LEN)) + encode_varint(len(tensor) + size) + tensor
        tensor = encode_varint(tag(2, LEN)) + encode_varint(len(tensor) + size) + tensor
        return encode_varint(tag(number, LEN)) + encode_varint(len(name) + len(tensor) + size) + name + tensor

    field = assemble(0)
    if not size:
        return field
    # A padding field takes at least 2 bytes, and may lengthen the two lengths around it by a byte each: either may leap over the size that
    # would have been aligned, so that only the third one is certain.
    return next(aligned for padding in (0, *range(2, 3 * ALIGNMENT + 4)) if (phase + len(aligned := assemble(padding))) % ALIGNMENT == 0)


def frame_tensors(number: int, specs: Sequence[TensorSpec], at: int, *, column: bool, with_data: bool) -> Frame:
    """Returns the frame of columns (all have the field's number) or of bare tensors (numbered from it on)."""
    literals, payloads = [], []
    for index, spec in enumerate(specs):
        field = tensor_field(number if column else number + index, spec, at % ALIGNMENT, column, with_data)
        literals.append((at, field))
        at += len(field)
        payloads.append(at)
        if with_data:
            at += spec.size_bytes
    return Frame(literals, payloads, at)


_DTYPE = tag(1, VARINT)
_SHAPE = tag(2, VARINT)
_SHAPE_PACKED = tag(2, LEN)
_DATA = tag(4, LEN)
_NAME = tag(1, LEN)
_TENSOR = tag(2, LEN)
_SPEC_DTYPE = tag(2, VARINT)
_SPEC_SHAPE = tag(3, VARINT)
_SPEC_SHAPE_PACKED = tag(3, LEN)


_known_heads: dict[tuple[int, CodecLimits], tuple[bytes, TensorSpec]] = {}


def read_tensor(data: Buffer, start: int, end: int, name: str, *, max_dims: int) -> TensorSlice:
    """Reads a ``Tensor``; its payload's size is not checked yet (see :meth:`TensorSlice.check_size`).

    Raises:
        CodecError: malformed, an unknown dtype, a shape that cannot be.
    """
    wire_dtype, first, last = 0, end, end
    shape: list[int] = []
    for key, a, b in read_fields(data, start, end):
        if key == _DTYPE:
            wire_dtype = to_int32(a)
        elif key == _SHAPE_PACKED:
            _read_packed(data, a, b, shape, name, max_dims)
        elif key == _SHAPE:
            _append_dim(shape, a, name, max_dims)
        elif key == _DATA:
            first, last = a, b
    return TensorSlice(_spec(name, wire_dtype, shape, max_dims), first, last)


def read_column(data: Buffer, start: int, end: int, limits: CodecLimits) -> TensorSlice:
    """Reads a ``Column``; its payload's size is not checked yet.

    A sender's columns look alike from one episode to the next, up to their payloads. So what stands before the payload is remembered with
    what it was found to say: a column of the same size that begins with the same bytes says the same.

    Raises:
        CodecError: malformed, no name, no tensor or two.
    """
    known = _known_heads.get((end - start, limits))
    if known is not None:
        head, spec = known
        if data[start : start + len(head)] == head:
            return TensorSlice(spec, start + len(head), end)
    column = _parse_column(data, start, end, limits)
    if column.end == end and column.start - start <= MAX_HEAD_BYTES and column.spec.size_bytes == end - column.start > 0:
        if len(_known_heads) >= MAX_HEADS:
            _known_heads.clear()
        _known_heads[end - start, limits] = bytes(data[start : column.start]), column.spec
    return column


def _parse_column(data: Buffer, start: int, end: int, limits: CodecLimits) -> TensorSlice:
    name, tensor = "", None
    for key, a, b in read_fields(data, start, end):
        if key == _NAME:
            name = read_text(data, a, b, "column name", max_chars=limits.max_name_chars)
        elif key == _TENSOR:
            if tensor is not None:
                raise CodecError(f"{name}: more than one tensor, expected one")
            tensor = a, b
    check_name(name, limits)
    if tensor is None:
        raise CodecError(f"{name}: no tensor, expected one")
    return read_tensor(data, *tensor, name, max_dims=limits.max_dims)


def read_column_spec(data: Buffer, start: int, end: int, limits: CodecLimits) -> TensorSpec:
    """Reads a ``ColumnSpec``; its shape is that of one row.

    Raises:
        CodecError: malformed, no name, an unknown dtype, a shape that cannot be.
    """
    name, wire_dtype = "", 0
    shape: list[int] = []
    max_dims = limits.max_dims - 1
    for key, a, b in read_fields(data, start, end):
        if key == _NAME:
            name = read_text(data, a, b, "column name", max_chars=limits.max_name_chars)
        elif key == _SPEC_DTYPE:
            wire_dtype = to_int32(a)
        elif key == _SPEC_SHAPE_PACKED:
            _read_packed(data, a, b, shape, name, max_dims)
        elif key == _SPEC_SHAPE:
            _append_dim(shape, a, name, max_dims)
    check_name(name, limits)
    return _spec(name, wire_dtype, shape, max_dims)


def encode_column_spec(number: int, spec: TensorSpec) -> bytes:
    """Returns a ``ColumnSpec`` field; the spec's shape is that of one row."""
    shape = len_field(3, b"".join(encode_varint(size) for size in spec.shape)) if spec.shape else b""
    return len_field(number, text_field(1, spec.name, "column name") + int_field(2, to_wire(spec.dtype)) + shape)


def _read_packed(data: Buffer, position: int, end: int, shape: list[int], name: str, max_dims: int) -> None:
    while position < end:
        size, position = read_varint(data, position, end)
        _append_dim(shape, size, name, max_dims)


def _append_dim(shape: list[int], size: int, name: str, max_dims: int) -> None:
    if len(shape) == max_dims:
        raise OversizeError(f"{name or 'a column'}: more than {max_dims} dimensions")
    shape.append(to_int64(size))


def _spec(name: str, wire_dtype: int, shape: list[int], max_dims: int) -> TensorSpec:
    try:
        dtype = to_numpy(wire_dtype)
    except ValueError as error:
        raise CodecError(f"{name}: {error}") from None
    spec = TensorSpec(name, dtype, tuple(shape))
    check_shape(spec, max_dims)
    return spec
