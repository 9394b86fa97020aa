"""LoadEpisodesRequest streams: whole episodes, chunks, and what a hostile or broken stream meets."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.codec_cases import episodes, feed_all, feed_one, from_proto, same_episode, small_episode
from touchline_protos.codec import (
    CodecError,
    CodecLimits,
    Episode,
    EpisodeKey,
    LoadDecoder,
    OversizeError,
    chunks,
    encode_load,
    encode_loads,
    wire,
)
from touchline_protos.v1 import replay_pb2 as pb

KEY = EpisodeKey("robot-7", 1_700_000_000, 42)


def header(length: int, *columns: pb.ColumnSpec, key: EpisodeKey | None = KEY) -> bytes:
    message = pb.EpisodeHeader(length=length, columns=columns)
    if key:
        message.key.CopyFrom(pb.EpisodeKey(client_id=key.client_id, incarnation=key.incarnation, sequence=key.sequence))
    return pb.LoadEpisodesRequest(header=message).SerializeToString()


def spec(name: str, *shape: int, dtype: int = pb.DTYPE_FLOAT32) -> pb.ColumnSpec:
    return pb.ColumnSpec(name=name, dtype=dtype, shape=shape)


def chunk(column: int, offset: int, data: bytes) -> bytes:
    return pb.LoadEpisodesRequest(chunk=pb.ColumnChunk(column=column, offset_bytes=offset, data=data)).SerializeToString()


def with_rows(episode: Episode, rows: int) -> Episode:
    """The episode with each of its columns repeated over the same number of rows."""
    columns = {name: np.stack([column] * rows) for name, column in episode.columns.items()}
    return Episode(columns, episode.key, episode.actor, episode.policy_version)


@given(episodes(), st.integers(1, 4), st.integers(1, 64))
def test_episode_arrives_the_same_however_it_is_cut(episode: Episode, rows: int, chunk_bytes: int) -> None:
    episode = with_rows(episode, rows)
    decoder = LoadDecoder()

    found = feed_all(decoder, encode_load(episode, table="t", chunk_bytes=chunk_bytes))

    assert len(found) == 1 and same_episode(found[0], episode)
    assert decoder.table == "t" and not decoder.in_progress


@given(episodes(), st.integers(1, 64))
def test_messages_are_read_by_the_generated_class(episode: Episode, chunk_bytes: int) -> None:
    episode = with_rows(episode, 3)
    messages = [pb.LoadEpisodesRequest.FromString(m) for m in encode_load(episode, table="t", chunk_bytes=chunk_bytes)]

    if episode.size_bytes <= chunk_bytes:
        assert len(messages) == 1 and same_episode(from_proto(messages[0].episode), episode)
        return
    assert messages[0].WhichOneof("part") == "header" and messages[0].table == "t"
    assert messages[0].header.length == 3
    data = [b""] * len(episode.columns)
    for message in messages[1:]:
        assert message.chunk.offset_bytes == len(data[message.chunk.column])
        assert 0 < len(message.chunk.data) <= chunk_bytes
        data[message.chunk.column] += message.chunk.data
    expected = [np.array(c, dtype=c.dtype.newbyteorder("<"), order="C").tobytes() for c in episode.columns.values()]
    assert data == expected


def test_one_stream_carries_whole_and_chunked_episodes() -> None:
    decoder = LoadDecoder()
    small, big = small_episode(), with_rows(small_episode(), 3)

    messages = [m for e in (small, big, small) for m in encode_load(e, chunk_bytes=150)]

    assert [same_episode(a, b) for a, b in zip(feed_all(decoder, messages), (small, big, small), strict=True)] == [True] * 3


@given(st.lists(episodes(), max_size=8), st.integers(1, 4), st.integers(1, 2000), st.integers(1, 2000))
def test_episodes_arrive_the_same_and_in_order_however_they_share_messages(
    some: list[Episode], rows: int, chunk_bytes: int, group_bytes: int
) -> None:
    some = [with_rows(episode, rows) for episode in some]
    decoder = LoadDecoder()

    messages = list(encode_loads(some, table="t", chunk_bytes=chunk_bytes, group_bytes=group_bytes))

    found = [episode for message in messages for episode in decoder.feed(message)]
    assert all(same_episode(a, b) for a, b in zip(found, some, strict=True))
    for message in messages:
        read = pb.LoadEpisodesRequest.FromString(message)
        if read.episodes:
            assert len(message) <= min(chunk_bytes, group_bytes) and len(read.episodes) > 1 and read.WhichOneof("part") is None


def test_small_episodes_share_messages_and_big_ones_do_not() -> None:
    small, big = small_episode(), with_rows(small_episode(), 50)

    messages = list(encode_loads([small] * 3 + [big] + [small], group_bytes=2000, chunk_bytes=2000))

    read = [pb.LoadEpisodesRequest.FromString(message) for message in messages]
    assert [len(message.episodes) or message.WhichOneof("part") for message in read] == [
        3,
        "header",
        *["chunk"] * (len(read) - 3),
        "episode",
    ]


def test_malformed_episode_in_a_group_is_refused_and_the_others_are_read() -> None:
    request = pb.LoadEpisodesRequest.FromString(next(encode_loads([small_episode(), small_episode(), small_episode()])))
    request.episodes[1].columns[0].tensor.data += b"x"
    request.episodes[1].key.sequence = 99

    first, refused, last = LoadDecoder().feed(request.SerializeToString())

    assert isinstance(first, Episode) and same_episode(first, small_episode())
    assert isinstance(refused, CodecError) and not refused.fatal and refused.key is not None and refused.key.sequence == 99
    assert isinstance(last, Episode) and same_episode(last, small_episode())


def test_episodes_beside_another_part_or_within_chunks_are_fatal() -> None:
    group = pb.LoadEpisodesRequest.FromString(next(encode_loads([small_episode(), small_episode()])))
    both = pb.LoadEpisodesRequest(episodes=group.episodes, episode=group.episodes[0])
    with pytest.raises(CodecError, match="3 parts in a message, expected one") as caught:
        LoadDecoder().feed(both.SerializeToString())
    assert caught.value.fatal

    decoder = LoadDecoder()
    feed_one(decoder, header(3, spec("obs")))
    with pytest.raises(CodecError, match="another episode begins") as caught:
        decoder.feed(group.SerializeToString())
    assert caught.value.fatal and caught.value.key == KEY


def test_more_episodes_than_a_message_may_have_are_refused() -> None:
    decoder = LoadDecoder()

    assert len(list(decoder.feed(pb.LoadEpisodesRequest(episodes=[pb.Episode()] * 1024).SerializeToString()))) == 1024
    with pytest.raises(OversizeError, match="1025 episodes in a message, expected at most 1024"):
        decoder.feed(pb.LoadEpisodesRequest(episodes=[pb.Episode()] * 1025).SerializeToString())


def test_chunked_columns_are_writable_and_own_their_memory() -> None:
    found = feed_all(LoadDecoder(), encode_load(small_episode(), chunk_bytes=7))[0]

    assert all(column.flags.writeable and column.flags.owndata for column in found.columns.values())


def test_columns_of_different_rows_cannot_go_in_chunks() -> None:
    episode = Episode({"obs": np.zeros((4, 3)), "reward": np.zeros(5)})

    with pytest.raises(CodecError, match=r"reward: shape \(5,\), expected 4 rows"):
        list(encode_load(episode, chunk_bytes=16))


def test_chunk_size_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="chunk_bytes 0"):
        list(encode_load(small_episode(), chunk_bytes=0))


def test_table_is_that_of_the_streams_first_message() -> None:
    decoder = LoadDecoder()

    feed_all(decoder, [*encode_load(small_episode(), table="first"), *encode_load(small_episode(), table="second")])

    assert decoder.table == "first"


def test_episode_without_bytes_is_complete_with_its_header() -> None:
    episode = feed_one(LoadDecoder(), header(0, spec("obs", 3), spec("reward")))

    assert episode is not None
    assert {name: column.shape for name, column in episode.columns.items()} == {"obs": (0, 3), "reward": (0,)}


def test_empty_columns_between_others_have_no_chunks() -> None:
    decoder = LoadDecoder()
    feed_one(decoder, header(2, spec("void", 0), spec("obs"), spec("hole", 3, 0), spec("reward"), spec("end", 0)))

    assert feed_one(decoder, chunk(1, 0, bytes(8))) is None
    episode = feed_one(decoder, chunk(3, 0, bytes(8)))

    assert episode is not None
    assert [c.shape for c in episode.columns.values()] == [(2, 0), (2,), (2, 3, 0), (2,), (2, 0)]


@pytest.mark.parametrize(
    ("chunks", "reason"),
    [
        (
            [chunk(0, 0, bytes(4)), chunk(0, 5, bytes(4))],
            "obs: chunk of column 0 at byte 5, expected column 0 at byte 4",
        ),
        ([chunk(0, 4, bytes(4))], "obs: chunk of column 0 at byte 4, expected column 0 at byte 0"),
        ([chunk(0, 0, bytes(4)), chunk(0, 0, bytes(4))], "at byte 0, expected column 0 at byte 4"),
        ([chunk(1, 0, bytes(8))], "chunk of column 1 at byte 0, expected column 0"),
        (
            [chunk(0, 0, bytes(8)), chunk(0, 8, bytes(4))],
            "reward: chunk of column 0 at byte 8, expected column 1 at byte 0",
        ),
        ([chunk(-1, 0, bytes(8))], "chunk of column -1"),
        ([chunk(0, -4, bytes(8))], "at byte -4"),
        ([chunk(0, 0, bytes(9))], r"obs: chunks of 9 bytes, expected 8 for float32 of shape \(2,\)"),
        ([header(1, spec("obs"))], "another episode begins before the last one is complete"),
        (list(encode_load(small_episode())), "another episode begins before the last one is complete"),
        ([b"\x22\x05"], "cut off|bytes, but only"),
        ([b""], "0 parts"),
        ([chunk(0, 0, bytes(4)) + chunk(0, 4, bytes(4))], "2 parts"),
    ],
)
def test_broken_framing_is_fatal_and_names_the_episode(chunks: list[bytes], reason: str) -> None:
    decoder = LoadDecoder()
    feed_one(decoder, header(2, spec("obs"), spec("reward")))

    with pytest.raises(CodecError, match=reason) as raised:
        feed_all(decoder, chunks)

    assert raised.value.fatal and raised.value.key == KEY
    assert not decoder.in_progress


def test_chunk_without_a_header_is_fatal() -> None:
    decoder = LoadDecoder()
    feed_one(decoder, next(encode_load(small_episode())))

    with pytest.raises(CodecError, match="without a header") as raised:
        feed_one(decoder, chunk(0, 0, b""))

    assert raised.value.fatal and raised.value.key is None


def test_announced_bytes_are_those_of_the_episode_in_progress() -> None:
    episode = small_episode()
    first, *chunks = encode_load(episode, chunk_bytes=10)
    decoder = LoadDecoder()
    assert decoder.announced_bytes == 0

    for message in (first, *chunks[:-1]):
        feed_one(decoder, message)
        assert decoder.announced_bytes == episode.size_bytes
    feed_one(decoder, chunks[-1])

    assert decoder.announced_bytes == 0
    feed_one(decoder, first)
    with pytest.raises(CodecError):
        feed_one(decoder, b"")
    assert decoder.announced_bytes == 0


HUGE = 1 << 40


@pytest.mark.parametrize(
    ("bad_header", "error", "reason"),
    [
        (
            header(HUGE, spec("obs", 64)),
            OversizeError,
            f"episode of {HUGE * 256} bytes announced, expected at most {1 << 30}",
        ),
        (header((1 << 28) + 1, spec("obs")), OversizeError, "announced"),
        (header(1 << 62, spec("obs", 1 << 62)), OversizeError, "larger than any memory"),
        (header(0, spec("obs", 1 << 62)), OversizeError, "larger than any memory"),
        (header(2, spec("obs", *[1] * 16)), OversizeError, "obs: more than 15 dimensions"),
        (header(2, *[spec(f"c{i}") for i in range(257)]), OversizeError, "more than 256 columns"),
        (header(2, spec("n" * 257)), OversizeError, "257 characters"),
        (header(2, spec("obs" + ".x" * 9)), OversizeError, "obs.x.x.x.x.x.x.x.x.x: nested 9 levels deep, expected at most 8"),
        (header(-1, spec("obs")), CodecError, "length -1"),
        (header(2, spec("obs", -3)), CodecError, "obs: negative dimension"),
        (header(2, spec("obs"), spec("obs")), CodecError, "obs: column appears twice"),
        (header(2, spec("")), CodecError, "without a name"),
        (header(2, spec("obs", dtype=99)), CodecError, "obs: dtype number 99 is unknown"),
        (header(2, spec("obs")).replace(b"obs", b"ob\xff"), CodecError, "not valid UTF-8"),
        (header(2, spec("obs")).replace(b"\x0a\x03obs", b"\x0a\x7fobs"), CodecError, "bytes, but only"),
    ],
)
def test_refused_header_allocates_nothing_and_the_stream_goes_on(
    bad_header: bytes, error: type[CodecError], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = LoadDecoder()
    allocated: list[object] = []
    monkeypatch.setattr(chunks.np, "empty", lambda *args: allocated.append(args))

    with pytest.raises(error, match=reason) as raised:
        feed_one(decoder, bad_header)

    monkeypatch.undo()
    assert not allocated
    assert raised.value.key == KEY and not raised.value.fatal and not decoder.in_progress
    # Its chunks are skipped, whatever they are; the next episode is taken.
    assert feed_all(decoder, [chunk(0, 0, bytes(8)), chunk(7, 99, b"")]) == []
    assert same_episode(feed_all(decoder, encode_load(small_episode(), chunk_bytes=10))[0], small_episode())


def test_header_by_itself_allocates_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = LoadDecoder()
    allocated: list[object] = []
    monkeypatch.setattr(chunks.np, "empty", lambda *args: allocated.append(args))

    feed_one(decoder, header(1 << 28, spec("obs")))

    monkeypatch.undo()
    assert decoder.in_progress and not allocated


def test_malformed_chunk_refuses_its_episode_and_the_stream_goes_on() -> None:
    decoder = LoadDecoder()
    feed_one(decoder, header(2, spec("obs")))

    with pytest.raises(CodecError) as raised:
        feed_one(decoder, wire.len_field(4, b"\x1a\x7f"))

    assert raised.value.key == KEY and not raised.value.fatal
    assert feed_one(decoder, chunk(0, 4, bytes(4))) is None
    assert same_episode(feed_all(decoder, encode_load(small_episode()))[0], small_episode())


def test_error_of_a_malformed_whole_episode_has_its_key_and_the_stream_continues() -> None:
    decoder = LoadDecoder()
    bad = pb.Episode(key=pb.EpisodeKey(client_id="c", sequence=5), columns=[pb.Column(name="obs")])

    with pytest.raises(CodecError, match="obs: no tensor") as raised:
        feed_one(decoder, pb.LoadEpisodesRequest(episode=bad).SerializeToString())

    assert raised.value.key == EpisodeKey("c", 0, 5) and not raised.value.fatal
    assert same_episode(feed_all(decoder, encode_load(small_episode()))[0], small_episode())


def test_bool_column_in_chunks_accepts_only_0_and_1() -> None:
    decoder = LoadDecoder()
    feed_one(decoder, header(2, spec("done", dtype=pb.DTYPE_BOOL)))

    with pytest.raises(CodecError, match="done: byte 255 in a bool column") as raised:
        feed_one(decoder, chunk(0, 0, b"\x01\xff"))

    assert raised.value.key == KEY and not raised.value.fatal
    assert same_episode(feed_all(decoder, encode_load(small_episode()))[0], small_episode())


def test_limits_are_the_decoders_own() -> None:
    with pytest.raises(OversizeError, match="132 bytes announced, expected at most 131"):
        feed_all(LoadDecoder(CodecLimits(max_episode_bytes=131)), encode_load(small_episode(), chunk_bytes=10))

    assert len(feed_all(LoadDecoder(CodecLimits(max_episode_bytes=132)), encode_load(small_episode(), chunk_bytes=10))) == 1


@given(st.randoms(use_true_random=False), st.integers(1, 6))
def test_mutated_stream_gives_codec_errors_or_valid_episodes(rng: random.Random, changes: int) -> None:
    messages = [bytearray(m) for m in encode_load(small_episode(), chunk_bytes=rng.choice([9, 1000]))]
    for _ in range(changes):
        message = rng.choice(messages)
        if message:
            message[rng.randrange(len(message))] = rng.randrange(256)
        if rng.random() < 0.1:
            del message[rng.randrange(len(message) + 1) :]
    decoder = LoadDecoder(CodecLimits(max_episode_bytes=1 << 20))

    for message in messages:
        try:
            episode = feed_one(decoder, bytes(message))
        except CodecError as error:
            assert str(error)
        else:
            assert episode is None or episode.size_bytes <= 1 << 20
