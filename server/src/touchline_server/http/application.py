"""The ASGI application: its routes, behind the guard."""

from __future__ import annotations

from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from touchline_server.config.settings import Config
from touchline_server.errors import ReplayError
from touchline_server.http.guard import Guard
from touchline_server.http.parts import HttpParts

STATIC = Path(__file__).with_name("static")
"""Folder of the page's files."""


def build_application(config: Config, parts: HttpParts) -> ASGIApp:
    """Returns the application of one server."""
    pages = _Pages(parts)
    routes = [
        Route("/healthz", pages.healthz),
        Route("/login", pages.login),
        Mount("/static", StaticFiles(directory=STATIC)),
    ]
    return Guard(Starlette(routes=routes, exception_handlers={404: _not_found}), parts, config)


class _Pages:
    """The answers that need nothing but the server's parts."""

    def __init__(self, parts: HttpParts) -> None:
        self._parts = parts

    async def healthz(self, request: Request) -> Response:
        """Answers 200 while the server takes calls, otherwise 503 and why not."""
        try:
            self._parts.check_serving()
        except ReplayError as error:
            return PlainTextResponse(f"{error}\n", 503)
        return PlainTextResponse("serving\n")

    async def login(self, request: Request) -> Response:
        """Answers with the form for a token."""
        return FileResponse(STATIC / "login.html")


async def _not_found(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": f"{request.url.path}: not found; docs/http.md lists what is"}, 404)
