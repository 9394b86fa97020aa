"""What every request passes: the name that it calls the server by, its token, and headers that confine the page to this server."""

from __future__ import annotations

from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from touchline_protos.types.metadata import TOKEN_METADATA_KEY
from touchline_server.config.addresses import is_loopback
from touchline_server.config.settings import Config
from touchline_server.errors import AccessDeniedError, UnauthenticatedError
from touchline_server.http.exposure import is_local_name
from touchline_server.http.parts import HttpParts, Tables

OPEN_PATHS = ("/healthz", "/login", "/logout", "/static/")
"""Prefixes of the paths that need no token: they show neither counts nor episodes."""

COOKIE = "touchline-token"
"""Cookie of a page that has logged in: the token itself, so a login survives a restart of the server."""

MAX_FORM_BYTES = 4_096
"""Largest form of a login."""

HEADERS = {
    # Scripts, styles, images and connections: only this server's own. Nothing may frame the page.
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; object-src 'none'",
    "cross-origin-resource-policy": "same-origin",
    # Not "no-referrer", with which a browser would send the login's form without its origin.
    "referrer-policy": "same-origin",
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
}
"""Headers of every answer that does not set them itself."""


class Guard:
    """An ASGI application around another one. The tables that a caller may see are in the scope's ``state["tables"]``.

    Args:
        inner: the application behind it.
        parts: the parts of the server, for its tokens.
        config: configuration of the server.
    """

    def __init__(self, inner: ASGIApp, parts: HttpParts, config: Config) -> None:
        self._inner = inner
        self._authorize = parts.authorize
        self._secure = bool(config.tls.cert)
        # Without tokens, all that keeps a foreign page in a browser of this machine out is the name by which it calls the server.
        self._checks_host = parts.authorize is None and is_loopback(config.http.host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        if scope["type"] != "http":
            return
        answer = self._refusal(scope) or await self._login(scope, receive)
        await (answer or self._inner)(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope) -> Response | None:
        """Returns the answer to a caller who is refused; None if the request may pass."""
        headers, path = Headers(scope=scope), str(scope["path"])
        tables: Tables = None
        if self._checks_host and not is_local_name(headers.get("host", "")):
            text = f"host {headers.get('host', '')!r}, expected an address, localhost or a name without a dot; see docs/http.md"
            return JSONResponse({"error": text}, 421)
        if self._authorize is not None and not path.startswith(OPEN_PATHS):
            try:
                tables = self._authorize(_token_of(headers))
            except AccessDeniedError as error:
                if path == "/":
                    return RedirectResponse("/login", 303)
                status = 401 if isinstance(error, UnauthenticatedError) else 403
                return JSONResponse({"error": str(error)}, status, {"www-authenticate": "Bearer"} if status == 401 else None)
        scope.setdefault("state", {})["tables"] = tables
        return None

    async def _login(self, scope: Scope, receive: Receive) -> Response | None:
        """Answers the form of the login page and the button that ends a login; None for every other request."""
        if scope["method"] != "POST" or scope["path"] not in ("/login", "/logout"):
            return None
        if not _is_same_origin(Headers(scope=scope)):
            return JSONResponse({"error": "a form of another site, expected the login page of this server"}, 403)
        answer = RedirectResponse("/", 303)
        if scope["path"] == "/logout" or self._authorize is None:
            answer.delete_cookie(COOKIE, path="/", secure=self._secure, httponly=True, samesite="strict")
            return answer
        token = await _token_in_form(Request(scope, receive))
        try:
            self._authorize(token)
        except AccessDeniedError as error:
            reason = "unknown" if isinstance(error, UnauthenticatedError) else "role"
            return RedirectResponse(f"/login?refused={reason}", 303)
        answer.set_cookie(COOKIE, token, path="/", secure=self._secure, httponly=True, samesite="strict")
        return answer


def _token_of(headers: Headers) -> str:
    scheme, _, value = headers.get(TOKEN_METADATA_KEY, "").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    try:
        cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        cookie = None
    return cookie.value if cookie is not None else ""


async def _token_in_form(request: Request) -> str:
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MAX_FORM_BYTES:
            return ""
    return parse_qs(body.decode("ascii", "replace")).get("token", [""])[0].strip()


def _is_same_origin(headers: Headers) -> bool:
    """Returns whether a form was sent by a page of this server. Browsers say so; other programs send no ``Origin``."""
    origin = headers.get("origin")
    return origin is None or urlsplit(origin).netloc == headers.get("host")
