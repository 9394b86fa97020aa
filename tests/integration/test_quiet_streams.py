"""Connections that are quiet, or carry only pings, survive many keepalive periods: over TCP, TLS and Unix sockets."""

from __future__ import annotations

import logging
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import grpc
import pytest

from support.certificates import Authority
from support.quiet import QuietConnections, episode
from support.service_calls import make_config
from touchline import ReplayClient, TlsConfig
from touchline_protos.shm.ring import shared_memory_id
from touchline_server.service.app import ServerThread

PING_S = 0.15
"""A client's keepalive, 200 times shorter than the real one; the server's limit is shortened as much, the time to answer is not."""
QUIET_S = 20 * PING_S
POLLS_WITHOUT_PYTHON = (1, 73)
"""First version of gRPC in which a client's connection survives a learner's thread that holds the interpreter's lock."""


@pytest.fixture
def short_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("touchline._rpc.channel.KEEPALIVE_S", PING_S)
    monkeypatch.setattr("touchline_server.service.app.MIN_PING_INTERVAL_S", PING_S / 6)


@pytest.mark.parametrize("way", ["tcp", "tls", "unix"])
@pytest.mark.usefixtures("short_intervals")
def test_quiet_and_busy_connections_live_over_many_keepalive_periods(
    way: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    server: dict[str, Any] = {"port": 0, "keepalive_s": 3.0}
    options: dict[str, Any] = {}
    tables: dict[str, Any] = {}
    if way == "tls":
        authority = Authority(tmp_path)
        pair = authority.issue("server", "127.0.0.1")
        tables["tls"] = {"cert": str(pair.cert), "key": str(pair.key)}
        options["tls"] = TlsConfig(ca=authority.cert)
    elif way == "unix":
        server["unix_socket"] = str(tmp_path / "socket")
    config = make_config(server=server, config={"buffer_size": 1_000_000, "batch_size": 8, "min_history": 1, "horizon": 3}, **tables)

    with (
        caplog.at_level(logging.WARNING, "touchline"),
        ServerThread(config) as running,
        QuietConnections(running.address, rings=bool(shared_memory_id()), **options) as connections,
    ):
        threading.Event().wait(QUIET_S)
        connections.check()

    assert [record.getMessage() for record in caplog.records if record.name.startswith("touchline")] == []
    assert "too_many_pings" not in capfd.readouterr().err


HOLDER = """
    import ctypes, logging, sys, time
    from touchline import ReplayClient
    logging.basicConfig(level=logging.WARNING, stream=sys.stdout)
    client = ReplayClient(sys.argv[1])
    batches = client.batches(as_numpy=True, ring=sys.argv[2] == "ring")
    next(batches)
    ctypes.PyDLL(None).usleep(int(float(sys.argv[3]) * 1e6))  # PyDLL: without letting the lock go
    for _ in range(200):
        next(batches)
    print("goes on", flush=True)
"""


@pytest.mark.parametrize("transport", ["ring", "stream"])
def test_learner_that_holds_the_interpreter_for_long_goes_on(transport: str) -> None:
    with ServerThread(make_config(server={"port": 0, "keepalive_s": 1.0})) as server, ReplayClient(server.address) as client:
        client.add({name: values[:100] for name, values in episode(0).items()})
        arguments = [sys.executable, "-c", textwrap.dedent(HOLDER), server.address, transport, "4"]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False)

    printed = done.stdout.splitlines()
    assert printed[-1:] == ["goes on"], done.stderr
    if tuple(int(number) for number in grpc.__version__.split(".")[:2]) >= POLLS_WITHOUT_PYTHON:
        assert printed == ["goes on"]
    else:
        assert len([line for line in printed if "sampling was interrupted" in line]) == 1
