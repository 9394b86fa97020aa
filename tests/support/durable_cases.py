"""Durable buffers for tests, filled with episodes that follow from their key, so that each can be verified as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from support.store_cases import as_bits, read_episode
from touchline_protos.codec import Episode, EpisodeKey
from touchline_server import Config, ReplayBuffer
from touchline_server.durability.database import Database
from touchline_server.durability.restore import episode_rows

MODES = ("sync", "batch", "memory")


def durable_config(data_dir: Path, *, capacity: int = 400, durability: str = "batch", **tables: dict[str, Any]) -> Config:
    """Returns the configuration of a small host buffer that stores its episodes in a folder."""
    return Config(
        config={"buffer_size": capacity, "batch_size": 8, "min_history": 0, "horizon": 3},
        storage={"device": "cpu", "data_dir": str(data_dir), "durability": durability} | tables.get("storage", {}),
        sampling=tables.get("sampling", {}),
        server={"port": 0},
    )


def keyed_episode(client: int, sequence: int, *, incarnation: int = 1) -> Episode:
    """Returns an episode of 10 to 49 rows, with client and sequence number in its provenance as well."""
    rng = np.random.default_rng([client, incarnation, sequence])
    length = int(rng.integers(10, 50))
    columns = {
        "obs.image": rng.integers(0, 256, (length, 8, 8), dtype=np.uint8),
        "obs.state": rng.standard_normal((length, 17), dtype=np.float32),
        "action": rng.standard_normal((length, 3)),
        "reward": rng.standard_normal(length, dtype=np.float32),
    }
    columns["action"][0] = np.nan
    return Episode(columns, key=EpisodeKey(f"client-{client}", incarnation, sequence), actor=f"actor-{client}", policy_version=sequence)


def client_of(actor: str) -> int:
    """Returns the number of the client in an actor's name."""
    return int(actor.removeprefix("actor-"))


def contents(buffer: ReplayBuffer) -> dict[int, tuple[str, int, dict[str, Any]]]:
    """Returns every episode in a buffer's ring by id: actor, policy version and the bits of its columns."""
    return {
        int(entry[0]): (
            buffer.store.actor_name(int(entry[3])),
            int(entry[4]),
            {name: as_bits(column) for name, column in read_episode(buffer.store, entry).items()},
        )
        for entry in buffer.store.entries()
    }


def bits(episode: Episode) -> dict[str, Any]:
    """Returns the bits of an episode's columns."""
    return {name: as_bits(column) for name, column in episode.columns.items()}


def assert_whole(found: dict[int, tuple[str, int, dict[str, Any]]]) -> None:
    """Asserts that every episode is the one that its provenance names, bit for bit, and that none is stored twice."""
    assert len({(actor, sequence) for actor, sequence, _ in found.values()}) == len(found)
    for actor, sequence, columns in found.values():
        assert columns == bits(keyed_episode(client_of(actor), sequence)), (actor, sequence)


def stored_keys(database: Path) -> dict[int, EpisodeKey | None]:
    """Returns the key of each episode in a database file, by id."""
    opened = Database(database)
    try:
        return {row.id: row.key for row in episode_rows(opened.connection, database)}
    finally:
        opened.close()
