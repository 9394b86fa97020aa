"""The HTTP server of a service: whether there is one, and what it is given."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING

from touchline_protos.log_lines import get_logger
from touchline_protos.types.metadata import TOKEN_METADATA_KEY
from touchline_protos.types.status import ServerStatus
from touchline_server.config.addresses import join_address
from touchline_server.config.settings import Config
from touchline_server.http.exposure import why_not
from touchline_server.http.parts import HttpParts, Tables
from touchline_server.service.access import Access, check_http_exposure
from touchline_server.service.parts import ServiceParts
from touchline_server.service.status_report import confine

if TYPE_CHECKING:
    from touchline_server.http.server import HttpServer

logger = get_logger(__name__)

METHOD = "/touchline.v1.Replay/Status"
"""Method whose roles a caller by HTTP needs. They are those of GetEpisodes too."""

NEWEST_EPISODES = 20
"""Most recent episodes of a table that a snapshot names."""


def check_http(config: Config, access: Access | None) -> str | None:
    """Logs who can reach the web page, if others can, and returns why there is no page; None if there is one.

    Raises:
        ConfigError: tokens would be sent unencrypted, or the page cannot be served although ``http.enabled`` is ``"on"``.
    """
    reason = why_not(config, has_tokens=access is not None)
    if reason is None:
        exposure = check_http_exposure(config, access)
        if exposure:
            logger.warning("web page: %s", exposure)
    elif config.http.enabled != "off":
        logger.info("no web page: %s", reason)
    return reason


def start_http(config: Config, parts: ServiceParts, access: Access | None) -> HttpServer | None:
    """Starts the HTTP server; returns None, with a line in the log, if it cannot listen and ``http.enabled`` is ``"auto"``.

    Raises:
        OSError: it cannot listen, and ``http.enabled`` is ``"on"``.
    """
    from touchline_server.http.server import HttpServer

    server = HttpServer(config, _http_parts(parts, access))
    try:
        server.start()
    except OSError as error:
        address = join_address(config.http.host, config.http.port)
        text = f"cannot listen on {address} for HTTP ({error.strerror or error}); choose another http.port, or set http.enabled = 'off'"
        if config.http.enabled == "on":
            raise OSError(text) from None
        logger.warning("no web page: %s", text)
        return None
    logger.info("web page on %s", server.url)
    return server


def _http_parts(parts: ServiceParts, access: Access | None) -> HttpParts:
    registry = parts.tables.registry

    loop = asyncio.get_running_loop()

    async def snapshot() -> ServerStatus:
        return parts.status.snapshot(newest_episodes=NEWEST_EPISODES, shared=True)

    def take_status() -> Future[ServerStatus]:
        coroutine = snapshot()
        try:
            return asyncio.run_coroutine_threadsafe(coroutine, loop)
        except RuntimeError:
            coroutine.close()
            raise

    def check_serving() -> None:
        parts.drain.raise_if_draining()
        registry.check_restored()

    return HttpParts(
        tables=registry,
        readers=parts.sample_pool,
        take_status=take_status,
        confine=lambda status, tables: confine(status, tables, whole=tables is None),
        check_serving=check_serving,
        authorize=_authorizing(access),
    )


def _authorizing(access: Access | None) -> Callable[[str], Tables] | None:
    if access is None:
        return None

    def authorize(token: str) -> Tables:
        metadata = ((TOKEN_METADATA_KEY, f"Bearer {token}"),)
        access.check(METHOD, metadata)
        return access.tables_of(metadata)

    return authorize
