"""A refused add counts once, on the server and on the client, on every path and however often it is tried."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from support.service_calls import make_config
from touchline import EpisodeKey, EpisodeWriter, ReplayClient, TouchlineError, UnacknowledgedError
from touchline_server import InvalidEpisodeError, ReplayBuffer
from touchline_server.service.app import ServerThread
from touchline_server.store.refused_episodes import MAX_REMEMBERED, RefusedEpisodes


def make_episode(value: float = 0.0, *, obs: int = 2, rows: int = 10) -> dict[str, Any]:
    return {
        "obs": np.full((rows, obs), value, np.float32),
        "action": np.zeros((rows, 1), np.float32),
        "reward": np.zeros(rows, np.float32),
    }


@pytest.fixture
def server() -> Iterator[ServerThread]:
    with ServerThread(make_config()) as server:
        server.buffer.add(make_episode())
        yield server


def write(client: ReplayClient, episodes: list[dict[str, Any]]) -> None:
    """Episodes that are sent together; the writer also counts the refused ones."""
    writer = EpisodeWriter(client)
    for episode in episodes:
        for row in range(len(episode["reward"])):
            writer.append({name: column[row] for name, column in episode.items()})
        writer.end_episode()
    with pytest.raises(UnacknowledgedError) as caught:
        writer.close(60)
    assert len(caught.value.results) == writer.counters.refused == 1


WAYS: dict[str, Callable[[ReplayClient, dict[str, Any]], Any]] = {
    "add": lambda client, bad: client.add(bad),
    "add again under its key": lambda client, bad: [_try(client, bad, EpisodeKey("c", 1, 1)) for _ in range(4)],
    "load": lambda client, bad: client.load([make_episode(1), bad, make_episode(2)]),
    "writer": lambda client, bad: write(client, [make_episode(1), bad, make_episode(2)]),
}


def _try(client: ReplayClient, episode: dict[str, Any], key: EpisodeKey) -> None:
    with suppress(TouchlineError):
        client.add(episode, key=key)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bad", [make_episode(obs=3), make_episode(float("nan"))], ids=["schema", "not finite"])
def test_episode_that_is_refused_counts_once(way: str, bad: dict[str, Any], server: ServerThread) -> None:
    with ReplayClient(server.address) as client, suppress(TouchlineError):
        WAYS[way](client, bad)

    assert server.buffer.counts().episodes_refused == 1


def test_other_episode_under_a_key_that_was_refused_counts_for_itself(server: ServerThread) -> None:
    key = EpisodeKey("c", 1, 1)
    with ReplayClient(server.address) as client:
        client.add(make_episode(5), key=key)
        for value in (6, 6, 7, 7, 7):
            _try(client, make_episode(value), key)

    assert server.buffer.counts().episodes_refused == 2


def test_episodes_without_a_key_count_each(server: ServerThread) -> None:
    buffer: ReplayBuffer = server.buffer
    for _ in range(3):
        with suppress(InvalidEpisodeError):
            buffer.add(make_episode(obs=3))

    assert buffer.counts().episodes_refused == 3


def test_remembered_refusals_are_bounded() -> None:
    refused = RefusedEpisodes()
    for number in range(MAX_REMEMBERED + 10):
        assert refused.is_new((EpisodeKey("c", 1, number), 0))

    assert len(refused._known) == MAX_REMEMBERED
    assert not refused.is_new((EpisodeKey("c", 1, MAX_REMEMBERED), 0))
    assert refused.is_new((EpisodeKey("c", 1, 0), 0))
