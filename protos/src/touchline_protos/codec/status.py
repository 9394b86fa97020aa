"""Status snapshots as messages: field by field, since the classes of :mod:`touchline_protos.types.status` have the messages' fields."""

from __future__ import annotations

import enum
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from google.protobuf.descriptor import EnumDescriptor, FieldDescriptor
from google.protobuf.message import Message

from touchline_protos.types import status
from touchline_protos.types.counts import Counts
from touchline_protos.v1 import replay_pb2 as pb

_CLASSES: dict[str, type[Any]] = {"StatusResponse": status.ServerStatus, "RateWaiter": status.HeldCaller, "Counts": Counts}
"""Class of each message whose name is another one, or which is defined elsewhere."""

_ENUMS: dict[str, Callable[[str], Any]] = {"StorageState": str}
"""Class of each enum that has none of its own name: a plain word."""


class _Field(NamedTuple):
    name: str
    repeated: bool
    optional: bool
    """Whether None stands for a value that is left out."""
    encode: Callable[[Any], Any] | None
    """What makes the message's value of the class's; None if they are the same."""
    decode: Callable[[Any], Any] | None


def status_to_message(value: status.ServerStatus) -> pb.StatusResponse:
    """Returns a snapshot as a message."""
    message: pb.StatusResponse = _encode(pb.StatusResponse, value)
    return message


def status_of_message(message: pb.StatusResponse) -> status.ServerStatus:
    """Returns the snapshot in a message."""
    value: status.ServerStatus = _decode(message)
    return value


def rate_to_message(value: status.RateInfo) -> pb.RateInfo:
    """Returns a rate limit as a message."""
    message: pb.RateInfo = _encode(pb.RateInfo, value)
    return message


def rate_of_message(message: pb.RateInfo) -> status.RateInfo:
    """Returns the rate limit in a message."""
    value: status.RateInfo = _decode(message)
    return value


def _encode(kind: Any, value: Any) -> Any:
    given = {}
    for one in _fields(kind):
        own = getattr(value, one.name)
        if own is None or (one.repeated and not own):
            continue
        encode = one.encode
        if encode is not None:
            own = [encode(item) for item in own] if one.repeated else encode(own)
        given[one.name] = own
    return kind(**given)


def _decode(message: Message) -> Any:
    kind: Any = type(message)
    given: dict[str, Any] = {}
    for one in _fields(kind):
        if one.optional and not message.HasField(one.name):
            given[one.name] = None
            continue
        own, decode = getattr(message, one.name), one.decode
        if one.repeated:
            given[one.name] = tuple(own) if decode is None else tuple(decode(item) for item in own)
        else:
            given[one.name] = own if decode is None else decode(own)
    return _class_of(kind.DESCRIPTOR.name)(**given)


@cache
def _fields(kind: Any) -> tuple[_Field, ...]:
    """Returns how the fields of a message are converted."""
    found = []
    for one in kind.DESCRIPTOR.fields:
        encode: Callable[[Any], Any] | None = None
        decode: Callable[[Any], Any] | None = None
        optional = one.has_presence
        if one.type == FieldDescriptor.TYPE_MESSAGE:
            nested = getattr(pb, one.message_type.name)
            encode, decode = (lambda value, nested=nested: _encode(nested, value)), _decode
            # A message of which there always is one, such as the counts: without it, the class has its defaults.
            optional = optional and (one.containing_type.name, one.name) in _MAYBE_NONE
        elif one.type == FieldDescriptor.TYPE_ENUM:
            encode, decode = _enum_converters(one.enum_type)
        found.append(_Field(one.name, _is_repeated(one), optional, encode, decode))
    return tuple(found)


_MAYBE_NONE = {("TableStatus", "rate"), ("TableStatus", "durability")}
"""Messages that are left out if there is none."""


def _is_repeated(one: FieldDescriptor) -> bool:
    return bool(one.default_value == [])  # ``label`` goes away in newer protobuf, ``is_repeated`` is not in older ones


def _enum_converters(kind: EnumDescriptor) -> tuple[Callable[[Any], int], Callable[[int], Any]]:
    """Returns what converts words to the numbers of an enum and back: LAW_STEP is ``step``, and LAW_UNSPECIFIED empty."""
    prefix = "".join(f"_{letter}" if letter.isupper() else letter.upper() for letter in kind.name)[1:]
    words = {value.number: value.name.removeprefix(f"{prefix}_").lower() for value in kind.values}
    words[0] = ""
    numbers = {word: number for number, word in words.items()}
    of_word = _ENUMS.get(kind.name) or getattr(status, kind.name)

    def encode(value: Any) -> int:
        return numbers[value.value if isinstance(value, enum.Enum) else value]

    def decode(number: int) -> Any:
        return of_word(words.get(number, ""))  # a number that this version does not know is not known

    return encode, decode


def _class_of(name: str) -> type[Any]:
    return _CLASSES.get(name) or getattr(status, name)
