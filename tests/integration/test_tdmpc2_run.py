"""The drop-in for TD-MPC2's buffer as the buffer of one run, on a server that outlives it."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict

from support.service_calls import eventually
from touchline import AccessDeniedError, InvalidArgumentError, NotReadyError, ReplayClient, TooLargeError, UnavailableError
from touchline.tdmpc2 import Buffer
from touchline_server import Config, ReplayBuffer
from touchline_server.service.app import ServerThread

SERVED, IN_PROCESS = "served", "in process"


def make_cfg(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**({"buffer_size": 4_000, "steps": 2_000, "batch_size": 32, "horizon": 3} | changes))


def server_config() -> Config:
    return Config(config={"buffer_size": 2_000, "batch_size": 8, "horizon": 1}, storage={"device": "cpu"}, server={"port": 0})


@pytest.fixture
def server() -> Iterator[ServerThread]:
    with ServerThread(server_config()) as server:
        yield server


def make_episode(number: int, length: int) -> TensorDict:
    """Returns an episode as TD-MPC2 makes it; a value encodes its episode and row: ``number * 100 + row``."""
    rows = number * 100.0 + torch.arange(length, dtype=torch.float32)
    columns = {"obs": torch.stack([rows, -rows], dim=1), "action": torch.stack([rows, rows / 2], dim=1), "reward": rows / 8}
    columns["action"][0] = columns["reward"][0] = torch.nan
    return TensorDict(columns, batch_size=[length])


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Returns the warnings about the run, or about waiting for the server."""
    about = ("touchline._tdmpc2.single_run", "touchline._rpc.waits")
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING and record.name in about]


def test_episodes_of_an_earlier_run_are_warned_about_and_stay(server: ServerThread, caplog: pytest.LogCaptureFixture) -> None:
    with Buffer(make_cfg(replay_address=server.address)) as first:
        for number in range(3):
            first.add(make_episode(number, 10))
        assert not said(caplog)

    with Buffer(make_cfg(replay_address=server.address)) as second:
        told = said(caplog)
        assert second.add(make_episode(3, 10)) == 4

    assert told == [
        f"the server at {server.address} already holds 3 episodes (30 steps), which this run samples, too; fresh=True or TOUCHLINE_FRESH=1 "
        "empties it first"
    ]


@pytest.mark.parametrize("kind", [SERVED, IN_PROCESS, "given client"])
@pytest.mark.parametrize("by", ["argument", "variable"])
def test_fresh_buffer_begins_with_nothing_and_counts_from_none(
    kind: str, by: str, server: ServerThread, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server.buffer.load({name: torch.zeros(5, 9, 2) if name != "reward" else torch.zeros(5, 9) for name in ("obs", "action", "reward")})
    fresh = True if by == "argument" else None
    if by == "variable":
        monkeypatch.setenv("TOUCHLINE_FRESH", "1")

    with ReplayClient(server.address) as client:
        backend = {SERVED: None, IN_PROCESS: server.buffer, "given client": client}[kind]
        with Buffer(make_cfg(replay_address=server.address), backend, fresh=fresh) as buffer:
            assert (buffer.num_eps, server.buffer.num_eps) == (0, 0)
            assert buffer.add(make_episode(0, 30)) == 1  # of another schema than before
            obs, *_ = buffer.sample()

    assert obs[0, :, 0].max() < 100  # of episode 0
    assert not said(caplog)


def test_fresh_false_keeps_stored_episodes_whatever_the_variable_says(server: ServerThread, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOUCHLINE_FRESH", "1")
    server.buffer.add({name: torch.zeros(9, 2) if name != "reward" else torch.zeros(9) for name in ("obs", "action", "reward")})

    with Buffer(make_cfg(replay_address=server.address), fresh=False) as buffer:
        assert buffer.num_eps == 1


@pytest.mark.parametrize("value", ["yes", "true", "2"])
def test_fresh_variable_of_another_value_is_refused_before_anything_is_cleared(
    value: str, server: ServerThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.buffer.add({name: torch.zeros(9, 2) if name != "reward" else torch.zeros(9) for name in ("obs", "action", "reward")})
    monkeypatch.setenv("TOUCHLINE_FRESH", value)

    with pytest.raises(InvalidArgumentError, match=f"TOUCHLINE_FRESH: '{value}', expected 1 or 0"):
        Buffer(make_cfg(replay_address=server.address))
    assert server.buffer.num_eps == 1


def test_fresh_without_an_admins_token_says_which_role_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOUCHLINE_SERVER_TOKENS", "actor+learner:trainer:trainer-token-0123456789")
    monkeypatch.setenv("TOUCHLINE_TOKEN", "trainer-token-0123456789")
    with (
        ServerThread(server_config()) as server,
        pytest.raises(AccessDeniedError, match=r"fresh: .* token of the role admin .*`touchline c"),
    ):
        Buffer(make_cfg(replay_address=server.address), fresh=True)


@given(
    earlier=st.lists(st.integers(4, 60), max_size=6),
    fresh=st.booleans(),
    added=st.lists(st.one_of(st.integers(4, 60), st.just("clear")), max_size=12),
)
@settings(max_examples=40)
def test_num_eps_is_what_was_there_and_what_was_added_since(earlier: list[int], fresh: bool, added: list[Any]) -> None:
    capacity = 100
    config = Config(config={"buffer_size": capacity, "horizon": 1}, storage={"device": "cpu"})
    backend = ReplayBuffer(config)
    for number, length in enumerate(earlier):
        Buffer(make_cfg(), backend=backend).add(make_episode(number, length))
    at_start = 0 if fresh else backend.num_eps

    buffer = Buffer(make_cfg(), backend=backend, fresh=fresh)

    assert buffer.num_eps == at_start
    for number, length in enumerate(one for one in added if one != "clear"):
        assert buffer.add(make_episode(number, length)) == at_start + number + 1


def test_capacity_below_cfg_warns_with_the_difference_before_the_load(server: ServerThread, caplog: pytest.LogCaptureFixture) -> None:
    with Buffer(make_cfg(buffer_size=345_690_000, steps=345_690_000, replay_address=server.address)):
        pass

    assert said(caplog) == [
        f"the server at {server.address} keeps 2,000 steps (config.buffer_size), 345,688,000 fewer than the 345,690,000 that cfg asks for, "
        "min(cfg.buffer_size, cfg.steps); to change it, start the server with TOUCHLINE_CONFIG__BUFFER_SIZE=345690000"
    ]


@pytest.mark.parametrize("accepted_by", [None, "argument", "variable"])
def test_load_that_cannot_fit_is_refused_unless_eviction_is_accepted(
    accepted_by: str | None, server: ServerThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    if accepted_by == "variable":
        monkeypatch.setenv("TOUCHLINE_ACCEPT_EVICTION", "1")
    backend = server.buffer
    buffer = Buffer(make_cfg(), backend=backend, accept_eviction=True if accepted_by == "argument" else None)
    episodes = torch.stack([make_episode(number, 50) for number in range(15)])
    assert buffer.load(episodes) == 15
    assert buffer.load(episodes) == 30

    if accepted_by is None:
        with pytest.raises(TooLargeError, match=r"load: 750 steps after 1,500 .* expected at most 2,000 .*: 250 would be evicted"):
            buffer.load(episodes)
        assert (backend.num_eps, backend.counts().episodes_added) == (30, 30)
        assert buffer.load(episodes[:10]) == 40  # to the last row
    else:
        assert buffer.load(episodes) == 45
        assert backend.num_eps == 40


def test_dead_address_is_reported_when_the_buffer_is_made(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("touchline._tdmpc2.single_run.AWAY_S", 0.5)
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"

        with pytest.raises(UnavailableError, match=f"^{address}: .*expected a running touchline-server"):
            Buffer(make_cfg(replay_address=address))

    told = said(caplog)
    assert len(told) == 1 and told[0].startswith(f"the drop-in buffer waits for {address}, 0 s so far: {address}: failed to connect")


def test_server_that_comes_up_late_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    made: list[Buffer] = []
    maker = threading.Thread(target=lambda: made.append(Buffer(make_cfg(replay_address=f"127.0.0.1:{port}"))))
    maker.start()
    eventually(lambda: "the drop-in buffer waits" in caplog.text, "the wait is logged")
    config = server_config()

    with ServerThread(config.model_copy(update={"server": config.server.model_copy(update={"port": port})})):
        maker.join()
        with made[0] as buffer:
            assert buffer.add(make_episode(0, 30)) == 1


@pytest.mark.parametrize("ring", [True, False])
def test_sample_at_a_horizon_longer_than_every_episode_raises_not_ready(ring: bool, server: ServerThread) -> None:
    with ReplayClient(server.address) as client:
        if not ring:
            client.batches = partial(client.batches, ring=False)  # type: ignore[method-assign]
        with Buffer(make_cfg(horizon=200), client, timeout_s=0.3) as buffer:
            buffer.add(make_episode(0, 101))

            with pytest.raises(NotReadyError, match="0 of them with the 201 steps that horizon 200 needs, the longest has 101"):
                buffer.sample()


def test_first_sample_gives_up_on_a_server_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("touchline._learner.outputs.RECONNECT_S", 0.5)
    with ServerThread(server_config()) as server:
        buffer = Buffer(make_cfg(replay_address=server.address))

    with buffer, pytest.raises(UnavailableError, match="no batch for"):
        buffer.sample()
