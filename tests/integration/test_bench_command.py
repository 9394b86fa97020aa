"""``touchline bench`` on a real server: what it measures, and that it leaves nothing behind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from support.service_calls import make_config
from touchline import ReplayClient
from touchline._cli import bench
from touchline._cli.app import app
from touchline_server.service.app import ServerThread

EPISODE = {name: np.zeros((20, 2), np.float32) for name in ("obs", "action")} | {"reward": np.zeros(20, np.float32)}
SHORT = ("--seconds", "0.05", "--rows", "20", "--obs", "4", "--batch-size", "16")


@pytest.fixture
def server() -> Iterator[ServerThread]:
    """A server whose default table has episodes and a rate limit, which the bench's table must not inherit."""
    with ServerThread(make_config(rate={"samples_per_insert": 1, "tolerance": 8, "min_steps": 20})) as server:
        with ReplayClient(server.address) as client:
            client.add(EPISODE)
        yield server


def run(server: ServerThread, *arguments: str, **environment: str) -> Any:
    return CliRunner().invoke(app, ["bench", server.address, *arguments], env=environment, prog_name="touchline")


@pytest.mark.parametrize("row_convention", ["incoming", "outgoing"])
def test_bench_measures_everything_in_a_table_of_its_own(row_convention: str) -> None:
    config = make_config(sampling={"row_convention": row_convention}, ring={"max_rings": 0})
    with ServerThread(config) as server, ReplayClient(server.address) as client:
        client.add(EPISODE)
        before = client.counts()
        found = run(server, *SHORT, "--json")

        assert found.exit_code == 0, found.output
        assert (client.counts(), list(client.tables())) == (before, [""])
    measured = json.loads(found.stdout)["measurements"]
    assert [(one["what"], one["transport"]) for one in measured] == [
        *(("add", "unary"), ("load", "stream"), ("sample", "ring"), ("sample", "stream"), ("sample", "unary")),
    ]
    for one in measured:
        if one["transport"] == "ring":
            assert "max_rings is 0" in one["note"]
            continue
        assert one["count"] > 0 and one["per_s"] > 0 and 0 < one["p50_s"] <= one["p99_s"]
        assert one["rows_per_s"] == pytest.approx(one["per_s"] * (20 if one["unit"] == "episodes" else 4 * 16))


def test_bench_prints_a_table_and_is_not_limited_by_the_default_tables_rate(server: ServerThread) -> None:
    found = run(server, *SHORT)

    lines = found.stdout.splitlines()
    assert lines[0].split() == ["WHAT", "TRANSPORT", "A", "SECOND", "ROWS/S", "MB/S", "P50", "MS", "P99", "MS"]
    assert [line.split()[:2] for line in lines[1:6]] == [
        *(["add", "unary"], ["load", "stream"], ["sample", "ring"], ["sample", "stream"], ["sample", "unary"]),
    ]
    assert lines[6] == (
        f"{server.address}: batches of 16 slices at horizon 3, 0.05 s each; episodes of 20 rows with 4 numbers in an observation"
    )


def test_existing_table_is_sampled_and_not_changed(server: ServerThread) -> None:
    with ReplayClient(server.address) as client:
        client.create_table("demos", **{"rate": {"samples_per_insert": 0, "min_steps": 0}})
        client.add(EPISODE, table="demos")
        before = client.tables()
        found = run(server, *SHORT, "--table", "demos", "--transport", "unary", "--json")

        assert client.tables() == before
    assert [(one["what"], one["transport"]) for one in json.loads(found.stdout)["measurements"]] == [("sample", "unary")]


def test_interrupted_bench_drops_its_table(server: ServerThread, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "_measure_load", interrupt)

    found = run(server, *SHORT)

    assert (found.exit_code, found.stderr) == (130, "touchline: interrupted\n")
    with ReplayClient(server.address) as client:
        assert list(client.tables()) == [""]


def test_bench_names_tables_that_an_earlier_one_left(server: ServerThread) -> None:
    with ReplayClient(server.address) as client:
        client.create_table("bench-0")

        found = run(server, *SHORT, "--transport", "unary")

        assert found.exit_code == 0 and "bench-0; touchline table drop NAME" in found.stderr
        assert sorted(client.tables()) == ["", "bench-0"]


def test_bench_without_the_role_admin_says_what_else_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOUCHLINE_SERVER_TOKENS", "learner:trainer:learner-token-0123456789")
    with ServerThread(make_config()) as server:
        found = run(server, *SHORT, TOUCHLINE_TOKEN="learner-token-0123456789")

    assert (found.exit_code, found.stdout) == (1, "")
    assert "expected one for admin to call CreateTable" in found.stderr and "--table NAME samples an existing table" in found.stderr
