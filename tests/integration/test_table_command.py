"""``touchline table`` and the client's verbs for tables, on a real server."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from support.service_calls import make_config
from touchline import InvalidArgumentError, ReplayClient, UnknownTableError
from touchline._cli.app import app
from touchline_server.service.app import ServerThread

EPISODE = {name: np.zeros((20, 2), np.float32) for name in ("obs", "action")} | {"reward": np.zeros(20, np.float32)}

ODD_TEXT = 'a "b"\n\x7f\\é'


def run(server: ServerThread, *arguments: str) -> Any:
    return CliRunner().invoke(app, ["table", *arguments], env={"TOUCHLINE_ADDRESS": server.address}, prog_name="touchline")


def test_client_creates_lists_and_drops_tables() -> None:
    with ServerThread(make_config(tables={"online": {}})) as server, ReplayClient(server.address) as client:
        client.create_table("demos", buffer_size=100, law="step", allow_non_finite=True)
        client.create_table("demos", buffer_size=100, law="step", allow_non_finite=True)
        client.add(EPISODE, table="demos")
        tables = client.tables()
        dropped = client.drop_table("demos")

        assert list(tables) == ["", "demos", "online"]
        assert (tables["demos"].name, tables["demos"].capacity, tables["demos"].counts.steps_stored) == ("demos", 100, 20)
        assert (tables["demos"].created, tables["online"].created, tables["demos"].storage_state) == (True, False, "")
        assert "allow_non_finite = true" in tables["demos"].config_toml
        assert dropped == tables["demos"].counts
        assert list(client.tables()) == ["", "online"]
        with pytest.raises(UnknownTableError, match="'demos' does not exist, expected the empty name of the default table or 'online'"):
            client.drop_table("demos")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"buffer_size": 0}, "tables.demos.buffer_size: 0, expected at least 1"),
        ({"law": ODD_TEXT}, f"tables.demos.law: {ODD_TEXT!r}, expected 'episode'"),
        ({"bad key": 1}, "bad key: expected a key of"),
        ({"seed": None}, "seed: None, expected a str, a number or a bool"),
        ({"seed": float("nan")}, "tables.demos.seed: nan, expected a finite number"),
    ],
)
def test_client_refuses_a_wrong_key_by_its_name(keys: dict[str, Any], message: str) -> None:
    with ServerThread(make_config()) as server, ReplayClient(server.address) as client:
        with pytest.raises(InvalidArgumentError) as caught:
            client.create_table("demos", **keys)

        assert message in str(caught.value)
        assert list(client.tables()) == [""]


def test_commands_create_list_and_drop_a_table() -> None:
    with ServerThread(make_config()) as server, ReplayClient(server.address) as client:
        created = run(server, "create", "demos", "buffer_size=1_000", "law=step", "allow_non_finite=true")
        client.add(EPISODE, table="demos")
        listed = run(server, "list")
        unanswered = run(server, "drop", "demos")
        dropped = run(server, "drop", "demos", "--yes")
        again = run(server, "drop", "demos", "--yes")

        assert list(client.tables()) == [""]
    assert (created.exit_code, created.output) == (
        0,
        f"{server.address}: created\ndemos: 0 of 1,000 steps, 0 episodes, law step, in memory, created at run time\n",
    )
    assert listed.output == (
        "(default): 0 of 2,000 steps, 0 episodes, law episode, in memory\n"
        "demos: 20 of 1,000 steps, 1 episode, law step, cpu, in memory, created at run time\n"
    )
    assert (unanswered.exit_code, "nothing was removed: there is no terminal to ask on" in unanswered.output) == (2, True)
    assert (dropped.exit_code, dropped.output) == (0, f"{server.address}: dropped demos, 1 episode removed\n")
    assert (again.exit_code, "UnknownTableError" in again.output) == (1, True)


@pytest.mark.parametrize(("key", "status", "words"), [("law", 2, "'law': expected KEY=VALUE"), ("law=x", 1, "tables.demos.law: 'x'")])
def test_create_refuses_a_wrong_key(key: str, status: int, words: str) -> None:
    with ServerThread(make_config()) as server:
        refused = run(server, "create", "demos", key)

    assert refused.exit_code == status
    assert words in refused.output
