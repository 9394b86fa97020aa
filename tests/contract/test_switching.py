"""Every program of docs/switching.md runs as written; the only change is the address of the test's server."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.service_calls import ServerProcess
from touchline import ReplayClient

PAGE = Path(__file__).parents[2] / "docs" / "switching.md"
PROGRAMS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
ADDRESS = "host:50051"


def _start(folder: Path) -> ServerProcess:
    """Starts a server as the page describes for 50,000 steps, with every other key at its default."""
    (size,) = re.findall(r"`TOUCHLINE_CONFIG__BUFFER_SIZE=(\d+) touchline-server serve`", PAGE.read_text("utf-8"))
    defaults = {"TOUCHLINE_CONFIG__MIN_HISTORY": "100000", "TOUCHLINE_CONFIG__BATCH_SIZE": "256"}
    return ServerProcess(folder, TOUCHLINE_CONFIG__BUFFER_SIZE=size, **defaults)


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    with _start(tmp_path) as server:
        yield server.address


def _run(code: str, address: str) -> dict[str, Any]:
    variables: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(code.replace(ADDRESS, address), PAGE.name, "exec"), variables)
    for name in ("slices", "buffer"):
        if name in variables:
            variables[name].close()
    return variables


def _program(beginning: str) -> str:
    (found,) = [code for code in PROGRAMS if beginning in code]
    return found


def test_every_program_of_the_page_is_run() -> None:
    tested = ("Buffer(cfg)\n", "Buffer(cfg, backend=", "RemoteReplayBuffer(", "GymnasiumRecorder(", "lockstep=True")

    assert sorted(map(_program, tested)) == sorted(PROGRAMS)


def test_buffer_of_tdmpc2_runs_as_written(address: str) -> None:
    found = _run(_program("Buffer(cfg)\n"), address)

    shapes = [tuple(found[name].shape) for name in ("obs", "action", "reward", "terminated")]
    assert shapes == [(4, 256, 24), (3, 256, 6), (3, 256, 1), (3, 256, 1)]
    assert found["task"] is None
    assert found["buffer"].capacity == 50_000


def test_buffer_in_process_runs_as_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)

    assert _run(_program("Buffer(cfg, backend="), "")["buffer"].num_eps == 0


def test_replay_buffer_of_torchrl_runs_as_written(address: str) -> None:
    found = _run(_program("RemoteReplayBuffer("), address)

    assert found["sample"].batch_size == (256,)
    assert found["sample"]["observation"].shape == (256, 4)


def test_recorder_runs_as_written(address: str) -> None:
    _run(_program("GymnasiumRecorder("), address)

    with ReplayClient(address) as client:
        (episode,) = client.episodes()
    assert (episode.actor, episode.length) == ("left-foot", 201)


def test_lockstep_runs_as_written(address: str) -> None:
    found = _run(_program("lockstep=True"), address)

    assert tuple(found["batch"].obs.shape[:3]) == (4, 8, 3)
    assert tuple(found["alive"].shape) == tuple(found["batch"].reward.shape) == (3, 8, 3)
    assert found["alive"].all() and found["loss_of_rewards"] > 0
