"""Protobuf's wire format by hand: varints, tags, a field iterator, and messages that are filled in place.

Tensors are too big for the generated classes, which copy each payload twice. Readers here treat what they read as
hostile: every length is checked against what arrived, varints are bounded, nothing recurses, nothing is allocated.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from touchline_protos.types.episode import CodecError, OversizeError

VARINT, FIXED64, LEN, GROUP, GROUP_END, FIXED32 = range(6)
"""Wire types."""

MAX_FIELDS = 1 << 12
"""Fields that one (sub-)message may have unless its reader knows better: bounds the time that a flood of them takes."""

MAX_MESSAGE_BYTES = (1 << 31) - 1
"""Protobuf's own limit of a message."""

MAX_SHORT_VARINT = 5
"""Bytes of a tag or a length, however it is stretched; protobuf refuses longer ones too."""

# Protobuf stops at 100 levels of groups and messages together, and a group may stand in a message within messages.
_MAX_GROUP_DEPTH = 64
_MAX_TAG = (1 << 32) - 1
_UINT64 = (1 << 64) - 1
_INT64_MIN, _INT64_MAX = -(1 << 63), (1 << 63) - 1

Buffer = bytes | memoryview
"""A message: ``bytes``, or a one-dimensional memoryview of format ``B``."""


def tag(number: int, kind: int) -> int:
    """Returns the tag of a field: its number and wire type."""
    return number << 3 | kind


def varint_size(value: int) -> int:
    """Returns how many bytes the varint of a value in 0..2**64-1 takes."""
    return (value.bit_length() + 6) // 7 or 1


def encode_varint(value: int, width: int = 1) -> bytes:
    """Returns the varint of an int64 (negative ones take ten bytes), stretched to at least ``width`` bytes."""
    value &= _UINT64
    encoded = bytearray()
    while value > 127 or len(encoded) + 1 < width:
        encoded.append(value & 127 | 128)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def int_field(number: int, value: int) -> bytes:
    """Returns an integer field; nothing for 0, its default.

    Raises:
        CodecError: the value is no int64.
    """
    if not _INT64_MIN <= value <= _INT64_MAX:
        raise CodecError(f"integer {value} is out of range, expected an int64")
    return encode_varint(tag(number, VARINT)) + encode_varint(value) if value else b""


def len_field(number: int, content: bytes) -> bytes:
    """Returns a length-delimited field, present even where its content is empty."""
    return encode_varint(tag(number, LEN)) + encode_varint(len(content)) + content


def text_field(number: int, text: str, what: str) -> bytes:
    """Returns a string field; nothing for the empty string, its default.

    Raises:
        CodecError: the text has no UTF-8 form; the message begins with ``what``.
    """
    try:
        return len_field(number, text.encode()) if text else b""
    except UnicodeEncodeError as error:
        raise CodecError(f"{what}: {text!r} has no UTF-8 form ({error.reason})") from None


def read_varint(data: Buffer, position: int, end: int, *, max_bytes: int = 10) -> tuple[int, int]:
    """Reads an unsigned varint.

    Args:
        data: the message.
        position: of its first byte.
        end: of what may be read.
        max_bytes: that it may take, from 1 to 10.

    Returns:
        The value in 0..2**64-1 and the position after it.

    Raises:
        CodecError: the message ends within it, or it is longer than ``max_bytes``.
    """
    value = shift = 0
    for index in range(position, min(position + max_bytes, end)):
        byte = data[index]
        value |= (byte & 127) << shift
        if byte < 128:
            return value & _UINT64, index + 1
        shift += 7
    fault = "is cut off" if end - position < max_bytes else f"is longer than {max_bytes} bytes"
    raise CodecError(f"malformed message: varint at byte {position} {fault}")


def read_fields(data: Buffer, start: int, end: int, *, max_fields: int = MAX_FIELDS) -> Iterator[tuple[int, int, int]]:
    """Iterates over the fields of the message ``data[start:end]``.

    Yields:
        ``(tag, value, 0)`` for a varint (unsigned), ``(tag, first, last)`` for the content ``data[first:last]`` of all
        others. Compare tags with :func:`tag`: a known number with another wire type is an unknown field, as protobuf
        has it. Groups are skipped.

    Raises:
        CodecError: the message is cut off or malformed.
    """
    position = start
    budget = max_fields
    while position < end:
        budget -= 1
        if budget < 0:
            raise OversizeError(f"malformed message: more than {max_fields} fields in one message")
        at = position
        key = data[position]
        position += 1
        if key > 127:
            key, position = read_varint(data, at, end, max_bytes=MAX_SHORT_VARINT)
        kind = key & 7
        if key < 8 or key > _MAX_TAG:
            raise CodecError(f"malformed message: tag {key} at byte {at} has no valid field number")
        if kind in (LEN, VARINT):
            if position < end and data[position] < 128:
                value = data[position]
                position += 1
            else:
                value, position = read_varint(data, position, end, max_bytes=MAX_SHORT_VARINT if kind == LEN else 10)
            if kind == VARINT:
                yield key, value, 0
                continue
            size = value
        elif kind == FIXED64:
            size = 8
        elif kind == FIXED32:
            size = 4
        elif kind == GROUP:
            position = _skip_group(data, position, end, key >> 3)
            continue
        else:
            raise CodecError(f"malformed message: field {key >> 3} at byte {at} has wire type {kind}")
        last = position + size
        if last > end:
            raise CodecError(f"malformed message: field {key >> 3} at byte {at} has {size} bytes, but only {end - position} are left")
        yield key, position, last
        position = last


def _skip_group(data: Buffer, position: int, end: int, number: int) -> int:
    """Returns the position after a group that began just before ``position``."""
    open_groups = [number]
    budget = MAX_FIELDS
    while open_groups:
        budget -= 1
        if budget < 0 or len(open_groups) > _MAX_GROUP_DEPTH:
            raise OversizeError("malformed message: a group with too many fields or levels")
        key, position = read_varint(data, position, end, max_bytes=MAX_SHORT_VARINT)
        kind = key & 7
        if key < 8 or key > _MAX_TAG:
            raise CodecError(f"malformed message: tag {key} in a group has no valid field number")
        if kind == GROUP:
            open_groups.append(key >> 3)
        elif kind == GROUP_END:
            if open_groups.pop() != key >> 3:
                raise CodecError(f"malformed message: group ends as field {key >> 3}, which is not open")
        elif kind == VARINT:
            _, position = read_varint(data, position, end)
        elif kind in (LEN, FIXED64, FIXED32):
            size = 8 if kind == FIXED64 else 4
            if kind == LEN:
                size, position = read_varint(data, position, end, max_bytes=MAX_SHORT_VARINT)
            position += size
        else:
            raise CodecError(f"malformed message: field {key >> 3} in a group has wire type {kind}")
        if position > end:
            raise CodecError("malformed message: a group is cut off")
    return position


def to_int64(value: int) -> int:
    """Returns the signed reading of a varint."""
    return value - (1 << 64) if value >> 63 else value


def to_int32(value: int) -> int:
    """Returns the signed reading of a varint's lower 32 bits, which is how protobuf reads an int32 or an enum."""
    value &= (1 << 32) - 1
    return value - (1 << 32) if value >> 31 else value


def read_text(data: Buffer, start: int, end: int, what: str, *, max_chars: int) -> str:
    """Returns a string field's text.

    Raises:
        OversizeError: more than ``max_chars`` characters.
        CodecError: not valid UTF-8. Both messages begin with ``what``.
    """
    if end - start > 4 * max_chars:
        raise OversizeError(f"{what}: {end - start} bytes, expected at most {max_chars} characters")
    try:
        text = str(data[start:end], "utf-8")
    except UnicodeDecodeError as error:
        raise CodecError(f"{what}: {bytes(data[start:end])!r} is not valid UTF-8 ({error.reason})") from None
    if len(text) > max_chars:
        raise OversizeError(f"{what}: {len(text)} characters, expected at most {max_chars}")
    return text


# Prototypes of our own: setting argtypes on the attributes of ctypes.pythonapi would change them for everyone in the
# process.
_new_bytes = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t)(("PyBytes_FromStringAndSize", ctypes.pythonapi))
_bytes_address = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object)(("PyBytes_AsString", ctypes.pythonapi))
_memory_at = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)(
    ("PyMemoryView_FromMemory", ctypes.pythonapi)
)
_PYBUF_WRITE = 0x200


@lru_cache(maxsize=256)
def char_array(size: int) -> Any:
    """Returns the ctypes type of ``size`` bytes; kept, for making such a type takes longer than filling a message."""
    return ctypes.c_char * size


def fresh_message(size: int) -> tuple[bytes, memoryview, int]:
    """Makes a bytes object with unset content, to be filled in place before anyone else sees it.

    The C API documents this use of ``PyBytes_FromStringAndSize(NULL, size)``. It saves the second copy that
    ``bytes(bytearray)`` or ``b"".join`` would make.

    Args:
        size: in bytes, at least 1 (the empty bytes object is shared).

    Returns:
        The message, a writable view of its content that does not keep it alive, and the address of the content.

    Raises:
        OversizeError: the size is over protobuf's limit.
    """
    if size > MAX_MESSAGE_BYTES:
        raise OversizeError(f"message of {size} bytes, expected at most {MAX_MESSAGE_BYTES}")
    if size < 1:
        raise ValueError(f"size {size}, expected at least 1")
    message: bytes = _new_bytes(None, size)
    address: int = _bytes_address(message)
    return message, _memory_at(address, size, _PYBUF_WRITE), address


def writable_storage(message: bytes, address: int) -> Any:
    """Returns a writable buffer over a fresh message's content that keeps the message alive."""
    storage = char_array(len(message)).from_address(address)
    storage.owner = message
    return storage
