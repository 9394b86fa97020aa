"""``touchline-server check``, ``recover`` and ``snapshot`` on the stores of several tables."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from support.service_calls import Caller, make_config, make_episode
from touchline_protos.codec import encode_add_episode
from touchline_protos.v1 import replay_pb2 as pb
from touchline_server import ReplayBuffer
from touchline_server.cli import main as cli
from touchline_server.service.app import ServerThread

TABLES: dict[str, dict[str, Any]] = {"demos": {}, "brief": {"durability": "none"}}


@pytest.fixture
def data_dir(tmp_path: Path) -> Iterator[Path]:
    """The folder of a running server with two episodes of a configured table, three of a created one, and one of the default table."""
    folder = tmp_path / "data"
    config = make_config(storage={"device": "cpu", "data_dir": str(folder)}, tables=TABLES)
    with ServerThread(config) as server, Caller(server.address) as caller:
        caller.stub.CreateTable(pb.CreateTableRequest(table="expert", config_toml="buffer_size = 500"))
        for name, count in (("", 1), ("demos", 2), ("expert", 3), ("brief", 1)):
            for seed in range(count):
                caller.add(encode_add_episode(make_episode(10, seed=seed), table=name))
        yield folder


def run(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def damage(folder: Path) -> None:
    """Overwrites observations of the second episode in a closed store."""
    file, stored = folder / "touchline.db", make_episode(10, seed=1).columns["obs"].tobytes()
    data = file.read_bytes()
    assert stored in data
    file.write_bytes(data.replace(stored, bytes(len(stored))))


def test_check_goes_through_the_tables_and_names_each(data_dir: Path) -> None:
    every, one = run("check", "--data-dir", data_dir), run("check", "--data-dir", data_dir, "--table", "expert")

    assert every.exit_code == one.exit_code == 0
    assert every.stdout == (
        "1 episodes, 10 steps are whole\ntable 'demos': 2 episodes, 20 steps are whole\ntable 'expert': 3 episodes, 30 steps are whole\n"
    )
    assert one.stdout == "table 'expert': 3 episodes, 30 steps are whole\n"


def test_table_without_a_store_is_refused_and_those_with_one_are_named(data_dir: Path) -> None:
    for command in (["check"], ["recover"], ["snapshot", data_dir / "copy"]):
        found = run(*command, "--data-dir", data_dir, "--table", "brief")

        assert found.exit_code == 2
        assert f"--table: 'brief' has no store in {data_dir}, expected '' or 'demos' or 'expert'" in found.output


def test_snapshot_copies_every_table_and_a_server_starts_on_it(data_dir: Path, tmp_path: Path) -> None:
    copy, only = tmp_path / "copy", tmp_path / "only"

    assert run("snapshot", "--data-dir", data_dir, copy).stdout.split() == [
        str(copy / name / "touchline.db") for name in ("", "demos", "expert")
    ]
    assert run("snapshot", "--data-dir", data_dir, "--table", "demos", only).exit_code == 0

    copied = ReplayBuffer(make_config(storage={"device": "cpu", "data_dir": str(copy)}, tables=TABLES))
    alone = ReplayBuffer(make_config(storage={"device": "cpu", "data_dir": str(only)}))
    assert {name: table.num_eps for name, table in copied.tables.items()} == {"": 1, "demos": 2, "brief": 0, "expert": 3}
    assert copied.tables["expert"].capacity == 500
    assert alone.num_eps == 2
    copied.close()
    alone.close()


def test_damaged_table_is_named_and_recovered_and_the_others_are_not_touched(data_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    run("snapshot", "--data-dir", data_dir, copy)
    damage(copy / "expert")
    others = {name: (copy / name / "touchline.db").read_bytes() for name in ("", "demos")}

    checked = run("check", "--data-dir", copy)
    refused = run("recover", "--data-dir", copy, "--table", "expert")
    recovered = run("recover", "--data-dir", copy, "--table", "expert", "--accept-loss")

    assert checked.exit_code == 1
    assert "table 'expert': " in checked.stdout
    assert f"`touchline-server recover --data-dir {copy} --table expert` keeps what is whole" in checked.output
    assert (refused.exit_code, recovered.exit_code) == (1, 0)
    assert run("check", "--data-dir", copy, "--table", "expert").exit_code == 0
    assert others == {name: (copy / name / "touchline.db").read_bytes() for name in ("", "demos")}


def test_data_dir_whose_default_table_is_not_durable_has_stores_all_the_same(tmp_path: Path) -> None:
    buffer = ReplayBuffer(
        make_config(storage={"device": "cpu", "data_dir": str(tmp_path), "durability": "none"}, tables={"demos": {"durability": "sync"}})
    )
    buffer.tables["demos"].add_episode(make_episode(10))
    buffer.close()

    assert run("check", "--data-dir", tmp_path).stdout == "table 'demos': 1 episodes, 10 steps are whole\n"
