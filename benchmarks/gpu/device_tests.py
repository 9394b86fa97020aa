"""Runs the tests that need a CUDA device, before anything is measured."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from benchmarks.protocol import REPOSITORY

OUTCOME = re.compile(r"^(\S+\.py)::(.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", re.MULTILINE)

OPTIONS = ("-m", "gpu", "-v", "-p", "no:cacheprovider", "--color=no", "--timeout=45")
"""Options of pytest. A test that hangs leaves time for the others."""


def files_with_device_tests(tests: Path = REPOSITORY / "tests") -> list[str]:
    """Returns the test files with tests that are marked ``gpu``, relative to the repository: collecting only these saves half a minute."""
    files = (path for path in sorted(tests.rglob("test_*.py")) if "mark.gpu" in path.read_text("utf-8"))
    return [str(path.relative_to(tests.parent)) for path in files]


def run_device_tests(limit_s: float) -> dict[str, object]:
    """Runs the tests marked ``gpu`` and ends them after ``limit_s``.

    Returns:
        ``outcomes``: number of tests by outcome; ``failed``: names of tests that failed; ``status``: exit status of pytest, None if it was
        ended; ``took_s``; and, unless all went well, ``end``: the end of its output.
    """
    command = [sys.executable, "-m", "pytest", *OPTIONS, *files_with_device_tests()]
    # JAX would take three quarters of the device's memory as soon as its tests are collected.
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    began = time.monotonic()
    status: int | None = None
    # A file, not a pipe: what was printed until the limit counts.
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # pytest ends its fixtures, and with them servers
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
        finally:
            # What is left of it would run beside the measurement.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        text = output.read()
    return {**summarize(text), "status": status, "took_s": time.monotonic() - began, **({"end": text[-8000:]} if status != 0 else {})}


def summarize(text: str) -> dict[str, object]:
    """Returns the number of tests by outcome, and those that failed, from the output of ``pytest -v``."""
    outcomes: dict[str, int] = {}
    failed = []
    for file, name, outcome in OUTCOME.findall(text):
        outcomes[outcome.lower()] = outcomes.get(outcome.lower(), 0) + 1
        if outcome in ("FAILED", "ERROR"):
            failed.append(f"{file}::{name}")
    return {"outcomes": outcomes, "failed": failed}
