"""What every call passes before a byte of its message is read: its token, the number of calls, and bytes for the message."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc

from touchline_server.errors import (
    AccessDeniedError,
    InvalidArgumentError,
    ReplayError,
    TooLargeError,
)
from touchline_server.metrics.server_metrics import Metrics
from touchline_server.service.access import Access
from touchline_server.service.call_counters import CallCounter, CallCounters
from touchline_server.service.callers import address_of
from touchline_server.service.drain import Drain
from touchline_server.service.grpc_status import abort, status_of
from touchline_server.service.receiver import FIRST_MESSAGE_S, MessageReader, MessageReaders
from touchline_server.service.refusal_log import RefusalLog, check_metadata

HEALTH_SERVICE = "grpc.health.v1.Health"

REFLECTION_SERVICES = ("grpc.reflection.v1alpha.ServerReflection", "grpc.reflection.v1.ServerReflection")

EPISODE_METHODS = frozenset({"/touchline.v1.Replay/AddEpisode", "/touchline.v1.Replay/LoadEpisodes"})
"""Methods whose messages carry episodes."""

LOAD_METHOD = "/touchline.v1.Replay/LoadEpisodes"
"""Method that reserves bytes for its messages itself, because only it knows when they must give way to other calls."""

STANDARD_MESSAGE_S = 5.0
"""Time for a message to the health or reflection service. Health is open to all, so no message may keep others from asking."""

MAX_STANDARD_BYTES = 4096
"""Size of the largest message to those services: the name of a service, a method or a file."""

Context = grpc.aio.ServicerContext[Any, Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"  # at run time it has no parameters


class Admission(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Checks tokens, counts calls, and reads a message only once bytes for it are reserved. Lives in the event loop.

    gRPC itself would read a unary request before it asks anyone. So every unary method is served as one that takes a stream of requests,
    which is the same on the wire.

    Args:
        access: rules of access; None: anyone may call everything.
        calls: counts and limits the calls.
        readers: receive the messages.
        drain: refuses new calls once the server is stopping.
        metrics: counts the calls that end, and those that are refused.
    """

    def __init__(self, access: Access | None, calls: CallCounters, readers: MessageReaders, drain: Drain, *, metrics: Metrics) -> None:
        self._metrics = metrics
        self._access = access
        self._calls = calls
        self._readers = readers
        self._drain = drain
        self._refused = RefusalLog()
        self._admitted: dict[str, tuple[Handler, Handler]] = {}

    async def intercept_service(  # type: ignore[override]
        self, continuation: Callable[[Any], Awaitable[Handler | None]], details: Any
    ) -> Handler | None:
        """Returns a method's handler, wrapped in what the call has to pass; gRPC calls this for each call."""
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
        """Returns a handler that refuses the call without reading a message."""

        async def refuse(requests: AsyncIterator[bytes], context: Context) -> None:
            self._refused.note(context.peer(), method, error)
            self._metrics.refused(error, status_of(error).reason.value, address_of(context.peer()))
            await abort(context, error)

        return grpc.stream_stream_rpc_method_handler(refuse)

    def _admitting(self, method: str, handler: Handler) -> Handler:
        policy = self._policy_of(method, handler)
        metrics = self._metrics
        inner = _inner(handler)
        make = grpc.stream_stream_rpc_method_handler if handler.response_streaming else grpc.stream_unary_rpc_method_handler
        if method == LOAD_METHOD:
            return make(_counted(policy, inner, method, metrics), handler.request_deserializer, handler.response_serializer)
        receive = _each_received if handler.request_streaming else _one_received
        return make(_counted(policy, receive(handler, inner, policy), method, metrics), None, handler.response_serializer)

    def _policy_of(self, method: str, handler: Handler) -> _Policy:
        service = method[1:].rpartition("/")[0]
        calls, readers = self._calls, self._readers
        if service == HEALTH_SERVICE:
            return _Policy.standard(calls.health_watches if handler.response_streaming else calls.health, readers.health)
        if service in REFLECTION_SERVICES:
            return _Policy.standard(calls.reflection, readers.reflection)
        reader = readers.messages if method in EPISODE_METHODS else readers.control
        return _Policy(calls.replay, reader, FIRST_MESSAGE_S, None, reader.max_bytes, self._drain)


@dataclass(frozen=True, slots=True)
class _Policy:
    """How the calls of one method are admitted."""

    calls: CallCounter
    """Counts them."""
    reader: MessageReader
    """Receives their messages."""
    first_timeout_s: float
    """Time for the first message."""
    next_timeout_s: float | None
    """Time for each further message; None: no limit, and no bytes are reserved for it. gRPC's own limit to a message holds."""
    max_bytes: int
    """Size of the largest message."""
    drain: Drain | None = None
    """Refuses the calls once the server is stopping; None: they are answered until it has stopped."""

    @classmethod
    def standard(cls, calls: CallCounter, reader: MessageReader) -> _Policy:
        """Returns the policy of a service that is not Touchline's own."""
        return cls(calls, reader, STANDARD_MESSAGE_S, STANDARD_MESSAGE_S, MAX_STANDARD_BYTES)


def _counted(policy: _Policy, method: Any, name: str, metrics: Metrics) -> Callable[[Any, Context], Awaitable[Any]]:
    """Returns a method that is counted while it runs; errors of what it passes become statuses."""
    name = name.rpartition("/")[2] if policy.drain is not None else name[1:]

    async def counted(_: Any, context: Context) -> Any:
        begin = time.monotonic()
        failed = True
        try:
            if policy.drain is not None:
                policy.drain.raise_if_draining()
            with policy.calls.count(context.peer()):
                answers = method(_Messages(context), context)
                answer = None
                if inspect.isasyncgen(answers):
                    async for part in answers:
                        await context.write(part)
                else:
                    answer = await answers
                failed = False
                return answer
        except asyncio.CancelledError:
            failed = False  # by its caller: that is how streams end
            raise
        except ReplayError as error:
            metrics.refused(error, status_of(error).reason.value, address_of(context.peer()))
            await abort(context, error)
        finally:
            metrics.ended(name, time.monotonic() - begin, failed=failed)

    return counted


def _one_received(handler: Handler, inner: Any, policy: _Policy) -> Callable[[AsyncIterator[bytes], Context], Awaitable[Any]]:
    """Returns a method that receives its one message, and keeps the message's bytes reserved until it has answered."""

    async def receive(requests: AsyncIterator[bytes], context: Context) -> tuple[bytes | None, Any]:
        receiving = policy.reader.receive(requests, context.peer(), timeout_s=policy.first_timeout_s)
        if policy.drain is None:
            return await receiving
        # A call whose message is not there yet would only be refused, so a stopping server does not wait for it.
        async with policy.drain.cancel_on_drain():
            return await receiving

    async def received(requests: AsyncIterator[bytes], context: Context) -> Any:
        message, reservation = await receive(requests, context)
        try:
            if message is None:
                raise InvalidArgumentError("the call ended without a message, expected one")
            return await inner(_parsed(handler, message, policy), context)
        finally:
            reservation.resize(0)

    return received


def _each_received(handler: Handler, inner: Any, policy: _Policy) -> Callable[[AsyncIterator[bytes], Context], Any]:
    """Returns a method that receives its messages one by one; they are small and parsed immediately."""

    async def parsed(requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[Any]:
        timeout_s: float | None = policy.first_timeout_s
        while True:
            if timeout_s is None:
                message = await anext(aiter(requests), None)
            else:
                message, reservation = await policy.reader.receive(requests, context.peer(), timeout_s=timeout_s)
                reservation.resize(0)
            if message is None:
                return
            yield _parsed(handler, message, policy)
            timeout_s = policy.next_timeout_s

    def received(requests: AsyncIterator[bytes], context: Context) -> Any:
        return inner(parsed(requests, context), context)

    return received


def _parsed(handler: Handler, message: bytes, policy: _Policy) -> Any:
    if len(message) > policy.max_bytes:
        raise TooLargeError(f"a message of {len(message)} bytes, expected at most {policy.max_bytes} for this method")
    parse = handler.request_deserializer
    try:
        return message if parse is None else parse(message)
    except Exception:
        raise InvalidArgumentError(f"{len(message)} bytes that are not a message of the expected type") from None


class _Messages:
    """Iterates over a call's messages, as gRPC's own iterator does.

    gRPC's iterator is part of a reference cycle, in which the last message that it returned stays until the garbage collector runs.
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


def _inner(handler: Handler) -> Any:
    if handler.request_streaming:
        return handler.stream_stream if handler.response_streaming else handler.stream_unary
    return handler.unary_stream if handler.response_streaming else handler.unary_unary
