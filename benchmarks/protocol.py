"""Subjects live in processes of their own, driven by one line of JSON a request and one an answer.

Needs only the standard library.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Self

REPOSITORY = Path(__file__).resolve().parent.parent

MALLOC_TUNING = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
}
"""Settings by which the C library keeps freed memory, so that big allocations cost no page faults. The same for all subjects."""


class WorkerError(RuntimeError):
    """A subject's process failed; the message contains its traceback."""


class Worker:
    """A process that answers calls. Also a context manager that ends it.

    Args:
        module: module to run, which calls :func:`serve`.
        python: the interpreter; None for this one.
        tuned: whether the process runs with :data:`MALLOC_TUNING`.
        tree: a checkout of the project whose product code the process imports; None for this one's.
    """

    def __init__(self, module: str, *, python: Path | None = None, tuned: bool = True, tree: Path | None = None) -> None:
        self.module = module
        # Its output is shown only if it fails: it would disturb the progress bar.
        self._messages = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [str(python or sys.executable), "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._messages,
            cwd=REPOSITORY,
            env=child_environment(tuned=tuned) | (product_environment(tree) if tree is not None else {}),
            text=True,
        )

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    def call(self, method: str, **arguments: Any) -> Any:
        """Makes a call, waits for the answer of the process and returns it.

        Raises:
            WorkerError: it raised, or it ended.
        """
        self.send(method, **arguments)
        return self.receive()

    def send(self, method: str, **arguments: Any) -> None:
        """Begins a call; :meth:`receive` ends it.

        Raises:
            WorkerError: the process ended.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"method": method, "arguments": arguments}) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise self._ended() from error

    def call_within(self, timeout_s: float, method: str, **arguments: Any) -> Any:
        """Makes a call as :meth:`call` does, and kills the process if it does not answer in time.

        Raises:
            WorkerError: it raised, it ended, or it was killed.
        """
        assert self._process.stdout is not None
        self.send(method, **arguments)
        if not wait_readable(self._process.stdout, timeout_s):
            self._process.kill()
            raise WorkerError(f"{self.module}: no answer to {method} within {timeout_s:.0f} s, so it was killed")
        return self.receive()

    def receive(self) -> Any:
        """Returns the answer to the call that was begun. Raises as :meth:`call` does."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{self.module}: {answer['error']}")
        return answer["result"]

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(OSError):  # it ended by itself, leaving a request unread
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._messages.close()

    def _ended(self) -> WorkerError:
        status = self._process.wait()
        self._messages.seek(0)
        return WorkerError(f"{self.module}: ended with status {status}: {self._messages.read()[-2000:]}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def wait_readable(stream: IO[str], timeout_s: float) -> bool:
    """Waits until a pipe of which nothing was read ahead has something to read, or has ended; returns whether it has."""
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        return bool(selector.select(max(timeout_s, 0.0)))


def serve(methods: Mapping[str, Callable[..., Any]]) -> None:
    """Answers calls from standard input until it ends; printed output goes to standard error instead."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"result": methods[request["method"]](**request["arguments"])}
        except Exception:
            answer = {"error": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def child_environment(*, tuned: bool) -> dict[str, str]:
    """Returns the environment of a subject's process: one thread for numerics, and the memory tuning if wanted."""
    environment = {name: value for name, value in os.environ.items() if name not in MALLOC_TUNING}
    environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "2", "RL_LOGGING_LEVEL": "ERROR"}
    return environment | (MALLOC_TUNING if tuned else {})


def product_environment(tree: Path) -> dict[str, str]:
    """Returns the variables with which a process runs the product code of a checkout, with that checkout's default configuration.

    Raises:
        FileNotFoundError: it is not a checkout of the project.
    """
    folders = [tree.resolve() / name / "src" for name in ("protos", "client", "server")]
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: not found, expected a checkout of the project in {tree}")
    return {"PYTHONPATH": os.pathsep.join(map(str, folders)), "TOUCHLINE_CFG": str(tree.resolve() / "cfg" / "default.toml")}


def cpu_seconds(pid: int) -> float:
    """Returns the CPU time that a process of this machine has used in all its threads (Linux)."""
    # The clock id of another process, as clock_getcpuclockid(3) makes it.
    return time.clock_gettime((~pid << 3) | 2)


def resident_bytes(pid: int) -> int:
    """Returns the resident memory of a process of this machine (Linux)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise WorkerError(f"process {pid} has no resident memory")
