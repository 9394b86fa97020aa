"""Tables from the client's side: every verb, the writer with and without a spool, recorders, data sets, commands and drop-ins."""

from __future__ import annotations

import contextlib
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from tensordict import TensorDict

from support.dataset_cases import make_episode
from support.service_calls import make_config
from support.serving import ServerThread
from touchline import EpisodeWriter, InvalidArgumentError, ReplayClient, UnacknowledgedError, UnknownTableError, datasets
from touchline._spool import maintenance
from touchline.recorders import GymnasiumRecorder
from touchline.tdmpc2 import Buffer
from touchline.torchrl import RemoteReplayBuffer
from touchline_protos.codec import Episode

TABLES: dict[str, Any] = {"demos": {"horizon": 2}, "online": {}}
NOWHERE = "127.0.0.1:1"


@pytest.fixture
def server() -> Iterator[ServerThread]:
    with ServerThread(make_config(config={"buffer_size": 5_000, "min_history": 1, "horizon": 3, "batch_size": 8}, tables=TABLES)) as server:
        yield server


def stored(server: ServerThread, table: str) -> list[int]:
    """Returns the policy version of each episode in a table, oldest first."""
    with ReplayClient(server.address) as client:
        return [episode.policy_version for episode in client.episodes(table=table)]


def play(writer: EpisodeWriter, number: int) -> None:
    """Appends one episode of ten steps that follows from its number."""
    writer.policy_version = number
    columns = make_episode(number)
    for row in range(len(columns["reward"])):
        writer.append({name: column[row] for name, column in columns.items()})
    writer.end_episode()


def transitions(number: int) -> TensorDict:
    """Returns one trajectory of six transitions for TorchRL's buffer."""
    obs = torch.full((7, 3), float(number)) + torch.arange(7.0)[:, None]
    done = torch.arange(6)[:, None] == 5
    after = TensorDict({"observation": obs[1:], "reward": torch.ones(6, 1), "done": done, "terminated": done}, [6])
    return TensorDict({"observation": obs[:-1], "action": torch.zeros(6, 2), "next": after}, [6])


# Verbs


def test_every_verb_reaches_the_table_of_the_call_or_else_the_clients(server: ServerThread) -> None:
    with ReplayClient(server.address, table="demos", as_numpy=True) as client:
        added = [
            client.add(make_episode(0, obs=7)),
            client.add(make_episode(1, obs=2), table="online"),
            client.add(make_episode(2), table=""),
        ]
        loaded = [client.load([make_episode(3, obs=7)] * 2), client.load([make_episode(4, obs=2)] * 3, table="online")]
        delivered = Episode(make_episode(5, obs=7), key=client.next_key(), policy_version=5)
        client.deliver(delivered, table="demos")
        (answers,) = client.deliver_all([(delivered.key, delivered)] if delivered.key else [], table="online")
        counts = {name: client.counts(table=name).episodes_stored for name in ("", "demos", "online")}
        shapes = {name: client.sample(table=name, batch_size=4).obs.shape for name in (None, "online")}
        with client.batches(table="online", batch_size=5) as batches:
            shapes["stream"] = next(batches).obs.shape
        read = {name: len(list(client.episodes(table=name))) for name in (None, "online", "")}
        ready = (
            client.ready(table="demos"),
            client.wait_until_ready(1, 10, table="online").horizon,
            client.ready_state(table="demos").horizon,
        )
        capacity = client.info(table="online").columns["obs"].shape
        cleared = client.clear(table="online").episodes_stored
        left = {name: client.counts(table=name).episodes_stored for name in ("", "demos", "online")}

    assert (added, loaded) == ([1, 1, 1], [3, 4])
    assert answers[0].error is not None and "obs" in str(answers[0].error)  # seven values, of the schema of the other table
    assert counts == {"": 1, "demos": 4, "online": 4}
    assert shapes == {None: (3, 4, 7), "online": (4, 4, 2), "stream": (4, 5, 2)}
    assert read == {None: 4, "online": 4, "": 1}
    assert ready == (True, 3, 2)
    assert capacity == (2,)
    assert (cleared, left) == (0, {"": 1, "demos": 4, "online": 0})


def verbs(client: ReplayClient, table: str) -> dict[str, Callable[[], Any]]:
    episode = Episode(make_episode(0), key=client.next_key())
    return {
        "add": lambda: client.add(make_episode(0), table=table),
        "load": lambda: client.load([make_episode(0)], table=table),
        "deliver": lambda: client.deliver(episode, table=table),
        "deliver_all": lambda: list(client.deliver_all([(client.next_key(), episode)], table=table)),
        "sample": lambda: client.sample(table=table),
        "batches": lambda: next(client.batches(table=table)),
        "episodes": lambda: list(client.episodes(table=table)),
        "ready": lambda: client.ready(table=table),
        "wait_until_ready": lambda: client.wait_until_ready(table=table),
        "counts": lambda: client.counts(table=table),
        "info": lambda: client.info(table=table),
        "clear": lambda: client.clear(table=table),
    }


VERBS = ["add", "load", "deliver", "deliver_all", "sample", "batches", "episodes", "ready", "wait_until_ready", "counts", "info", "clear"]


@pytest.mark.parametrize("verb", VERBS)
def test_unknown_table_is_an_error_that_names_those_that_exist(server: ServerThread, verb: str) -> None:
    with ReplayClient(server.address) as client, pytest.raises(UnknownTableError, match=r"'expert' does not exist.*'demos'.*'online'"):
        verbs(client, "expert")[verb]()


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("table", ["x" * 129, "line\nbreak", 7])
def test_name_that_no_table_can_have_is_refused_before_any_call(verb: str, table: Any) -> None:
    with ReplayClient(NOWHERE) as client, pytest.raises(InvalidArgumentError, match=r"^table: .*expected"):
        verbs(client, table)[verb]()


@pytest.mark.parametrize("table", ["x" * 129, "line\nbreak", 7])
def test_client_or_writer_of_a_name_that_no_table_can_have_is_refused(table: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=r"^table: "):
        ReplayClient(NOWHERE, table=table)
    with ReplayClient(NOWHERE) as client, pytest.raises(InvalidArgumentError, match=r"^table: "):
        EpisodeWriter(client, table=table)


# Writers and recorders


@pytest.mark.parametrize("spooled", [False, True])
def test_writers_of_one_client_fill_a_table_each(server: ServerThread, tmp_path: Path, spooled: bool) -> None:
    with ReplayClient(server.address, table="demos") as client, contextlib.ExitStack() as stack:
        writers = [
            stack.enter_context(EpisodeWriter(client, table=table, spool_dir=tmp_path / str(number) if spooled else None))
            for number, table in enumerate([None, "online", ""])
        ]
        for number in range(12):
            play(writers[number % 3], number)
        names = [writer.table for writer in writers]

    assert names == ["demos", "online", ""]
    assert {table: stored(server, table) for table in ("demos", "online", "")} == {
        "demos": [0, 3, 6, 9],
        "online": [1, 4, 7, 10],
        "": [2, 5, 8, 11],
    }


KILLED = """
import sys, numpy as np
from support.dataset_cases import make_episode
from touchline import EpisodeWriter, ReplayClient

client = ReplayClient(sys.argv[1], timeout_s=1)
for first, table in ((0, "demos"), (3, "online")):
    writer = EpisodeWriter(client, table=table, spool_dir=sys.argv[2], actor="robot")
    for number in range(first, first + 3):
        writer.policy_version = number
        columns = make_episode(number)
        for row in range(len(columns["reward"])):
            writer.append({name: column[row] for name, column in columns.items()})
        writer.end_episode()
    if table == "demos":
        writer.close(0)
print("written", flush=True)
sys.stdin.read()
"""


def test_spooled_episodes_keep_their_table_over_kills_and_the_next_writers_table(server: ServerThread, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, NOWHERE, str(tmp_path / "spool")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]) as process:
        assert process.stdout is not None and process.stdout.readline() == "written\n"
        process.kill()

    report = maintenance.inspect(tmp_path / "spool")
    with ReplayClient(server.address) as client, EpisodeWriter(client, spool_dir=tmp_path / "spool") as writer:
        play(writer, 6)

    assert [episode.table for episode in report.waiting] == ["demos"] * 3 + ["online"] * 3
    assert {table: stored(server, table) for table in ("demos", "online", "")} == {"demos": [0, 1, 2], "online": [3, 4, 5], "": [6]}
    assert writer.counters.acknowledged == 7 and writer.counters.resumed == 6


@pytest.mark.parametrize("spooled", [False, True])
def test_episode_for_a_table_that_does_not_exist_is_refused_with_the_reason(
    server: ServerThread, tmp_path: Path, spooled: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with ReplayClient(server.address) as client:
        writer = EpisodeWriter(client, table="expert", spool_dir=tmp_path / "spool" if spooled else None)
        for number in range(3):
            with contextlib.suppress(UnacknowledgedError):
                play(writer, number)
        with contextlib.suppress(UnacknowledgedError):
            writer.close()

    assert (writer.counters.refused, writer.counters.pending) == (writer.counters.appended, 0) and writer.counters.refused
    refusals = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR and "expert" in record.getMessage()]
    assert len(refusals) == writer.counters.refused and "'expert' does not exist" in refusals[0] and "'demos'" in refusals[0]


def test_refused_episodes_of_a_table_are_sent_once_it_exists(server: ServerThread, tmp_path: Path) -> None:
    folder = tmp_path / "spool"
    with (
        ReplayClient(server.address) as client,
        contextlib.suppress(UnacknowledgedError),
        EpisodeWriter(client, table="expert", spool_dir=folder) as writer,
    ):
        play(writer, 0)
    refused = maintenance.inspect(folder).refused

    with ServerThread(make_config(tables={"expert": {}, "demos": {}})) as second:
        requeued = maintenance.retry(folder)
        report = maintenance.send(folder, second.address)
        found = {table: stored(second, table) for table in ("", "demos", "expert")}

    assert [(episode.table, "'expert' does not exist" in episode.reason) for episode in refused] == [("expert", True)]
    assert (requeued, report.sent, report.refused) == (1, 1, 0)
    assert found == {"": [], "demos": [], "expert": [0]}


def test_spool_command_shows_tables(server: ServerThread, tmp_path: Path) -> None:
    with ReplayClient(NOWHERE, timeout_s=0.1) as client:
        for count, table in ((2, "demos"), (1, ""), (3, "demos")):
            with EpisodeWriter(client, table=table, spool_dir=tmp_path) as writer:
                for number in range(count):
                    play(writer, number)

    shown = subprocess.run([sys.executable, "-m", "touchline", "spool", "show", str(tmp_path)], capture_output=True, text=True, check=True)

    assert "    1 for the default table, 5 for the table 'demos'\n" in shown.stdout


def test_recorder_stores_in_its_table(server: ServerThread, tmp_path: Path) -> None:
    with (
        ReplayClient(server.address, table="online") as client,
        GymnasiumRecorder(gymnasium.make("Pendulum-v1", max_episode_steps=20), client, table="demos", spool_dir=tmp_path) as env,
    ):
        env.reset(seed=1)
        for _ in range(20):
            env.step(env.action_space.sample())
        env.recording.flush(20)
        counts = {name: client.counts(table=name).episodes_stored for name in ("", *TABLES)}

    assert counts == {"": 0, "demos": 1, "online": 0}


# Data sets and commands


def test_data_set_is_loaded_into_a_table_and_exported_from_it(server: ServerThread, tmp_path: Path) -> None:
    path = tmp_path / "all.npz"
    with ReplayClient(server.address) as client:
        client.load([make_episode(number) for number in range(5)], table="demos")
        exported = datasets.export(client, str(path), table="demos")
        report = datasets.load(client, str(path), table="online")
        again = datasets.load(client, str(path), table="online")
        default = datasets.load(client, str(path))
        counts = {name: client.counts(table=name).episodes_stored for name in ("", *TABLES)}
        read = {name: list(client.episodes(table=name)) for name in TABLES}

    assert (exported.written, report.stored, again.duplicates, default.stored) == (5, 5, 5, 5)
    assert counts == {"": 5, "demos": 5, "online": 5}
    for one, other in zip(read["demos"], read["online"], strict=True):
        assert one.key == other.key
        assert all(np.array_equal(one.columns[name], other.columns[name], equal_nan=True) for name in one.columns)


def touchline(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "touchline", *arguments], capture_output=True, text=True, check=False)


def test_commands_take_a_table(server: ServerThread, tmp_path: Path) -> None:
    np.savez(tmp_path / "demos.npz", **{f"0/{name}": column for name, column in make_episode(0).items()})  # type: ignore[arg-type]
    at = ("--address", server.address)

    loaded = touchline("load", str(tmp_path / "demos.npz"), "--table", "demos", *at)
    exported = touchline("export", str(tmp_path / "out.npz"), "--table", "demos", *at)
    empty = touchline("export", str(tmp_path / "none.npz"), "--table", "online", *at)
    cleared = touchline("clear", "--table", "demos", "--yes", *at)
    unknown = touchline("load", str(tmp_path / "demos.npz"), "--table", "expert", *at)

    assert loaded.returncode == 0 and f"{server.address}, table 'demos' has 1 episode, 11 steps" in loaded.stdout
    assert exported.returncode == 0 and "out.npz: 1 episode" in exported.stdout
    assert empty.returncode == 1 and "no episodes are stored" in empty.stderr
    assert f"{server.address}, table 'demos': cleared, 1 episode removed" in cleared.stdout
    assert unknown.returncode == 1 and "UnknownTableError" in unknown.stderr and "'demos'" in unknown.stderr


# Drop-ins


@pytest.mark.parametrize("by", ["argument", "cfg", "backend", "in process"])
def test_tdmpc2_buffer_uses_its_table(server: ServerThread, by: str) -> None:
    cfg = SimpleNamespace(buffer_size=5_000, steps=5_000, batch_size=4, horizon=3, device="cpu", replay_address=server.address)
    with contextlib.ExitStack() as stack:
        if by == "argument":
            buffer = Buffer(cfg, table="demos")
        elif by == "cfg":
            buffer = Buffer(SimpleNamespace(**vars(cfg), replay_table="demos"))
        elif by == "backend":
            buffer = Buffer(cfg, stack.enter_context(ReplayClient(server.address, table="demos")))
        else:
            buffer = Buffer(cfg, server.buffer.tables["demos"])
        stack.enter_context(buffer)
        columns = {"obs": torch.zeros(11, 6), "action": torch.zeros(11, 2), "reward": torch.zeros(11)}
        assert buffer.add(TensorDict(columns, [11])) == 1
        assert buffer.load(TensorDict({name: column[None].repeat_interleave(2, 0) for name, column in columns.items()}, [2, 11])) == 3
        assert buffer.sample()[0].shape == (4, 4, 6)
    with ReplayClient(server.address) as client:
        counts = {name: client.counts(table=name).episodes_stored for name in ("", *TABLES)}

    assert counts == {"": 0, "demos": 3, "online": 0}


def test_tdmpc2_buffer_of_an_unknown_table_or_of_two_is_refused(server: ServerThread) -> None:
    cfg = SimpleNamespace(buffer_size=5_000, steps=5_000, batch_size=4, horizon=3, replay_address=server.address)

    with pytest.raises(UnknownTableError, match="'expert' does not exist"):
        Buffer(cfg, table="expert")
    with pytest.raises(InvalidArgumentError, match=r"^table: 'demos' with a backend"):
        Buffer(cfg, server.buffer, table="demos")


def test_torchrl_buffer_uses_its_table(server: ServerThread) -> None:
    with (
        ReplayClient(server.address, table="online") as client,
        RemoteReplayBuffer(client, table="demos", batch_size=4, slice_len=2) as buffer,
    ):
        buffer.extend(transitions(1))
        buffer.extend(torch.cat([transitions(2), transitions(3)]))
        sampled, length, written = buffer.sample(), len(buffer), buffer.write_count
        counts = {name: client.counts(table=name).episodes_stored for name in ("", *TABLES)}
        buffer.empty()
        emptied = client.counts(table="demos").episodes_stored

    assert sampled.batch_size == (4,) and (length, written) == (18, 18)
    assert counts == {"": 0, "demos": 3, "online": 0} and emptied == 0
