"""The ASGI application: its routes, behind the guard."""

from __future__ import annotations

from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from touchline_server.config.settings import Config
from touchline_server.errors import ReplayError
from touchline_server.http.api import Api, answer_error
from touchline_server.http.guard import Guard
from touchline_server.http.live import LiveStatus
from touchline_server.http.parts import HttpParts

STATIC = Path(__file__).with_name("static")
"""Folder of the page's files."""


def build_application(config: Config, parts: HttpParts, live: LiveStatus) -> ASGIApp:
    """Returns the application of one server."""
    pages, api = _Pages(parts), Api(parts, live)
    routes = [
        Route("/", pages.page),
        Route("/login", pages.login),
        Route("/healthz", pages.healthz),
        Route("/api/session", api.session),
        Route("/api/status", api.status),
        Route("/api/history", api.history),
        Route("/api/events", api.events),
        Route("/api/episodes", api.episodes),
        Route("/api/episodes/{episode_id}", api.episode),
        Route("/api/episodes/{episode_id}/frame", api.frame),
        Route("/metrics", api.metrics),
        Mount("/static", StaticFiles(directory=STATIC)),
    ]
    application = Starlette(routes=routes, exception_handlers={HTTPException: _not_found, ReplayError: answer_error})
    return Guard(application, parts, config)


class _Pages:
    """The answers that need nothing but the server's parts."""

    def __init__(self, parts: HttpParts) -> None:
        self._parts = parts

    async def page(self, request: Request) -> Response:
        """Answers with the page."""
        return FileResponse(STATIC / "index.html")

    async def login(self, request: Request) -> Response:
        """Answers with the form for a token."""
        return FileResponse(STATIC / "login.html")

    async def healthz(self, request: Request) -> Response:
        """Answers 200 while the server takes calls, otherwise 503 and why not."""
        try:
            self._parts.check_serving()
        except ReplayError as error:
            return PlainTextResponse(f"{error}\n", 503)
        return PlainTextResponse("serving\n")


async def _not_found(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    text = f"{request.method} {request.url.path}: {error.detail}; docs/http.md lists what there is"
    return JSONResponse({"error": text}, error.status_code)
