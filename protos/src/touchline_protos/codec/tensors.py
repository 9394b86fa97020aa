"""Tensors and columns on the wire: their specs, the bytes around their payloads, and how they are read.

A column ``obs`` of dtype float32 and shape (51, 24), as field 4 of an episode, byte by byte::

    22 ..             tag of Episode.columns (4 << 3 | LEN), varint: the column's length
      0A 03 6F 62 73    Column.name: tag, length, "obs"
      12 ..             tag of Column.tensor, varint: the tensor's length
        08 09             Tensor.dtype: tag, 9 = float32
        12 02 33 18       Tensor.shape: tag, length, packed varints 51 and 24
        1A 05 00 ..       Tensor.padding: tag, length, zeros; only if the payload would not be aligned without
        22 A0 26          Tensor.data: tag, varint 4,896 = 51 * 24 * 4
          ..                the payload, from a multiple of 16 bytes on: C order, little-endian
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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
"""Payloads begin at multiples of this, in bytes from the message's first byte.

The content of a bytes object begins at such an address too, so an array over a payload is aligned in memory.
"""

BODY_ALIGNMENT = 64
"""Tensors begin at multiples of this in the body of a chunked batch, in bytes: a cache line."""

DEFAULT_LIMITS = CodecLimits()

MAX_CACHED_HEADS = 1024
"""Maximum number of column heads, the bytes before a payload, in the cache of :func:`read_column`."""

MAX_CACHED_HEAD_BYTES = 1024
"""Maximum size of a head in the cache."""

_MAX_EXTENT = 1 << 62
"""Maximum size in bytes that an array's shape may stand for: below numpy's limit, an intp."""


class TensorSpec(NamedTuple):
    """Name, dtype and shape of a tensor."""

    name: str
    dtype: np.dtype
    """Element type, little-endian."""
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Size of the payload, in bytes."""
        return prod(self.shape) * self.dtype.itemsize


class TensorSlice(NamedTuple):
    """A tensor in a message: its spec, and the position of its payload."""

    spec: TensorSpec
    start: int
    """Position of the payload's first byte in the message."""
    end: int
    """Position after its last byte."""

    def check_size(self) -> None:
        """Raises CodecError unless the payload has the size that dtype and shape require."""
        found, expected = self.end - self.start, self.spec.size_bytes
        if found != expected:
            raise CodecError(
                f"{self.spec.name}: {found} bytes of data, expected {expected} for {dtype_name(self.spec.dtype)} of shape {self.spec.shape}"
            )


class MessageSkeleton(NamedTuple):
    """All of a message, or of a part of one, except the payloads. Positions are in bytes from the message's first byte."""

    literals: list[tuple[int, bytes]]
    """Positions and bytes of everything but the payloads."""
    payloads: list[int]
    """Positions at which the payloads begin."""
    end: int
    """Position after the last byte."""


def little_endian(name: str, dtype: np.dtype) -> np.dtype:
    """Returns the dtype of a column on the wire: ``dtype`` with little-endian elements.

    Raises:
        CodecError: the dtype is not supported; the message names the column.
    """
    little = dtype.newbyteorder("<") if dtype.kind in "biufV" else dtype  # other kinds may have no byte order
    try:
        to_wire(little)
    except ValueError as error:
        raise CodecError(f"{name}: {error}") from None
    return little


def check_name(name: str, limits: CodecLimits = DEFAULT_LIMITS) -> None:
    """Raises CodecError unless the length and the nesting of a column's name are within the limits."""
    if not name:
        raise CodecError("a column without a name, expected 1 to 256 characters")
    if len(name) > limits.max_name_chars:
        raise OversizeError(f"column name of {len(name)} characters, expected at most {limits.max_name_chars}")
    if name.count(".") > limits.max_nesting:
        raise OversizeError(f"{name}: nested {name.count('.')} levels deep, expected at most {limits.max_nesting}")


def check_shape(spec: TensorSpec, max_dims: int) -> None:
    """Raises CodecError unless an array of this dtype and shape can exist.

    Called before any size is computed from a shape that a peer sent.
    """
    if len(spec.shape) > max_dims:
        raise OversizeError(f"{spec.name}: {len(spec.shape)} dimensions, expected at most {max_dims}")
    if any(size < 0 for size in spec.shape):
        raise CodecError(f"{spec.name}: negative dimension in shape {spec.shape}")
    # numpy refuses shapes beyond the address space, even if another dimension is 0 and nothing would be allocated.
    if prod(size for size in spec.shape if size) * spec.dtype.itemsize > _MAX_EXTENT:
        raise OversizeError(f"{spec.name}: shape {spec.shape} is larger than any memory")


def body_offsets(specs: Sequence[TensorSpec]) -> tuple[list[int], int]:
    """Returns the offset of each tensor in the body of a chunked batch, and the size of the body, in bytes."""
    offsets, end = [], 0
    for spec in specs:
        offset = -(-end // BODY_ALIGNMENT) * BODY_ALIGNMENT  # the end of the previous tensor, rounded up
        offsets.append(offset)
        end = offset + spec.size_bytes
    return offsets, end


def submessage(number: int, at: int, build: Callable[[int], MessageSkeleton], *, at_least: int) -> MessageSkeleton:
    """Lays out a submessage as a field at position ``at``.

    The content's padding depends on its position, which depends on the size of the varint before it that holds the content's length,
    which in turn depends on the padding. So the sizes of that varint are tried in ascending order, and the first that holds the resulting
    length is taken. In rare cases it is a byte too large, and the varint is padded with a leading zero, which every reader accepts.

    Args:
        number: number of the field.
        at: position of the field's tag.
        build: a function that lays out the content, given its position.
        at_least: lower bound of the content's size in bytes; saves attempts.
    """
    head = encode_varint(tag(number, LEN))
    for width in range(varint_size(at_least), 10):
        start = at + len(head) + width
        content = build(start)
        if varint_size(content.end - start) <= width:
            break
    return MessageSkeleton([(at, head + encode_varint(content.end - start, width)), *content.literals], content.payloads, content.end)


@lru_cache(maxsize=4096)
def tensor_field(number: int, spec: TensorSpec, phase: int, column: bool, with_data: bool) -> bytes:
    """Returns the bytes of a tensor field up to its payload.

    Args:
        number: number of the field.
        spec: name, dtype and shape of the tensor.
        phase: position of the field modulo :data:`ALIGNMENT`. The padding is chosen so that the payload is aligned. As only the remainder
            is given, the result can be cached.
        column: whether the field is a ``Column`` with the spec's name; otherwise it is a bare ``Tensor``, as in ``Provenance``.
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
    # A padding field takes at least 2 bytes, its tag and its length, so 1 is impossible. Each byte of padding moves the payload by one,
    # except that the lengths of the tensor and of the column may each grow by a byte once, and so skip the aligned position. Three full
    # cycles of 16 contain one that nothing skips.
    return next(aligned for padding in (0, *range(2, 3 * ALIGNMENT + 4)) if (phase + len(aligned := assemble(padding))) % ALIGNMENT == 0)


def lay_out_tensors(numbers: Iterable[int], specs: Sequence[TensorSpec], at: int, *, column: bool, with_data: bool) -> MessageSkeleton:
    """Lays out columns, or bare tensors.

    Args:
        numbers: number of each tensor's field.
        specs: specs of the tensors, in order.
        at: position of the first field.
        column: whether the fields are columns.
        with_data: whether the payloads follow; otherwise only dtypes and shapes are sent.
    """
    literals, payloads = [], []
    for number, spec in zip(numbers, specs, strict=False):  # columns all have one number, repeated without end
        field = tensor_field(number, spec, at % ALIGNMENT, column, with_data)
        literals.append((at, field))
        at += len(field)
        payloads.append(at)
        if with_data:
            at += spec.size_bytes
    return MessageSkeleton(literals, payloads, at)


_DTYPE = tag(1, VARINT)
_SHAPE = tag(2, VARINT)
_SHAPE_PACKED = tag(2, LEN)
_DATA = tag(4, LEN)
_NAME = tag(1, LEN)
_TENSOR = tag(2, LEN)
_SPEC_DTYPE = tag(2, VARINT)
_SPEC_SHAPE = tag(3, VARINT)
_SPEC_SHAPE_PACKED = tag(3, LEN)


_cached_heads: dict[tuple[int, CodecLimits], tuple[bytes, TensorSpec]] = {}
"""The head and the spec of the last column of each size and under each limits. Threads may race for it: entries are immutable."""


def read_tensor(data: Buffer, start: int, end: int, name: str, *, max_dims: int) -> TensorSlice:
    """Reads the ``Tensor`` in ``data[start:end]``, except for the size of its payload (see :meth:`TensorSlice.check_size`).

    Raises:
        CodecError: it is malformed, its dtype unknown or its shape impossible; the message begins with ``name``.
        OversizeError: it has more than ``max_dims`` dimensions.
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
    """Reads the ``Column`` in ``data[start:end]``, except for the size of its payload (see :meth:`TensorSlice.check_size`).

    A sender's columns differ from one episode to the next only in their payloads. So the head of a column, the bytes before its payload, is
    cached together with the spec that it was parsed to: a column of the same size with the same head has the same spec.

    Raises:
        CodecError: it is malformed, or has no name, no tensor or two.
        OversizeError: it exceeds a limit.
    """
    cached = _cached_heads.get((end - start, limits))
    if cached is not None:
        head, spec = cached
        if data[start : start + len(head)] == head:
            return TensorSlice(spec, start + len(head), end)
    column = _parse_column(data, start, end, limits)
    # Only if nothing follows the payload, and the payload has the size that the head requires, does the head decide everything.
    if column.end == end and column.start - start <= MAX_CACHED_HEAD_BYTES and column.spec.size_bytes == end - column.start > 0:
        if len(_cached_heads) >= MAX_CACHED_HEADS:
            _cached_heads.clear()
        _cached_heads[end - start, limits] = bytes(data[start : column.start]), column.spec
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
    """Reads the ``ColumnSpec`` in ``data[start:end]``; its shape is that of one row.

    Raises:
        CodecError: it is malformed, has no name, an unknown dtype or an impossible shape.
        OversizeError: it exceeds a limit.
    """
    name, wire_dtype = "", 0
    shape: list[int] = []
    max_dims = limits.max_dims - 1  # the rows are a dimension too
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
    """Returns a ``ColumnSpec`` as field ``number``; the spec's shape is that of one row."""
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
