"""Actors and learners of a table with a rate limit, each a process that is killed some day.

python -m support.limited_peers act ADDRESS NAME
python -m support.limited_peers learn ADDRESS ring|messages
"""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np

from touchline import OverLimitError, ReplayClient

STEPS = 20
EPISODE = {name: np.zeros((STEPS, 2), np.float32) for name in ("obs", "action")} | {"reward": np.zeros(STEPS, np.float32)}


def start(role: str, address: str, which: str) -> subprocess.Popen[bytes]:
    """Starts a process that adds episodes, or takes batches, until it is killed."""
    command = [sys.executable, "-m", "support.limited_peers", role, address, which]
    return subprocess.Popen(command, cwd=Path(__file__).parents[1])


def main() -> None:
    role, address, which = sys.argv[1:]
    with ReplayClient(address) as client:
        if role == "learn":
            batches = client.batches(ring=which == "ring")
            while True:
                next(batches)
        while True:
            with suppress(OverLimitError):  # held back for as long as a call may be: another one
                client.add(EPISODE, actor=which)


if __name__ == "__main__":
    main()
