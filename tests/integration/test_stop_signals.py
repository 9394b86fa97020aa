"""SIGTERM and SIGINT at any time in the life of a server process: a clean exit with 0."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest

from support.service_calls import DEADLINE_S, SERVICE, Caller, ServerProcess, eventually, make_config, make_episode
from touchline_protos.codec import encode_load
from touchline_server.buffer import ReplayBuffer

BOTH = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])


@BOTH
def test_signal_before_it_listens_ends_in_order(tmp_path: Path, number: signal.Signals) -> None:
    with ServerProcess(tmp_path) as process:
        eventually(lambda: "is starting" in process.log, "its first line", every_s=0.01)

        process.signal(number)

        assert process.wait() == 0
        assert process.process.stdout is not None
        assert process.process.stdout.read() == ""
        assert "Traceback" not in process.log


RESTORE = """
import os, signal, sys
from touchline_server.service.app import run
from support.service_calls import make_config

sys.exit(run(make_config(storage={"device": "cpu", "data_dir": sys.argv[1]}), lambda *progress: os.kill(os.getpid(), int(sys.argv[2]))))
"""


@BOTH
def test_signal_during_a_restore_exits_cleanly_and_keeps_the_store(tmp_path: Path, number: signal.Signals) -> None:
    config = make_config(storage={"device": "cpu", "data_dir": str(tmp_path / "store")})
    with closing(ReplayBuffer(config)) as buffer:
        for seed in range(50):
            buffer.add_episode(make_episode(seed=seed))

    ended = subprocess.run(
        [sys.executable, "-c", RESTORE, str(tmp_path / "store"), str(int(number))],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )

    assert (ended.returncode, ended.stdout) == (0, ""), ended.stderr
    assert "Traceback" not in ended.stderr
    with closing(ReplayBuffer(config)) as buffer:
        assert buffer.counts().episodes_stored == 50


@BOTH
def test_further_signals_while_it_drains_change_nothing(tmp_path: Path, number: signal.Signals) -> None:
    with ServerProcess(tmp_path) as process, Caller(process.address) as caller:
        header, *chunks = encode_load(make_episode(), chunk_bytes=16)
        go_on = threading.Event()

        def messages():  # type: ignore[no-untyped-def]
            yield header
            go_on.wait(DEADLINE_S)
            yield from chunks

        call = caller.channel.stream_unary(SERVICE + "LoadEpisodes").future(messages(), timeout=DEADLINE_S)
        caller.counts()
        process.signal(number)
        eventually(lambda: "draining" in process.log, "it drains", every_s=0.01)

        for _ in range(5):
            process.signal(number)
        go_on.set()
        while process.process.poll() is None:  # up to its very end
            process.signal(number)

        assert process.process.returncode == 0
        assert "stopped: " in process.log
        assert "Traceback" not in process.log
        assert call.done()
