"""The wire format by hand, against protobuf's own reading of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from touchline_protos.codec import CodecError, OversizeError, wire
from touchline_protos.v1 import replay_pb2 as pb

INT64 = st.integers(-(1 << 63), (1 << 63) - 1)


@given(st.integers(0, (1 << 64) - 1), st.integers(1, 10))
def test_varint_of_any_width_reads_back(value: int, width: int) -> None:
    encoded = wire.encode_varint(value, width)

    assert wire.read_varint(encoded, 0, len(encoded)) == (value, len(encoded))
    assert len(encoded) == max(width, wire.varint_size(value))


@given(INT64)
def test_int_field_is_what_protobuf_writes(value: int) -> None:
    assert wire.int_field(1, value) == pb.AddEpisodeResponse(episode_id=value).SerializeToString()


@pytest.mark.parametrize("value", [1 << 63, -(1 << 63) - 1])
def test_int_field_beyond_int64_is_refused(value: int) -> None:
    with pytest.raises(CodecError, match="expected an int64"):
        wire.int_field(1, value)


@pytest.mark.parametrize(("data", "reason"), [(b"\x80" * 3, "cut off"), (b"", "cut off"), (b"\x80" * 11, "longer than")])
def test_varint_without_end_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(CodecError, match=reason):
        wire.read_varint(data, 0, len(data))


def test_read_fields_yields_contents_of_every_wire_type() -> None:
    data = b"\x08\x96\x01" + b"\x12\x02ab" + b"\x19" + bytes(8) + b"\x25" + bytes(4)

    fields = list(wire.read_fields(data, 0, len(data)))

    assert fields == [(8, 150, 0), (18, 5, 7), (25, 8, 16), (37, 17, 21)]


def test_read_fields_skips_nested_groups() -> None:
    group = b"\x0b" + b"\x10\x01" + b"\x13" + b"\x1a\x02zz" + b"\x14" + b"\x21" + bytes(8) + b"\x2d" + bytes(4) + b"\x0c"

    fields = list(wire.read_fields(group + b"\x08\x05", 0, len(group) + 2))

    assert fields == [(8, 5, 0)]


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\x01",  # field number 0
        b"\x0e\x01",  # wire type 6
        b"\x0c",  # a group's end without its beginning
        b"\x12\x05ab",  # content cut off
        b"\x12",  # length cut off
        b"\x08",  # value cut off
        b"\x19\x00",  # fixed64 cut off
        b"\x0b\x08\x01",  # group without end
        b"\x0b\x14",  # group with another's end
        b"\x0b\x12\x7fa\x0c",  # content in a group cut off
        b"\x0b" * 1000,  # groups too deep
        b"\xff\xff\xff\xff\x7f\x01",  # tag of more than 32 bits
    ],
)
def test_read_fields_refuses_what_is_malformed(data: bytes) -> None:
    with pytest.raises(CodecError):
        list(wire.read_fields(data, 0, len(data)))


def test_read_fields_gives_up_on_a_flood_of_fields() -> None:
    flood = b"\x78\x00" * (wire.MAX_FIELDS + 1)

    with pytest.raises(OversizeError, match="more than 4096 fields"):
        list(wire.read_fields(flood, 0, len(flood)))


@given(st.binary(max_size=60))
def test_read_fields_of_any_bytes_ends_or_raises(data: bytes) -> None:
    try:
        fields = list(wire.read_fields(data, 0, len(data)))
    except CodecError:
        return
    assert all(key >= 8 and (key & 7 == wire.VARINT or a <= b <= len(data)) for key, a, b in fields)


@given(st.integers(0, (1 << 64) - 1))
def test_signed_readings_are_those_of_two_complement(value: int) -> None:
    assert wire.to_int64(value) == int.from_bytes(value.to_bytes(8, "little"), "little", signed=True)
    assert wire.to_int32(value) == int.from_bytes((value & 0xFFFFFFFF).to_bytes(4, "little"), "little", signed=True)


def test_text_without_utf8_form_is_refused_both_ways() -> None:
    with pytest.raises(CodecError, match="actor"):
        wire.text_field(1, "\ud800", "actor")
    with pytest.raises(CodecError, match=r"actor.*not valid UTF-8"):
        wire.read_text(b"\xff", 0, 1, "actor", max_chars=5)


def test_fresh_message_is_filled_in_place_and_kept_alive_by_its_storage() -> None:
    message, view, address = wire.fresh_message(5)
    view[:] = b"hello"
    storage = wire.writable_storage(message, address)
    del message, view

    assert storage.owner == b"hello"
    assert bytes(storage) == b"hello"


def test_fresh_message_over_the_limit_is_refused() -> None:
    with pytest.raises(OversizeError, match="2147483648 bytes"):
        wire.fresh_message(1 << 31)
    with pytest.raises(ValueError, match="at least 1"):
        wire.fresh_message(0)
