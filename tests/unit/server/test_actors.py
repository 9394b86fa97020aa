"""Names of actors and clients: kept for as long as episodes have them, bounded in bytes, never another's."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.service_calls import Caller, eventually, key, make_config, make_episode, refused, serving
from touchline import EpisodeWriter, ReplayClient
from touchline_server.errors import InvalidEpisodeError, OverLimitError
from touchline_server.store import actors
from touchline_server.store.actors import NameTable
from touchline_server.store.episode_store import EpisodeStore


@pytest.fixture
def store() -> EpisodeStore:
    return EpisodeStore(make_config())


def room_for(monkeypatch: pytest.MonkeyPatch, names: int, *, like: str) -> None:
    monkeypatch.setattr(actors, "MAX_NAME_BYTES", names * actors._cost(like))


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.booleans()), max_size=80))
def test_table_against_a_plain_list(steps: list[tuple[str, bool]]) -> None:
    table, stored, ever = NameTable("actor names"), [], {}
    for name, add in steps:
        if add or not stored:
            number = table.hold(name)
            assert ever.setdefault(number, name) == name, "a number stands for one name only"
            stored.append(number)
        else:
            table.release(stored.pop(0))
        assert {number: table.name(number) for number in set(stored)} == {number: ever[number] for number in stored}
        assert len(table) == len(set(stored))
        assert all(table.find(name) == next((one for one in stored if ever[one] == name), None) for name in "abcdef")
        assert table.size_bytes == sum(actors._cost(ever[number]) for number in set(stored))


def test_names_of_evicted_episodes_are_forgotten(store: EpisodeStore) -> None:
    for number in range(500):
        store.add(make_episode(20, actor=f"actor {number}", key=key(0, client_id=f"client {number}")))

    stored = store.counts().episodes_stored
    assert stored == 100
    assert len(store.actors) == len(store._ring.index._clients) == stored
    assert {store.actor_name(int(entry[3])) for entry in store.entries()} == {f"actor {number}" for number in range(400, 500)}


def test_clear_gives_the_memory_of_names_back(store: EpisodeStore) -> None:
    store.add(make_episode(2, actor="first"))
    store.clear()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for number in range(900):
            name = f"{number:04d}" + "\U0001f916" * 124
            store.add(make_episode(2, actor=name, key=key(0, client_id=name)))
        filled = tracemalloc.get_traced_memory()[0] - before
        store.clear()
        left = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()

    assert filled > 900 * 2 * 500
    # The keys outlive their episodes: a sender's name takes 16 bytes there, however long its id is.
    assert left < 900 * 600
    assert len(store.actors) == 0


def test_new_name_beyond_the_limit_is_refused_and_accepted_after_an_eviction(store: EpisodeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    room_for(monkeypatch, 3, like="actor 0")
    for number in range(3):
        store.add(make_episode(20, actor=f"actor {number}"))

    with pytest.raises(OverLimitError, match="actor names: the 3 different ones") as refusal:
        store.add(make_episode(20, actor="actor 3"))

    assert refusal.value.retry_after_s
    assert store.counts().episodes_refused == 0
    for number in range(98):  # the others go on, and evict the first one's
        store.add(make_episode(20, actor=f"actor {1 + number % 2}"))
    assert not store.add(make_episode(20, actor="actor 3")).duplicate
    store.clear()
    for number in range(3):
        store.add(make_episode(20, actor=f"anew {number}"))


def test_limit_of_client_ids_is_a_limit_too(store: EpisodeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    room_for(monkeypatch, 3, like="client 0")
    for number in range(3):
        store.add(make_episode(20, key=key(0, client_id=f"client {number}")))

    with pytest.raises(OverLimitError, match="client ids"):
        store.add(make_episode(20, key=key(0, client_id="client 3")))


@pytest.mark.parametrize("data_dir", [False, True])
def test_writer_at_the_limit_of_names_waits_and_is_stored_after_a_clear(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object, data_dir: bool
) -> None:
    room_for(monkeypatch, 1, like="keeper")
    storage = {"device": "cpu", "data_dir": str(tmp_path)} if data_dir else {"device": "cpu"}
    with serving(storage=storage) as (server, caller), ReplayClient(server.address, client_id="keeper", actor="keeper") as client:
        client.add(dict(make_episode().columns))
        refusal = refused(caller.add, make_episode(actor="winger"))
        assert (refusal.reason, refusal.retry_after_ms) == ("over-limit", "1000")
        assert caller.counts().episodes_refused == 0

        writer = EpisodeWriter(client, actor="winger")
        zeros = {"obs": np.zeros(4, np.float32), "action": np.zeros(2, np.float32), "reward": np.float32(0)}
        for row in range(20):
            writer.append(zeros if row else {"obs": zeros["obs"]})
        writer.end_episode()
        client.clear()
        writer.close()

        assert caller.counts().episodes_stored == 1
        assert [episode.actor for episode in client.episodes()] == ["winger"]


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31m", "\x7f", "a\u2028b", "\u202egnp.exe"])
def test_name_that_could_forge_a_line_is_refused_by_the_server(name: str) -> None:
    with serving() as (_, caller):
        for episode in (make_episode(actor=name), make_episode(key=key(0, client_id=name))):
            refusal = refused(caller.add, episode)

            assert refusal.reason == "invalid-episode"
            assert "U+" in refusal.details
            assert refusal.details.isprintable()


def test_name_with_a_line_break_is_refused_in_process(store: EpisodeStore) -> None:
    with pytest.raises(InvalidEpisodeError, match=r"actor: a control character \(U\+000A\) at position 1"):
        store.add(make_episode(actor="a\nb"))


def test_streams_tell_the_right_name_while_names_come_and_go() -> None:
    with serving() as (server, caller), Caller(server.address) as other:
        caller.add(make_episode(actor="0"))
        stream = caller.stream().open(credits=1)
        seen = 0
        for number in range(1, 600):
            # A name in two comes back after its number was forgotten.
            other.add(make_episode(20, policy_version=number, actor=str(number % 250)))
            if number % 10 == 0:
                (batch,) = stream.read(1)
                stream.grant(1)
                for actor, version in zip(batch.actor.tolist(), batch.policy_version.tolist(), strict=True):
                    assert batch.actor_names[actor] == str(version % 250)
                    seen += 1
        assert seen > 400
        known = server.buffer.store.actors
        assert len(known) == server.buffer.store.counts().episodes_stored
        stream.close()
        eventually(lambda: stream.rest() is not None, "the stream ends")


def test_in_process_batch_keeps_its_names_after_they_are_forgotten() -> None:
    with serving() as (server, _):
        buffer = server.buffer
        buffer.add_episode(make_episode(actor="first"))
        batch = buffer.sample()
        for number in range(200):
            buffer.add_episode(make_episode(actor=f"actor {number}"))

        assert {batch.actor_names[int(number)] for number in batch.actor} == {"first"}
