"""The episode writer with a server that stores, refuses and goes away on demand."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
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
    EpisodeKey,
    EpisodeResult,
    EpisodeWriter,
    InvalidArgumentError,
    InvalidEpisodeError,
    KeyConflictError,
    ReplayClient,
    ServerError,
    UnacknowledgedError,
    UnavailableError,
)
from touchline._actor.queue import MemoryQueue, PutResult, QueueItem
from touchline._actor.sender import EpisodeSender
from touchline_protos.codec import Episode, LoadDecoder, decode_add_episode
from touchline_protos.v1 import replay_pb2 as pb


class Shelf:
    """A server's stored episodes; while ``away`` is set it is unavailable, and ``failures`` are answered first, one a call."""

    def __init__(self, *failures: tuple[grpc.StatusCode, str]) -> None:
        self.failures = list(failures)
        self.away = threading.Event()
        self.asked = threading.Event()
        self.episodes: list[Episode] = []

    def __call__(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        self.asked.set()
        if self.away.is_set():
            fail(context, grpc.StatusCode.UNAVAILABLE, details="gone for lunch")
        if self.failures:
            fail(context, *self.failures.pop(0), details="obs: as the test wants")
        self.episodes.append(decode_add_episode(request)[1])
        return b""

    def columns(self, name: str) -> list[list[Any]]:
        return [episode.columns[name].tolist() for episode in self.episodes]


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


@pytest.fixture
def client(shelf: Shelf) -> Iterator[ReplayClient]:
    with ScriptedServer(AddEpisode=shelf) as server, ReplayClient(server.address, actor="keeper") as client:
        yield trying_once(client)


def _play(writer: EpisodeWriter, numbers: range) -> None:
    """Appends rows in TD-MPC2's convention: only the reset observation, then one row a transition."""
    for number in numbers:
        step = {"obs": np.float32(number)}
        writer.append(step if number == numbers[0] else step | {"action": np.float32(number), "reward": float(number)})


def test_ended_episode_goes_out_whole(client: ReplayClient, shelf: Shelf) -> None:
    with EpisodeWriter(client, policy_version=4) as writer:
        _play(writer, range(3))
        key = writer.end_episode()
        writer.flush(60)

    (episode,) = shelf.episodes
    assert episode.columns["obs"].tolist() == [0, 1, 2]
    assert np.isnan(episode.columns["reward"][0]) and episode.columns["reward"].tolist()[1:] == [1, 2]
    assert (episode.key, episode.actor, episode.policy_version) == (key, "keeper", 4)


def test_endless_episode_is_cut_with_one_overlapping_row(client: ReplayClient, shelf: Shelf) -> None:
    with EpisodeWriter(client, max_steps=3) as writer:
        _play(writer, range(9))

    assert shelf.columns("obs") == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8]]
    assert shelf.columns("reward")[1:] == [[3, 4, 5, 6], [6, 7, 8]]
    assert (writer.counters.appended, writer.counters.steps_appended, writer.counters.discarded) == (3, 11, 0)


def test_episode_that_ends_at_a_cut_leaves_no_piece_of_one_row(client: ReplayClient, shelf: Shelf) -> None:
    with EpisodeWriter(client, max_steps=3) as writer:
        _play(writer, range(4))
        assert writer.end_episode() is None
        _play(writer, range(10, 12))

    assert shelf.columns("obs") == [[0, 1, 2, 3], [10, 11]]
    assert writer.counters.discarded == 0


def test_close_sends_the_unfinished_episode(client: ReplayClient, shelf: Shelf) -> None:
    writer = EpisodeWriter(client)
    _play(writer, range(2))

    writer.close(60)

    assert shelf.columns("obs") == [[0, 1]]
    counters = writer.counters
    assert (counters.appended, counters.pending, counters.acknowledged, counters.refused) == (1, 0, 1, 0)
    assert (counters.steps_appended, counters.steps_acknowledged) == (2, 2)


def test_one_row_is_discarded_counted_and_logged(client: ReplayClient, shelf: Shelf, caplog: pytest.LogCaptureFixture) -> None:
    with EpisodeWriter(client) as writer:
        _play(writer, range(1))
        assert writer.end_episode() is None
        assert writer.end_episode() is None  # nothing since

    assert shelf.episodes == []
    assert (writer.counters.discarded, writer.counters.appended) == (1, 0)
    assert "discarded 1 rows of an unfinished episode: one row holds no transition" in caplog.text


def test_policy_version_counts_from_the_next_episode_or_piece_on(client: ReplayClient, shelf: Shelf) -> None:
    with EpisodeWriter(client, max_steps=2, policy_version=1) as writer:
        _play(writer, range(2))
        writer.policy_version = 2
        for number in (2, 3):
            writer.append({"obs": np.float32(number), "action": np.float32(number), "reward": float(number)})
        writer.end_episode()
        writer.policy_version = 3
        _play(writer, range(2))

    assert [episode.policy_version for episode in shelf.episodes] == [1, 2, 3]


def test_full_queue_blocks_until_there_is_space(client: ReplayClient, shelf: Shelf) -> None:
    shelf.away.set()
    third = threading.Event()
    writer = EpisodeWriter(client, max_pending=2)

    def play() -> None:
        for _ in range(3):
            _play(writer, range(2))
            writer.end_episode()
        third.set()

    actor = threading.Thread(target=play)
    actor.start()
    eventually(lambda: writer.counters.pending == 2, "two wait")
    assert not third.wait(0.2)

    shelf.away.clear()

    assert third.wait(60)
    actor.join()
    writer.close(60)
    assert writer.counters.acknowledged == 3


class Rack(Shelf):
    """A shelf that also accepts loads, and blocks the first call until it is released."""

    def __init__(self, *failures: tuple[grpc.StatusCode, str], load_fails: bool = False) -> None:
        super().__init__(*failures)
        self.go_on = threading.Event()
        self.load_fails = load_fails

    def __call__(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        self.asked.set()
        assert self.go_on.wait(60)
        return super().__call__(request, context)

    def load(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        decoder = LoadDecoder()
        episodes = [episode for message in requests for episode in decoder.feed(message) if isinstance(episode, Episode)]
        if self.load_fails:
            fail(context, grpc.StatusCode.INTERNAL, details="as the test wants")
        results = []
        for episode in episodes:
            bad = bool(episode.columns["obs"][0] == 13)
            if not bad:
                self.episodes.append(episode)
            results.append(pb.EpisodeResult(outcome=3 if bad else 1, reason="obs: thirteen" if bad else ""))
        return pb.LoadEpisodesResponse(results=results).SerializeToString()


@pytest.mark.parametrize("spooled", [False, True], ids=["memory", "spool"])
def test_episodes_that_wait_share_a_call_in_their_order(tmp_path: Path, spooled: bool) -> None:
    rack = Rack()
    with ScriptedServer(AddEpisode=rack, LoadEpisodes=rack.load) as server, ReplayClient(server.address) as client:
        writer = EpisodeWriter(client, spool_dir=tmp_path if spooled else None)
        for number in range(10, 21):
            _play(writer, range(number, number + 2))
            writer.end_episode()
            assert rack.asked.wait(60)
        rack.go_on.set()
        with pytest.raises(UnacknowledgedError, match=r"1 episodes are not acknowledged.*obs: thirteen"):
            writer.close(60)

        assert (server.count("AddEpisode"), server.count("LoadEpisodes")) == (1, 1)
    assert [number for number, _ in rack.columns("obs")] == [10, 11, 12, *range(14, 21)]
    counters = writer.counters
    assert (counters.appended, counters.acknowledged, counters.refused, counters.pending) == (11, 10, 1, 0)


def test_episodes_whose_common_call_fails_go_one_by_one() -> None:
    rack = Rack(load_fails=True)
    with ScriptedServer(AddEpisode=rack, LoadEpisodes=rack.load) as server, ReplayClient(server.address) as client:
        with EpisodeWriter(client) as writer:
            for number in range(10, 21):
                _play(writer, range(number, number + 2))
                writer.end_episode()
                assert rack.asked.wait(60)
            rack.go_on.set()

        assert (server.count("AddEpisode"), server.count("LoadEpisodes")) == (11, 1)
    assert [number for number, _ in rack.columns("obs")] == list(range(10, 21))
    assert writer.counters.acknowledged == 11


def test_unavailable_server_is_tried_until_it_is_back(client: ReplayClient, shelf: Shelf, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "touchline")
    shelf.away.set()
    writer = EpisodeWriter(client)
    _play(writer, range(3))
    key = writer.end_episode()
    eventually(lambda: "are pending, retrying" in caplog.text, "retries fail")
    with pytest.raises(UnacknowledgedError, match="1 episodes are not acknowledged") as caught:
        writer.flush(0)
    assert [(result.key, type(result.error)) for result in caught.value.results] == [(key, UnavailableError)]

    shelf.away.clear()
    writer.close(60)

    assert [episode.key for episode in shelf.episodes] == [key]
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


def test_close_in_vain_may_be_made_again(client: ReplayClient, shelf: Shelf) -> None:
    shelf.away.set()
    writer = EpisodeWriter(client)
    _play(writer, range(3))
    with pytest.raises(UnacknowledgedError):
        writer.close(0.1)
    with pytest.raises(ClosedError):
        _play(writer, range(1))

    shelf.away.clear()
    writer.close(60)
    writer.close()

    assert writer.counters.acknowledged == 1


def test_server_at_its_limits_is_tried_again(client: ReplayClient, shelf: Shelf) -> None:
    shelf.failures = [(grpc.StatusCode.RESOURCE_EXHAUSTED, "over-limit")] * 2

    with EpisodeWriter(client) as writer:
        _play(writer, range(2))

    assert writer.counters.acknowledged == 1


def test_server_at_its_limits_is_not_asked_again_before_the_delay_that_it_gave() -> None:
    arrivals: list[float] = []

    def refuse_once(request: bytes, context: grpc.ServicerContext) -> bytes:
        arrivals.append(time.monotonic())
        if len(arrivals) == 1:
            fail(context, grpc.StatusCode.RESOURCE_EXHAUSTED, "over-limit", retry_after="400")
        return pb.AddEpisodeResponse().SerializeToString()

    with ScriptedServer(AddEpisode=refuse_once) as server, ReplayClient(server.address) as client:
        # The client makes no second attempt, so the writer has to observe the delay.
        with EpisodeWriter(trying_once(client)) as writer:
            _play(writer, range(2))

        assert writer.counters.acknowledged == 1
    assert arrivals[1] - arrivals[0] >= 0.4


def test_server_that_keeps_failing_on_an_episode_has_refused_it(
    client: ReplayClient, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("touchline._actor.send_loop.SERVER_ERROR_ATTEMPTS", 2)
    shelf.failures = [(grpc.StatusCode.INTERNAL, "internal")] * 2
    writer = EpisodeWriter(client)
    _play(writer, range(2))
    writer.end_episode()
    _play(writer, range(2))

    with pytest.raises(UnacknowledgedError) as caught:
        writer.close(60)

    assert [type(result.error) for result in caught.value.results] == [ServerError]
    assert (writer.counters.acknowledged, writer.counters.refused) == (1, 1)


def _refused(writer: EpisodeWriter) -> Any:
    """Ends an episode and waits for its answer."""
    _play(writer, range(2))
    key = writer.end_episode()
    eventually(lambda: not writer.counters.pending, "the episode is answered")
    return key


@pytest.mark.parametrize("report", ["append", "end_episode", "flush", "close"])
def test_refused_episode_is_logged_counted_and_reported_once(
    client: ReplayClient, shelf: Shelf, caplog: pytest.LogCaptureFixture, report: str
) -> None:
    shelf.failures = [(grpc.StatusCode.INVALID_ARGUMENT, "invalid-episode")]
    writer = EpisodeWriter(client)
    key = _refused(writer)
    report_by = {
        "append": lambda: writer.append({"obs": 1}),
        "end_episode": writer.end_episode,
        "flush": writer.flush,
        "close": writer.close,
    }

    with pytest.raises(UnacknowledgedError, match="obs: as the test wants") as caught:
        report_by[report]()

    assert [(result.key, type(result.error)) for result in caught.value.results] == [(key, InvalidEpisodeError)]
    assert "obs: as the test wants" in caplog.text
    assert writer.counters.refused == 1
    writer.close(60)  # does not report it again


def test_append_that_reports_a_refusal_may_be_made_again(client: ReplayClient, shelf: Shelf) -> None:
    shelf.failures = [(grpc.StatusCode.ALREADY_EXISTS, "key-conflict")]
    writer = EpisodeWriter(client)
    _refused(writer)
    with pytest.raises(UnacknowledgedError) as caught:
        writer.append({"obs": np.float32(0)})

    _play(writer, range(2))
    writer.close(60)

    assert type(caught.value.results[0].error) is KeyConflictError
    assert shelf.columns("obs") == [[0, 1]]


def test_failed_body_discards_the_unfinished_episode_and_sends_the_ended_ones(
    client: ReplayClient, shelf: Shelf, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ZeroDivisionError), EpisodeWriter(client) as writer:
        _play(writer, range(3))
        writer.end_episode()
        _play(writer, range(7))
        raise ZeroDivisionError

    assert shelf.columns("obs") == [[0, 1, 2]]
    assert (writer.counters.acknowledged, writer.counters.discarded) == (1, 1)
    assert "discarded 7 rows of an unfinished episode" in caplog.text


def test_failed_body_with_the_server_away_raises_its_own_error_and_logs_the_loss(
    client: ReplayClient, shelf: Shelf, caplog: pytest.LogCaptureFixture
) -> None:
    shelf.away.set()
    hasty = ReplayClient(client.address, timeout_s=0.2, actor="keeper")  # time that closing waits
    with pytest.raises(ZeroDivisionError), EpisodeWriter(hasty) as writer:
        _play(writer, range(3))
        writer.end_episode()
        raise ZeroDivisionError

    assert "closed because of ZeroDivisionError: 1 episodes are not acknowledged" in caplog.text
    shelf.away.clear()
    writer.close(60)
    hasty.close()


def test_closed_client_gives_the_episodes_up(client: ReplayClient, shelf: Shelf) -> None:
    shelf.away.set()
    writer = EpisodeWriter(client)
    _play(writer, range(3))
    writer.end_episode()
    assert shelf.asked.wait(60)

    client.close()

    with pytest.raises(UnacknowledgedError) as caught:
        writer.close(60)
    assert [type(result.error) for result in caught.value.results] == [ClosedError]
    assert writer.counters.refused == 1


@pytest.mark.parametrize("arguments", [{"max_steps": 0}, {"max_pending": 0}, {"actor": "x" * 129}, {"policy_version": 1.5}])
def test_bad_argument_is_refused(client: ReplayClient, arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError, match=next(iter(arguments))):
        EpisodeWriter(client, **arguments)


FORGETFUL = """
import sys
import numpy as np
from touchline import EpisodeWriter, ReplayClient
from touchline._actor import exit_hooks

def play(address, away):
    if not away:
        exit_hooks.GRACE_S = 60.0  # however slow the machine
    global writer  # not dropped, only forgotten
    writer = EpisodeWriter(ReplayClient(address, timeout_s=0.1 if away else 30.0, client_id="forgetful"))
    for _ in range(3):
        writer.append({"obs": np.zeros(2, np.float32), "action": np.zeros(1, np.float32), "reward": 0.0})
    writer.end_episode()
    writer.append({"obs": np.zeros(2, np.float32)})

if __name__ == "__main__":
    arguments = (sys.argv[1], sys.argv[3] == "away")
    if sys.argv[2] == "main":
        play(*arguments)
    else:
        import multiprocessing
        child = multiprocessing.get_context(sys.argv[2]).Process(target=play, args=arguments)
        child.start()
        child.join()
"""


@pytest.mark.parametrize("process", ["main", "fork", "spawn"])
@pytest.mark.parametrize("away", [False, True])
def test_writer_forgotten_at_exit_neither_hangs_nor_loses_in_silence(tmp_path: Path, shelf: Shelf, away: bool, process: str) -> None:
    script = tmp_path / "forgetful.py"
    script.write_text(FORGETFUL)
    if away:
        shelf.away.set()
    env = {name: value for name, value in os.environ.items() if name != "GRPC_ENABLE_FORK_SUPPORT"}

    with ScriptedServer(AddEpisode=shelf) as server:
        command = [sys.executable, str(script), server.address, process, "away" if away else "there"]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env, check=True)

    assert len(shelf.episodes) == (0 if away else 1)
    lost = f"was not closed: {int(away)} episodes not acknowledged, 1 rows of an unfinished one"
    assert ended.stderr.count(lost) == 1


class _SlowlyCounted(MemoryQueue):
    """Answers the last of three episodes before its ``put`` returns."""

    def put(self, item: QueueItem, *, drop_oldest: bool, force: bool = False) -> PutResult:
        admission = super().put(item, drop_oldest=drop_oldest, force=force)
        if item.key.sequence == 2:
            self.sending.set()
            eventually(lambda: not self.waiting_keys(), "all three are answered")
        return admission

    sending = threading.Event()


def test_episode_that_is_answered_before_it_is_counted_leaves_the_thread_at_rest(
    client: ReplayClient, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = _SlowlyCounted(max_pending=8, max_bytes=1 << 20)
    monkeypatch.setattr(client, "deliver", lambda episode, table: queue.sending.wait(60))
    monkeypatch.setattr(client, "deliver_all", lambda episodes, table: iter([[EpisodeResult(key) for key, _ in episodes]]))
    sender = EpisodeSender(client, queue, name="keeper", when_full="block")
    pauses: list[int] = []
    sleep = sender._status.sleep

    def noted(delay_s: float) -> None:
        pauses.append(sender.counters.pending)
        sleep(delay_s)

    monkeypatch.setattr(sender._status, "sleep", noted)
    columns = {name: np.zeros(2, np.float32) for name in ("obs", "action", "reward")}

    for sequence in range(4):
        sender.put(Episode(columns, key=EpisodeKey("keeper", 1, sequence)))
        if sequence == 0:
            eventually(lambda: queue._sending == 0, "the first is being sent")
    sender.flush(60)

    assert [pending for pending in pauses if pending <= 0] == []
    assert sender.counters.acknowledged == sender.counters.appended == 4
    sender.close(60)
