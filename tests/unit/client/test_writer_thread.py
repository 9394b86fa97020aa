"""The episode writer whose background thread ends unexpectedly: no caller waits for it, and a spool keeps its episodes."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from support.client_faults import ScriptedServer, refuse_threads
from support.service_calls import eventually
from touchline import EpisodeWriter, ReplayClient, ServerError, UnacknowledgedError
from touchline._actor import exit_hooks
from touchline._actor.queue import MemoryQueue
from touchline._spool.queue import Spool
from touchline_protos.codec import EpisodeKey, decode_add_episode

BUG = ZeroDivisionError("a bug")


class Shelf:
    """Keys and first observations of the server's stored episodes, in order."""

    def __init__(self) -> None:
        self.keys: list[EpisodeKey | None] = []
        self.firsts: list[float] = []

    def __call__(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        _, episode = decode_add_episode(request)
        self.keys.append(episode.key)
        self.firsts.append(episode.columns["obs"][0].item())
        return b""


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


@pytest.fixture
def client(shelf: Shelf) -> Iterator[ReplayClient]:
    with ScriptedServer(AddEpisode=shelf) as server, ReplayClient(server.address, actor="keeper") as client:
        yield client


@pytest.fixture(autouse=True)
def forget_writers() -> Iterator[None]:
    """Unregisters failed writers, which would otherwise report their unsent episodes when the tests' process exits."""
    yield
    for writer in list(exit_hooks._open):
        exit_hooks.unregister(writer)


@pytest.fixture(params=["memory", "spool"])
def spool_dir(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """Keywords of a writer with or without a spool."""
    return {"spool_dir": tmp_path / "spool"} if request.param == "spool" else {}


@pytest.fixture
def bug(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Ends the thread of every writer when it looks for an episode; a test undoes this if a later writer has to work."""

    def peek(*_: object) -> None:
        raise BUG

    with monkeypatch.context() as patch:
        patch.setattr(MemoryQueue, "peek", peek)
        patch.setattr(Spool, "peek", peek)
        yield patch


def row(number: int) -> dict[str, Any]:
    return {"obs": np.float32(number), "action": np.float32(0), "reward": 0.0}


def play(writer: EpisodeWriter, first: int) -> EpisodeKey | None:
    for number in (first, first + 1):
        writer.append(row(number))
    return writer.end_episode()


def failures(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.exc_info is not None]


def check(error: UnacknowledgedError, keys: list[EpisodeKey | None]) -> None:
    """Asserts that the error says what happened, what to do, and what is not acknowledged."""
    assert f"{len(keys)} episodes are not acknowledged: the thread that sends the episodes ended unexpectedly" in str(error)
    assert repr(BUG) in str(error) and "close this writer and make another" in str(error)
    assert [(result.key, type(result.error)) for result in error.results] == [(key, ServerError) for key in keys]


@pytest.mark.parametrize("wait", [EpisodeWriter.flush, EpisodeWriter.close])
def test_waiting_for_a_dead_thread_raises_its_error(
    client: ReplayClient, spool_dir: dict[str, Any], bug: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, wait: Callable[..., None]
) -> None:
    writer = EpisodeWriter(client, **spool_dir)
    key = play(writer, 0)

    with pytest.raises(UnacknowledgedError) as caught:
        wait(writer)

    check(caught.value, [key])
    assert len(failures(caplog)) == 1 and "the thread that sends the episodes ended unexpectedly" in failures(caplog)[0]


def test_caller_that_waits_when_the_thread_dies_gets_its_error(
    client: ReplayClient, spool_dir: dict[str, Any], bug: pytest.MonkeyPatch
) -> None:
    waiting = threading.Event()

    def peek(*_: object) -> None:
        assert waiting.wait(30)
        raise BUG

    bug.setattr(MemoryQueue, "peek", peek)
    bug.setattr(Spool, "peek", peek)
    writer = EpisodeWriter(client, **spool_dir)
    key = play(writer, 0)
    wait_for = writer._state.sender._status.changed.wait_for

    def wait_for_and_say_so(*arguments: Any) -> bool:
        waiting.set()
        return wait_for(*arguments)

    bug.setattr(writer._state.sender._status.changed, "wait_for", wait_for_and_say_so)
    with pytest.raises(UnacknowledgedError) as caught:
        writer.flush()

    check(caught.value, [key])


def test_blocked_actor_is_released_when_the_thread_dies(
    client: ReplayClient, spool_dir: dict[str, Any], bug: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    held_up = threading.Event()

    def peek(*_: object) -> None:
        assert held_up.wait(30)
        raise BUG

    bug.setattr(MemoryQueue, "peek", peek)
    bug.setattr(Spool, "peek", peek)
    writer = EpisodeWriter(client, max_pending=1, **spool_dir)
    key = play(writer, 0)
    bug.setattr(writer._state.sender._log, "held_up", lambda *_: held_up.set())

    with pytest.raises(UnacknowledgedError) as caught:
        play(writer, 10)

    check(caught.value, [key])
    assert len(failures(caplog)) == 1
    with pytest.raises(UnacknowledgedError, match="ended unexpectedly"):
        writer.end_episode()  # its rows are kept, and the queue is still full


def test_spool_of_a_writer_whose_thread_died_goes_on_taking_and_the_next_writer_sends_all(
    client: ReplayClient, shelf: Shelf, tmp_path: Path, bug: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    writer = EpisodeWriter(client, spool_dir=tmp_path)
    keys = [play(writer, 0)]
    eventually(lambda: bool(failures(caplog)), "the thread died")
    with pytest.raises(UnacknowledgedError):
        writer.append(row(10))  # raised once, before the row is accepted
    keys += [play(writer, number) for number in (10, 20)]
    writer.append(row(30))
    writer.append(row(31))
    with pytest.raises(UnacknowledgedError) as caught:
        writer.close()
    counters = writer.counters
    writer.close()  # does not report it again

    bug.undo()
    with EpisodeWriter(client, spool_dir=tmp_path) as following:
        resumed = following.counters.resumed

    assert [result.key for result in caught.value.results][:3] == keys
    assert (counters.pending, counters.appended, resumed) == (4, 4, 4)
    assert shelf.firsts == [0, 10, 20, 30] and shelf.keys[:3] == keys
    assert len(failures(caplog)) == 1


def test_memory_of_a_writer_whose_thread_died_takes_no_more_episodes(
    client: ReplayClient, bug: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    writer = EpisodeWriter(client)
    key = play(writer, 0)
    eventually(lambda: bool(failures(caplog)), "the thread died")
    with pytest.raises(UnacknowledgedError):
        writer.append(row(10))

    for _ in range(2):
        with pytest.raises(UnacknowledgedError) as caught:
            play(writer, 10)
        check(caught.value, [key])
    assert writer.counters.appended == 1


def test_append_that_cuts_an_episode_after_the_thread_died_adds_its_row_once(
    client: ReplayClient, bug: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    writer = EpisodeWriter(client, max_steps=2)
    play(writer, 0)
    eventually(lambda: bool(failures(caplog)), "the thread died")
    with pytest.raises(UnacknowledgedError):
        writer.append(row(10))
    for number in (10, 11, 12):
        writer.append(row(number))

    with pytest.raises(UnacknowledgedError):
        writer.append(row(13))  # the cut piece has to be queued first

    assert len(writer._state.rows) == 1 and writer._state.due is not None and writer._state.due.columns["obs"].tolist() == [10, 11, 12]


def test_thread_that_cannot_be_started_is_reported(
    client: ReplayClient, spool_dir: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_threads(monkeypatch, "touchline-writer")
    writer = EpisodeWriter(client, **spool_dir)
    key = play(writer, 0)

    with pytest.raises(UnacknowledgedError, match="can't start new thread") as caught:
        writer.close()

    assert [result.key for result in caught.value.results] == [key]


def test_want_of_memory_while_sending_is_tried_again(
    client: ReplayClient, shelf: Shelf, spool_dir: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    deliver, left = client.deliver, [MemoryError(), MemoryError()]

    def deliver_where_there_is_memory(*arguments: Any, **options: Any) -> None:
        if left:
            raise left.pop()
        deliver(*arguments, **options)

    monkeypatch.setattr(client, "deliver", deliver_where_there_is_memory)
    with EpisodeWriter(client, **spool_dir) as writer:
        play(writer, 5)

    assert shelf.firsts == [5] and writer.counters.acknowledged == 1
    assert len(failures(caplog)) == 1


def test_want_of_memory_while_reading_the_spool_is_tried_again(
    client: ReplayClient, shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    oldest, left = Spool._oldest, [MemoryError(), MemoryError()]

    def oldest_where_there_is_memory(*arguments: Any, **options: Any) -> Any:
        if left:
            raise left.pop()
        return oldest(*arguments, **options)

    monkeypatch.setattr(Spool, "_oldest", oldest_where_there_is_memory)
    with EpisodeWriter(client, spool_dir=tmp_path) as writer:
        play(writer, 5)

    assert shelf.firsts == [5] and writer.counters.acknowledged == 1
    assert "not enough memory" in caplog.text and not failures(caplog)
