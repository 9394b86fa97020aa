"""Functions of a test module in a process of their own."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

LIMIT_S = 120.0


def run_in_fresh_process(file: str, function: str, *arguments: str) -> None:
    """Calls a function of a test module in a new process, and fails if it fails.

    For tests that fork. gRPC ends a forked child with status 64 while anything of gRPC lives on in it. With grpcio 1.63 the servers that
    earlier tests ran in this process do.

    Args:
        file: the test module's ``__file__``.
        function: the name of the function.
        arguments: what it is called with.
    """
    path = os.pathsep.join((str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")))
    command = [sys.executable, __file__, file, function, *arguments]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    module, name, *given = sys.argv[1:]
    runpy.run_path(module)[name](*given)
