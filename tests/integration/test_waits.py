"""No method waits silently: servers that are away, that never answer or that are not Touchline, and tables with nothing to sample."""

from __future__ import annotations

import http.server
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict

import touchline._rpc.waits
from support.service_calls import eventually, make_config
from touchline import DeadlineError, EpisodeWriter, ReplayClient, TouchlineError
from touchline._rpc.calls import Backoff
from touchline._rpc.waits import WaitLog
from touchline.tdmpc2 import Buffer
from touchline.torchrl import RemoteReplayBuffer
from touchline_server.service.app import ServerThread

EPISODE = {"obs": np.zeros((10, 2), np.float32), "action": np.zeros((10, 1), np.float32), "reward": np.zeros(10, np.float32)}


class Waits:
    """The process's log of waits, on a clock that the test advances."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log = WaitLog(clock=lambda: self.now, threaded=False)

    def consume_exception(self, second: float) -> None:
        self.now = second
        self.log.log_due()

    def reasons(self) -> list[str]:
        return [wait.reason() for wait in list(self.log._waits)]


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Waits:
    waits = Waits()
    monkeypatch.setattr(touchline._rpc.waits, "process_waits", waits.log)
    return waits


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def write(client: ReplayClient, folder: Path | None) -> EpisodeWriter:
    writer = EpisodeWriter(client, actor="left-foot", spool_dir=folder)
    for row in range(3):
        writer.append({name: column[row] for name, column in EPISODE.items()})
    writer.end_episode()
    return writer


def transitions() -> TensorDict:
    flags = {"done": torch.tensor([[False], [True]]), "terminated": torch.tensor([[False], [True]])}
    following = {"observation": torch.ones(2, 3), "reward": torch.zeros(2, 1), **flags}
    return TensorDict({"observation": torch.ones(2, 3), "action": torch.zeros(2, 1), "next": following}, [2])


class Cfg:
    buffer_size = steps = 2_000
    batch_size = 8
    horizon = 3


def make_drop_in(client: ReplayClient) -> Buffer:
    return Buffer(Cfg(), client)


VERBS: dict[str, Callable[[ReplayClient], Any]] = {
    "add()": lambda client: client.add(EPISODE),
    "load()": lambda client: client.load([EPISODE] * 3),
    "sample()": lambda client: client.sample(),
    "batches()": lambda client: next(client.batches(ring=False)),
    "episodes()": lambda client: next(client.episodes()),
    "ready() or counts()": lambda client: client.counts(),
    "wait_until_ready()": lambda client: client.wait_until_ready(),
    "info()": lambda client: client.info(),
    "clear()": lambda client: client.clear(),
    "the drop-in buffer": make_drop_in,
}


def begin(verb: Callable[[ReplayClient], Any], client: ReplayClient, stack: ExitStack) -> None:
    """Calls a method in a thread, which ends once the client is closed."""
    client._rpc.backoff = Backoff(first_s=0.01, max_s=0.05)

    def run() -> None:
        with suppress(TouchlineError):
            verb(client)

    thread = threading.Thread(target=run)
    stack.callback(thread.join)
    stack.callback(client.close)
    thread.start()


def listening(stack: ExitStack) -> tuple[socket.socket, str]:
    listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    return listener, f"127.0.0.1:{listener.getsockname()[1]}"


def away(stack: ExitStack) -> str:
    """Returns an address at which connections are refused: bound, without a listener."""
    taken = stack.enter_context(socket.socket())
    taken.bind(("127.0.0.1", 0))
    return f"127.0.0.1:{taken.getsockname()[1]}"


def something_else(stack: ExitStack) -> str:
    """Returns the address of a web server."""
    server = stack.enter_context(http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler))
    threading.Thread(target=server.serve_forever).start()
    stack.callback(server.shutdown)
    return f"127.0.0.1:{server.server_port}"


def lines_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "touchline._rpc.waits" and record.levelno == logging.WARNING]


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "clear()"])  # which is not retried
@pytest.mark.parametrize("place", [away, something_else], ids=["away", "another server"])
def test_unanswered_method_logs_its_wait_after_ten_seconds_and_each_minute(
    verb: str, place: Callable[[ExitStack], str], waits: Waits, stack: ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    address = place(stack)
    begin(VERBS[verb], ReplayClient(address), stack)
    at_once = verb == "the drop-in buffer"
    eventually(lambda: bool(lines_of(caplog)) if at_once else any(address in reason for reason in waits.reasons()), "the failure is known")

    counts = []
    for second in (9.9, 10.0, 69.9, 70.0):
        waits.consume_exception(second)
        counts.append(len(lines_of(caplog)))

    assert counts == ([1, 1, 2, 2] if at_once else [0, 1, 1, 2])
    for line, second in zip(lines_of(caplog), (0, 69.9) if at_once else (10, 70), strict=True):
        assert line.startswith(f"{verb} waits for {address}, {second:.0f} s so far: {address}: failed to connect")
        assert "expected a running touchline-server that uses no TLS" in line


@pytest.mark.parametrize("verb", VERBS)
def test_method_on_a_silent_server_logs_its_wait(
    verb: str, waits: Waits, stack: ExitStack, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("touchline._learner.readiness.PROBE_TIMEOUT_S", 0.1)
    _, address = listening(stack)
    begin(VERBS[verb], ReplayClient(address), stack)
    eventually(lambda: bool(waits.log._waits), "it waits")

    waits.consume_exception(10.0)

    (line,) = lines_of(caplog)
    assert line.startswith(f"{verb} waits for {address}, 10 s so far: ")
    assert any(words in line for words in ("no answer yet", "no message yet", "Deadline Exceeded", "DEADLINE_EXCEEDED"))


@pytest.mark.parametrize("spool", [False, True], ids=["memory", "spool"])
def test_writer_says_why_its_episodes_wait_and_so_does_flush(
    spool: bool, waits: Waits, stack: ExitStack, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    address = away(stack)
    client = ReplayClient(address)
    begin(lambda client: write(client, tmp_path if spool else None).flush(), client, stack)
    eventually(lambda: sum(address in reason for reason in waits.reasons()) >= 1 and len(waits.log._waits) == 2, "both wait")

    waits.consume_exception(10.0)
    waits.consume_exception(69.0)
    waits.consume_exception(70.0)

    name = f"episode writer of actor 'left-foot' waits for {address}"
    assert [line.startswith((name, f"flush() of the {name}")) for line in lines_of(caplog)] == [True] * 4
    assert sum(line.startswith(name) and "failed to connect" in line for line in lines_of(caplog)) == 2
    assert sum(line.startswith("flush()") and "1 episodes wait to be stored" in line for line in lines_of(caplog)) == 2


def too_short(client: ReplayClient) -> None:
    client.add(EPISODE)
    client.add(EPISODE)


SAMPLERS: dict[str, tuple[str, Callable[[ReplayClient], Any]]] = {
    "unary": ("sample()", lambda client: client.sample(horizon=200, wait_s=60)),
    "stream": ("batches()", lambda client: next(client.batches(horizon=200, ring=False))),
    "ring": ("batches()", lambda client: next(client.batches(horizon=200))),
    "drop-in": ("batches()", lambda client: _drop_in_at(client, 200).sample()),
    "TorchRL": ("batches()", lambda client: RemoteReplayBuffer(client, batch_size=200, slice_len=200).sample()),
}


def _drop_in_at(client: ReplayClient, horizon: int) -> Buffer:
    cfg = Cfg()
    cfg.horizon = horizon
    return Buffer(cfg, client)


@pytest.mark.parametrize("path", SAMPLERS)
def test_wait_at_a_horizon_longer_than_every_episode_logs_the_counts(
    path: str, waits: Waits, stack: ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    server = stack.enter_context(ServerThread(make_config()))
    client = ReplayClient(server.address)
    too_short(client)
    who, sample = SAMPLERS[path]
    begin(sample, client, stack)
    eventually(lambda: any(wait.who == who for wait in list(waits.log._waits)), "it waits")

    for second in (9.0, 10.0, 69.0, 70.0):
        waits.consume_exception(second)

    assert lines_of(caplog) == [
        f"{who} waits for {server.address}, {second} s so far: 20 steps in 2 episodes, 0 of them with the 201 steps that horizon 200 "
        "needs, the longest has 10; the other 2 are too short to be sampled without pad='end'"
        for second in (10, 70)
    ]


LIMITED: dict[str, tuple[str, dict[str, Any]]] = {
    "unary": ("sample()", {"wait_s": 60}),
    "stream": ("batches()", {"ring": False}),
    "ring": ("batches()", {}),
    "mix": ("batches()", {"mix": {"": 1, "demos": 1}}),
}


@pytest.mark.parametrize("path", LIMITED)
def test_wait_for_a_rate_limit_names_it(path: str, waits: Waits, stack: ExitStack, caplog: pytest.LogCaptureFixture) -> None:
    rate = {"samples_per_insert": 1, "tolerance": 8}
    server = stack.enter_context(ServerThread(make_config(tables={"demos": {"rate": rate}})))
    client = ReplayClient(server.address, table="demos")
    for table in ("", "demos"):
        client.add(EPISODE, table=table)
    who, options = LIMITED[path]
    taken = threading.Semaphore(0)

    def learn(client: ReplayClient) -> None:
        for _ in client.batches(**options) if path != "unary" else iter(lambda: client.sample(**options), None):
            taken.release()

    begin(learn, client, stack)
    for _ in range(2 if path == "mix" else 1):  # the 8 slices that may be ahead
        taken.acquire()
    eventually(lambda: any("rate limit" in reason for reason in waits.reasons()), "the limit holds the learner back")
    waits.consume_exception(10.0)

    (line,) = lines_of(caplog)
    assert line.startswith(f"{who} waits for {server.address}, 10 s so far: ")
    assert "the rate limit of table 'demos' holds batches back: 8 slices were delivered for 0 steps added" in line
    assert "expected 1 slices per step within 8 slices; actors have to add steps before the next batch is due" in line
    client._rpc.backoff = Backoff()
    with pytest.raises(DeadlineError, match=r"no batch within 0\.1 s: the rate limit of table 'demos' holds batches back"):
        next(client.batches(timeout_s=0.1))


def test_wait_until_ready_says_how_far_min_history_is(
    waits: Waits, stack: ExitStack, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("touchline._learner.readiness.POLL_INTERVAL_S", 0.1)
    server = stack.enter_context(ServerThread(make_config()))
    client = ReplayClient(server.address)
    too_short(client)
    begin(lambda client: client.wait_until_ready(), client, stack)
    eventually(lambda: any("expected 100 steps" in reason for reason in waits.reasons()), "the state is known")

    waits.consume_exception(10.0)

    assert lines_of(caplog) == [
        f"wait_until_ready() waits for {server.address}, 10 s so far: 20 steps in 2 episodes, 2 of them with the 4 steps that horizon 3 "
        "needs, the longest has 10; expected 100 steps"
    ]


def test_extend_of_the_torchrl_drop_in_logs_that_no_server_answers(
    waits: Waits, stack: ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    address = away(stack)
    begin(lambda client: RemoteReplayBuffer(client, batch_size=8).extend(transitions()), ReplayClient(address), stack)
    eventually(lambda: any(address in reason for reason in waits.reasons()), "the failure is known")

    waits.consume_exception(10.0)

    assert lines_of(caplog)[0].startswith(f"info() waits for {address}, 10 s so far: {address}: failed to connect")
