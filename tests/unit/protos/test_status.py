"""The classes of a status and the messages of the wire: the same fields, converted both ways without a loss."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from touchline_protos.codec.status import status_of_message, status_to_message
from touchline_protos.types.status import ServerStatus, Verdict
from touchline_protos.v1 import replay_pb2 as pb


def fill(message: Any, number: int = 1) -> int:
    """Sets every field of a message, and of those in it, to a value of its own."""
    for field in message.DESCRIPTOR.fields:
        number += 1
        repeated = field.default_value == []
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            number = fill(getattr(message, field.name).add() if repeated else getattr(message, field.name), number)
            continue
        if field.type == FieldDescriptor.TYPE_STRING:
            value: Any = f"text {number}"
        elif field.type == FieldDescriptor.TYPE_BOOL:
            value = True
        elif field.type == FieldDescriptor.TYPE_ENUM:
            value = 1 + number % (len(field.enum_type.values) - 1)
        else:
            value = number
        if repeated:
            getattr(message, field.name).append(value)
        else:
            setattr(message, field.name, value)
    return number


def messages_in(kind: Descriptor) -> set[str]:
    found = {kind.name}
    for field in kind.fields:
        if field.message_type is not None and field.message_type.name not in found:
            found |= messages_in(field.message_type)
    return found


def test_every_field_of_every_message_survives_both_ways() -> None:
    message = pb.StatusResponse()
    fill(message)

    status = status_of_message(message)

    assert len(messages_in(pb.StatusResponse.DESCRIPTOR)) >= 17
    assert status_to_message(status) == message
    assert status_of_message(status_to_message(status)) == status


def test_empty_message_is_the_classes_defaults() -> None:
    assert status_of_message(pb.StatusResponse()) == ServerStatus()


def test_word_that_a_newer_server_says_is_not_known() -> None:
    message = pb.StatusResponse(tables=[pb.TableStatus(verdict=77)])  # type: ignore[arg-type]

    assert status_of_message(message).tables[0].verdict is Verdict.UNSPECIFIED


def test_status_as_a_dict_is_json_with_what_follows_from_its_fields() -> None:
    message = pb.StatusResponse()
    fill(message)
    status = status_of_message(message)

    plain = json.loads(json.dumps(status.to_dict()))

    assert set(plain) == {field.name for field in fields(status)}
    (flow,) = plain["tables"][0]["flows"]
    assert flow["replay_ratio"] == flow["delivered"][0]["rows"] / flow["rows_in"]
    assert plain["tables"][0]["verdict"] in {str(verdict) for verdict in Verdict}
