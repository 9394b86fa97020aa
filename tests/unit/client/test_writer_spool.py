"""The episode writer with a full queue, and with a spool."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from support.client_faults import ScriptedServer, fail, trying_once
from support.service_calls import eventually
from touchline import (
    ClosedError,
    EpisodeWriter,
    InvalidArgumentError,
    InvalidEpisodeError,
    OverLimitError,
    ReplayClient,
    SpoolError,
    TooLargeError,
    UnacknowledgedError,
    UnauthenticatedError,
    WriterCounters,
)
from touchline._actor.sender_log import SenderLog
from touchline._spool.queue import Spool
from touchline_protos.codec import Episode, EpisodeKey, decode_add_episode

LIMIT = 2 << 20


class Shelf:
    """A server's stored episodes, each key once; ``away`` makes it unavailable, ``deaf`` makes it store without answering in time."""

    def __init__(self) -> None:
        self.away = threading.Event()
        self.deaf = threading.Event()
        self.asked = threading.Event()
        self.failures: list[tuple[grpc.StatusCode, str]] = []
        self.episodes: dict[EpisodeKey, Episode] = {}
        self.requests: list[bytes] = []

    def __call__(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        self.asked.set()
        if self.away.is_set():
            fail(context, grpc.StatusCode.UNAVAILABLE)
        if self.failures:
            fail(context, *self.failures.pop(0))
        _, episode = decode_add_episode(request)
        assert episode.key is not None
        self.requests.append(request)
        self.episodes.setdefault(episode.key, episode)
        if self.deaf.is_set():
            fail(context, grpc.StatusCode.DEADLINE_EXCEEDED)
        return b""

    @property
    def firsts(self) -> list[float]:
        return [episode.columns["obs"][0].item() for episode in self.episodes.values()]


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


@pytest.fixture
def client(shelf: Shelf) -> Iterator[ReplayClient]:
    with ScriptedServer(AddEpisode=shelf) as server, ReplayClient(server.address, actor="keeper") as client:
        yield trying_once(client)


def play(writer: EpisodeWriter, first: int, rows: int = 2) -> EpisodeKey | None:
    """Appends an episode's rows and ends it; the first observation identifies it."""
    for number in range(rows):
        writer.append({"obs": np.float32(first + number), "action": np.zeros(4, np.float32), "reward": 0.0})
    return writer.end_episode()


def check(counters: WriterCounters) -> None:
    assert counters.appended + counters.resumed == counters.pending + counters.acknowledged + counters.refused + counters.dropped


# A full queue, without a spool


def test_drop_oldest_keeps_the_newest_and_the_one_being_sent(client: ReplayClient, shelf: Shelf, caplog: pytest.LogCaptureFixture) -> None:
    shelf.away.set()
    writer = EpisodeWriter(client, max_pending=3, when_full="drop-oldest")
    play(writer, 0)
    assert shelf.asked.wait(60)

    assert all(play(writer, number) is not None for number in range(1, 7))
    counters = writer.counters
    shelf.away.clear()
    writer.close(60)

    check(counters)
    assert (counters.pending, counters.dropped, counters.steps_dropped) == (3, 4, 8)
    assert shelf.firsts == [0, 5, 6]
    lines = [record.getMessage() for record in caplog.records if "dropped" in record.getMessage()]
    assert "dropped 1 episodes since the last such line (drop-oldest), 1 with 2 rows in all" in lines[0]
    assert "dropped 3 episodes since the last such line (drop-oldest), 4 with 8 rows in all" in lines[1]
    assert len(lines) == 2


def test_drop_newest_keeps_the_oldest_and_returns_no_key(client: ReplayClient, shelf: Shelf) -> None:
    shelf.away.set()
    writer = EpisodeWriter(client, max_pending=3, when_full="drop-newest")

    keys = [play(writer, number) for number in range(5)]
    counters = writer.counters
    shelf.away.clear()
    writer.close(60)

    check(counters)
    assert [key is None for key in keys] == [False, False, False, True, True]
    assert (counters.appended, counters.dropped, counters.steps_dropped, counters.steps_appended) == (5, 2, 4, 10)
    assert shelf.firsts == [0, 1, 2]


def test_bytes_in_memory_are_bounded_and_a_larger_episode_waits_by_itself(client: ReplayClient, shelf: Shelf) -> None:
    shelf.away.set()
    row = 4 * (1 + 4 + 1)
    writer = EpisodeWriter(client, max_pending=50, max_pending_bytes=10 * row, when_full="drop-newest")

    kept = [play(writer, 10 * number, rows) is not None for number, rows in enumerate((20, 2, 2))]
    shelf.away.clear()
    writer.flush(60)
    shelf.away.set()
    kept += [play(writer, 10 * number, rows) is not None for number, rows in enumerate((4, 4, 4), 3)]
    shelf.away.clear()
    writer.close(60)

    assert kept == [True, False, False, True, True, False]
    assert shelf.firsts == [0, 30, 40]


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"when_full": "drop"}, "when_full"),
        ({"when_full": "drop-oldest", "max_pending": 1}, "max_pending"),
        ({"max_pending_bytes": 0}, "max_pending_bytes"),
        ({"spool_limit_bytes": 1000}, "spool_limit_bytes"),
    ],
)
def test_bad_argument_is_refused(client: ReplayClient, arguments: dict[str, Any], name: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"^{name}: .*expected"):
        EpisodeWriter(client, **arguments)


# A spool


def test_spooled_episode_goes_out_and_leaves_the_disk(client: ReplayClient, shelf: Shelf, tmp_path: Path) -> None:
    with EpisodeWriter(client, spool_dir=tmp_path / "spool", policy_version=4) as writer:
        key = play(writer, 7, 3)
        writer.flush(60)
        counters = writer.counters

    (episode,) = shelf.episodes.values()
    assert (episode.key, episode.actor, episode.policy_version, shelf.firsts) == (key, "keeper", 4, [7])
    assert (counters.acknowledged, counters.pending, counters.resumed, counters.steps_acknowledged) == (1, 0, 0, 3)
    assert counters.spool_bytes > 0
    spool = Spool(tmp_path / "spool", limit_bytes=LIMIT)
    assert spool.resumed == 0
    spool.close()


def test_ended_episode_is_on_the_disk_when_end_episode_returns(client: ReplayClient, shelf: Shelf, tmp_path: Path) -> None:
    shelf.away.set()
    writer = EpisodeWriter(client, spool_dir=tmp_path / "spool", max_steps=3)
    for number in range(5):  # cut after four rows
        writer.append({"obs": np.float32(number), "action": np.float32(0), "reward": 0.0})
    shutil.copytree(tmp_path / "spool", tmp_path / "killed-after-the-cut")
    last = writer.end_episode()
    shutil.copytree(tmp_path / "spool", tmp_path / "killed-after-the-end")
    writer.close(0)

    found = []
    for name in ("killed-after-the-cut", "killed-after-the-end"):
        spool = Spool(tmp_path / name, limit_bytes=LIMIT)
        found.append(spool.waiting_keys())
        spool.close()
    assert [len(keys) for keys in found] == [1, 2]
    assert found[1][-1] == last


def test_next_writer_sends_what_was_left_under_the_first_keys_and_in_order(client: ReplayClient, shelf: Shelf, tmp_path: Path) -> None:
    shelf.away.set()
    first = EpisodeWriter(client, spool_dir=tmp_path, actor="left")
    keys = [play(first, number) for number in range(3)]
    first.close(0)
    shelf.away.clear()

    second = EpisodeWriter(client, spool_dir=tmp_path, actor="right")
    keys.append(play(second, 3))
    second.close(60)

    assert list(shelf.episodes) == keys
    assert [episode.actor for episode in shelf.episodes.values()] == ["left"] * 3 + ["right"]
    counters = second.counters
    check(counters)
    assert (counters.resumed, counters.appended, counters.acknowledged, counters.pending) == (3, 1, 4, 0)


def test_episode_whose_acknowledgement_was_lost_is_sent_again_under_the_same_key(
    client: ReplayClient, shelf: Shelf, tmp_path: Path
) -> None:
    shelf.deaf.set()
    first = EpisodeWriter(client, spool_dir=tmp_path)
    play(first, 5)
    eventually(lambda: bool(shelf.requests), "the server stored it")
    first.close(0)
    shelf.deaf.clear()

    with EpisodeWriter(client, spool_dir=tmp_path) as second:
        second.flush(60)

    assert len(shelf.requests) > 1 and len(set(shelf.requests)) == 1
    assert len(shelf.episodes) == 1


def test_close_leaves_pending_episodes_to_the_next_start_with_a_warning(
    client: ReplayClient, shelf: Shelf, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shelf.away.set()
    hasty = ReplayClient(client.address, timeout_s=0.2)  # time that closing waits
    with hasty, EpisodeWriter(hasty, spool_dir=tmp_path, actor="keeper") as writer:
        play(writer, 0)
        writer.append({"obs": np.float32(9)})
        writer.append({"obs": np.float32(10)})

    assert writer.counters.pending == 2
    assert f"2 episodes wait in {tmp_path} for its next start" in caplog.text
    writer.close()  # and is closed
    with pytest.raises(ClosedError):
        writer.append({"obs": 1})
    with pytest.raises(ClosedError, match="2 episodes wait in"):
        writer.flush()
    Spool(tmp_path, limit_bytes=LIMIT).close()  # the folder is free


def test_flush_in_vain_names_what_waits(client: ReplayClient, shelf: Shelf, tmp_path: Path) -> None:
    shelf.away.set()
    writer = EpisodeWriter(client, spool_dir=tmp_path)
    key = play(writer, 0)

    with pytest.raises(UnacknowledgedError) as caught:
        writer.flush(0.1)

    assert [result.key for result in caught.value.results] == [key]
    writer.close(0)


def test_second_writer_on_the_folder_is_refused(client: ReplayClient, tmp_path: Path) -> None:
    with EpisodeWriter(client, spool_dir=tmp_path), pytest.raises(SpoolError, match="give each writer a folder of its own"):
        EpisodeWriter(client, spool_dir=tmp_path)


def test_refused_episode_is_reported_and_kept_aside(client: ReplayClient, shelf: Shelf, tmp_path: Path) -> None:
    shelf.failures = [(grpc.StatusCode.INVALID_ARGUMENT, "invalid-episode")]
    writer = EpisodeWriter(client, spool_dir=tmp_path)
    key = play(writer, 0)
    with pytest.raises(UnacknowledgedError) as caught:
        writer.flush(60)
    play(writer, 1)
    writer.close(60)

    assert [(result.key, type(result.error)) for result in caught.value.results] == [(key, InvalidEpisodeError)]
    assert shelf.firsts == [1]
    counters = writer.counters
    check(counters)
    assert (counters.refused, counters.acknowledged) == (1, 1)


def test_client_that_is_not_let_in_loses_nothing_and_goes_on_once_it_is(client: ReplayClient, shelf: Shelf, tmp_path: Path) -> None:
    shelf.failures = [(grpc.StatusCode.UNAUTHENTICATED, "")] * 1000
    writer = EpisodeWriter(client, spool_dir=tmp_path)
    play(writer, 0)
    assert shelf.asked.wait(60)
    eventually(lambda: len(shelf.failures) < 999, "it was turned away twice")
    with pytest.raises(UnacknowledgedError) as caught:
        writer.flush(0)

    shelf.failures.clear()
    writer.close(60)

    assert [type(result.error) for result in caught.value.results] == [UnauthenticatedError]
    assert shelf.firsts == [0] and writer.counters.refused == 0


def test_closed_client_leaves_the_episodes_in_the_spool(shelf: Shelf, tmp_path: Path) -> None:
    shelf.away.set()
    with ScriptedServer(AddEpisode=shelf) as server:
        client = ReplayClient(server.address, timeout_s=0.2)
        writer = EpisodeWriter(client, spool_dir=tmp_path)
        key = play(writer, 0)
        client.close()
        with pytest.raises(UnacknowledgedError) as caught:
            writer.flush()
        writer.close()

    assert [(result.key, type(result.error)) for result in caught.value.results] == [(key, ClosedError)]
    spool = Spool(tmp_path, limit_bytes=LIMIT)
    assert spool.waiting_keys() == [key]
    spool.close()


def test_episode_larger_than_the_spool_is_refused_and_reported(client: ReplayClient, shelf: Shelf, tmp_path: Path) -> None:
    writer = EpisodeWriter(client, spool_dir=tmp_path, spool_limit_bytes=1 << 20)
    for _ in range(2):
        writer.append({"obs": np.zeros(500_000, np.uint8)})
    writer.end_episode()

    with pytest.raises(UnacknowledgedError, match="raise spool_limit_bytes, or cut") as caught:
        writer.end_episode()
    writer.close(60)

    assert [type(result.error) for result in caught.value.results] == [TooLargeError]
    assert writer.counters.refused == 1


def test_full_spool_blocks_the_actor_until_there_is_space_and_is_logged_once(
    client: ReplayClient, shelf: Shelf, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shelf.away.set()
    writer = EpisodeWriter(client, spool_dir=tmp_path, max_pending=2)
    third = threading.Event()

    def act() -> None:
        for number in range(3):
            play(writer, number)
        third.set()

    actor = threading.Thread(target=act)
    actor.start()
    eventually(lambda: writer.counters.pending == 2, "two wait")
    assert not third.wait(0.2)
    shelf.away.clear()

    assert third.wait(60)
    actor.join()
    for number in range(3, 20):
        play(writer, number)
    writer.close(60)
    assert shelf.firsts == list(range(20))
    # A second line only if the reason was not known at first.
    assert caplog.text.count("is blocked: no space for another episode, 2 are pending: ") in (1, 2)


@pytest.mark.parametrize("when_full", ["drop-oldest", "drop-newest"])
def test_full_spool_drops_by_its_policy_within_its_bytes(client: ReplayClient, shelf: Shelf, tmp_path: Path, when_full: Any) -> None:
    shelf.away.set()
    writer = EpisodeWriter(client, spool_dir=tmp_path, spool_limit_bytes=1 << 20, when_full=when_full)
    keys = []
    for number in range(40):
        for _ in range(2):
            writer.append({"obs": np.full(10_000, number, np.float32)})
        keys.append(writer.end_episode())
        assert writer.counters.spool_bytes <= 1 << 20
    counters = writer.counters
    shelf.away.clear()
    writer.flush(60)
    writer.close()

    check(counters)
    assert counters.dropped > 20 and counters.steps_dropped == 2 * counters.dropped
    numbers = [int(episode.columns["obs"][0, 0]) for episode in shelf.episodes.values()]
    assert len(numbers) == 40 - counters.dropped
    if when_full == "drop-newest":
        assert [key for key in keys if key is not None] == list(shelf.episodes)
        assert numbers[:5] == [0, 1, 2, 3, 4]
    else:
        assert None not in keys
        assert numbers[1:] == list(range(41 - len(numbers), 40))


def test_close_with_a_full_spool_keeps_the_unfinished_episode_until_there_is_space(
    client: ReplayClient, shelf: Shelf, tmp_path: Path
) -> None:
    shelf.away.set()
    writer = EpisodeWriter(client, spool_dir=tmp_path, max_pending=1)
    play(writer, 0)
    for number in (1, 2):
        writer.append({"obs": np.float32(number), "action": np.zeros(4, np.float32), "reward": 0.0})

    with pytest.raises(SpoolError, match="no space"):
        writer.close(0.1)
    loss = writer._state.describe_loss()
    shelf.away.clear()
    writer.close(60)
    writer.close(60)

    assert loss is not None and "2 rows of an unfinished one" in loss
    assert shelf.firsts == [0, 1]


@pytest.mark.parametrize("ended_by", ["end", "cut"])
def test_spool_that_cannot_be_written_is_reported_and_loses_nothing_once_it_can(
    client: ReplayClient, shelf: Shelf, tmp_path: Path, ended_by: str
) -> None:
    shelf.away.set()
    writer = EpisodeWriter(client, spool_dir=tmp_path, max_steps=1 if ended_by == "cut" else None)
    connection = writer._state.sender._queue._connection  # type: ignore[attr-defined]
    connection.execute("PRAGMA query_only = ON")
    rows = [{"obs": np.float32(number), "action": np.float32(0), "reward": 0.0} for number in range(3)]
    writer.append(rows[0])
    writer.append(rows[1])  # the next call retries a cut that failed here
    calls = [writer.end_episode, writer.end_episode] if ended_by == "end" else [writer.end_episode]
    for call in [*calls, lambda: writer.append(rows[2])]:
        with pytest.raises(SpoolError):
            call()

    connection.execute("PRAGMA query_only = OFF")
    shelf.away.clear()
    if ended_by == "cut":
        writer.append(rows[2])
    assert writer.end_episode() is not None or ended_by == "cut"
    writer.close(60)

    found = [episode.columns["obs"].tolist() for episode in shelf.episodes.values()]
    assert found == ([[0, 1]] if ended_by == "end" else [[0, 1], [1, 2]])
    check(writer.counters)


def test_damaged_episode_is_reported_and_the_others_arrive(client: ReplayClient, shelf: Shelf, tmp_path: Path) -> None:
    shelf.away.set()
    first = EpisodeWriter(client, spool_dir=tmp_path)
    keys = [play(first, 1000 + number, 50) for number in range(3)]
    first.close(0)
    data = (tmp_path / "spool.db").read_bytes()
    values = np.arange(1001, 1051, dtype=np.float32)
    assert values.tobytes() in data
    (tmp_path / "spool.db").write_bytes(data.replace(values.tobytes(), (values + (values == 1010)).tobytes()))
    shelf.away.clear()

    second = EpisodeWriter(client, spool_dir=tmp_path)
    with pytest.raises(UnacknowledgedError, match="damaged") as caught:
        second.close(60)

    assert [(result.key, type(result.error)) for result in caught.value.results] == [(keys[1], SpoolError)]
    assert list(shelf.episodes) == [keys[0], keys[2]]
    check(second.counters)


def test_memory_does_not_grow_with_what_waits_in_the_spool(client: ReplayClient, shelf: Shelf, tmp_path: Path) -> None:
    shelf.away.set()
    writer = EpisodeWriter(client, spool_dir=tmp_path)
    row = {"obs": np.zeros(250_000, np.uint8)}

    def add(episodes: int) -> None:
        for _ in range(episodes):
            writer.append(row)
            writer.append(row)
            writer.end_episode()

    add(3)
    assert shelf.asked.wait(60)
    tracemalloc.start()
    add(40)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    pending = writer.counters.pending
    writer.close(0)

    assert pending == 43
    assert held < 4_000_000, "43 episodes have 21 MB"


# Processes


FORKING = """
import os, sys
import numpy as np
from touchline import EpisodeWriter, ForkError, ReplayClient

def play(writer):
    for _ in range(3):
        writer.append({"obs": np.zeros(2, np.float32), "action": np.zeros(1, np.float32), "reward": 0.0})
    return writer.end_episode()

client = ReplayClient(sys.argv[1], timeout_s=5)
writer = EpisodeWriter(client, spool_dir=sys.argv[2])
for number in range(5):
    play(writer)
    pid = os.fork()
    if pid == 0:
        try:
            try:
                play(writer)
            except ForkError as error:
                assert "make a writer there (if with a spool, in another folder)" in str(error), error
            else:
                os._exit(2)
            writer.close()
            with EpisodeWriter(client, spool_dir=f"{sys.argv[2]}-child-{number}") as mine:
                play(mine)
            os._exit(0 if mine.counters.acknowledged == 1 else 3)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    play(writer)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
writer.close(60)
assert writer.counters.acknowledged == 10, writer.counters
"""


def test_fork_between_episodes_leaves_the_spool_to_the_parent(shelf: Shelf, tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name != "GRPC_ENABLE_FORK_SUPPORT"}

    with ScriptedServer(AddEpisode=shelf) as server:
        ended = subprocess.run(
            [sys.executable, "-c", FORKING, server.address, str(tmp_path / "spool")], capture_output=True, text=True, timeout=300, env=env
        )

    assert ended.returncode == 0, ended.stderr
    assert len(shelf.episodes) == len(shelf.requests) == 15


FORGETFUL = """
import sys
import numpy as np
from touchline import EpisodeWriter, ReplayClient

writer = EpisodeWriter(ReplayClient(sys.argv[1], timeout_s=0.1), spool_dir=sys.argv[2])
for _ in range(3):
    writer.append({"obs": np.zeros(2, np.float32), "action": np.zeros(1, np.float32), "reward": 0.0})
writer.end_episode()
writer.append({"obs": np.zeros(2, np.float32)})
"""


def test_writer_forgotten_at_exit_leaves_its_episodes_in_the_spool_and_says_what_is_lost(
    shelf: Shelf, client: ReplayClient, tmp_path: Path
) -> None:
    shelf.away.set()
    ended = subprocess.run(
        [sys.executable, "-c", FORGETFUL, client.address, str(tmp_path)], capture_output=True, text=True, timeout=300, check=True
    )
    shelf.away.clear()
    with EpisodeWriter(client, spool_dir=tmp_path) as writer:
        writer.flush(60)

    assert "was not closed: 1 rows of an unfinished one" in ended.stderr
    assert f"was not closed: 1 episodes wait in {tmp_path} for its next start" in ended.stderr
    assert len(shelf.episodes) == 1


def test_line_about_sending_in_vain_is_repeated_after_ten_seconds_and_then_each_minute(caplog: pytest.LogCaptureFixture) -> None:
    now = [100.0]
    log = SenderLog("writer", "", clock=lambda: now[0])
    full = OverLimitError("the disk is full")

    logged = []
    for second in range(200):
        now[0] = 100.0 + second
        before = len(caplog.messages)
        log.retrying(full, second)
        logged += [second] * (len(caplog.messages) - before)

    assert logged == [0, 10, 70, 130, 190]
    assert caplog.messages[-1] == "writer: 190 episodes are pending, retrying: the disk is full"
