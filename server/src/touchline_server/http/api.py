"""The JSON API: snapshots, history, a stream of events, and the episode browser. docs/http.md describes it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from touchline_server.errors import (
    AccessDeniedError,
    InvalidArgumentError,
    ReplayError,
    TooLargeError,
    UnavailableError,
    UnknownEpisodeError,
    UnknownTableError,
)
from touchline_server.http.episodes import EpisodeBrowser
from touchline_server.http.live import LiveStatus, encode_json
from touchline_server.http.parts import HttpParts, Tables
from touchline_server.http.prometheus import PrometheusExporter

T = TypeVar("T")

RETRY_MS = 1_000
"""Delay after which a browser opens a lost stream of events again."""

MAX_EVENT_STREAMS = 64
"""Most streams of events at a time."""

STATUS_OF: dict[type[ReplayError], int] = {
    AccessDeniedError: 403,
    UnknownEpisodeError: 404,
    UnknownTableError: 404,
    TooLargeError: 413,
    InvalidArgumentError: 400,
    UnavailableError: 503,
}
"""Status of each error, a class before its base; any other one is a 500."""


class Api:
    """The answers to requests under ``/api``. Lives in the HTTP server's event loop.

    Args:
        parts: the parts of the server.
        live: the snapshots.
    """

    def __init__(self, parts: HttpParts, live: LiveStatus) -> None:
        self._parts = parts
        self._live = live
        self._browser = EpisodeBrowser(parts.tables)
        # One request at a time, so the page never occupies more than one of the threads that sampling needs.
        self._turn = asyncio.Lock()
        self._exporter = PrometheusExporter()
        self._streams = 0

    async def session(self, request: Request) -> Response:
        """Answers whether callers need a token, so that the page knows whether there is a login to end."""
        return _json({"tokens": self._parts.authorize is not None})

    async def status(self, request: Request) -> Response:
        """Answers with the newest snapshot."""
        return _json((await self._live.status(_tables(request))).to_dict())

    async def metrics(self, request: Request) -> Response:
        """Answers with the newest snapshot for Prometheus."""
        status = await self._live.status(_tables(request))
        text, content_type = self._exporter.render(status, request.headers.get("accept", ""))
        return Response(text, headers={"content-type": content_type})

    async def history(self, request: Request) -> Response:
        """Answers with the last 5 minutes, or with ``resolution_s=10`` the last hour."""
        coarse = _number(request, "resolution_s", 1) == 10
        return _json(self._live.history.to_dict(_tables(request), coarse=coarse))

    async def events(self, request: Request) -> Response:
        """Answers with a snapshot a second, as server-sent events, until the caller ends the stream or the server stops."""
        if self._streams == MAX_EVENT_STREAMS:
            return _json({"error": f"{self._streams} pages are open, the most at a time; close one, or ask /api/status"}, 503)
        return StreamingResponse(self._events(_tables(request)), media_type="text/event-stream")

    async def episodes(self, request: Request) -> Response:
        """Answers with the newest episodes of a table."""
        table, below, limit = _table(request), _number(request, "below", None), _number(request, "limit", 20)
        actor = request.query_params.get("actor")
        return _json(await self._read(lambda: self._browser.newest(table, below=below, actor=actor, limit=limit)))

    async def episode(self, request: Request) -> Response:
        """Answers with an episode's columns, as points of plots."""
        table, episode_id = _table(request), _whole("episode", request.path_params["episode_id"])
        columns, first_dim = request.query_params.getlist("column"), _number(request, "first_dim", 0)
        return _json(await self._read(lambda: self._browser.show(table, episode_id, columns=columns, first_dim=first_dim)))

    async def frame(self, request: Request) -> Response:
        """Answers with a row of an image column, as a PNG."""
        table, episode_id = _table(request), _whole("episode", request.path_params["episode_id"])
        column, row, side = request.query_params.get("column", ""), _number(request, "row", 0), _number(request, "side", 512)
        png = await self._read(lambda: self._browser.frame(table, episode_id, column=column, row=row, max_side=side))
        return Response(png, media_type="image/png", headers={"cache-control": "private, max-age=600"})

    async def _events(self, tables: Tables) -> AsyncIterator[str]:
        self._streams += 1
        try:
            yield f"retry: {RETRY_MS}\n\n"
            async for event in self._live.events(tables):
                yield event
        finally:
            self._streams -= 1

    async def _read(self, work: Callable[[], T]) -> T:
        """Returns what a reader thread returns.

        Raises:
            ReplayError: the server is restoring its tables or stopping, or the work failed.
        """
        self._parts.check_serving()
        async with self._turn:
            return await asyncio.get_running_loop().run_in_executor(self._parts.readers, work)


async def answer_error(request: Request, error: Exception) -> Response:
    """Answers a request that failed."""
    status = next((status for kind, status in STATUS_OF.items() if isinstance(error, kind)), 500)
    return _json({"error": str(error)}, status)


def _json(value: Any, status: int = 200) -> Response:
    return Response(encode_json(value), status, media_type="application/json")


def _tables(request: Request) -> Tables:
    tables: Tables = request.state.tables
    return tables


def _table(request: Request) -> str:
    """Returns the name of the table that a request is about.

    Raises:
        AccessDeniedError: the caller's token is confined to other tables.
    """
    table, tables = request.query_params.get("table", ""), _tables(request)
    if tables is not None and table not in tables:
        raise AccessDeniedError(f"table: {table!r}, expected one that the token is for: {', '.join(map(repr, sorted(tables)))}")
    return table


def _number(request: Request, name: str, default: Any) -> Any:
    text = request.query_params.get(name)
    if text is None:
        return default
    return _whole(name, text)


def _whole(name: str, text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = None
    if number is None or not -(2**63) <= number < 2**63:
        raise InvalidArgumentError(f"{name}: {text[:40]!r}, expected a 64-bit integer")
    return number
