"""Ctrl-C while a method waits: the process ends promptly, even with unsent episodes and without a server."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

PROMPT_S = 15.0
"""A client's timeout is 30 s. It takes well below 5 s; machines may be busy."""

PROGRAM = '''
import logging, os, sys, threading
import numpy as np
import touchline
from touchline import EpisodeWriter, ReplayClient
address, spool = sys.argv[1:]
episode = {"obs": np.zeros((5, 2), np.float32), "action": np.zeros((5, 1), np.float32), "reward": np.zeros(5, np.float32)}

def write(writer):
    for row in range(5):
        writer.append({name: column[row] for name, column in episode.items()})
    writer.end_episode()

def begun():
    """Says so once the main thread does not move any more: it waits."""
    main = threading.main_thread().ident

    def watch():
        still, last, changed = 0, None, threading.Event()
        while still < 20:
            frame = sys._current_frames()[main]
            here = (frame.f_code, frame.f_lasti)
            still, last = (still + 1 if here == last else 0), here
            del frame
            changed.wait(0.02)
        print("begun", flush=True)

    threading.Thread(target=watch, daemon=True).start()

'''

BODIES = {
    "add": "with ReplayClient(address) as client:\n    begun(); client.add(episode)",
    "load": "with ReplayClient(address) as client:\n    begun(); client.load([episode] * 3)",
    "sample": "with ReplayClient(address) as client:\n    begun(); client.sample(wait_s=60)",
    "batches": "with ReplayClient(address) as client, client.batches() as batches:\n    begun(); next(batches)",
    "episodes": "with ReplayClient(address) as client:\n    begun(); next(client.episodes())",
    "counts": "with ReplayClient(address) as client:\n    begun(); client.counts()",
    "wait_until_ready": "with ReplayClient(address) as client:\n    begun(); client.wait_until_ready()",
    "writer, in its body": (
        "import time\n"
        "from contextlib import ExitStack\n"
        "with ReplayClient(address) as client, ExitStack() as stack:\n"
        "    for _ in range(3): write(stack.enter_context(EpisodeWriter(client)))\n"
        "    begun(); time.sleep(600)"
    ),
    "writer, at its end": "with ReplayClient(address) as client, EpisodeWriter(client) as writer:\n    write(writer); begun()",
    "writer, flush": "with ReplayClient(address) as client, EpisodeWriter(client) as writer:\n    write(writer); begun(); writer.flush()",
    "writer, never closed": "import time\nwriter = EpisodeWriter(ReplayClient(address)); write(writer); begun(); time.sleep(600)",
    "writer, held up": (
        "with ReplayClient(address) as client, EpisodeWriter(client, max_pending=1) as writer:\n"
        "    write(writer); begun(); write(writer); write(writer)"
    ),
    "spool": (
        "import time\nwith ReplayClient(address) as client, EpisodeWriter(client, spool_dir=spool) as writer:\n"
        "    write(writer); begun(); time.sleep(600)"
    ),
    "spool, at its end": (
        "with ReplayClient(address) as client, EpisodeWriter(client, spool_dir=spool) as writer:\n    write(writer); begun()"
    ),
    "recorder": (
        "import time, gymnasium\nfrom touchline.recorders import GymnasiumVectorRecorder\n"
        "envs = gymnasium.make_vec('CartPole-v1', num_envs=4, vectorization_mode='sync')\n"
        "with ReplayClient(address) as client, GymnasiumVectorRecorder(envs, client) as envs:\n"
        "    envs.reset(seed=0)\n"
        "    for _ in range(200): envs.step(envs.action_space.sample())\n"
        "    begun(); time.sleep(600)"
    ),
    "drop-in": (
        "from types import SimpleNamespace\nfrom touchline.tdmpc2 import Buffer\nbegun()\n"
        "Buffer(SimpleNamespace(buffer_size=10, steps=10, batch_size=1, horizon=1, replay_address=address))"
    ),
}


SILENT = ("batches", "episodes", "counts", "writer, flush", "drop-in")
"""Methods tried on a server that accepts connections but is silent; others run without a server. ``FAULT_LONG`` tries both for each."""
CASES = [(verb, silent) for verb in BODIES for silent in (False, True) if "FAULT_LONG" in os.environ or silent == (verb in SILENT)]


@pytest.mark.parametrize(("verb", "silent"), CASES)
def test_interrupted_process_ends_promptly(verb: str, silent: bool, tmp_path: Path) -> None:
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        if silent:
            taken.listen()
        took_s, errors = interrupt(verb, f"127.0.0.1:{taken.getsockname()[1]}", tmp_path)

    assert "KeyboardInterrupt" in errors
    assert took_s < PROMPT_S, errors


def interrupt(verb: str, address: str, tmp_path: Path) -> tuple[float, str]:
    """Returns how long a program takes to end after Ctrl-C, and what it wrote to stderr."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM + BODIES[verb], encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, str(program), address, str(tmp_path / "spool")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGINT)
        begin = time.monotonic()
        _, errors = process.communicate(timeout=120)
        took_s = time.monotonic() - begin
    finally:
        process.kill()
        process.wait()
    return took_s, errors
