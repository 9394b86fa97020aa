"""Runs the tests that need a CUDA device, before anything is measured."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.protocol import REPOSITORY

OUTCOME = re.compile(r"^(\S+\.py)::(.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", re.MULTILINE)


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
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-p", "no:cacheprovider", "--color=no", *files_with_device_tests()]
    began = time.monotonic()
    status: int | None = None
    # A file, not a pipe: what was printed until the limit counts.
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=output, stderr=subprocess.STDOUT)
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        output.seek(0)
        text = output.read()
    return {**summarize(text), "status": status, "took_s": time.monotonic() - began, **({"end": text[-8000:]} if status else {})}


def summarize(text: str) -> dict[str, object]:
    """Returns the number of tests by outcome, and those that failed, from the output of ``pytest -v``."""
    outcomes: dict[str, int] = {}
    failed = []
    for file, name, outcome in OUTCOME.findall(text):
        outcomes[outcome.lower()] = outcomes.get(outcome.lower(), 0) + 1
        if outcome in ("FAILED", "ERROR"):
            failed.append(f"{file}::{name}")
    return {"outcomes": outcomes, "failed": failed}
