"""Actors and learners for fault tests, on the real client: episodes that follow from their key go out by EpisodeWriter, and every batch
that comes in is compared with them.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from support.durable_cases import assert_whole, client_of, contents, durable_config, keyed_episode
from touchline import EpisodeWriter, ReplayClient, UnacknowledgedError
from touchline_protos import Batch
from touchline_protos.codec import Episode
from touchline_server import ReplayBuffer

WAIT_S = 120.0
"""The longest wait for anything."""


class Players:
    """Some actors, each with a client and a writer of its own. A context manager.

    Args:
        address: the server's address.
        count: number of actors.
        timeout_s: the deadline of their calls.
        spool_dir: folder for the spools, one for each actor; None keeps episodes in memory.
    """

    def __init__(self, address: str, *, count: int = 4, timeout_s: float = 30.0, spool_dir: Path | None = None) -> None:
        self._clients = [ReplayClient(address, timeout_s=timeout_s) for _ in range(count)]
        self.writers = [
            EpisodeWriter(
                client,
                actor=f"actor-{number}",
                max_pending=10_000,
                spool_dir=None if spool_dir is None else spool_dir / str(number),
            )
            for number, client in enumerate(self._clients)
        ]
        self._pool = ThreadPoolExecutor(count)
        self.played = 0
        """Episodes that each actor has played."""

    def play(self, episodes: int) -> None:
        """Makes every actor play ``episodes`` more, without waiting until they are sent."""
        numbers = range(self.played, self.played + episodes)
        self.played += episodes
        list(self._pool.map(lambda actor: self._play(actor, numbers), range(len(self.writers))))

    def flush_all(self) -> None:
        """Waits until every episode is acknowledged."""
        list(self._pool.map(lambda writer: writer.flush(WAIT_S), self.writers))

    def pending_errors(self, timeout_s: float) -> list[Exception]:
        """Waits ``timeout_s``; returns one error for each episode that is still unacknowledged then."""
        errors: list[Exception] = []
        for found in self._pool.map(lambda writer: _why_unacknowledged(writer, timeout_s), self.writers):
            errors += found
        return errors

    @property
    def everything(self) -> set[tuple[str, int]]:
        """Actor and number of every episode played."""
        return {(f"actor-{actor}", number) for actor in range(len(self.writers)) for number in range(self.played)}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for client in self._clients:
            client.close()  # what is not acknowledged counts as refused, so that the writers end
        for writer in self.writers:
            if kind is None:
                writer.close(WAIT_S)
        self._pool.shutdown()

    def _play(self, actor: int, numbers: range) -> None:
        writer = self.writers[actor]
        for number in numbers:
            episode = keyed_episode(actor, number)
            writer.policy_version = number
            for row in range(episode.length):
                writer.append({name: column[row] for name, column in episode.columns.items()})
            assert writer.end_episode() is not None


def _why_unacknowledged(writer: EpisodeWriter, timeout_s: float) -> list[Exception]:
    try:
        writer.flush(timeout_s)
    except UnacknowledgedError as error:
        return [result.error for result in error.results if result.error is not None]
    return []


class Learner:
    """Reads a stream of batches in a thread of its own and compares each with the episodes. A context manager."""

    def __init__(self, address: str, *, ring: bool = False, **options: Any) -> None:
        self._client = ReplayClient(address, as_numpy=True)
        self._stream = self._client.batches(ring=ring, **options)
        self._news = threading.Condition()
        self._fault: BaseException | None = None
        self._thread = threading.Thread(target=self._learn, daemon=True)
        self.batches = 0
        """Batches that were read and found right."""

    def wait_for(self, more: int) -> None:
        """Waits for ``more`` further batches."""
        with self._news:
            wanted = self.batches + more
            assert self._news.wait_for(lambda: self._fault is not None or self.batches >= wanted, WAIT_S), f"{self.batches} of {wanted}"
            self._complain()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stream.close()
        self._thread.join(WAIT_S)
        self._client.close()
        if kind is None:
            self._complain()

    def _complain(self) -> None:
        """Raises what ended the thread, once."""
        fault, self._fault = self._fault, None
        if fault is not None:
            raise fault

    def _learn(self) -> None:
        try:
            for batch in self._stream:
                assert_right(batch)
                with self._news:
                    self.batches += 1
                    self._news.notify_all()
        except BaseException as fault:
            with self._news:
                self._fault = fault
                self._news.notify_all()


@lru_cache(maxsize=4096)
def _known(client: int, sequence: int) -> Episode:
    return keyed_episode(client, sequence)


def assert_right(batch: Batch) -> None:
    """Asserts that every slice of a batch is, bit for bit, the piece of the episode that its provenance names."""
    for index in range(len(batch.start)):
        name, number, start = batch.actor_names[int(batch.actor[index])], int(batch.policy_version[index]), int(batch.start[index])
        columns, end = _known(client_of(name), number).columns, start + len(batch.reward) + 1
        expected = {
            "image": (columns["obs.image"][start:end], batch.obs["image"][:, index]),
            "state": (columns["obs.state"][start:end], batch.obs["state"][:, index]),
            "action": (columns["action"][start + 1 : end], batch.action[:, index]),
            "reward": (columns["reward"][start + 1 : end], batch.reward[:, index, 0]),
        }
        for column, (stored, found) in expected.items():
            assert (found.dtype, found.shape) == (stored.dtype, stored.shape), (name, number, column)
            assert found.tobytes() == stored.tobytes(), (name, number, start, column)
        assert not np.asarray(batch.done).any()


def assert_stored_once(data_dir: Path, expected: set[tuple[str, int]]) -> None:
    """Asserts that the folder of a server that has ended holds exactly these episodes, each once and bit for bit."""
    buffer = ReplayBuffer(durable_config(data_dir, capacity=1_000_000))
    try:
        found = contents(buffer)
    finally:
        buffer.close()
    assert_whole(found)
    assert {(actor, number) for actor, number, _ in found.values()} == expected
