"""Interleaved writers of several tables while their server and their own processes' queues come and go."""

from __future__ import annotations

import signal
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from support.durable_cases import assert_whole, contents, keyed_episode
from support.fault_tally import LONG
from support.service_calls import ServerProcess
from touchline import EpisodeWriter, ReplayClient
from touchline_server import Config, ReplayBuffer

TABLES = ["", "demos", "online"]
WRITERS = 4
WAIT_S = 60.0
CAPACITY = 40_000

PLAY = st.tuples(st.just("play"), st.integers(0, WRITERS - 1), st.integers(1, 5))
REOPEN = st.tuples(st.just("reopen"), st.integers(0, WRITERS - 1), st.sampled_from(TABLES))
SERVER = st.tuples(st.sampled_from(["kill", "stop", "start"]), st.just(0), st.just(0))


class Team:
    """Writers with a spool or without, whose episodes are for the tables that they had when the episodes ended. A context manager."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = ExitStack()
        self._server: ServerProcess | None = None
        self._port = "0"
        self.start()
        assert self._server is not None
        self._client: ReplayClient = self._stack.enter_context(ReplayClient(self._server.address, timeout_s=2.0))
        self._port = self._server.address.rpartition(":")[2]
        self._tables: list[str] = [TABLES[number % len(TABLES)] for number in range(WRITERS)]
        self._writers: list[EpisodeWriter] = [self._open(number) for number in range(WRITERS)]
        self._played = [0] * WRITERS
        self.expected: dict[str, set[tuple[str, int]]] = defaultdict(set)

    def _open(self, number: int) -> EpisodeWriter:
        spool_dir = self._folder / str(number) if number % 2 else None
        return EpisodeWriter(self._client, table=self._tables[number], actor=f"actor-{number}", spool_dir=spool_dir, max_pending=1_000)

    def play(self, number: int, episodes: int) -> None:
        """Ends some more episodes of a writer; they wait while the server is away."""
        for _ in range(episodes):
            writer, sequence = self._writers[number], self._played[number]
            self._played[number] += 1
            writer.policy_version = sequence
            columns = keyed_episode(number, sequence).columns
            for row in range(len(columns["reward"])):
                writer.append({name: column[row] for name, column in columns.items()})
            writer.end_episode()
            self.expected[self._tables[number]].add((f"actor-{number}", sequence))

    def reopen(self, number: int, table: str) -> None:
        """Ends a writer without waiting for its episodes if it has a spool, and makes the next one, for a table, on the same folder."""
        if number % 2 == 0 and self._server is None:
            return  # without a spool, closing waits for the server
        self._writers[number].close(0 if number % 2 else WAIT_S)
        self._tables[number] = table
        self._writers[number] = self._open(number)

    def start(self, *_: Any) -> None:
        if self._server is None:
            settings = {"CONFIG__BUFFER_SIZE": str(CAPACITY), "CONFIG__MIN_HISTORY": "0", "STORAGE__DATA_DIR": str(self._folder / "data")}
            environment = {f"TOUCHLINE_{name}": value for name, value in settings.items()}
            (self._folder / "tables.toml").write_text("[tables.demos]\n[tables.online]\n", encoding="utf-8")
            options = ("--config", str(self._folder / "tables.toml"), "--port", self._port)
            self._server = self._stack.enter_context(ServerProcess(self._folder, *options, **environment))
            assert self._server.address

    def kill(self, *_: Any) -> None:
        self._end(signal.SIGKILL)

    def stop(self, *_: Any) -> None:
        self._end(signal.SIGTERM)

    def _end(self, number: signal.Signals) -> None:
        if self._server is not None:
            self._server.signal(number)
            self._server.wait()
            self._server = None

    def finish(self) -> None:
        """Waits until every episode of every writer is acknowledged, and stops the server."""
        self.start()
        for writer in self._writers:
            writer.close(WAIT_S)
            counters = writer.counters
            assert (counters.pending, counters.refused, counters.dropped) == (0, 0, 0), counters
        self.stop()

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()


@pytest.mark.slow
@pytest.mark.timeout(600)
@settings(
    max_examples=5 if LONG else 1,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@example(  # what waits in one spool is for several tables, and goes out in calls of several episodes
    schedule=[
        ("kill", 0, 0),
        *(step for table in ("online", "demos", "") for step in (("play", 1, 3), ("reopen", 1, table), ("play", 1, 2))),
        ("start", 0, 0),
        ("reopen", 1, "online"),
        ("play", 3, 2),
    ]
)
@given(schedule=st.lists(PLAY | PLAY | REOPEN | SERVER, min_size=8, max_size=20))
def test_interleaved_writers_to_several_tables_store_each_episode_in_its_own_table_exactly_once(
    tmp_path_factory: pytest.TempPathFactory, schedule: list[tuple[str, int, Any]]
) -> None:
    folder = tmp_path_factory.mktemp("tables")

    with Team(folder) as team:
        for verb, number, argument in schedule:
            act: Callable[[int, Any], None] = getattr(team, verb)
            act(number, argument)
        team.finish()

    config = Config(
        config={"buffer_size": CAPACITY, "batch_size": 8, "min_history": 0, "horizon": 3},
        storage={"device": "cpu", "data_dir": str(folder / "data")},
        tables={"demos": {}, "online": {}},
    )
    buffer = ReplayBuffer(config)
    found = {table: contents(buffer.tables[table]) for table in TABLES}
    buffer.close()
    for table in TABLES:
        assert_whole(found[table])
        assert {(actor, sequence) for actor, sequence, _ in found[table].values()} == team.expected[table], table
