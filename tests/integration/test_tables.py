"""Several tables on one server: each with its own episodes, schema, counts, ids and configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.service_calls import DEADLINE_S, Caller, make_config, make_episode, refused
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
