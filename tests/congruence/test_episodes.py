"""Episodes read back in process and over the wire are the same, and are what was added."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.codec_cases import bits
from support.store_cases import make_config, traced
from touchline import InvalidArgumentError, ReplayClient, StoredEpisode
from touchline_protos.codec import Episode, EpisodeKey
from touchline_protos.types.dtypes import DType, to_numpy
from touchline_server import Config, ReplayBuffer
from touchline_server import errors as server_errors
from touchline_server.service.app import ServerThread

EPISODES = 24
CAPACITY = 260_000


def columns_of(number: int) -> dict[str, np.ndarray]:
    """Random bits of every dtype; every seventh episode is larger than a frame."""
    length = 60_000 if number % 7 == 6 else 3 + number
    random = np.random.default_rng(number)
    columns = {
        "obs.state": random.standard_normal((length, 5), dtype=np.float32),
        "obs.empty": np.empty((length, 0), np.float32),
        "action": random.standard_normal((length, 2)),
        "reward": random.standard_normal(length, dtype=np.float32),
    }
    for wire in DType:
        dtype = to_numpy(wire)
        raw = np.frombuffer(random.bytes(length * dtype.itemsize), np.uint8)
        columns[wire.name.lower()] = np.frombuffer((raw & 1 if dtype == np.bool_ else raw).tobytes(), dtype)
    return columns


def facts(episode: StoredEpisode) -> tuple[Any, ...]:
    """Returns everything that identifies an episode and its content."""
    assert all(column.flags.writeable and column.flags.c_contiguous for column in episode.columns.values())
    columns = [(name, bits(column)) for name, column in episode.columns.items()]
    return episode.id, episode.key, episode.actor, episode.policy_version, episode.length, columns


def all_facts(episodes: Iterable[StoredEpisode]) -> list[tuple[Any, ...]]:
    return [facts(episode) for episode in episodes]


@pytest.fixture(scope="module", params=["cpu", "disk"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A buffer and a client of its server; the first episodes are evicted, and one wraps around the ring's end."""
    storage = {"device": request.param, "allow_non_finite": True, "scratch_dir": str(tmp_path_factory.mktemp("scratch"))}
    buffer = ReplayBuffer(Config(config={"buffer_size": CAPACITY, "min_history": 0}, storage=storage, server={"port": 0}))
    for number in range(EPISODES):
        key = EpisodeKey("sender", -5, number) if number % 3 else None
        buffer.add_episode(Episode(columns_of(number), key, f"actor-{number % 4}", number * 10**15))
    with ServerThread(buffer.config, buffer) as server, ReplayClient(server.address) as client:
        yield buffer, client


def test_episodes_are_what_was_added_on_either_way(both: tuple[ReplayBuffer, ReplayClient]) -> None:
    buffer, client = both
    stored = buffer.store.entries()[:, 0].tolist()

    expected = [
        (
            number,
            EpisodeKey("sender", -5, number) if number % 3 else None,
            f"actor-{number % 4}",
            number * 10**15,
            len(columns_of(number)["reward"]),
            [(name, bits(column)) for name, column in columns_of(number).items()],
        )
        for number in stored
    ]

    assert all_facts(buffer.episodes()) == expected
    assert all_facts(client.episodes()) == expected


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_queries_are_answered_alike(both: tuple[ReplayBuffer, ReplayClient], data: st.DataObject) -> None:
    buffer, client = both
    numbers = st.none() | st.integers(-2, EPISODES + 2)
    names = ["obs", "obs.empty", "action", "reward", "bool", "bfloat16", "float"]
    query: dict[str, Any] = {"columns": data.draw(st.none() | st.lists(st.sampled_from(names), max_size=3))}
    if data.draw(st.booleans()):
        query |= {"ids": data.draw(st.lists(st.integers(-2, EPISODES + 2), max_size=8)), "skip_missing": data.draw(st.booleans())}
    else:
        query |= {"first": data.draw(numbers), "last": data.draw(numbers)}
        query |= {"actor": data.draw(st.sampled_from([None, "actor-1", "nobody"])), "newest": data.draw(st.none() | st.integers(1, 9))}

    try:
        expected = all_facts(buffer.episodes(**query))
    except server_errors.InvalidArgumentError as error:
        # An empty list of ids is answered without the server, so no column is refused as unknown.
        if query.get("ids") == []:
            return
        with pytest.raises(InvalidArgumentError) as refusal:
            list(client.episodes(**query))
        assert str(refusal.value) == str(error)
        return

    episodes = client.episodes(**query)
    assert (episodes.total, episodes.total_steps) == (len(expected), sum(length for *_, length, _ in expected))
    assert all_facts(episodes) == expected


def test_column_without_a_byte_is_read_of_every_episode(both: tuple[ReplayBuffer, ReplayClient]) -> None:
    buffer, client = both

    expected = [(int(entry[0]), (int(entry[2]), 0)) for entry in buffer.store.entries()]

    for episodes in (buffer.episodes(columns=["obs.empty"]), client.episodes(columns=["obs.empty"])):
        assert [(episode.id, episode.columns["obs.empty"].shape) for episode in episodes] == expected


def test_read_episodes_added_again_are_the_same_episodes(both: tuple[ReplayBuffer, ReplayClient], tmp_path: Path) -> None:
    buffer, client = both
    tables = buffer.config.model_dump()
    copy = ReplayBuffer(Config(**tables | {"storage": tables["storage"] | {"scratch_dir": str(tmp_path)}}))

    for episode in client.episodes():
        copy.add(episode.columns, actor=episode.actor, policy_version=episode.policy_version, key=episode.key)

    without_ids = [fact[1:] for fact in all_facts(copy.episodes())]
    assert without_ids == [fact[1:] for fact in all_facts(client.episodes())]


@pytest.mark.parametrize("limit", [1 << 16, 1 << 26])
def test_client_with_a_small_message_limit_reads_big_episodes(limit: int) -> None:
    buffer = ReplayBuffer(make_config(8_000))
    config = Config(**(buffer.config.model_dump() | {"server": {"port": 0}}))
    with ServerThread(config, buffer) as server, ReplayClient(server.address, max_message_bytes=limit) as client:
        for number in range(5):
            buffer.add_episode(traced(number, 40 + 1900 * (number % 2)))
        assert all_facts(client.episodes()) == all_facts(buffer.episodes())
