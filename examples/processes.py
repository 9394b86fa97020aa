"""The demo's child processes: started with a log, watched, and always ended."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

LOG_TAIL_LINES = 25
STOP_TIMEOUT_S = 60.0


class ChildError(Exception):
    """A child failed or missed a deadline; the message has the end of its log."""


class Child:
    """One process; its stdout goes to `<name>.out`, its stderr to `<name>.log`.

    Args:
        variables: environment variables, unless they are set already.
    """

    def __init__(self, name: str, command: Sequence[str], folder: Path, *, variables: Mapping[str, str] | None = None) -> None:
        self.name = name
        self._asked = False
        self.stdout, self.log = folder / f"{name}.out", folder / f"{name}.log"
        environment = {"OMP_NUM_THREADS": "1", **(variables or {}), **os.environ, "PYTHONUNBUFFERED": "1"}
        with self.stdout.open("wb") as stdout, self.log.open("wb") as log:
            # In a session of its own, so that Ctrl-C reaches only the demo, which then stops its children cleanly.
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=log, env=environment, start_new_session=True
            )

    def check(self) -> None:
        """Checks that the process runs.

        Raises:
            ChildError: it ended.
        """
        if self._process.poll() is not None:
            raise self._error(f"ended with status {self._process.returncode}")

    def wait_for_line(self, prefix: str, *, timeout_s: float) -> str:
        """Returns the rest of the first line on its stdout that begins with `prefix`.

        Raises:
            ChildError: it ended before, or there was none in time.
        """
        ends = time.monotonic() + timeout_s
        while (line := self.find_line(prefix)) is None:
            self.check()
            if time.monotonic() > ends:
                raise self._error(f"did not print {prefix!r} within {timeout_s:.0f} s")
            time.sleep(0.05)
        return line

    def find_line(self, prefix: str) -> str | None:
        """Returns the rest of the first line on its stdout that begins with `prefix`; None if there is none yet."""
        for line in self.stdout.read_text().splitlines(keepends=True):
            if line.startswith(prefix) and line.endswith("\n"):
                return line.removeprefix(prefix).strip()
        return None

    def ask_to_stop(self) -> None:
        """Sends SIGTERM, once: a second one would kill a program that is already stopping."""
        if not self._asked and self._process.poll() is None:
            self._asked = True
            self._process.terminate()

    def stop(self) -> None:
        """Sends SIGTERM and waits until it ended by itself.

        Raises:
            ChildError: it ended with another status than 0, or not in time.
        """
        self.ask_to_stop()
        try:
            status = self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise self._error(f"did not stop within {STOP_TIMEOUT_S:.0f} s") from None
        if status != 0:
            raise self._error(f"ended with status {status}")

    def end(self, *, grace_s: float) -> None:
        """Makes sure that it has ended: by SIGTERM, if it was not sent before, and SIGKILL after a while."""
        self.ask_to_stop()
        try:
            self._process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _error(self, what: str) -> ChildError:
        lines = self.log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        tail = "\n".join(f"    {line}" for line in lines) or "    (empty)"
        return ChildError(f"{self.name} {what}; the end of {self.log}:\n{tail}")


class Children:
    """Starts children, and ends all of them at the end of its `with` block, last started first, however the block ends."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._children: list[Child] = []

    def start(self, name: str, *command: str, variables: Mapping[str, str] | None = None) -> Child:
        """Starts a child, with `variables` in its environment unless they are set there."""
        child = Child(name, command, self._folder, variables=variables)
        self._children.append(child)
        return child

    def check(self) -> None:
        """Raises ChildError if a child has ended."""
        for child in self._children:
            child.check()

    def __enter__(self) -> Children:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for child in reversed(self._children):
            child.ask_to_stop()
        for child in reversed(self._children):
            child.end(grace_s=10.0)
