"""A server for tests of the client, limited to what a client can ask of it.

If the server is installed, it runs in this process. The environments of ``tests/environments`` have only the client, as those of its
users do: there the interpreter that ``$SERVER_PYTHON`` names runs the server, in one process for all tests (``server_host.py``).
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from touchline import ReplayClient

if TYPE_CHECKING:
    from typing_extensions import Self

    from touchline_server import Config, ReplayBuffer
    from touchline_server import InvalidEpisodeError as ServerInvalidEpisodeError
    from touchline_server import NotReadyError as ServerNotReadyError
    from touchline_server.service.app import ServerThread

    HAS_SERVER = True
else:
    try:
        from touchline_server import Config, ReplayBuffer
        from touchline_server import InvalidEpisodeError as ServerInvalidEpisodeError
        from touchline_server import NotReadyError as ServerNotReadyError
        from touchline_server.service.app import ServerThread

        HAS_SERVER = True
    except ModuleNotFoundError as error:
        if error.name != "touchline_server" or "SERVER_PYTHON" not in os.environ:
            raise
        HAS_SERVER = False
        ReplayBuffer = None
        ServerInvalidEpisodeError = ServerNotReadyError = type("OfTheServerError", (Exception,), {})

needs_server = pytest.mark.skipif(not HAS_SERVER, reason="the server is not installed here")
"""Marks tests that use the buffer in process."""


class Host:
    """A process that runs the servers."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [os.environ["SERVER_PYTHON"], str(Path(__file__).with_name("server_host.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        atexit.register(self.end)

    def ask(self, question: dict[str, Any]) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        answer = json.loads(self._process.stdout.readline())
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["value"]

    def end(self) -> None:
        """Stops the process with all its servers."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


class RemoteBuffer:
    """The part of a server's buffer that a client can reach, under the buffer's own names."""

    def __init__(self, address: str) -> None:
        self._address = address

    @property
    def num_eps(self) -> int:
        with ReplayClient(self._address) as client:
            return client.num_eps

    @property
    def size(self) -> int:
        with ReplayClient(self._address) as client:
            return client.counts().steps_stored

    def add(self, episode: Mapping[str, Any]) -> int:
        with ReplayClient(self._address) as client:
            return client.add(episode)


if not HAS_SERVER:
    _host: list[Host] = []

    class Config:
        """Tables of a server's configuration."""

        def __init__(self, **tables: dict[str, Any]) -> None:
            self.tables = tables

    class ServerThread:
        """A server in the host's process; a context manager."""

        def __init__(self, config: Config) -> None:
            self._tables = config.tables
            self.address = ""

        @property
        def buffer(self) -> RemoteBuffer:
            return RemoteBuffer(self.address)

        def __enter__(self) -> Self:
            if not _host:
                _host.append(Host())
            self.address = _host[0].ask({"start": self._tables})
            return self

        def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
            _host[0].ask({"stop": self.address})


def stored_episodes(server: ServerThread) -> list[tuple[str, dict[str, np.ndarray]]]:
    """Returns the actor and the columns of every stored episode, oldest first."""
    with ReplayClient(server.address) as client:
        return [(episode.actor, dict(episode.columns)) for episode in client.episodes()]
