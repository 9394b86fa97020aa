"""``touchline top`` and ``touchline status`` against real servers; ``top`` on a terminal of its own, with keys and a change of its size."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import suppress
from types import TracebackType
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from support.service_calls import DEADLINE_S, make_config
from touchline import ReplayClient
from touchline._cli.app import app
from touchline_server.service.app import ServerThread

EPISODE = {name: np.zeros((20, 2), np.float32) for name in ("obs", "action")} | {"reward": np.zeros(20, np.float32)}
CONTROL = re.compile(r"\x1b[\[\]()][?0-9;]*[A-Za-z]?")
START = (
    "import fcntl, runpy, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); runpy.run_module('touchline', run_name='__main__', alter_sys=True)"
)
"""Program that makes the terminal its own, so that Ctrl-C reaches it, and runs the command."""
HOME = b"\x1b[H"
"""Beginning of each drawing of the screen."""


class Terminal:
    """The command on a terminal of its own. A context manager that kills it."""

    def __init__(self, *arguments: str, columns: int = 100, rows: int = 30, **variables: str) -> None:
        self._screen, terminal = pty.openpty()
        self.resize(columns, rows)
        self.settings = termios.tcgetattr(terminal)
        environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, *arguments],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            env=environment | {"TERM": "xterm-256color"} | variables,
            start_new_session=True,
        )
        self._terminal = terminal
        self._seen = b""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._screen)
        os.close(self._terminal)

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self._screen, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    @property
    def colours(self) -> bool:
        """Whether anything was written in a colour so far."""
        return re.search(rb"\x1b\[(\d+;)*3\d", self._seen) is not None

    def press(self, keys: str) -> None:
        os.write(self._screen, keys.encode())

    def wait_for(self, words: str, *, without: str = "\0") -> list[str]:
        """Waits for a screen with some words, and without others; returns its lines."""
        end = time.monotonic() + DEADLINE_S
        while time.monotonic() < end:
            frame = CONTROL.sub("", self._seen.rpartition(HOME)[2].decode("utf-8", "replace"))
            if words in frame and without not in frame:
                return [line.rstrip() for line in frame.replace("\r", "").splitlines()]
            if select.select([self._screen], [], [], 0.5)[0]:
                self._seen += os.read(self._screen, 1 << 16)
        raise AssertionError(f"{words!r} is not on the screen:\n{self._seen[-4000:]!r}")

    def end(self) -> tuple[int, str]:
        """Returns exit status and all text, once the command has ended."""
        end = time.monotonic() + DEADLINE_S
        while self.process.poll() is None and time.monotonic() < end:
            if select.select([self._screen], [], [], 0.1)[0]:
                self._seen += os.read(self._screen, 1 << 16)
        while select.select([self._screen], [], [], 0)[0]:
            self._seen += os.read(self._screen, 1 << 16)
        assert self.process.returncode is not None
        assert termios.tcgetattr(self._terminal) == self.settings, "the terminal is as it was"
        return self.process.returncode, CONTROL.sub("", self._seen.decode("utf-8", "replace"))


@pytest.fixture(scope="module")
def server() -> Iterator[ServerThread]:
    with ServerThread(make_config(tables={"demos": {}})) as server, ReplayClient(server.address, actor="striker") as client:
        for _ in range(3):
            client.add(EPISODE, table="demos")
        yield server


def run(*arguments: str, **environment: str) -> Any:
    return CliRunner().invoke(app, list(arguments), env=environment, prog_name="touchline")


def test_status_shows_every_table_as_text_and_as_json(server: ServerThread) -> None:
    text = run("status", "--address", server.address)
    only = run("status", "--address", server.address, "--table", "demos")
    document = json.loads(run("status", "--address", server.address, "--json").stdout)

    assert (text.exit_code, only.exit_code) == (0, 0)
    assert f"at {server.address}: serving, up " in text.stdout
    assert "(default)" in text.stdout and "demos" in text.stdout and "(default)" not in only.stdout
    assert "3 episodes, 60 of 2,000 steps (3%" in only.stdout
    assert "\x1b" not in text.stdout and "Traceback" not in text.output
    assert {"address", "server", "tables", "actors", "learners", "refusals", "time_unix_s"} == set(document)
    assert [table["table"] for table in document["tables"]] == ["", "demos"]
    assert document["tables"][1]["counts"]["steps_stored"] == 60


@pytest.mark.parametrize("command", ["status", "top"])
def test_errors_are_sentences(server: ServerThread, command: str) -> None:
    away = run(command, "--address", "127.0.0.1:1", "--timeout-s", "0.3")
    unknown = run(command, "--address", server.address, "--table", "demo")

    assert (away.exit_code, unknown.exit_code, away.stdout, unknown.stdout) == (1, 1, "", "")
    assert away.stderr.startswith("touchline: no answer: 127.0.0.1:1: ") and "touchline doctor" in away.stderr
    assert "'demos'" in unknown.stderr and "Traceback" not in unknown.stderr + away.stderr


def test_top_that_is_piped_prints_snapshots(server: ServerThread) -> None:
    one = run("top", "--address", server.address)
    two = run("top", "--address", server.address, "--json", "--count", "2", "--interval-s", "0.5")

    assert (one.exit_code, two.exit_code) == (0, 0)
    assert one.stdout.count("serving, up") == 1 and "\x1b" not in one.stdout
    first, second = map(json.loads, two.stdout.splitlines())
    assert first.keys() == second.keys() and first["time_unix_s"] < second["time_unix_s"]


def test_reader_of_a_pipe_that_goes_away_ends_it_quietly(server: ServerThread) -> None:
    command = f"{sys.executable} -m touchline top --address {server.address} --json --interval-s 0.5 | head -n 1; echo ${{PIPESTATUS[0]}}"
    found = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=DEADLINE_S, check=False)

    first, status = found.stdout.splitlines()
    assert json.loads(first)["address"] == server.address
    assert (status, found.stderr) == ("0", "")


def test_keys_pause_sort_help_and_quit(server: ServerThread) -> None:
    with Terminal("top", "--address", server.address, "--interval-s", "0.5") as terminal:
        lines = terminal.wait_for("sorted by PENDING")
        assert any(line.startswith("demos") for line in lines)
        terminal.press(">")
        terminal.wait_for("sorted by WAITS")
        terminal.press("\x1b[D")
        terminal.wait_for("sorted by PENDING")
        terminal.press("2r")
        terminal.wait_for("sorted by NAME, reversed")
        terminal.press("h")
        terminal.wait_for("share of the last minute")
        terminal.press("?")
        terminal.wait_for("demos", without="share of the last minute")
        terminal.press(" ")
        terminal.wait_for("PAUSED: space goes on")
        with ReplayClient(server.address) as client:
            client.add(EPISODE, table="demos")
        terminal.press("p")
        terminal.wait_for("demos", without="PAUSED")
        terminal.press("q")
        assert terminal.end()[0] == 0


def test_change_of_size_is_drawn_and_ctrl_c_restores_the_terminal(server: ServerThread) -> None:
    with Terminal("top", "--address", server.address, "--interval-s", "60", columns=120) as terminal:
        terminal.wait_for("SAMPLED AGE")
        terminal.resize(60, 20)
        lines = terminal.wait_for("sorted by PENDING", without="SAMPLED AGE")
        assert max(map(len, lines)) <= 60
        terminal.press("\x03")
        status, text = terminal.end()

    assert (status, text.rstrip().endswith("touchline: interrupted")) == (130, True)


def test_terminated_top_restores_the_terminal(server: ServerThread) -> None:
    with Terminal("top", "--address", server.address) as terminal:
        terminal.wait_for("sorted by")
        terminal.process.send_signal(signal.SIGTERM)

        assert terminal.end()[0] == 143


def test_server_that_goes_away_and_comes_back() -> None:
    with ServerThread(make_config()) as first:
        address = first.address
        terminal = Terminal("top", "--address", address, "--interval-s", "0.5")
        terminal.wait_for("sorted by")
    with terminal:
        terminal.wait_for("NO ANSWER, this is of")
        port = int(address.rpartition(":")[2])
        with suppress(OSError), ServerThread(make_config(server={"port": port})):
            terminal.wait_for("serving", without="NO ANSWER")
            terminal.press("q")
            assert terminal.end()[0] == 0


@pytest.mark.parametrize("columns", [60, 200])
def test_status_fits_a_terminal(server: ServerThread, columns: int) -> None:
    with Terminal("status", "--address", server.address, columns=columns) as terminal:
        status, text = terminal.end()

    assert status == 0 and "of 2,000 steps" in " ".join(text.split())
    assert max(len(line.rstrip()) for line in text.replace("\r", "").splitlines()) <= columns


def test_colours_are_off_if_asked(server: ServerThread) -> None:
    with Terminal("doctor", "--address", server.address, "--seconds", "0") as terminal:
        terminal.end()
        coloured = terminal.colours
    with Terminal("doctor", "--address", server.address, "--seconds", "0", NO_COLOR="1") as terminal:
        terminal.end()
        plain = terminal.colours

    assert (coloured, plain) == (True, False)
