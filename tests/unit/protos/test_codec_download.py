"""GetEpisodesResponse: groups, announced episodes, and what a broken stream meets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.codec_cases import bits, episodes, from_proto, same_episode, small_episode
from touchline_protos.codec import CodecError, Episode, EpisodeDecoder, EpisodeSelection, StoredEpisode
from touchline_protos.codec.chunks import chunk_message
from touchline_protos.codec.download import EpisodeOutline, encode_evicted, encode_selection, encode_stored_header, group_message
from touchline_protos.codec.episodes import column_spec
from touchline_protos.v1 import replay_pb2 as pb

SELECTION = EpisodeSelection(3, 1 << 40, 12, 345, 1 << 61)


def outline(number: int, episode: Episode) -> EpisodeOutline:
    specs = [column_spec(name, column) for name, column in episode.columns.items()]
    return EpisodeOutline(number, Episode({}, episode.key, episode.actor, episode.policy_version), specs)


def flat(column: np.ndarray) -> np.ndarray:
    return np.frombuffer(bits(column)[2], np.uint8)


def group(*numbered: tuple[int, Episode]) -> bytes:
    message, outs = group_message([outline(number, episode) for number, episode in numbered])
    for (_, episode), arrays in zip(numbered, outs, strict=True):
        for column, out in zip(episode.columns.values(), arrays, strict=True):
            out[:] = flat(column)
    return message


def announced(number: int, episode: Episode, piece: int) -> list[bytes]:
    messages = [encode_stored_header(outline(number, episode), episode.length)]
    for index, column in enumerate(episode.columns.values()):
        data = flat(column)
        for offset in range(0, data.size, piece):
            message, out = chunk_message(index, offset, len(data[offset : offset + piece]))
            out[:] = data[offset : offset + piece]
            messages.append(message)
    return messages


def with_rows(episode: Episode, rows: int) -> Episode:
    columns = {name: np.stack([column] * rows) for name, column in episode.columns.items()}
    return Episode(columns, episode.key, episode.actor, episode.policy_version)


def started() -> EpisodeDecoder:
    decoder = EpisodeDecoder()
    assert decoder.feed(encode_selection(SELECTION)) == []
    return decoder


def feed_all(decoder: EpisodeDecoder, messages: Sequence[bytes]) -> list[StoredEpisode]:
    return [episode for message in messages for episode in decoder.feed(message)]


def same(found: StoredEpisode, number: int, episode: Episode) -> bool:
    return (found.id, found.length) == (number, episode.length) and same_episode(
        Episode(found.columns, found.key, found.actor, found.policy_version), episode
    )


@given(st.lists(episodes(), max_size=4), st.integers(1, 3), st.integers(1, 64))
def test_episodes_arrive_the_same_whole_and_in_pieces(given_episodes: list[Episode], rows: int, piece: int) -> None:
    stored = [(7 * number, with_rows(episode, rows)) for number, episode in enumerate(given_episodes) if episode.columns]

    together = feed_all(started(), [group(*stored)])
    apart = feed_all(started(), [message for number, episode in stored for message in announced(number, episode, piece)])

    assert len(together) == len(apart) == len(stored)
    assert all(same(found, *wanted) for found, wanted in zip(together, stored, strict=True))
    assert all(same(found, *wanted) for found, wanted in zip(apart, stored, strict=True))


@given(episodes(), episodes())
def test_messages_are_read_by_the_generated_class(one: Episode, other: Episode) -> None:
    one, other = with_rows(one, 2), with_rows(other, 2)

    response = pb.GetEpisodesResponse.FromString(group((0, one), (5, other)))
    header = pb.GetEpisodesResponse.FromString(encode_stored_header(outline(9, one), 2)).header

    assert [stored.episode_id for stored in response.group.episodes] == [0, 5]
    assert same_episode(from_proto(response.group.episodes[0].episode), one)
    assert same_episode(from_proto(response.group.episodes[1].episode), other)
    assert (header.episode_id, header.header.length, header.header.actor) == (9, 2, one.actor)
    assert [column.name for column in header.header.columns] == list(one.columns)


@given(st.tuples(*[st.integers(-(1 << 63), (1 << 63) - 1)] * 5))
def test_selection_arrives_the_same_and_is_the_generated_class_s(values: tuple[int, ...]) -> None:
    selection = EpisodeSelection(*values)
    decoder = EpisodeDecoder()

    decoder.feed(encode_selection(selection))
    by_class = pb.GetEpisodesResponse.FromString(encode_selection(selection)).selection

    assert decoder.selection == selection
    assert tuple(getattr(by_class, field.name) for field in by_class.DESCRIPTOR.fields) == values


def test_arrays_are_writable_and_of_their_own_memory() -> None:
    found = feed_all(started(), [group((1, small_episode())), *announced(2, small_episode(), 8)])

    assert all(column.flags.writeable and column.flags.owndata for episode in found for column in episode.columns.values())


def test_evicted_episode_is_forgotten_and_the_next_one_read() -> None:
    decoder = started()
    messages = announced(4, small_episode(), 8)

    found = feed_all(decoder, [*messages[:-1], encode_evicted(4), group((6, small_episode()))])

    assert [episode.id for episode in found] == [6]
    assert decoder.seen_id == 6 and not decoder.in_progress


BROKEN: dict[str, tuple[list[bytes], str]] = {
    "nothing": ([b""], "0 parts"),
    "two parts": ([group((1, small_episode())) + encode_evicted(1)], "2 parts"),
    "a second selection": ([encode_selection(SELECTION)], "selection comes first"),
    "a chunk without a header": ([announced(1, small_episode(), 8)[1]], "without a header"),
    "an eviction of nothing": ([encode_evicted(1)], "episode 1 is withdrawn"),
    "an eviction of another": ([announced(1, small_episode(), 8)[0], encode_evicted(2)], "episode 2 is withdrawn"),
    "a group within an episode": ([announced(1, small_episode(), 8)[0], group((2, small_episode()))], "before the last one is complete"),
    "a gap": ([announced(1, small_episode(), 8)[0], announced(1, small_episode(), 8)[2]], "chunk of column 0 at byte 8"),
    "ids that go back": ([group((2, small_episode()), (1, small_episode()))], "episode 1 after 2"),
    "an id twice": ([group((2, small_episode())), *announced(2, small_episode(), 8)], "episode 2 after 2"),
    "no content": (
        [pb.GetEpisodesResponse(group=pb.EpisodeGroup(episodes=[pb.StoredEpisode(episode_id=3)])).SerializeToString()],
        "without",
    ),
    "columns of different rows": ([group((1, Episode({"obs": np.zeros((4, 3)), "reward": np.zeros(5)})))], r"reward: shape \(5,\)"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_stream_that_is_broken_is_refused(name: str) -> None:
    messages, words = BROKEN[name]

    with pytest.raises(CodecError, match=words):
        feed_all(started(), messages)


def test_stream_that_begins_without_a_selection_is_refused() -> None:
    with pytest.raises(CodecError, match="selection comes first"):
        EpisodeDecoder().feed(group((1, small_episode())))


@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_are_read_or_refused(data: bytes, selected: bool) -> None:
    decoder = started() if selected else EpisodeDecoder()

    try:
        decoder.feed(data)
    except CodecError:
        return
    assert decoder.selection is not None
