"""Reading episodes back in process: which come, that they are whole, and what evictions and adds meanwhile do."""

from __future__ import annotations

import threading
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.codec_cases import arrays, bits
from support.durable_cases import MODES, durable_config, keyed_episode
from support.store_cases import make_config, plain_columns, traced, traced_columns
from touchline_protos.codec import Episode, EpisodeDecoder, EpisodeKey, StoredEpisode
from touchline_protos.v1 import replay_pb2 as pb
from touchline_server import InvalidArgumentError, ReplayBuffer, UnknownEpisodeError
from touchline_server.service.episode_framer import EpisodeFramer
from touchline_server.store import reader as reading_module
from touchline_server.store.reader import MAX_EPISODE_IDS, EpisodeQuery, EpisodeReader


def filled(capacity: int = 200, *, episodes: int = 10, **options: Any) -> ReplayBuffer:
    """Episodes of 5 to 14 rows whose number is their id, by three actors; every other one has a key."""
    buffer = ReplayBuffer(make_config(capacity, **options))
    for number in range(episodes):
        key = EpisodeKey("client", 1, number) if number % 2 else None
        buffer.add_episode(traced(number, 5 + number % 10, key=key, actor=f"actor-{number % 3}"))
    return buffer


def assert_traced(episode: StoredEpisode) -> None:
    """Everything about an episode is as it was added."""
    expected = traced_columns(episode.policy_version, episode.length)
    assert list(episode.columns) == list(expected)
    assert all(bits(episode.columns[name]) == bits(column) for name, column in expected.items())


def ids(episodes: Any) -> list[int]:
    return [episode.id for episode in episodes]


# What comes back is what was added


@st.composite
def schemas(draw: st.DrawFn) -> dict[str, np.ndarray]:
    """One row of each column: any dtype and shape, whose bits are repeated and varied by :func:`rows_of`."""
    row = {"obs": np.float32([1, 2]), "action": np.float64([3]), "reward": np.float32(4)}
    named = draw(st.dictionaries(st.sampled_from(["a", "b", "c.d", "c.e", "f"]), arrays(), max_size=5))
    return row | named


def rows_of(row: dict[str, np.ndarray], length: int, seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    columns = {}
    for name, value in row.items():
        shape, dtype = (length, *np.shape(value)), np.asarray(value).dtype.newbyteorder("<")
        raw = np.frombuffer(random.bytes(int(np.prod(shape, dtype=int)) * dtype.itemsize), np.uint8)
        columns[name] = np.ndarray(shape, dtype, (raw & 1 if dtype == np.bool_ else raw).tobytes())
    return columns


@given(schemas(), st.lists(st.integers(1, 12), min_size=1, max_size=8), st.integers(1, 40), st.sampled_from([1, 7, 64, 1 << 20]))
def test_episodes_of_any_schema_come_back_exactly_across_the_wrap_in_pieces_of_any_size(
    row: dict[str, np.ndarray], lengths: list[int], capacity: int, piece_bytes: int
) -> None:
    capacity = max(capacity, 4, *lengths)
    buffer = ReplayBuffer(make_config(capacity, storage={"allow_non_finite": True}))
    added = [rows_of(row, length, number) for number, length in enumerate(lengths)]
    for number, columns in enumerate(added):
        buffer.add_episode(Episode(columns, EpisodeKey("c", 2, number), f"actor-{number}", number))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading_module, "PIECE_BYTES", piece_bytes)
        found = list(buffer.episodes())

    assert ids(found) == buffer.store.entries()[:, 0].tolist()
    for episode in found:
        assert (episode.key, episode.actor) == (EpisodeKey("c", 2, episode.id), f"actor-{episode.id}")
        assert (episode.policy_version, episode.length) == (episode.id, lengths[episode.id])
        assert list(episode.columns) == list(added[episode.id])
        assert all(bits(episode.columns[name]) == bits(column) for name, column in added[episode.id].items())


def test_episodes_are_the_callers_own() -> None:
    buffer = filled()
    before = next(buffer.episodes(newest=1))

    for column in before.columns.values():
        column[...] = 0

    assert_traced(next(buffer.episodes(newest=1)))
    assert before.size_bytes == sum(column.nbytes for column in before.columns.values())


def test_episode_added_with_a_key_has_it_and_another_has_none() -> None:
    found = {episode.id: episode.key for episode in filled(60, episodes=20).episodes()}

    assert 0 < len(found) < 20
    assert found == {number: EpisodeKey("client", 1, number) if number % 2 else None for number in found}


@pytest.mark.parametrize("durability", MODES)
def test_keys_and_ids_outlive_a_restart_and_so_does_the_lineage(durability: str, tmp_path: Path) -> None:
    def read() -> tuple[list[tuple[int, EpisodeKey | None, str, dict[str, Any]]], int]:
        stored = [(e.id, e.key, e.actor, {name: bits(column) for name, column in e.columns.items()}) for e in buffer.episodes()]
        return stored, buffer.store.store_generation

    buffer = ReplayBuffer(durable_config(tmp_path / "data", durability=durability))
    for sequence in range(25):
        buffer.add_episode(keyed_episode(sequence % 2, sequence))
    before = read()
    buffer.close()

    buffer = ReplayBuffer(durable_config(tmp_path / "data", durability=durability))
    after = read()
    buffer.close()

    assert len(before[0]) < 25 and all(key is not None for _, key, _, _ in before[0])
    assert after == before


def test_lineage_of_two_buffers_in_memory_differs() -> None:
    assert ReplayBuffer(make_config()).store.store_generation != ReplayBuffer(make_config()).store.store_generation


# Which come


@given(st.data())
def test_selectors_choose_what_a_plain_list_would(data: st.DataObject) -> None:
    buffer = filled(data.draw(st.sampled_from([60, 200])), episodes=25)
    stored = [(int(entry[0]), f"actor-{int(entry[0]) % 3}") for entry in buffer.store.entries()]
    number = st.none() | st.integers(-3, 30)
    first, last = data.draw(number), data.draw(number)
    actor, newest = data.draw(st.sampled_from([None, "actor-0", "actor-2", "nobody"])), data.draw(st.none() | st.integers(1, 12))

    found = ids(buffer.episodes(first=first, last=last, actor=actor, newest=newest))

    expected = [
        number
        for number, name in stored
        if (first is None or number >= first) and (last is None or number <= last) and actor in (None, name)
    ]
    assert found == (expected if newest is None else expected[-newest:])


def test_many_episodes_of_a_rare_actor_are_found_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("touchline_server.store.index.SCAN_ENTRIES", 4)
    monkeypatch.setattr(reading_module, "AHEAD", 3)
    buffer = filled(600, episodes=60)

    assert ids(buffer.episodes(actor="actor-1")) == list(range(1, 60, 3))
    assert ids(buffer.episodes(actor="actor-1", newest=5)) == [46, 49, 52, 55, 58]


def test_ids_come_in_ascending_order_and_once() -> None:
    assert ids(filled().episodes(ids=[7, 2, 7, 5, 2])) == [2, 5, 7]
    assert ids(filled().episodes(ids=[])) == []
    assert ids(filled().episodes(ids=range(10, 100), skip_missing=True)) == []
    assert ids(filled().episodes(ids=[12, 3, -1], skip_missing=True)) == [3]


def test_ids_that_are_not_stored_are_named() -> None:
    with pytest.raises(UnknownEpisodeError, match=r"^ids: -1, 10 not stored, expected stored ones, or skip_missing"):
        filled().episodes(ids=[3, 10, -1])
    with pytest.raises(UnknownEpisodeError, match=r"^ids: 10, 11, 12, 13, 14, 15, 16, 17, 18, 19 and 5 more not stored"):
        filled().episodes(ids=range(25))
    with pytest.raises(UnknownEpisodeError, match=r"^ids: 0 not stored"):
        ReplayBuffer(make_config()).episodes(ids=[0])


def test_columns_are_chosen_by_name_and_by_group_in_the_schemas_order() -> None:
    buffer = filled()

    assert list(next(buffer.episodes(columns=["reward", "obs"])).columns) == ["obs.image", "obs.state", "reward"]
    assert list(next(buffer.episodes(columns=["obs.state"])).columns) == ["obs.state"]
    assert list(next(buffer.episodes(columns=[])).columns) == list(traced_columns(0, 1))
    assert bits(next(buffer.episodes(columns=["action"])).columns["action"]) == bits(traced_columns(0, 5)["action"])


def test_empty_buffer_has_no_episodes_whatever_is_asked_for() -> None:
    buffer = ReplayBuffer(make_config())

    assert list(buffer.episodes()) == list(buffer.episodes(newest=3, actor="x", columns=["nonsense"])) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"ids": [1], "first": 0}, "^ids and first: expected either"),
        ({"ids": [1], "newest": 2}, "^ids and newest: expected either"),
        ({"ids": [2**63]}, r"^ids\[0\]: "),
        ({"ids": range(MAX_EPISODE_IDS + 1)}, "^ids: 1000001, expected at most 1000000"),
        ({"newest": 0}, "^newest: 0, expected 1 or more"),
        ({"skip_missing": True}, "^skip_missing without ids"),
        ({"first": -(2**63) - 1}, "^first: "),
        ({"last": 2**63 - 1}, "^last: "),
        ({"columns": ["ob"]}, "^columns: 'ob', expected some of stamp, obs.image"),
        ({"columns": ["obs."]}, "^columns: 'obs.'"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        filled().episodes(**arguments)


# Meanwhile


def test_what_is_added_after_the_call_is_not_read() -> None:
    buffer = filled()
    episodes = buffer.episodes()
    first = next(episodes)

    buffer.add_episode(traced(10, 5))

    assert [first.id, *ids(episodes)] == list(range(10))


def test_what_is_evicted_meanwhile_is_left_out_and_the_rest_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading_module, "AHEAD", 4)
    buffer = filled(100, episodes=10)
    episodes = buffer.episodes()
    before = list(islice(episodes, 2))

    for number in range(10, 14):
        buffer.add_episode(traced(number, 12))
    left = set(buffer.store.entries()[:, 0].tolist())
    after = list(episodes)

    assert ids(before) == [0, 1]
    assert ids(after) == sorted(left & set(range(2, 10))) != list(range(2, 10))
    for episode in (*before, *after):
        assert_traced(episode)


def test_cleared_buffer_of_another_schema_ends_the_reading() -> None:
    buffer = filled()
    episodes = buffer.episodes()
    next(episodes)

    buffer.clear()
    buffer.add(plain_columns(8))

    assert list(episodes) == []
    assert list(next(buffer.episodes()).columns) == ["obs", "action", "reward"]


def frames_of(buffer: ReplayBuffer, *, max_frame_bytes: int = 4096, **query: Any) -> EpisodeFramer:
    return EpisodeFramer(EpisodeReader(buffer.store, EpisodeQuery(**query)), max_message_bytes=1 << 26, max_frame_bytes=max_frame_bytes)


def test_episode_evicted_between_two_chunks_is_taken_back() -> None:
    buffer = ReplayBuffer(make_config(1000))
    buffer.add_episode(traced(0, 900))
    frames, decoder = frames_of(buffer), EpisodeDecoder()
    kinds = []

    while (frame := frames.next()) is not None:
        assert decoder.feed(frame) == []
        kinds.append(pb.GetEpisodesResponse.FromString(frame).WhichOneof("part"))
        if len(kinds) == 5:
            buffer.add_episode(traced(1, 900))  # into the rows that were being read

    assert kinds == ["selection", "header", "chunk", "chunk", "chunk", "evicted"]
    assert not decoder.in_progress and decoder.seen_id == 0


def test_episode_evicted_between_two_pieces_is_left_out_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading_module, "PIECE_BYTES", 1000)
    buffer = ReplayBuffer(make_config(1000))
    buffer.add_episode(traced(0, 500))
    buffer.add_episode(traced(1, 400))
    copy, copies = EpisodeReader.copy, []

    def copy_and_add(*arguments: Any) -> bool:
        copies.append(copy(*arguments))
        if len(copies) == 3:
            buffer.add_episode(traced(2, 500))
        return copies[-1]

    monkeypatch.setattr(EpisodeReader, "copy", copy_and_add)
    (found,) = buffer.episodes()

    assert copies[:4] == [True, True, True, False] and all(copies[4:])
    assert found.id == 1
    assert_traced(found)


def test_groups_lose_what_was_evicted_since_it_was_located() -> None:
    buffer = filled(100, episodes=10)
    frames, decoder = frames_of(buffer, max_frame_bytes=1 << 16), EpisodeDecoder()
    decoder.feed(frames.next() or b"")
    entries = frames._reader.take(0)  # located, and so are those behind it
    assert [entry.episode_id for entry in entries] == [0]

    for number in range(10, 13):
        buffer.add_episode(traced(number, 14))
    left = [number for number in buffer.store.entries()[:, 0].tolist() if number < 10]
    found = decoder.feed(frames.next() or b"")

    assert 0 < len(left) < 9 and ids(found) == left
    for episode in found:
        assert_traced(episode)
    assert frames.next() is None


def test_frames_are_within_their_limit_and_small_episodes_share_one() -> None:
    buffer = filled(200, episodes=12)
    buffer.add_episode(traced(12, 90))

    for limit in (4096, 10_000, 1 << 20):
        frames, sizes, decoder, found = frames_of(buffer, max_frame_bytes=limit), [], EpisodeDecoder(), []
        while (frame := frames.next()) is not None:
            sizes.append(len(frame))
            found += decoder.feed(frame)
        assert max(sizes) <= limit
        assert ids(found) == list(range(13))
        for episode in found:
            assert_traced(episode)
    assert len(sizes) == 2  # the selection and all of them


def test_frame_limit_below_the_smallest_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match=r"^max_frame_bytes: 4095, expected 0 or at least 4096"):
        frames_of(filled(), max_frame_bytes=4095)


def test_suspended_reading_blocks_no_one() -> None:
    buffer = filled(100)
    episodes = buffer.episodes()
    next(episodes)

    adder = threading.Thread(target=lambda: [buffer.add_episode(traced(number, 20)) for number in range(10, 30)], daemon=True)
    adder.start()
    adder.join(60)

    assert not adder.is_alive()
    assert list(episodes) == []


@pytest.mark.parametrize("piece_bytes", [256, 1 << 20])
def test_episodes_read_while_others_are_added_are_whole(piece_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading_module, "PIECE_BYTES", piece_bytes)
    buffer = filled(300)
    done = threading.Event()
    added = []

    def add() -> None:
        number = 10
        while not done.is_set() and number < 20_000:
            added.append(buffer.add_episode(traced(number, 5 + number % 40)).episode_id)
            number += 1

    adder = threading.Thread(target=add)
    adder.start()
    read = passes = 0
    try:
        while passes < 60 or (len(added) <= 60 and adder.is_alive()):
            passes += 1
            previous = -1
            for episode in buffer.episodes():
                assert episode.id == episode.policy_version > previous
                assert_traced(episode)
                previous = episode.id
                read += 1
    finally:
        done.set()
        adder.join()

    assert read > 60 and len(added) > 60
