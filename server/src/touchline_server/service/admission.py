"""What every call passes before a byte of its message is read: may it come in, and is there room for it."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc

from touchline_server.errors import (
    AccessDeniedError,
    InvalidArgumentError,
    OverLimitError,
    ReplayError,
    TooLargeError,
)
from touchline_server.service.access import Access
from touchline_server.service.grpc_status import abort
from touchline_server.service.receiver import FIRST_MESSAGE_S, MessageReader, MessageReaders
from touchline_server.service.refusal_log import RefusalLog, check_metadata

HEALTH_SERVICE = "grpc.health.v1.Health"

REFLECTION_SERVICES = ("grpc.reflection.v1alpha.ServerReflection", "grpc.reflection.v1.ServerReflection")

EPISODE_METHODS = frozenset({"/touchline.v1.Replay/AddEpisode", "/touchline.v1.Replay/LoadEpisodes"})
"""Methods whose messages bring episodes."""

LOADING_METHOD = "/touchline.v1.Replay/LoadEpisodes"
"""It takes room for its messages itself, because it knows when others may want that room."""

MAX_HEALTH_CALLS = 256
"""Calls to the health service at a time, apart from those that watch it."""

MAX_HEALTH_WATCHES = 128
"""Calls that watch the health at a time: they last, and must keep nobody from asking."""

MAX_REFLECTION_CALLS = 64
"""Calls that ask what methods there are, at a time."""

STANDARD_SHARE = 16
"""One connection gets one part in so many of the calls to a service that is not Touchline's own."""

STANDARD_MESSAGE_S = 5.0
"""How long a question to such a service may take to come in: health is open to all, and none may keep the others from asking."""

MAX_STANDARD_BYTES = 4096
"""Largest question to such a service: it is the name of a service, a method or a file."""

Context = grpc.aio.ServicerContext[Any, Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"  # at run time it has no parameters


class Admission(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Asks for tokens, counts calls, and reads the message of a unary request only once there is room for it. Lives in one event loop.

    gRPC itself would read that message first. So each such method is served as one that takes a stream, which on the wire is the same.

    Args:
        access: who may call what; None: everybody everything.
        max_calls: at a time, apart from those to the health and reflection services.
        receptions: of messages.
    """

    def __init__(self, access: Access | None, *, max_calls: int, receptions: MessageReaders) -> None:
        self._access = access
        self._receptions = receptions
        self._calls = _Count(max_calls, "limits.max_calls")
        health, reflection = "the limit of the health service", "the limit of the reflection service"
        self._health_calls = _Count(MAX_HEALTH_CALLS, health, share=MAX_HEALTH_CALLS // STANDARD_SHARE)
        self._health_watches = _Count(MAX_HEALTH_WATCHES, health, share=MAX_HEALTH_WATCHES // STANDARD_SHARE)
        self._reflection_calls = _Count(MAX_REFLECTION_CALLS, reflection, share=MAX_REFLECTION_CALLS // STANDARD_SHARE)
        self._refused = RefusalLog()
        self._admitted: dict[str, tuple[Handler, Handler]] = {}

    @property
    def calls_now(self) -> int:
        """Calls in progress, of every service."""
        return sum(count.now for count in (self._calls, self._health_calls, self._health_watches, self._reflection_calls))

    async def intercept_service(  # type: ignore[override]
        self, continuation: Callable[[Any], Awaitable[Handler | None]], details: Any
    ) -> Handler | None:
        """Returns a method's handler with what it has to pass; gRPC calls this for each call."""
        method, metadata = details.method, details.invocation_metadata or ()
        try:
            check_metadata(metadata)
            if self._access is not None:
                self._access.check(method, metadata)
        except (InvalidArgumentError, AccessDeniedError) as error:
            return self._refusing(method, error)
        handler = await continuation(details)
        if handler is None:
            return None
        known = self._admitted.get(method)
        if known is None or known[0] is not handler:
            known = self._admitted[method] = (handler, self._admitting(method, handler))
        return known[1]

    def _refusing(self, method: str, error: Exception) -> Handler:
        """Returns a handler that refuses whatever is called; none of its messages is read."""

        async def refuse(requests: AsyncIterator[bytes], context: Context) -> None:
            self._refused.note(context.peer(), method, error)
            await abort(context, error)

        return grpc.stream_stream_rpc_method_handler(refuse)

    def _admitting(self, method: str, handler: Handler) -> Handler:
        way = self._way_of(method, handler)
        inner = _inner(handler)
        make = grpc.stream_stream_rpc_method_handler if handler.response_streaming else grpc.stream_unary_rpc_method_handler
        if method == LOADING_METHOD:
            return make(_counted(way.count, inner), handler.request_deserializer, handler.response_serializer)
        receive = _each_received if handler.request_streaming else _one_received
        return make(_counted(way.count, receive(handler, inner, way)), None, handler.response_serializer)

    def _way_of(self, method: str, handler: Handler) -> _Way:
        service = method[1:].rpartition("/")[0]
        if service == HEALTH_SERVICE:
            count = self._health_watches if handler.response_streaming else self._health_calls
            return _Way(count, self._receptions.health, STANDARD_MESSAGE_S, STANDARD_MESSAGE_S, MAX_STANDARD_BYTES)
        if service in REFLECTION_SERVICES:
            return _Way(self._reflection_calls, self._receptions.reflection, STANDARD_MESSAGE_S, STANDARD_MESSAGE_S, MAX_STANDARD_BYTES)
        reception = self._receptions.messages if method in EPISODE_METHODS else self._receptions.questions
        return _Way(self._calls, reception, FIRST_MESSAGE_S, None, reception.size)


@dataclass(frozen=True, slots=True)
class _Way:
    """How the calls of a method come in."""

    count: _Count
    reception: MessageReader
    first_within_s: float
    """Time for the first message."""
    next_within_s: float | None
    """Time for each further one; None: they may come at any time, so no room is taken for them. gRPC's limit to a message holds."""
    max_bytes: int
    """Of a message."""


def _one_received(handler: Handler, inner: Any, way: _Way) -> Callable[[AsyncIterator[bytes], Context], Awaitable[Any]]:
    """Returns a method that receives its one message, and keeps the message's room until it has answered."""

    async def received(requests: AsyncIterator[bytes], context: Context) -> Any:
        message, room = await way.reception.receive(requests, context.peer(), within_s=way.first_within_s)
        try:
            if message is None:
                raise InvalidArgumentError("the call ended without a message, expected one")
            return await inner(_parsed(handler, message, way), context)
        finally:
            room.resize(0)

    return received


def _each_received(handler: Handler, inner: Any, way: _Way) -> Callable[[AsyncIterator[bytes], Context], Any]:
    """Returns a method that receives its messages one by one; they are small, and parsed at once."""

    async def parsed(requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[Any]:
        within_s: float | None = way.first_within_s
        while True:
            if within_s is None:
                message = await anext(aiter(requests), None)
            else:
                message, room = await way.reception.receive(requests, context.peer(), within_s=within_s)
                room.resize(0)
            if message is None:
                return
            yield _parsed(handler, message, way)
            within_s = way.next_within_s

    def received(requests: AsyncIterator[bytes], context: Context) -> Any:
        return inner(parsed(requests, context), context)

    return received


def _parsed(handler: Handler, message: bytes, way: _Way) -> Any:
    if len(message) > way.max_bytes:
        raise TooLargeError(f"a message of {len(message)} bytes, expected at most {way.max_bytes} for this method")
    parse = handler.request_deserializer
    try:
        return message if parse is None else parse(message)
    except Exception:
        raise InvalidArgumentError(f"{len(message)} bytes that are no message of the expected type") from None


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
    """So many of something at a time.

    Args:
        limit: of all connections.
        what: sets the limit, for the text of errors.
        share: of one connection; None: no less than all. Connections over a Unix socket cannot be told apart, and have none.
    """

    def __init__(self, limit: int, what: str, *, share: int | None = None) -> None:
        self._limit = limit
        self._what = what
        self._share = limit if share is None else share
        self._of: Counter[str] = Counter()
        self.now = 0
        """In progress."""

    def enter(self, peer: str) -> None:
        if self.now == self._limit:
            raise OverLimitError(f"{self.now} calls are in progress, which is what {self._what} allows; try again later")
        if self._of[peer] == self._share and not peer.startswith("unix:"):
            raise OverLimitError(f"{self._share} calls of one connection are in progress, its share of {self._what}; try again later")
        self._of[peer] += 1
        self.now += 1

    def leave(self, peer: str) -> None:
        self.now -= 1
        self._of[peer] -= 1
        if not self._of[peer]:
            del self._of[peer]


def _inner(handler: Handler) -> Any:
    if handler.request_streaming:
        return handler.stream_stream if handler.response_streaming else handler.stream_unary
    return handler.unary_stream if handler.response_streaming else handler.unary_unary


def _counted(count: _Count, method: Any) -> Callable[[Any, Context], Awaitable[Any]]:
    async def counted(_: Any, context: Context) -> Any:
        peer = context.peer()
        try:
            count.enter(peer)
        except OverLimitError as error:
            await abort(context, error)
        try:
            answers = method(_Messages(context), context)
            if not inspect.isasyncgen(answers):
                return await answers
            async for answer in answers:
                await context.write(answer)
        except ReplayError as error:
            await abort(context, error)
        finally:
            count.leave(peer)

    return counted
