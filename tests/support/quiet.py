"""Connections of every kind that stay open with little or no traffic, and a check that none was interrupted."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import grpc
import numpy as np

from touchline import EpisodeWriter, ReplayClient

ROWS = 50_000
EPISODES = 16
"""Episodes on the server: more than gRPC reads ahead, so that a pausing reader holds the server's answer up."""
PAUSE_S = 0.1
"""Pause between two batches of a learner that keeps working."""


class QuietConnections:
    """Learners by ring and by messages, quiet and at work; a writer, a reader of episodes and a client that have nothing to do.

    Each has a client, and so a connection, of its own. A context manager.

    Args:
        address: address of a server.
        rings: whether learners get rings there.
        options: options of the clients.
    """

    def __init__(self, address: str, *, rings: bool, **options: Any) -> None:
        self._stack = ExitStack()
        self._options = options
        self._address = address
        self._rings = rings
        self._states: dict[str, list[grpc.ChannelConnectivity]] = {}
        self._stopped = threading.Event()
        self._failures: list[BaseException] = []

    def __enter__(self) -> Self:
        self.idle = self._client("idle")
        for number in range(EPISODES):
            self.idle.add(episode(number))
        self.reader = self._stack.enter_context(self._client("reader").episodes())
        assert len(next(self.reader).columns["reward"]) == ROWS
        self.writer = self._stack.enter_context(EpisodeWriter(self._client("writer")))
        self._play()
        self.learners = {}
        for name, ring in (("ring", True), ("stream", False), ("busy ring", True), ("busy stream", False)):
            batches = self._client(name).batches(ring=ring and self._rings, as_numpy=True)
            self.learners[name] = self._stack.enter_context(batches)
            next(batches)
            assert batches.transport == ("ring" if ring and self._rings else "stream")
        self._sessions = {name: batches._source._session for name, batches in self.learners.items()}  # type: ignore[attr-defined]
        self._reading = self.reader._source._session
        self._busy = [threading.Thread(target=self._work, args=(self.learners[name],)) for name in ("busy ring", "busy stream")]
        for thread in self._busy:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stopped.set()
        for thread in self._busy:
            thread.join()
        self._stack.close()

    def check(self) -> None:
        """Uses every connection again and asserts that none was interrupted meanwhile."""
        for name in ("ring", "stream"):
            for _ in range(100):
                next(self.learners[name])
        interrupted = [name for name, batches in self.learners.items() if batches._source._session is not self._sessions[name]]  # type: ignore[attr-defined]
        assert interrupted == []
        self._play()
        assert self.writer.counters.acknowledged == 2
        assert self.reader._source._session is self._reading
        assert [len(stored.columns["reward"]) for stored in self.reader] == [ROWS] * (EPISODES - 1)
        assert self.idle.num_eps == EPISODES + 2
        assert self._failures == []
        ready = grpc.ChannelConnectivity.READY
        left_ready = [name for name, states in self._states.items() if {*states[states.index(ready) :]} != {ready}]
        assert left_ready == []

    def _client(self, name: str) -> ReplayClient:
        client = self._stack.enter_context(ReplayClient(self._address, **self._options))
        client.info()  # opens the channel
        states = self._states[name] = []
        client._channel._grpc_channel.subscribe(states.append)
        return client

    def _play(self) -> None:
        for row in range(5):
            self.writer.append({"obs": np.full(3, row, np.float32), **({"action": np.zeros(2, np.float32), "reward": 0.0} if row else {})})
        self.writer.end_episode()
        self.writer.flush(60)

    def _work(self, batches: Any) -> None:
        try:
            while not self._stopped.wait(PAUSE_S):
                next(batches)
        except BaseException as error:
            self._failures.append(error)


def episode(number: int) -> dict[str, np.ndarray]:
    columns = {
        "obs": np.full((ROWS, 3), number, np.float32),
        "action": np.zeros((ROWS, 2), np.float32),
        "reward": np.zeros(ROWS, np.float32),
    }
    columns["action"][0] = np.nan  # the reset row
    return columns
