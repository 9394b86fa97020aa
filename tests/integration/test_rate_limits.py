"""A configured rate limit on a real server: both sides wait, are woken, and learn why; it is changed, described and remembered."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from support.service_calls import Caller, eventually, key, make_config, make_episode
from touchline import EpisodeWriter, InvalidArgumentError, OverLimitError, ReplayClient, UnknownTableError
from touchline._cli.app import app
from touchline_server import Config, ConfigError, ReplayBuffer, read_cfg
from touchline_server import InvalidArgumentError as ServerInvalidArgumentError
from touchline_server import OverLimitError as ServerOverLimitError
from touchline_server.limiters.samples_per_insert import SamplesPerInsert
from touchline_server.service import add_calls
from touchline_server.service.app import ServerThread

EPISODE = {name: np.zeros((20, 2), np.float32) for name in ("obs", "action")} | {"reward": np.zeros(20, np.float32)}
SLICES = 8
"""The batch size of make_config."""


def play(writer: EpisodeWriter, episodes: int) -> None:
    for _ in range(episodes):
        for row in range(20):
            writer.append({name: column[row] for name, column in EPISODE.items()})
        writer.end_episode()


def run(server: ServerThread, *arguments: str) -> Any:
    return CliRunner().invoke(app, ["table", *arguments], env={"TOUCHLINE_ADDRESS": server.address}, prog_name="touchline")


BAD_RATES: list[tuple[dict[str, float], str]] = [
    ({"samples_per_insert": -1}, "rate.samples_per_insert: -1, expected at least 0"),
    ({"samples_per_insert": float("nan")}, "rate.samples_per_insert: nan, expected"),
    ({"samples_per_insert": float("inf")}, "rate.samples_per_insert: inf, expected"),
    ({"tolerance": float("nan")}, "rate.tolerance: nan, expected"),
    ({"tolerance": -1}, "rate.tolerance: -1, expected"),
    ({"tolerance": 5}, "rate.tolerance: 5, expected 0 or at least SECTION.batch_size (8), because a batch is delivered as a whole"),
    ({"min_steps": -1}, "rate.min_steps: -1, expected"),
    ({"min_steps": 10**9}, "rate.min_steps: 1000000000, expected at most SECTION.buffer_size (2000), because more steps are never stored"),
    ({"max": 1}, "rate.max: unknown key, expected one of samples_per_insert, tolerance, min_steps"),
]


def test_limit_that_cannot_be_held_is_refused_by_name_wherever_it_is_given(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    with ServerThread(make_config(tables={"demos": {}})) as server, ReplayClient(server.address) as client:
        for rate, message in BAD_RATES:
            [(key, value)] = rate.items()
            written = f"{key}={value}"

            def read(section: str, line: str = written) -> Config:
                file.write_text(f"[config]\nbuffer_size = 2000\nbatch_size = 8\n[{section}]\n{line}\n", "utf-8")
                return read_cfg(file)

            places: dict[str, Callable[[], Any]] = {
                "constructor": lambda rate=rate: make_config(rate=rate),
                "constructor of a table": lambda rate=rate: make_config(tables={"demos": {"rate": rate}}),
                "file": lambda read=read: read("rate"),
                "file, of a table": lambda read=read: read("tables.demos.rate"),
                "client": lambda rate=rate: client.set_rate("demos", **rate),
                "client, creating": lambda rate=rate: client.create_table("expert", rate=rate),
                "in process": lambda rate=rate: server.buffer.set_rate(**rate),
                "in process, creating": lambda rate=rate: server.buffer.create_table("expert", rate=rate),
                "command": lambda written=written: _raise(run(server, "set", f"demos.rate.{written}")),
                "command, creating": lambda written=written: _raise(run(server, "create", "expert", f"rate.{written}")),
            }
            for place, give in places.items():
                with pytest.raises((ConfigError, InvalidArgumentError, ServerInvalidArgumentError)) as caught:
                    give()
                assert _core(message) in _core(str(caught.value)), place

        assert list(client.tables()) == ["", "demos"]
        assert all(table.rate is None for table in client.tables().values())


def _raise(result: Any) -> None:
    assert result.exit_code == 1
    raise InvalidArgumentError(result.output.replace("\n", " "))


def _core(message: str) -> str:
    """Returns a message without what depends on how the value was given: the file, the section of the other key, 5 or 5.0."""
    message = re.sub(r"(config|tables\.\w+)\.(batch_size|buffer_size)", r"SECTION.\2", message)
    return re.sub(r" \(in [^)]*\)", "", re.sub(r"(\d)\.0\b", r"\1", message))


def test_table_takes_what_it_leaves_out_from_the_default_tables_limit() -> None:
    config = make_config(
        rate={"samples_per_insert": 8, "tolerance": 100}, tables={"demos": {"rate": {"samples_per_insert": 2}}, "other": {}}
    )

    assert config.for_table("demos").rate.model_dump() == {"samples_per_insert": 2, "tolerance": 100, "min_steps": 0}
    assert config.for_table("other").rate == config.rate
    assert Config.model_validate(config.model_dump()) == config
    assert "[tables.demos.rate]\nsamples_per_insert = 2.0" in config.to_toml()


@pytest.mark.parametrize("path", ["unary", "messages", "ring"])
def test_both_sides_wait_and_the_ratio_holds(path: str) -> None:
    rate = {"samples_per_insert": 2, "tolerance": 5 * SLICES, "min_steps": 20}
    with ServerThread(make_config(rate=rate)) as server, ReplayClient(server.address) as client, ThreadPoolExecutor(2) as pool:
        stop = threading.Event()

        def act() -> None:
            while not stop.is_set():
                client.add(EPISODE)

        def learn() -> None:
            if path == "unary":
                while not stop.is_set():
                    client.sample(wait_s=60)
                return
            with client.batches(ring=path == "ring") as batches:
                while not stop.is_set():
                    next(batches)
            assert path != "ring" or batches.transport == "ring"

        running = [pool.submit(act), pool.submit(learn)]
        limiter = server.buffer.table.rate
        seen = []

        def enough() -> bool:
            status = limiter.status()
            seen.append(status.owed_slices)
            return status.steps_added >= 600

        eventually(enough, "600 steps were added")
        stop.set()
        client.set_rate(samples_per_insert=0, min_steps=0)
        for one in running:
            one.result(60)

    # An episode of 20 steps is 40 slices, as much as the tolerance.
    assert max(abs(owed) for owed in seen) <= 5 * SLICES
    assert len(set(seen)) > 3


def test_add_that_is_held_back_is_answered_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(add_calls, "MAX_ADD_HOLD_S", 0.05)
    tables = {"demos": {"rate": {"samples_per_insert": 2}}}
    with (
        ServerThread(make_config(rate={"tolerance": 40}, tables=tables)) as server,
        ReplayClient(server.address, table="demos", timeout_s=3) as client,
    ):
        for _ in range(2):
            client.add(EPISODE)
        with pytest.raises(OverLimitError) as caught:
            client.add(EPISODE)
        info = client.info().rate

        assert "the rate limit of table 'demos' holds adds back: 0 slices were delivered for 20 steps added" in str(caught.value)
        assert "learners have to take 40 slices" in str(caught.value)
        assert info is not None and (info.steps_added, info.owed_slices, info.ratio, info.adds_held) == (20, 40, 0, 1)
        assert server.buffer.table.rate.status().steps_added == 0
        client.add(EPISODE, table="")


def test_writer_says_what_holds_it_back(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(add_calls, "MAX_ADD_HOLD_S", 0.05)
    monkeypatch.setattr(add_calls, "MAX_LOAD_HOLD_S", 0.05)
    caplog.set_level(logging.WARNING)
    rate = {"samples_per_insert": 2, "tolerance": 40}
    with ServerThread(make_config(rate=rate)) as server, ExitStack() as stack:
        client = stack.enter_context(ReplayClient(server.address, timeout_s=2))
        pool = stack.enter_context(ThreadPoolExecutor(1))
        with EpisodeWriter(client, actor="left-3", max_pending=2) as writer:
            playing = pool.submit(play, writer, 6)
            blocked = "'left-3' is blocked: no space for another episode, 2 are pending: the rate limit holds adds back: 0 slices"
            eventually(lambda: blocked in caplog.text, "a blocked actor's log says why")
            retries = "2 episodes are pending, retrying: the rate limit holds adds back"
            eventually(lambda: retries in caplog.text, "so does the log of a call that failed")
            held = client.info().rate
            assert held is not None and held.adds[0].who == "left-3"
            client.set_rate(samples_per_insert=0)
            playing.result(60)
            writer.flush(timeout_s=60)
        assert client.info().rate is None
        assert server.buffer.counts().episodes_added == 6


def test_server_logs_once_whom_a_limit_has_held_for_long(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("touchline_server.service.app.STATUS_INTERVAL_S", 0.01)
    monkeypatch.setattr("touchline_server.limiters.waiting.LOG_AFTER_S", 0.1)
    looks = 0
    log_held = SamplesPerInsert.log_held

    def count_looks(limiter: SamplesPerInsert) -> None:
        nonlocal looks
        log_held(limiter)
        looks += 1

    monkeypatch.setattr(SamplesPerInsert, "log_held", count_looks)
    caplog.set_level(logging.WARNING)
    tables = {"demos": {"rate": {"samples_per_insert": 2, "tolerance": 40}}, "scarce": {"rate": {"min_steps": 100}}}
    with ServerThread(make_config(tables=tables)) as server, ReplayClient(server.address) as client, ThreadPoolExecutor(2) as pool:
        for _ in range(2):
            client.add(EPISODE, table="demos", actor="left-3")
        client.add(EPISODE, table="scarce")
        held = [
            pool.submit(client.add, EPISODE, table="demos", actor="left-3"),
            pool.submit(client.sample, table="scarce", wait_s=60),
        ]
        eventually(lambda: caplog.text.count("has held back") == 2, "both are logged")
        before = looks
        eventually(lambda: looks > before + 20, "the server has looked again many times")
        client.set_rate("demos", samples_per_insert=0)
        client.set_rate("scarce", min_steps=0)
        for one in held:
            one.result(60)

    lines = [record.getMessage() for record in caplog.records if "has held back" in record.getMessage()]
    assert len(lines) == 2
    assert any(
        "the rate limit of table 'demos' has held back adds of left-3 for" in line and "learners have to take 40" in line for line in lines
    )
    assert any(
        "the rate limit of table 'scarce' has held back batches for ipv4" in line and "rate.min_steps = 100" in line for line in lines
    )


def test_info_and_list_tell_how_each_tables_limit_stands() -> None:
    tables = {"demos": {"law": "step", "rate": {"samples_per_insert": 2, "tolerance": 40}}, "scarce": {"rate": {"min_steps": 100}}}
    with ServerThread(make_config(tables=tables)) as server, ReplayClient(server.address) as client, ThreadPoolExecutor(2) as pool:
        client.add(EPISODE, table="demos", actor="left-3")
        client.sample(table="demos")
        client.add(EPISODE, table="demos", actor="left-3")
        held = [
            pool.submit(client.add, EPISODE, table="demos", actor="left-3"),
            pool.submit(client.sample, table="scarce", wait_s=60),
        ]
        client.add({name: column[:3] for name, column in EPISODE.items()}, table="scarce")
        client.add(EPISODE, table="scarce")
        eventually(lambda: _held(client) == {"demos": (1, 0), "scarce": (0, 1)}, "both wait")
        info = client.info(table="scarce")
        listed = run(server, "list").stdout.splitlines()
        client.set_rate("demos", samples_per_insert=0)
        client.set_rate("scarce", min_steps=0)
        for one in held:
            one.result(60)

    assert list(info.tables) == ["", "demos", "scarce"]
    demos, scarce = info.tables["demos"], info.tables["scarce"]
    assert (demos.law, demos.counts.steps_stored, demos.config_toml, info.tables[""].rate) == ("step", 40, "", None)
    assert demos.rate is not None and (demos.rate.ratio, demos.rate.recent_ratio, demos.rate.owed_slices) == (0.4, 0.4, 32)
    assert demos.rate.adds[0].who == "left-3" and "learners have to take 32 slices" in demos.rate.adds_wait_for
    assert not demos.rate.batches_wait_for
    assert info.rate is not None and scarce.rate is not None and scarce.rate.batches_wait_for == info.rate.batches_wait_for
    assert scarce.episodes_not_sampled == info.episodes_not_sampled == 1
    assert listed[0] == "(default): 0 of 2,000 steps, 0 episodes, law episode, in memory"
    assert listed[2] == "  rate limit: 2 slices per step within 40 slices; 0.40 since the start, 0.40 in the last minute"
    assert listed[3].startswith("  1 actor held back, left-3 for ") and "learners have to take 32 slices" in listed[3]
    assert listed[5] == "  rate limit: no ratio, after 100 steps; none yet"
    assert listed[6].startswith("  1 learner held back, ipv4") and "actors have to add more" in listed[6]


def _held(client: ReplayClient) -> dict[str, tuple[int, int]]:
    rates = {name: table.rate for name, table in client.info().tables.items()}
    return {name: (rate.adds_held, rate.batches_held) for name, rate in rates.items() if rate is not None}


def test_change_of_the_limit_wakes_learner_and_actor() -> None:
    rate = {"samples_per_insert": 2, "tolerance": 40}
    with ServerThread(make_config(rate=rate)) as server, ReplayClient(server.address) as client, ThreadPoolExecutor(1) as pool:
        client.add(EPISODE)
        client.add(EPISODE)
        adding = pool.submit(client.add, EPISODE)
        eventually(lambda: client.info().rate.adds_held == 1, "the add waits")
        changed = run(server, "set", "rate.tolerance=1_000")
        adding.result(60)
        assert (changed.exit_code, changed.stdout) == (0, f"{server.address}: changed (default)\n")

        client.set_rate(min_steps=200)
        learning = pool.submit(lambda: client.sample(wait_s=60))
        eventually(lambda: client.info().rate.batches_held == 1, "the learner waits")
        assert run(server, "set", "rate.min_steps=10").exit_code == 0
        learning.result(60)


def test_cleared_table_lets_adds_pass_again() -> None:
    rate = {"samples_per_insert": 2, "tolerance": 40}
    with ServerThread(make_config(rate=rate)) as server, ReplayClient(server.address) as client, ThreadPoolExecutor(1) as pool:
        for _ in range(2):
            client.add(EPISODE)
        adding = pool.submit(client.add, EPISODE)
        eventually(lambda: client.info().rate.adds_held == 1, "the add waits")
        client.clear()
        adding.result(60)


def test_change_is_refused_by_name() -> None:
    with ServerThread(make_config(tables={"demos": {}})) as server, ReplayClient(server.address) as client:
        for keys, message in [
            ({"samples_per_insert": -1}, "rate.samples_per_insert: -1"),
            ({"tolerance": 1, "samples_per_insert": 1}, "rate.tolerance: 1, expected 0 or at least"),
            ({"every": 1}, "rate.every: unknown key"),
        ]:
            with pytest.raises(InvalidArgumentError, match=message):
                client.set_rate("demos", **keys)
        with pytest.raises(UnknownTableError, match="'expert' does not exist"):
            client.set_rate("expert", min_steps=1)
        assert client.info().rate is None
        for arguments in (["demos.rate.tolerance"], ["demos.batch_size=4"], ["a.b.rate.tolerance=4"]):
            assert run(server, "set", *arguments).exit_code == 2
        with pytest.raises(ServerInvalidArgumentError, match="buffer_size: only keys of rate can be changed"):
            server.buffer.registry.change("demos", {"buffer_size": 4})


def test_limit_of_a_created_table_is_remembered_and_that_of_a_configured_one_is_the_configured_one(tmp_path: Path) -> None:
    config = make_config(storage={"device": "cpu", "data_dir": str(tmp_path)}, rate={"samples_per_insert": 3}, tables={"demos": {}})
    with ServerThread(config) as server, ReplayClient(server.address) as client:
        assert run(server, "create", "expert", "rate.samples_per_insert=5").exit_code == 0
        assert run(server, "set", "expert.rate.min_steps=70", "demos.rate.samples_per_insert=4", "rate.samples_per_insert=9").exit_code == 0
        for name, number in (("expert", 5), ("demos", 4), ("", 9)):
            found = client.info(table=name).rate
            assert found is not None and found.samples_per_insert == number
        for _ in range(5):
            client.add(EPISODE, table="expert")
    with ServerThread(config) as server, ReplayClient(server.address) as client:
        for name, number, steps in (("expert", 5, 70), ("demos", 3, 0), ("", 3, 0)):
            found = client.info(table=name).rate
            assert found is not None and (found.samples_per_insert, found.min_steps, found.steps_added) == (number, steps, 0)
        client.sample(table="expert")  # restored steps count for min_steps


def test_in_process_add_over_the_limit_fails_and_the_limit_can_be_changed() -> None:
    buffer = ReplayBuffer(make_config(rate={"samples_per_insert": 2, "tolerance": 40}))
    for _ in range(2):
        buffer.add(EPISODE)
    with pytest.raises(ServerOverLimitError, match="learners have to take 40 slices"):
        buffer.add(EPISODE)
    for _ in range(10):
        buffer.sample()
    buffer.set_rate(samples_per_insert=4)
    buffer.add(EPISODE)
    assert buffer.config.rate.samples_per_insert == 4


def test_limited_table_holds_no_other_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("touchline_server.service.ingest.HELD_SHARE", 1024)
    config = make_config(rate={"tolerance": 40}, limits={"max_calls": 4096}, tables={"slow": {"rate": {"samples_per_insert": 2}}})
    with ServerThread(config) as server, Caller(server.address) as caller, ThreadPoolExecutor(8) as pool:
        from touchline_protos.codec import encode_add_episode

        def add(number: int) -> Any:
            episode = make_episode(20, key=key(number, client_id=f"actor-{number}"))
            return caller.channel.unary_unary("/touchline.v1.Replay/AddEpisode")(encode_add_episode(episode, table="slow"), timeout=30)

        for number in range(2):
            add(number)
        # Four may wait; the others are answered immediately.
        waiting = [pool.submit(add, number) for number in range(3, 11)]
        eventually(lambda: sum(one.done() for one in waiting) >= 4, "what is above the share is refused")
        caller.add(make_episode(20))
        server.buffer.registry.change("slow", {"rate": {"samples_per_insert": 0}})
        assert sum(one.exception(60) is None for one in waiting) == 4
