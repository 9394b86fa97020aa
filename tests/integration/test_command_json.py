"""``--json`` of the commands that move data and change a server: one document on stdout, with the keys that scripts rely on."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from support.dataset_cases import make_episode, write_npz
from support.durable_cases import durable_config
from support.service_calls import make_config
from support.spool_cases import fill, spooled
from touchline import Counts, ReplayClient
from touchline._cli.app import app
from touchline._cli.terminal import print_json
from touchline_server.cli.main import app as server_app
from touchline_server.service.app import ServerThread

COUNTS = {field.name for field in fields(Counts)}


@pytest.fixture(scope="module")
def server() -> Iterator[ServerThread]:
    with ServerThread(make_config(storage={"device": "cpu", "allow_non_finite": False})) as server:
        yield server


def run(server: ServerThread, *arguments: str, status: int = 0) -> Any:
    found = CliRunner().invoke(app, [*arguments, "--json"], env={"TOUCHLINE_ADDRESS": server.address}, prog_name="touchline")
    assert found.exit_code == status, found.output
    return json.loads(found.stdout)


def test_tables_are_created_changed_listed_and_dropped(server: ServerThread) -> None:
    created = run(server, "table", "create", "demos", "buffer_size=100")
    changed = run(server, "table", "set", "demos.rate.samples_per_insert=4")
    listed = run(server, "table", "list")
    dropped = run(server, "table", "drop", "demos", "--yes")

    assert (created["created"]["name"], created["created"]["capacity"]) == ("demos", 100)
    assert [(one["table"], one["rate"]["samples_per_insert"]) for one in changed["changed"]] == [("demos", 4)]
    assert [one["name"] for one in listed["tables"]] == ["", "demos"]
    assert set(listed["tables"][0]["counts"]) == COUNTS == set(dropped["counts"])
    assert {"name", "config_toml", "counts", "capacity", "device", "size_bytes", "storage_state", "storage_reason", "created"} <= set(
        listed["tables"][0]
    )
    assert dropped["dropped"] == "demos"


def test_data_are_loaded_exported_and_cleared(server: ServerThread, tmp_path: Path) -> None:
    episodes = [make_episode(number) for number in range(3)]
    episodes[2]["obs"][1] = np.nan
    write_npz(tmp_path / "demos.npz", episodes)
    source = str(tmp_path / "demos.npz")

    dry = run(server, "load", source, "--dry-run", status=1)
    loaded = run(server, "load", source, str(tmp_path / "gone.npz"), status=1)
    exported = run(server, "export", str(tmp_path / "all.npz"))
    cleared = run(server, "clear", "--yes")
    again = run(server, "clear")

    assert (dry["address"], dry["sources"][0]["report"]["read"]) == (None, 3)
    first, second = loaded["sources"]
    assert {key: first["report"][key] for key in ("read", "stored", "duplicates", "refused")} == {
        **{"read": 3, "stored": 2, "duplicates": 0, "refused": 1},
    }
    (reason,) = first["report"]["reasons"].values()
    assert reason["count"] == 1 and "not finite in row 1" in reason["examples"][0][1]
    assert (first["error"], second["report"], "no such file" in second["error"]) == (None, None, True)
    assert loaded["counts"]["episodes_stored"] == 2
    assert {key: exported["report"][key] for key in ("written", "left_out", "evicted", "steps")} == {
        **{"written": 2, "left_out": 0, "evicted": 0, "steps": 22},
    }
    assert (cleared["episodes_removed"], cleared["steps_removed"], set(cleared["counts"])) == (2, 22, COUNTS)
    assert (again["episodes_removed"], again["steps_removed"]) == (0, 0)


def test_a_spool_is_shown_retried_and_sent(server: ServerThread, tmp_path: Path) -> None:
    fill(tmp_path, spooled(0), spooled(1))

    shown = run(server, "spool", "show", str(tmp_path))
    retried = run(server, "spool", "retry", str(tmp_path))
    sent = run(server, "spool", "send", str(tmp_path))

    assert (len(shown["waiting"]), shown["refused"], shown["damaged"], shown["holder"]) == (2, [], [], None)
    assert {"number", "length", "size_bytes", "time_s", "reason", "table"} == set(shown["waiting"][0])
    assert retried == {"folder": str(tmp_path), "pending_again": 0}
    assert {key: sent["report"][key] for key in ("total", "sent", "refused", "pending", "error")} == {
        **{"total": 2, "sent": 2, "refused": 0, "pending": 0, "error": None},
    }


def test_snapshot_shows_the_stores_and_the_command_that_copies_them(server: ServerThread, tmp_path: Path) -> None:
    with ServerThread(durable_config(tmp_path)) as durable:
        found = run(durable, "snapshot")
        text = CliRunner().invoke(app, ["snapshot", "--address", durable.address]).stdout
    none = CliRunner().invoke(app, ["snapshot", "--address", server.address])

    assert (found["data_dir"], found["command"]) == (str(tmp_path), f"touchline-server snapshot --data-dir {tmp_path} DIR")
    assert [(store["table"], store["mode"], store["state"]) for store in found["stores"]] == [("", "batch", "ok")]
    assert text.startswith("(default)  batch, ok, ") and found["command"] in text
    assert none.exit_code == 1 and "set storage.data_dir on the server" in none.stderr


def test_a_store_is_copied_checked_and_recovered(tmp_path: Path) -> None:
    folder, copy = tmp_path / "data", tmp_path / "copy"

    def run_here(*arguments: str, status: int = 0) -> Any:
        found = CliRunner().invoke(server_app, [*arguments, "--json"], prog_name="touchline-server")
        assert found.exit_code == status, found.output
        return json.loads(found.stdout)

    with ServerThread(durable_config(folder)) as durable, ReplayClient(durable.address) as client:
        for number in range(3):
            client.add(episode(10 + number))
    copied = run_here("snapshot", "--data-dir", str(folder), str(copy))
    whole = run_here("check", "--data-dir", str(copy))
    file = copy / "touchline.db"
    data = file.read_bytes()
    at = data.index(np.full(12, 7, np.float32).tobytes())  # within the last episode
    file.write_bytes(data[: at + 9] + b"!" + data[at + 10 :])
    damaged = run_here("check", "--data-dir", str(copy), status=1)
    refused = run_here("recover", "--data-dir", str(copy), status=1)
    kept = run_here("recover", "--data-dir", str(copy), "--accept-loss")

    assert (copied["data_dir"], copied["files"]) == (str(folder), [str(file)])
    assert whole == {"data_dir": str(copy), "tables": [{"table": "", "episodes": 3, "steps": 33, "damage": []}]}
    ((table, steps, damage),) = [(one["table"], one["steps"], one["damage"]) for one in damaged["tables"]]
    assert (table, steps) == ("", 21) and damage
    assert (refused["store"], refused["replaced"], kept["replaced"]) == (str(copy), False, True)
    assert refused["lost"] == kept["lost"] != []
    assert (kept["episodes"], kept["steps"]) == (2, 21)


def episode(rows: int) -> dict[str, np.ndarray]:
    return {"obs": np.full(rows, 7, np.float32), "action": np.zeros(rows, np.float32), "reward": np.zeros(rows, np.float32)}


def test_what_json_cannot_hold_becomes_null_or_text(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"nan": math.nan, "inf": [math.inf], "path": Path("a"), "error": ValueError("b"), "counts": Counts(3)})

    found = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))
    assert (found["nan"], found["inf"], found["path"], found["error"], found["counts"]["steps_stored"]) == (None, [None], "a", "b", 3)


def test_error_is_a_sentence_on_stderr_and_nothing_on_stdout() -> None:
    found = CliRunner().invoke(app, ["table", "list", "--json", "--address", "127.0.0.1:1", "--timeout-s", "0.2"])

    assert (found.exit_code, found.stdout) == (1, "")
    assert found.stderr.startswith("touchline: no answer: 127.0.0.1:1: ")
