"""Quiet connections in real time: the default configuration, a server and its clients, and minutes of almost no traffic."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

import pytest

from support.quiet import QuietConnections
from support.service_calls import ServerProcess
from touchline_protos.shm.ring import shared_memory_id
from touchline_server.config.settings import Config

DEFAULTS = {
    "TOUCHLINE_CONFIG__BUFFER_SIZE": str(Config().config.buffer_size),
    "TOUCHLINE_CONFIG__MIN_HISTORY": str(Config().config.min_history),
    "TOUCHLINE_CONFIG__BATCH_SIZE": str(Config().config.batch_size),
}
"""Configuration with the defaults that servers of other tests reduce."""
MINUTES = float(os.environ.get("QUIET_MINUTES", "0"))


@pytest.mark.skipif(not MINUTES, reason="takes its minutes: `make test-quiet` runs it")
@pytest.mark.timeout(MINUTES * 60 + 300)
def test_quiet_connections_live_for_minutes_under_the_default_configuration(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with (
        caplog.at_level(logging.INFO),
        ServerProcess(tmp_path, **DEFAULTS) as server,
        QuietConnections(server.address, rings=bool(shared_memory_id())) as connections,
    ):
        threading.Event().wait(MINUTES * 60)
        connections.check()
        log = server.log

    assert [record.getMessage() for record in caplog.records if "interrupted" in record.getMessage()] == []
    lines = [*log.splitlines(), *capfd.readouterr().err.splitlines()]
    assert [line for line in lines if any(word in line for word in ("too_many_pings", "GOAWAY", "WARNING", "ERROR"))] == []
    print(f"{MINUTES:g} minutes: {', '.join(connections.learners)}, writer, reader of episodes and idle client: none was interrupted")
