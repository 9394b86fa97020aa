"""AddEpisodeRequest by hand: against itself, against the generated classes, and against malformed messages."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.codec_cases import arrays, episodes, from_proto, same_episode, small_episode, to_proto
from touchline_protos.codec import (
    CodecError,
    CodecLimits,
    Episode,
    EpisodeKey,
    OversizeError,
    decode_add_episode,
    encode_add_episode,
    wire,
)
from touchline_protos.codec.tensors import ALIGNMENT, TensorSpec, tensor_field
from touchline_protos.v1 import replay_pb2 as pb


def request(*columns: pb.Column) -> bytes:
    return pb.AddEpisodeRequest(episode=pb.Episode(columns=columns)).SerializeToString()


def column(name: str, shape: list[int], data: bytes, dtype: int = pb.DTYPE_FLOAT32) -> pb.Column:
    return pb.Column(name=name, tensor=pb.Tensor(dtype=dtype, shape=shape, data=data))


@given(episodes(), st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_episode_decodes_to_the_same_bits(episode: Episode, table: str) -> None:
    found_table, found = decode_add_episode(encode_add_episode(episode, table=table))

    assert found_table == table
    assert same_episode(found, episode)


@given(episodes())
def test_episode_by_hand_is_read_by_the_generated_class(episode: Episode) -> None:
    message = pb.AddEpisodeRequest.FromString(encode_add_episode(episode, table="t"))

    assert message.table == "t"
    assert same_episode(from_proto(message.episode), episode)


@given(episodes())
def test_episode_by_the_generated_class_is_read_by_hand(episode: Episode) -> None:
    message = pb.AddEpisodeRequest(table="t", episode=to_proto(episode)).SerializeToString()

    table, found = decode_add_episode(message)

    assert table == "t"
    assert same_episode(found, episode)


@given(st.lists(arrays(), min_size=1, max_size=4), st.integers(0, 140))
def test_payloads_are_aligned_within_the_message(columns: list[np.ndarray], name_chars: int) -> None:
    episode = Episode({f"{index}" + "x" * name_chars: column for index, column in enumerate(columns)})
    message = encode_add_episode(episode)
    origin = np.frombuffer(message, np.uint8).ctypes.data

    _, found = decode_add_episode(message)

    assert all((array.ctypes.data - origin) % 16 == 0 for array in found.columns.values() if array.size)


@pytest.mark.parametrize("size", [*range(90, 140), *range(16300, 16400)])
def test_length_boundaries_are_read_by_the_generated_class(size: int) -> None:
    episode = Episode({"x": np.arange(size, dtype=np.uint32).astype(np.uint8)})

    message = encode_add_episode(episode)

    assert same_episode(from_proto(pb.AddEpisodeRequest.FromString(message).episode), episode)
    assert same_episode(decode_add_episode(message)[1], episode)


@pytest.mark.parametrize("boundary", [1 << 7, 1 << 14, 1 << 21])
def test_payload_is_aligned_even_if_the_padding_lengthens_two_lengths(boundary: int) -> None:
    for name_chars in range(6, 16):
        for size in range(max(boundary - 70, 1), boundary + 10):
            for phase in range(ALIGNMENT):
                spec = TensorSpec("n" * name_chars, np.dtype("u1"), (size,))
                field = tensor_field.__wrapped__(4, spec, phase, True, True)

                assert (phase + len(field)) % ALIGNMENT == 0


def test_decoded_columns_are_read_only_views_of_the_message() -> None:
    message = encode_add_episode(small_episode())

    _, episode = decode_add_episode(message)

    for array in episode.columns.values():
        assert not array.flags.writeable
        assert np.shares_memory(array, np.frombuffer(message, np.uint8))


def test_encoding_does_not_change_the_callers_arrays() -> None:
    array = np.arange(6, dtype=">f4").reshape(2, 3).T
    before = array.copy()

    encode_add_episode(Episode({"obs": array}))

    assert array.dtype == np.dtype(">f4") and array.strides == (4, 12)
    np.testing.assert_array_equal(array, before)


def test_episode_counts_rows_and_bytes() -> None:
    assert (small_episode().length, small_episode().size_bytes) == (4, 48 + 64 + 16 + 4)
    assert Episode({"scalar": np.float32(1).reshape(())}).length == 0


@pytest.mark.parametrize(
    "value",
    [
        np.zeros(2, "u2"),
        np.zeros(2, "c8"),
        np.array(["a"]),
        np.array([None]),
        np.zeros(1, "M8[s]"),
    ],
)
def test_unsupported_dtype_is_refused_by_name(value: np.ndarray) -> None:
    with pytest.raises(CodecError, match=r"^gripper: dtype .* is not supported, expected one of bool, uint8"):
        encode_add_episode(Episode({"gripper": value}))


@pytest.mark.skipif(np.lib.NumpyVersion(np.__version__) < "2.0.0", reason="StringDType came with numpy 2")
def test_dtype_without_byte_order_is_refused_by_name() -> None:
    with pytest.raises(CodecError, match=r"^word: dtype StringDType.* is not supported"):
        encode_add_episode(Episode({"word": np.array(["a"], np.dtypes.StringDType())}))


@pytest.mark.parametrize(
    ("episode", "reason"),
    [
        (Episode({"": np.zeros(1)}), "without a name"),
        (Episode({"n" * 257: np.zeros(1)}), "257 characters"),
        (Episode({"x": np.zeros((1,) * 17)}), "x: 17 dimensions"),
        (Episode({f"c{i}": np.zeros(1) for i in range(257)}), "257 columns"),
        (Episode({}, EpisodeKey("", 0, 0)), "client_id of 0"),
        (Episode({}, EpisodeKey("c" * 129, 0, 0)), "client_id of 129"),
        (Episode({}, EpisodeKey("c", 1 << 63, 0)), "expected an int64"),
        (Episode({}, actor="a" * 129), "actor of 129"),
        (Episode({"\ud800": np.zeros(1)}), "no UTF-8 form"),
    ],
)
def test_episode_out_of_range_is_not_encoded(episode: Episode, reason: str) -> None:
    with pytest.raises(CodecError, match=reason):
        encode_add_episode(episode)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (b"", "no episode"),
        (
            request(column("reward", [4], bytes(12))),
            r"^reward: 12 bytes of data, expected 16 for float32 of shape \(4,\)$",
        ),
        (request(column("reward", [4], bytes(17))), "reward: 17 bytes of data, expected 16"),
        (request(column("reward", [0], b"x")), "reward: 1 bytes of data, expected 0"),
        (request(column("reward", [], b"")), r"reward: 0 bytes of data, expected 4 for float32 of shape \(\)"),
        (
            request(column("reward", [2], bytes(4), pb.DTYPE_BFLOAT16), column("reward", [0], b"")),
            "reward: column appears twice",
        ),
        (request(column("reward", [-1], b"")), r"reward: negative dimension in shape \(-1,\)"),
        (request(column("reward", [1 << 62, 1 << 62], b"")), "reward: shape .* larger than any memory"),
        (request(column("reward", [1 << 62, 0, 8], b"")), "reward: shape .* larger than any memory"),
        (request(column("reward", [1 << 32, 1 << 32, 1], b"")), "reward: shape .* larger than any memory"),
        (request(column("reward", [1] * 17, bytes(4))), "reward: more than 16 dimensions"),
        (request(column("reward", [1], bytes(4), 77)), "reward: dtype number 77 is unknown"),
        (request(column("reward", [1], bytes(4), 0)), "reward: dtype number 0 is unknown"),
        (request(column("reward", [1], bytes(4), -1)), "reward: dtype number -1 is unknown"),
        (request(column("", [1], bytes(4))), "column without a name"),
        (request(column("n" * 257, [1], bytes(4))), "257 characters, expected at most 256"),
        (request(column("n" * 2000, [1], bytes(4))), "2000 bytes, expected at most 256"),
        (request(pb.Column(name="reward")), "reward: no tensor"),
        (request(column("done", [2], b"\x01\x02", pb.DTYPE_BOOL)), "done: byte 2 in a bool column, expected 0 or 1"),
        (request(*[column(f"c{i}", [0], b"") for i in range(257)]), "more than 256 columns"),
        (request(column("reward", [1], bytes(4))).replace(b"reward", b"rewar\xff"), "not valid UTF-8"),
        (
            pb.AddEpisodeRequest(episode=pb.Episode(key=pb.EpisodeKey(sequence=1))).SerializeToString(),
            "without a client_id",
        ),
        (pb.AddEpisodeRequest(episode=pb.Episode(actor="a" * 129)).SerializeToString(), "actor: 129 characters"),
        (request(column("reward", [1], bytes(4))) * 2, "more than one episode"),
    ],
)
def test_malformed_episode_is_refused_with_column_found_and_expected(message: bytes, reason: str) -> None:
    with pytest.raises(CodecError, match=reason):
        decode_add_episode(message)


def test_limits_are_the_receivers() -> None:
    message = encode_add_episode(small_episode())

    with pytest.raises(OversizeError, match="expected at most 100"):
        decode_add_episode(message, limits=CodecLimits(max_episode_bytes=100))
    with pytest.raises(OversizeError, match="more than 3 columns"):
        decode_add_episode(message, limits=CodecLimits(max_columns=3))
    with pytest.raises(OversizeError, match="obs: more than 1 dimensions"):
        decode_add_episode(message, limits=CodecLimits(max_dims=1))
    with pytest.raises(OversizeError, match="column name: 6 characters"):
        decode_add_episode(message, limits=CodecLimits(max_name_chars=5))
    nested = request(column("reward", [1], bytes(4)), column("obs.head.left", [1], bytes(4)))
    with pytest.raises(OversizeError, match=r"obs\.head\.left: nested 2 levels deep, expected at most 1"):
        decode_add_episode(nested, limits=CodecLimits(max_nesting=1))
    assert list(decode_add_episode(nested, limits=CodecLimits(max_nesting=2))[1].columns) == ["reward", "obs.head.left"]
    assert same_episode(decode_add_episode(message, limits=CodecLimits(132, 4, 6, 2))[1], small_episode())


def test_error_of_a_refused_episode_has_its_key_wherever_the_field_is() -> None:
    key = pb.Episode(key=pb.EpisodeKey(client_id="c", incarnation=2, sequence=3)).SerializeToString()
    bad = pb.Episode(columns=[column("reward", [4], b"")]).SerializeToString()

    for content in (key + bad, bad + key):
        with pytest.raises(CodecError) as raised:
            decode_add_episode(wire.len_field(2, content))
        assert raised.value.key == EpisodeKey("c", 2, 3)
        assert not raised.value.fatal


UNKNOWN = [
    wire.len_field(900, b"new"),
    wire.int_field(901, -5),
    b"\x9b\x06\x08\x01\x9c\x06",
    wire.encode_varint(902 << 3 | 5) + b"abcd",
]


@given(st.randoms(use_true_random=False), episodes())
def test_any_field_order_unknown_fields_and_unpacked_shapes_are_read(rng: random.Random, episode: Episode) -> None:
    def shuffled(fields: list[bytes]) -> bytes:
        fields = [*fields, rng.choice(UNKNOWN)]
        rng.shuffle(fields)
        return b"".join(fields)

    def tensor_fields(message: pb.Tensor) -> bytes:
        # The dimensions keep their order; each may stand alone, packed or not, or in the company of others.
        if len(message.shape) == 2 and rng.random() < 0.5:
            shape = [wire.len_field(2, b"".join(wire.encode_varint(size, 3) for size in message.shape))]
        else:
            shape = [b"".join(wire.encode_varint(16) + wire.encode_varint(size) for size in message.shape)]
        return shuffled([wire.int_field(1, message.dtype), *shape, wire.len_field(3, b"pad"), wire.len_field(4, message.data)])

    source = to_proto(episode)
    # Columns keep their order as well: protobuf's lists have one.
    columns = [
        wire.len_field(4, shuffled([wire.len_field(1, c.name.encode()), wire.len_field(2, tensor_fields(c.tensor))]))
        for c in source.columns
    ]
    source.ClearField("columns")
    message = shuffled([wire.len_field(2, shuffled([source.SerializeToString(), b"".join(columns)])), wire.len_field(1, b"t")])

    table, found = decode_add_episode(message)

    assert table == "t"
    assert same_episode(found, episode)
    assert same_episode(from_proto(pb.AddEpisodeRequest.FromString(message).episode), episode)


@given(st.randoms(use_true_random=False), st.integers(1, 8))
def test_mutated_message_is_refused_or_a_valid_episode(rng: random.Random, changes: int) -> None:
    message = bytearray(encode_add_episode(small_episode(), table="t"))
    for _ in range(changes):
        # Most changes go where the structure is: a payload takes any value.
        message[rng.choice([rng.randrange(90), rng.randrange(len(message))])] = rng.randrange(256)
    if rng.random() < 0.3:
        del message[rng.randrange(len(message)) :]

    try:
        _, episode = decode_add_episode(bytes(message))
    except CodecError as error:
        assert str(error)
        return

    decoded_again = decode_add_episode(encode_add_episode(episode))[1]
    assert same_episode(decoded_again, episode)


@given(st.integers(0, 400))
def test_truncated_message_is_refused(size: int) -> None:
    message = encode_add_episode(small_episode())

    with pytest.raises(CodecError):
        decode_add_episode(message[: min(size, len(message) - 1)])


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_or_a_valid_episode(message: bytes) -> None:
    try:
        decode_add_episode(wire.len_field(2, message))
    except CodecError as error:
        assert str(error)
