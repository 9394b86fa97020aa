"""Protobuf's wire format by hand: varints, tags, a field iterator, and messages that are filled in place.

The generated classes copy each payload twice, which is too slow for tensors. The format (protobuf.dev/programming-guides/encoding)::

    message   field, field, ...                      in any order
    field     tag, value
    tag       varint of  number << 3 | wire type     one byte for the numbers 1 to 15
    value     VARINT   1 to 10 bytes, 7 bits each, least significant first; the top bit of a byte says that another follows
              FIXED64  8 bytes
              LEN      varint of the length n, then n bytes: text, bytes, packed numbers, or a message
              FIXED32  4 bytes

Input is treated as hostile: every length is compared with the bytes that arrived before it is used, varints and the number of fields are
bounded, nothing recurses, and nothing is allocated.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from touchline_protos.types.episode import CodecError, OversizeError

VARINT, FIXED64, LEN, GROUP, GROUP_END, FIXED32 = range(6)
"""Wire types. GROUP and GROUP_END are obsolete; readers skip what is between them."""

MAX_FIELDS = 1 << 12
"""Default limit of the fields in one message or submessage. It bounds the time that a message of empty fields takes to read."""

MAX_MESSAGE_BYTES = (1 << 31) - 1
"""Protobuf's limit of a message: lengths are int32."""

MAX_SHORT_VARINT = 5
"""Maximum size of a tag or a length, leading zeros included; protobuf refuses longer ones too."""

# Protobuf refuses more than 100 levels of groups and messages together. A group may itself be several messages deep.
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
    """Returns the size in bytes of the varint of a value in 0..2**64-1."""
    return (value.bit_length() + 6) // 7 or 1  # 7 bits a byte, rounded up; 0 takes a byte too


def encode_varint(value: int, width: int = 1) -> bytes:
    """Returns the varint of an int64, padded with leading zeros to at least ``width`` bytes. A negative value takes ten bytes."""
    value &= _UINT64  # two's complement
    encoded = bytearray()
    while value > 127 or len(encoded) + 1 < width:
        encoded.append(value & 127 | 128)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def int_field(number: int, value: int) -> bytes:
    """Returns an integer field; empty for 0, its default.

    Raises:
        CodecError: the value does not fit an int64.
    """
    if not _INT64_MIN <= value <= _INT64_MAX:
        raise CodecError(f"integer {value} is out of range, expected an int64")
    return encode_varint(tag(number, VARINT)) + encode_varint(value) if value else b""


def len_field(number: int, content: bytes) -> bytes:
    """Returns a length-delimited field; it is present even if its content is empty."""
    return encode_varint(tag(number, LEN)) + encode_varint(len(content)) + content


def text_field(number: int, text: str, what: str) -> bytes:
    """Returns a string field; empty for the empty string, its default.

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
        position: position of the varint's first byte.
        end: position after the last byte that may be read.
        max_bytes: maximum size of the varint, from 1 to 10.

    Returns:
        The value in 0..2**64-1 and the position after it.

    Raises:
        CodecError: the varint is cut off, or longer than ``max_bytes``.
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

    Args:
        data: the bytes that hold the message.
        start: position of the message's first byte.
        end: position after its last byte.
        max_fields: maximum number of fields.

    Yields:
        ``(tag, value, 0)`` for a varint, unsigned; ``(tag, first, last)`` for any other field, whose content is ``data[first:last]``.
        Compare the tag with :func:`tag`: as in protobuf, a known number with another wire type is an unknown field. Groups are skipped.

    Raises:
        CodecError: the message is cut off or malformed.
        OversizeError: it has more than ``max_fields`` fields.
    """
    # The order of the checks: the budget first, so that each field costs bounded time; then the tag, which says what the value is; then
    # the value's length against the end, before any position derived from it is used or handed out.
    position = start
    budget = max_fields
    while position < end:
        budget -= 1
        if budget < 0:
            raise OversizeError(f"malformed message: more than {max_fields} fields in one message")
        at = position
        key = data[position]
        position += 1  # nearly all tags and many values take one byte; calling read_varint for them would double the time
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
    """Returns the position after a group whose start tag ends at ``position``. Keeps a stack of open groups in place of recursion."""
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
    """Returns the int64 whose two's complement is the unsigned ``value``."""
    return value - (1 << 64) if value >> 63 else value


def to_int32(value: int) -> int:
    """Returns the int32 in the lower 32 bits of ``value``: how protobuf reads an int32 or an enum."""
    value &= (1 << 32) - 1
    return value - (1 << 32) if value >> 31 else value


def read_text(data: Buffer, start: int, end: int, what: str, *, max_chars: int) -> str:
    """Returns the text ``data[start:end]`` of a string field.

    Raises:
        OversizeError: the text has more than ``max_chars`` characters.
        CodecError: it is not valid UTF-8. Both messages begin with ``what``.
    """
    # A character takes at most 4 bytes, so this needs no decoding, and bounds what decoding allocates.
    if end - start > 4 * max_chars:
        raise OversizeError(f"{what}: {end - start} bytes, expected at most {max_chars} characters")
    try:
        text = str(data[start:end], "utf-8")
    except UnicodeDecodeError as error:
        raise CodecError(f"{what}: {bytes(data[start:end])!r} is not valid UTF-8 ({error.reason})") from None
    if len(text) > max_chars:
        raise OversizeError(f"{what}: {len(text)} characters, expected at most {max_chars}")
    return text


# Own prototypes: setting argtypes on the functions of ctypes.pythonapi would change them for the whole process.
_new_bytes = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t)(("PyBytes_FromStringAndSize", ctypes.pythonapi))
_bytes_address = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object)(("PyBytes_AsString", ctypes.pythonapi))
_memory_at = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)(
    ("PyMemoryView_FromMemory", ctypes.pythonapi)
)
_PYBUF_WRITE = 0x200


@lru_cache(maxsize=256)
def char_array(size: int) -> Any:
    """Returns the ctypes type of ``size`` bytes. Cached: making such a type takes longer than filling a small message."""
    return ctypes.c_char * size


def fresh_message(size: int) -> tuple[bytes, memoryview, int]:
    """Makes a bytes object with arbitrary content, which the caller fills in place before sharing it.

    gRPC sends nothing but ``bytes``, and ``bytes(bytearray)`` or ``b"".join`` would copy every payload once more. The C API documents this
    use of ``PyBytes_FromStringAndSize(NULL, size)``. Until it is shared, a bytes object is an ordinary block of memory: its hash is not
    yet computed, and no other reference can observe the change.

    Args:
        size: size in bytes, at least 1, because the empty bytes object is shared by the whole process.

    Returns:
        The message; a writable view of its content, which does not keep the message alive; and the address of the content, a multiple of
        16 (object header and allocator see to that).

    Raises:
        OversizeError: ``size`` exceeds protobuf's limit.
    """
    if size > MAX_MESSAGE_BYTES:
        raise OversizeError(f"message of {size} bytes, expected at most {MAX_MESSAGE_BYTES}")
    if size < 1:
        raise ValueError(f"size {size}, expected at least 1")
    message: bytes = _new_bytes(None, size)
    address: int = _bytes_address(message)
    return message, _memory_at(address, size, _PYBUF_WRITE), address


def writable_storage(message: bytes, address: int) -> Any:
    """Returns a writable buffer over the content of a message of :func:`fresh_message`; it keeps the message alive."""
    storage = char_array(len(message)).from_address(address)
    storage.owner = message
    return storage
