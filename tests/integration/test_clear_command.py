"""``touchline clear`` on a real server: what it shows, when it asks, and what is stored afterwards."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from support.dataset_cases import make_episode
from support.durable_cases import durable_config, keyed_episode
from support.serving import ServerThread
from touchline import ReplayClient
from touchline_server import ReplayBuffer

TOKENS = {role: f"{role}-token-0123456789" for role in ("actor", "admin")}


def run(*arguments: str, answer: str | None = None, **environment: str) -> tuple[int, str, str]:
    """Runs the command, on a terminal if there is an answer to type."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TOUCHLINE_")}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": inherited | {"COLUMNS": "200"} | environment}
    command = [sys.executable, "-m", "touchline", "clear", *arguments]
    if answer is None:
        found = subprocess.run(command, stdin=subprocess.DEVNULL, timeout=100, **options)
        return found.returncode, found.stdout, found.stderr
    keyboard, terminal = pty.openpty()
    try:
        process = subprocess.Popen(command, stdin=terminal, **options)
        os.write(keyboard, f"{answer}\n".encode())
        out, err = process.communicate(timeout=100)
        return process.returncode, out, err
    finally:
        os.close(keyboard)
        os.close(terminal)


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    with closing(ReplayBuffer(durable_config(tmp_path, capacity=2_000))) as buffer:
        for sequence in range(12):
            buffer.add_episode(keyed_episode(0, sequence))
    return tmp_path


@pytest.mark.parametrize(("answer", "options"), [("y", ()), (None, ("--yes",))])
def test_clear_shows_what_goes_and_leaves_a_server_for_other_columns(answer: str | None, options: tuple[str, ...], data_dir: Path) -> None:
    config = durable_config(data_dir, capacity=2_000)
    with ServerThread(config) as server, ReplayClient(server.address) as client:
        steps = client.size
        status, out, err = run("--address", server.address, *options, answer=answer)
        cleared = client.counts()
        client.add(make_episode(0))
    with closing(ReplayBuffer(config)) as buffer:
        after = buffer.counts()

    assert status == 0, err
    assert f"{server.address}: 12 episodes, {steps} steps" in out
    assert "obs.state  float32 [17]" in out
    assert f"{server.address}: cleared, 12 episodes removed; the next episode defines the columns anew" in out
    assert ("Remove all of it? This cannot be undone." in err) == (answer is not None)
    assert (cleared.episodes_stored, cleared.episodes_added) == (0, 12)
    assert (after.episodes_stored, after.episodes_added) == (1, 13)


@pytest.mark.parametrize(
    ("answer", "status", "words"),
    [("n", 1, "nothing was cleared"), ("", 1, "nothing was cleared"), (None, 2, "there is no terminal to ask on; --yes clears without")],
)
def test_clear_that_is_not_confirmed_changes_nothing(answer: str | None, status: int, words: str, data_dir: Path) -> None:
    with ServerThread(durable_config(data_dir, capacity=2_000)) as server, ReplayClient(server.address) as client:
        before = client.counts()
        found, _, err = run("--address", server.address, answer=answer)

        assert (found, client.counts()) == (status, before)
    assert words in err


def test_clear_of_an_empty_server_reports_it_without_asking(tmp_path: Path) -> None:
    with ServerThread(durable_config(tmp_path)) as server:
        status, out, _ = run("--address", server.address)

    assert (status, out) == (0, f"{server.address}: 0 episodes, 0 steps\n")


def test_clear_without_a_server_or_with_a_token_for_something_else_exits_1(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOUCHLINE_SERVER_TOKENS", " ".join(f"{role}:{role}-name:{token}" for role, token in TOKENS.items()))
    with ServerThread(durable_config(data_dir, capacity=2_000)) as server:
        refused = run("--yes", TOUCHLINE_ADDRESS=server.address, TOUCHLINE_TOKEN=TOKENS["actor"])
        nobody = run("--yes", TOUCHLINE_ADDRESS=server.address)
        assert server.buffer.num_eps == 12
        cleared = run("--yes", TOUCHLINE_ADDRESS=server.address, TOUCHLINE_TOKEN=TOKENS["admin"])
        assert server.buffer.num_eps == 0
    away = run("--yes", "--address", "127.0.0.1:1")

    assert [status for status, _, _ in (refused, nobody, cleared, away)] == [1, 1, 0, 1]
    assert "AccessDeniedError" in refused[2] and "UnauthenticatedError" in nobody[2]
    assert "no server: " in away[2]
