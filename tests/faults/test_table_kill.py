"""Servers that are killed while tables are created and dropped."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import grpc
import pytest

from support.fault_tally import KILLS
from support.service_calls import DEADLINE_S, Caller, ServerProcess, eventually, make_episode
from touchline_protos.codec import encode_add_episode
from touchline_protos.v1 import replay_pb2 as pb

NAMES = ("one", "two", "three")


class Changes(threading.Thread):
    """Creates and drops tables, with an episode in each, until the server is gone; remembers what was acknowledged."""

    def __init__(self, caller: Caller, existing: dict[str, bool], rng: random.Random) -> None:
        super().__init__()
        self._caller = caller
        self._rng = rng
        self.existing = existing
        """Whether each table exists with its episode, by acknowledgements."""
        self.uncertain = ""
        """Table of the call that got no answer."""
        self.answered = 0

    def run(self) -> None:
        """Makes calls until one fails."""
        stub = self._caller.stub
        while True:
            self.uncertain = name = self._rng.choice(NAMES)
            try:
                if self.existing[name]:
                    stub.DropTable(pb.DropTableRequest(table=name), timeout=DEADLINE_S)
                else:
                    stub.CreateTable(pb.CreateTableRequest(table=name, config_toml="buffer_size = 100"), timeout=DEADLINE_S)
                    self._caller.add(encode_add_episode(make_episode(10), table=name))
                self._caller.add(encode_add_episode(make_episode(10)))
            except grpc.RpcError:
                return
            self.existing[name] = not self.existing[name]
            self.answered += 1


@pytest.mark.parametrize("seed", range(KILLS))
def test_kill_while_tables_come_and_go_keeps_what_was_acknowledged(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    environment = {"TOUCHLINE_STORAGE__DATA_DIR": str(tmp_path / "data")}
    existing, default_episodes = dict.fromkeys(NAMES, False), 0
    for _ in range(2):
        with ServerProcess(tmp_path, **environment) as process, Caller(process.address) as caller:
            tables = {table.table: table.counts.episodes_stored for table in caller.stub.ListTables(pb.ListTablesRequest()).tables}
            changes = Changes(caller, existing, rng)
            for name in NAMES:
                # What was not acknowledged may have happened: a table that was being created may be there without its episode.
                if tables.get(name) == 0:
                    caller.stub.DropTable(pb.DropTableRequest(table=name), timeout=DEADLINE_S)
                    tables.pop(name)
            assert tables.pop("") >= default_episodes
            default_episodes = caller.counts().episodes_stored
            changes.start()
            target = rng.randrange(2, 12)
            eventually(lambda: changes.answered >= target, "calls are answered", every_s=0.001)  # noqa: B023
            process.process.kill()
            changes.join(DEADLINE_S)
            default_episodes += changes.answered
            existing = changes.existing

        with ServerProcess(tmp_path, **environment) as process, Caller(process.address) as caller:
            found = {table.table: table.counts.episodes_stored for table in caller.stub.ListTables(pb.ListTablesRequest()).tables}
            assert found[""] >= default_episodes
            for name in NAMES:
                if name != changes.uncertain:
                    assert (found.get(name, 0) == 1) == existing[name], (name, found, existing)
            existing = {name: found.get(name, 0) == 1 for name in NAMES}
            assert not list((tmp_path / "data").glob("*.dropped"))
