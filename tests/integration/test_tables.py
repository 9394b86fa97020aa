"""Several tables on one server: each with its own episodes, schema, counts, ids and configuration."""

from __future__ import annotations

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.durable_cases import MODES
from support.failing_disk import FailingDisk, Fault, failing_disk
from support.service_calls import DEADLINE_S, Caller, eventually, make_config, make_episode, refused
from touchline import ReplayClient, TouchlineError
from touchline_protos.codec import encode_add_episode, encode_load
from touchline_protos.v1 import replay_pb2 as pb
from touchline_server import ReplayBuffer, StoreMismatchError
from touchline_server.service.app import ServerThread

TABLES: dict[str, dict[str, Any]] = {"demos": {"buffer_size": 500, "horizon": 5, "law": "step"}, "online": {}}


def add(caller: Caller, table: str, rows: int = 20, **options: Any) -> pb.AddEpisodeResponse:
    return caller.add(encode_add_episode(make_episode(rows, **options), table=table))


def counts(caller: Caller, table: str) -> pb.Counts:
    return caller.stub.Info(pb.InfoRequest(table=table), timeout=DEADLINE_S).counts


def test_configured_tables_have_episodes_schemas_ids_and_configurations_of_their_own() -> None:
    with ServerThread(make_config(tables=TABLES)) as server, Caller(server.address) as caller:
        added = [add(caller, "demos", obs=7), add(caller, "online", obs=2), add(caller, "demos", obs=7)]
        loaded = caller.load(encode_load(make_episode(30, obs=2), table="online"))
        infos = {name: caller.stub.Info(pb.InfoRequest(table=name), timeout=DEADLINE_S) for name in ("", "demos", "online")}
        batch = caller.sample(table="demos", wait_s=1)
        ready = caller.stub.Ready(pb.ReadyRequest(table="demos"), timeout=DEADLINE_S)
        empty = refused(caller.sample)

    assert [answer.episode_id for answer in added] == [0, 0, 1]
    assert loaded.results[0].episode_id == 1
    assert {name: info.counts.episodes_stored for name, info in infos.items()} == {"": 0, "demos": 2, "online": 2}
    assert {name: info.capacity for name, info in infos.items()} == {"": 2000, "demos": 500, "online": 2000}
    assert 'law = "step"' in infos["demos"].config_toml
    assert np.asarray(batch.obs).shape == (6, 8, 7)
    assert (ready.horizon, ready.episodes_eligible) == (5, 2)
    assert empty.reason == "not-ready"


def test_streams_and_reading_calls_are_of_their_table() -> None:
    with ServerThread(make_config(tables=TABLES)) as server, Caller(server.address) as caller:
        for seed in range(3):
            add(caller, "demos", seed=seed, obs=7)
            add(caller, "online", seed=seed, obs=2)
        batches = {name: caller.stream().open(credits=2, table=name).read(2) for name in TABLES}
        read = [pb.GetEpisodesResponse.FromString(part) for part in _episodes(caller, "online")]

    assert {name: np.asarray(got[0].obs).shape for name, got in batches.items()} == {"demos": (6, 8, 7), "online": (4, 8, 2)}
    assert read[0].selection.episodes == 3


def test_clearing_a_table_leaves_the_others() -> None:
    with ServerThread(make_config(tables=TABLES)) as server, Caller(server.address) as caller:
        for name in ("", *TABLES):
            add(caller, name)
        cleared = caller.stub.Clear(pb.ClearRequest(table="demos"), timeout=DEADLINE_S).counts
        left = {name: counts(caller, name).episodes_stored for name in ("", *TABLES)}

    assert cleared.episodes_stored == 0
    assert left == {"": 1, "demos": 0, "online": 1}


@pytest.mark.parametrize("verb", ["ready", "sample", "stream"])
def test_adding_to_a_table_wakes_no_caller_that_waits_for_another(verb: str) -> None:
    with ServerThread(make_config(tables=TABLES)) as server, Caller(server.address) as caller, ThreadPoolExecutor(1) as pool:
        stream = caller.stream()
        calls = {
            "ready": lambda: caller.stub.Ready(pb.ReadyRequest(table="demos", min_steps=1, wait_s=60), timeout=DEADLINE_S),
            "sample": lambda: caller.sample(table="demos", wait_s=60),
            "stream": lambda: stream.open(credits=1, table="demos").read(1),
        }
        waiting = pool.submit(calls[verb])
        changes = server._server.parts.changes
        eventually(lambda: len(changes._waiters) == 1, "it waits")
        [wake] = changes._waiters
        other = caller.stream().open(credits=0, table="online")
        eventually(lambda: len(changes._waiters) == 2, "another learner waits for the other table")
        woken: list[str] = []
        wake.set, wake_it = lambda: (woken.append("demos"), wake_it())[0], wake.set  # type: ignore[assignment, method-assign]
        for _ in range(10):
            add(caller, "online")
            add(caller, "")
        before = list(woken)
        add(caller, "demos", obs=7)
        waiting.result(60)
        stream.close()
        other.close()
        eventually(lambda: not changes._waiters and not changes._signals, "no caller waits any more")

    assert not before
    assert woken


@pytest.mark.parametrize("verb", ["add", "load", "sample", "stream", "episodes", "ready", "info", "clear"])
def test_unknown_table_is_not_found_and_names_those_that_exist(verb: str) -> None:
    with ServerThread(make_config(tables=TABLES)) as server, Caller(server.address) as caller:
        calls: dict[str, Any] = {
            "add": lambda: add(caller, "expert"),
            "load": lambda: caller.load(encode_load(make_episode(), table="expert")),
            "sample": lambda: caller.sample(table="expert"),
            "stream": lambda: caller.stream().open(credits=1, table="expert").read(1),
            "episodes": lambda: list(_episodes(caller, "expert")),
            "ready": lambda: caller.stub.Ready(pb.ReadyRequest(table="expert"), timeout=DEADLINE_S),
            "info": lambda: caller.stub.Info(pb.InfoRequest(table="expert"), timeout=DEADLINE_S),
            "clear": lambda: caller.stub.Clear(pb.ClearRequest(table="expert"), timeout=DEADLINE_S),
        }
        refusal = refused(calls[verb])

    assert (refusal.code.name, refusal.reason) == ("NOT_FOUND", "unknown-table")
    assert refusal.details == "table: 'expert' does not exist, expected the empty name of the default table or 'demos' or 'online'"


def test_durable_tables_have_a_folder_each_and_come_back(tmp_path: Path) -> None:
    config = make_config(storage={"device": "cpu", "data_dir": str(tmp_path)}, tables={**TABLES, "brief": {"durability": "none"}})
    with ServerThread(config) as server, Caller(server.address) as caller:
        for name in ("", "demos", "brief"):
            add(caller, name)

    with ServerThread(config) as server, Caller(server.address) as caller:
        found = {name: counts(caller, name).episodes_stored for name in ("", *config.tables)}

    assert found == {"": 1, "demos": 1, "online": 0, "brief": 0}
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["demos", "online"]


def test_data_dir_of_the_version_before_opens_as_the_default_table(tmp_path: Path) -> None:
    before = make_config(storage={"device": "cpu", "data_dir": str(tmp_path)})
    with ServerThread(before) as server, Caller(server.address) as caller:
        add(caller, "")

    with ServerThread(before.override(tables=TABLES)) as server, Caller(server.address) as caller:
        found = {name: counts(caller, name).episodes_stored for name in ("", *TABLES)}

    assert found == {"": 1, "demos": 0, "online": 0}


def test_table_that_cannot_be_restored_is_named_and_everything_is_closed_again(tmp_path: Path) -> None:
    config = make_config(storage={"device": "cpu", "data_dir": str(tmp_path)}, tables=TABLES)
    with ServerThread(config) as server, Caller(server.address) as caller:
        for seed in range(10):
            add(caller, "demos", 40, seed=seed)

    with (
        pytest.raises(StoreMismatchError, match=r"^table 'demos': tables\.demos\.buffer_size: 100 rows, expected at least 400"),
        ServerThread(config.override(tables={"demos": {"buffer_size": 100}})),
    ):
        pass

    buffer = ReplayBuffer(config)
    assert buffer.tables["demos"].num_eps == 10
    buffer.close()


def _episodes(caller: Caller, table: str) -> Any:
    request = pb.GetEpisodesRequest(table=table).SerializeToString()
    return caller.channel.unary_stream("/touchline.v1.Replay/GetEpisodes")(request, timeout=DEADLINE_S)


# Created and dropped at run time


def create(caller: Caller, table: str, config_toml: str = "") -> None:
    caller.stub.CreateTable(pb.CreateTableRequest(table=table, config_toml=config_toml), timeout=DEADLINE_S)


def drop(caller: Caller, table: str) -> pb.Counts:
    return caller.stub.DropTable(pb.DropTableRequest(table=table), timeout=DEADLINE_S).counts


def tables_of(caller: Caller) -> dict[str, pb.TableInfo]:
    return {table.table: table for table in caller.stub.ListTables(pb.ListTablesRequest(), timeout=DEADLINE_S).tables}


def test_created_table_is_listed_and_used_and_gone_when_dropped() -> None:
    with ServerThread(make_config()) as server, Caller(server.address) as caller:
        create(caller, "demos", 'buffer_size = 100\nlaw = "step"')
        add(caller, "demos", 20)
        add(caller, "", 30)
        listed = tables_of(caller)
        info = caller.stub.Info(pb.InfoRequest(), timeout=DEADLINE_S)
        dropped = drop(caller, "demos")
        after = tables_of(caller)
        again = refused(add, caller, "demos")

    assert list(listed) == [table.table for table in info.tables] == ["", "demos"]
    assert (listed["demos"].capacity, listed["demos"].counts.steps_stored, listed["demos"].created) == (100, 20, True)
    assert (listed[""].capacity, listed[""].counts.steps_stored, listed[""].created) == (2000, 30, False)
    assert 'law = "step"' in listed["demos"].config_toml and 'law = "episode"' in listed[""].config_toml
    assert (listed["demos"].device, listed["demos"].size_bytes > 0) == ("cpu", True)
    assert dropped.episodes_stored == 1
    assert list(after) == [""]
    assert again.reason == "unknown-table"


@pytest.mark.parametrize(
    ("table", "config_toml", "message"),
    [
        ("", "", "table: '', expected a name of 1 to 64 lower-case letters"),
        ("Demos", "", "table: 'Demos', expected a name of 1 to 64 lower-case letters"),
        ("default", "", "table: 'default', expected another name: this one is reserved"),
        ("online", "", "table: 'online' exists already, expected a new name"),
        ("fresh", "buffer_size = 0", "tables.fresh.buffer_size: 0, expected at least 1"),
        ("fresh", "data_dir = 'x'", "tables.fresh.data_dir: unknown key"),
        ("fresh", "[config]\nbuffer_size = 5", "tables.fresh.config: unknown key"),
        ("fresh", "buffer_size =", "config_toml: not valid TOML"),
    ],
)
def test_table_that_cannot_be_created_is_refused_by_name(table: str, config_toml: str, message: str) -> None:
    with ServerThread(make_config(tables=TABLES)) as server, Caller(server.address) as caller:
        refusal = refused(create, caller, table, config_toml)
        names = list(tables_of(caller))

    assert (refusal.code.name, refusal.reason) == ("INVALID_ARGUMENT", "invalid-argument")
    assert message in refusal.details
    assert names == ["", "demos", "online"]


def test_creating_a_table_again_with_the_same_keys_does_nothing_and_with_others_is_refused() -> None:
    with ServerThread(make_config()) as server, Caller(server.address) as caller:
        create(caller, "demos", "buffer_size = 100")
        add(caller, "demos")
        create(caller, "demos", "buffer_size = 100")
        refusal = refused(create, caller, "demos", "buffer_size = 200")

        assert counts(caller, "demos").episodes_stored == 1
    assert refusal.details == "table: 'demos' exists already, expected a new name"


def test_default_table_cannot_be_dropped() -> None:
    with ServerThread(make_config()) as server, Caller(server.address) as caller:
        refusal = refused(drop, caller, "")

    assert refusal.details == "table: '' is the default table, which cannot be dropped; clear it"


@pytest.mark.parametrize("durability", ["sync", "batch", "memory", "none"])
def test_created_tables_are_remembered_and_dropped_ones_forgotten(durability: str, tmp_path: Path) -> None:
    """Whether or not the default table itself is durable."""
    config = make_config(storage={"device": "cpu", "data_dir": str(tmp_path), "durability": durability})
    with ServerThread(config) as server, Caller(server.address) as caller:
        create(caller, "demos", 'buffer_size = 100\ndurability = "sync"')
        create(caller, "expert", 'durability = "none"')
        create(caller, "brief")
        for name in ("", "demos", "expert", "brief"):
            add(caller, name)
        drop(caller, "brief")

    with ServerThread(config) as server, Caller(server.address) as caller:
        listed = tables_of(caller)
        drop(caller, "demos")
    with ServerThread(config) as server, Caller(server.address) as caller:
        left = list(tables_of(caller))

    assert {name: (table.capacity, table.counts.episodes_stored) for name, table in listed.items()} == {
        "": (2000, 0 if durability == "none" else 1),
        "demos": (100, 1),
        "expert": (2000, 0),
    }
    assert left == ["", "expert"]
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_folder_that_no_table_uses_is_not_taken_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = make_config(storage={"device": "cpu", "data_dir": str(tmp_path)}, tables=TABLES)
    with ServerThread(config) as server, Caller(server.address) as caller:
        add(caller, "demos")

    with ServerThread(make_config(storage=config.storage.model_dump())) as server, Caller(server.address) as caller:
        refusal = refused(create, caller, "demos")
        names = list(tables_of(caller))

    assert f"{tmp_path / 'demos'} holds a table that is not in the configuration: it is not served" in caplog.text
    assert f"table: 'demos' is not open, but {tmp_path / 'demos'} exists: put [tables.demos] into the configuration" in refusal.details
    assert names == [""]


def test_configured_table_comes_back_empty_after_it_was_dropped(tmp_path: Path) -> None:
    config = make_config(storage={"device": "cpu", "data_dir": str(tmp_path)}, tables=TABLES)
    with ServerThread(config) as server, Caller(server.address) as caller:
        add(caller, "demos")
        drop(caller, "demos")
        names = list(tables_of(caller))

    with ServerThread(config) as server, Caller(server.address) as caller:
        found = counts(caller, "demos")

    assert names == ["", "online"]
    assert (found.episodes_stored, found.episodes_added) == (0, 0)


def test_rest_of_a_dropped_table_is_removed_by_the_next_start(tmp_path: Path) -> None:
    """As a kill between the drop and the removal of its folder leaves it."""
    config = make_config(storage={"device": "cpu", "data_dir": str(tmp_path)})
    with ServerThread(config) as server, Caller(server.address) as caller:
        create(caller, "demos")
        add(caller, "demos")
    (tmp_path / "demos").rename(tmp_path / "demos.dropped")

    with ServerThread(config) as server, Caller(server.address) as caller:
        found = counts(caller, "demos")

    assert found.episodes_added == 0
    assert not (tmp_path / "demos.dropped").exists()


# Streams and calls that wait for a table that is dropped


def test_drop_ends_everything_that_waits_for_the_table_with_a_clear_error() -> None:
    """Streams with and without credits, calls that wait, and a reader; streams of other tables go on."""
    with ServerThread(make_config(tables=TABLES)) as server, Caller(server.address) as caller:
        for name in ("", "demos"):
            add(caller, name)
        fed, idle = caller.stream().open(credits=1, table="demos"), caller.stream().open(credits=0, table="demos")
        empty, other = caller.stream().open(credits=1, table="online"), caller.stream().open(credits=1)
        fed.read(1)
        fed.grant(0)
        other.read(1)
        with ThreadPoolExecutor(4) as pool:
            waiting = [
                pool.submit(refused, idle.read, 1),
                pool.submit(refused, fed.read, 1),
                pool.submit(refused, caller.stub.Ready, pb.ReadyRequest(table="demos", min_steps=400, wait_s=100), timeout=DEADLINE_S),
                pool.submit(refused, caller.sample, table="demos", horizon=40, wait_s=100),
            ]
            calls = server._server.parts.calls.replay
            eventually(lambda: calls.now == 6, "all calls are there")
            drop(caller, "demos")
            refusals = [one.result(DEADLINE_S) for one in waiting]
        other.grant(1)
        other.read(1)
        add(caller, "online")
        empty.read(1)

    assert [(refusal.code.name, refusal.reason, refusal.details) for refusal in refusals] == [
        ("NOT_FOUND", "unknown-table", "table: 'demos' was dropped")
    ] * 4


def test_ring_of_a_dropped_table_ends_with_a_clear_error() -> None:
    with ServerThread(make_config(tables=TABLES)) as server, Caller(server.address) as caller, ReplayClient(server.address) as client:
        add(caller, "demos")
        client._table = "demos"
        with client.batches(as_numpy=True) as batches:
            next(batches)
            assert batches.transport == "ring"
            drop(caller, "demos")
            with pytest.raises(TouchlineError, match="table: 'demos' was dropped"):
                for _ in range(10_000):
                    next(batches)


def test_dropped_table_frees_its_memory_and_its_threads() -> None:
    with ServerThread(make_config()) as server, Caller(server.address) as caller:
        create(caller, "demos")
        add(caller, "demos", 100, obs=4000)
        table = weakref.ref(server.buffer.registry.get("demos"))
        drop(caller, "demos")

        def is_gone() -> bool:
            gc.collect()
            threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("touchline-add-demos")]
            return table() is None and not threads

        eventually(is_gone, "table and threads go, a moment after the answer", every_s=0.01)


# Tables that never wait for each other

OBS = 10_000
"""Values in an observation, so that an episode of 20 rows is larger than what the event loop stores itself."""


@pytest.mark.parametrize("durability", MODES)
def test_adds_to_a_table_are_acknowledged_while_the_disk_of_another_hangs(
    durability: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under load: more adds than there are threads wait for the table whose disk hangs, small and large ones, and a clear."""
    config = make_config(storage={"device": "cpu", "data_dir": str(tmp_path), "durability": durability}, tables=TABLES)
    hangs, released, hanging = threading.Event(), threading.Event(), threading.Event()

    def verdict(disk: FailingDisk, call: str, path: str) -> Fault | None:
        if hanging.is_set() and call in ("write", "sync") and Path(path).parent.name == "demos":
            hangs.set()
            assert released.wait(DEADLINE_S)
        return None

    monkeypatch.setattr(FailingDisk, "verdict", verdict)
    with failing_disk(), ServerThread(config) as server, Caller(server.address) as caller, ThreadPoolExecutor(16) as pool:
        for name in ("", *TABLES):
            add(caller, name, obs=OBS if name == "demos" else 4)
        try:
            hanging.set()
            held = [pool.submit(add, caller, "demos", 20 if seed % 2 else 6, seed=seed, obs=OBS) for seed in range(10)]
            assert hangs.wait(DEADLINE_S)
            clearing = pool.submit(caller.stub.Clear, pb.ClearRequest(table="demos"), timeout=DEADLINE_S)
            for seed in range(20):
                add(caller, "online", 20, seed=seed)
                add(caller, "", 20, seed=seed)
            last = add(caller, "online", 20)
            batch = caller.sample(table="online")
            still_held = [future.done() for future in held]
        finally:
            released.set()
        wait([*held, clearing], DEADLINE_S)

    assert last.episode_id == 21
    assert np.asarray(batch.obs).shape[0] == 4
    assert [future.exception() for future in (*held, clearing)] == [None] * 11
    if durability != "memory":
        assert not any(still_held)
