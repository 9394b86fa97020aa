"""What every call passes before a byte of its message is read: may it come in, and is there room for it."""

from __future__ import annotations

import inspect
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias

import grpc

from touchline_server.access import Access
from touchline_server.errors import AccessDeniedError, InvalidRequestError, OverloadedError, ReplayError, UnauthenticatedError
from touchline_server.receiving import Reception, Receptions
from touchline_server.status import abort

HEALTH_SERVICE = "grpc.health.v1.Health"

EPISODE_METHODS = frozenset({"/touchline.v1.Replay/AddEpisode", "/touchline.v1.Replay/LoadEpisodes"})
"""Methods whose messages bring episodes."""

MAX_HEALTH_CALLS = 256
"""Calls to the health service at a time, apart from those that watch it."""

MAX_HEALTH_WATCHES = 128
"""Calls that watch the health at a time: they last, and must keep nobody from asking."""

HEALTH_MESSAGE_S = 5.0
"""How long a question to the health service may take to come in: it is open to all, and none may keep the others from asking."""

Context = grpc.aio.ServicerContext[Any, Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"  # at run time it has no parameters


class Admission(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Asks for tokens, counts calls, and reads the message of a unary request only once there is room for it. Lives in one event loop.

    gRPC itself would read that message first. So each such method is served as one that takes a stream, which on the wire is the same.

    Args:
        access: who may call what; None: everybody everything.
        max_calls: at a time, apart from those to the health service.
        receptions: of messages.
    """

    def __init__(self, access: Access | None, *, max_calls: int, receptions: Receptions) -> None:
        self._access = access
        self._receptions = receptions
        self._calls = _Count(max_calls, "server.max_calls")
        self._health_calls = _Count(MAX_HEALTH_CALLS, "the limit of the health service")
        self._health_watches = _Count(MAX_HEALTH_WATCHES, "the limit of the health service")
        self._admitted: dict[str, tuple[Handler, Handler]] = {}

    async def intercept_service(  # type: ignore[override]
        self, continuation: Callable[[Any], Awaitable[Handler | None]], details: Any
    ) -> Handler | None:
        """Returns a method's handler with what it has to pass; gRPC calls this for each call."""
        method = details.method
        if self._access is not None:
            try:
                self._access.check(method, details.invocation_metadata or ())
            except (UnauthenticatedError, AccessDeniedError) as error:
                return _refusing(error)
        handler = await continuation(details)
        if handler is None:
            return None
        known = self._admitted.get(method)
        if known is None or known[0] is not handler:
            known = self._admitted[method] = (handler, self._admitting(method, handler))
        return known[1]

    def _admitting(self, method: str, handler: Handler) -> Handler:
        within_s = math.inf
        if method.startswith(f"/{HEALTH_SERVICE}/"):
            count = self._health_watches if handler.response_streaming else self._health_calls
            reception, within_s = self._receptions.health, HEALTH_MESSAGE_S
        else:
            count = self._calls
            reception = self._receptions.messages if method in EPISODE_METHODS else self._receptions.questions
        inner = _inner(handler)
        make = grpc.stream_stream_rpc_method_handler if handler.response_streaming else grpc.stream_unary_rpc_method_handler
        if handler.request_streaming:
            return make(_counted(count, inner), handler.request_deserializer, handler.response_serializer)
        return make(_counted(count, _reading(handler, inner, reception, within_s)), None, handler.response_serializer)


def _reading(
    handler: Handler, inner: Any, reception: Reception, within_s: float
) -> Callable[[AsyncIterator[bytes], Context], Awaitable[Any]]:
    parse = handler.request_deserializer

    async def read(requests: AsyncIterator[bytes], context: Context) -> Any:
        try:
            message, room = await reception.receive(requests, context.peer(), within_s=within_s)
        except ReplayError as error:
            await abort(context, error)
        try:
            if message is None:
                await abort(context, InvalidRequestError("the call ended without a message, expected one"))
            try:
                request = message if parse is None else parse(message)
            except Exception:
                await abort(context, InvalidRequestError(f"{len(message)} bytes that are no message of the expected type"))
            return await inner(request, context)
        finally:
            room.resize(0)

    return read


class _Messages:
    """A call's messages, one after the other, as gRPC's own iterator of them yields them.

    That one is part of a circle of references, in which the message that it yielded last stays until the garbage collector comes by.
    """

    def __init__(self, context: Context) -> None:
        self._context = context

    def __aiter__(self) -> _Messages:
        return self

    async def __anext__(self) -> Any:
        message = await self._context.read()
        if message is grpc.aio.EOF:  # type: ignore[attr-defined]
            raise StopAsyncIteration
        return message


class _Count:
    """So many of something at a time."""

    def __init__(self, limit: int, what: str) -> None:
        self._limit = limit
        self._what = what
        self.now = 0
        """In progress."""

    def enter(self) -> None:
        if self.now == self._limit:
            raise OverloadedError(f"{self.now} calls are in progress, which is what {self._what} allows; try again later")
        self.now += 1

    def leave(self) -> None:
        self.now -= 1


def _refusing(error: Exception) -> Handler:
    """Returns a handler that refuses whatever is called; none of its messages is read."""

    async def refuse(requests: AsyncIterator[bytes], context: Context) -> None:
        await abort(context, error)

    return grpc.stream_stream_rpc_method_handler(refuse)


def _inner(handler: Handler) -> Any:
    if handler.request_streaming:
        return handler.stream_stream if handler.response_streaming else handler.stream_unary
    return handler.unary_stream if handler.response_streaming else handler.unary_unary


def _counted(count: _Count, method: Any) -> Callable[[Any, Context], Awaitable[Any]]:
    async def counted(_: Any, context: Context) -> Any:
        try:
            count.enter()
        except OverloadedError as error:
            await abort(context, error)
        try:
            answers = method(_Messages(context), context)
            if not inspect.isasyncgen(answers):
                return await answers
            async for answer in answers:
                await context.write(answer)
        finally:
            count.leave()

    return counted
