"""The HTTP server: a socket, and a thread with an event loop of its own, so that no page ever keeps a batch waiting."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from touchline_protos.log_lines import get_logger
from touchline_server.config.addresses import join_address
from touchline_server.config.settings import Config
from touchline_server.http.parts import HttpParts

if TYPE_CHECKING:
    import uvicorn

    from touchline_server.http.live import LiveStatus

logger = get_logger(__name__)

BACKLOG = 64
"""Connections that may wait to be accepted."""

CLOSING_S = 1
"""Time for the last answers when the server stops."""


class HttpServer:
    """Serves the page, the JSON API and the health check until it is stopped.

    Args:
        config: configuration of the server.
        parts: what it works with.
    """

    def __init__(self, config: Config, parts: HttpParts) -> None:
        self._config = config
        self._parts = parts
        self._stopping = threading.Event()
        self._server: uvicorn.Server | None = None
        self._live: LiveStatus | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="touchline-http", daemon=True)
        self.address = ""
        """Address once the server has started: ``HOST:PORT``."""

    @property
    def url(self) -> str:
        """The page's address, as a browser takes it."""
        host, _, port = self.address.rpartition(":")
        host = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)
        return f"{'https' if self._config.tls.cert else 'http'}://{host}:{port}/"

    def start(self) -> None:
        """Listens, and starts the thread; connections are answered a moment later.

        Raises:
            OSError: the server cannot listen at the configured address.
        """
        self._socket = _listen(self._config.http.host, self._config.http.port)
        self.address = join_address(self._config.http.host, self._socket.getsockname()[1])
        self._thread.start()

    def stop(self) -> None:
        """Ends open connections and the thread; blocks until that is done."""
        self._stopping.set()
        if self._server is not None and self._loop is not None and self._live is not None:
            with suppress(RuntimeError):  # it ended by itself
                asyncio.run_coroutine_threadsafe(self._live.close(), self._loop)
            self._server.should_exit = True
        self._thread.join()
        self._socket.close()

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except Exception:
            logger.exception("the HTTP server ended; batches and episodes are served as before")

    async def _serve(self) -> None:
        # Imported here: they take a third of a second, which the service does not wait for.
        import uvicorn

        from touchline_server.http.application import build_application
        from touchline_server.http.live import LiveStatus

        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
        self._loop, self._live = asyncio.get_running_loop(), LiveStatus(self._parts)
        self._server = uvicorn.Server(self._uvicorn_config(build_application(self._config, self._parts, self._live)))
        if self._stopping.is_set():
            return
        sampling = asyncio.create_task(self._live.run())
        try:
            await self._server.serve(sockets=[self._socket])
        finally:
            sampling.cancel()

    def _uvicorn_config(self, application: object) -> uvicorn.Config:
        import uvicorn

        from touchline_server.http.connections import LimitedConnection

        tls = self._config.tls
        return uvicorn.Config(
            application,  # type: ignore[arg-type]
            loop="asyncio",
            http=LimitedConnection,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=CLOSING_S,
            h11_max_incomplete_event_size=16_384,
            ssl_certfile=tls.cert or None,
            ssl_keyfile=tls.key or None,
            ssl_ca_certs=tls.client_ca or None,
            ssl_cert_reqs=ssl.CERT_REQUIRED if tls.client_ca else ssl.CERT_NONE,
        )


def _listen(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    listening = socket.socket(family, kind, protocol)
    try:
        # A restarted server gets its port back immediately; two servers never share one.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(BACKLOG)
    except BaseException:
        listening.close()
        raise
    return listening
