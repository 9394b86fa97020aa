"""A real gRPC server with answers chosen by a test, for behaviour that a healthy replay server does not show on demand."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from types import TracebackType
from typing import Any, NoReturn

import grpc
import pytest

from touchline import ReplayClient
from touchline._rpc.calls import Backoff

Handler = Callable[[Any, grpc.ServicerContext], Any]

_KINDS = {
    "GetEpisodes": grpc.unary_stream_rpc_method_handler,
    "LoadEpisodes": grpc.stream_unary_rpc_method_handler,
    "SampleStream": grpc.stream_stream_rpc_method_handler,
}


def fail(
    context: grpc.ServicerContext, code: grpc.StatusCode, reason: str = "", details: str = "as the test wants", retry_after: str = ""
) -> NoReturn:
    """Ends a call as the replay service does: with a status code, a text, a reason for programs and a delay in milliseconds."""
    trailing = (("touchline-reason", reason), ("grpc-retry-pushback-ms", retry_after))
    context.set_trailing_metadata(tuple((key, value) for key, value in trailing if value))
    context.abort(code, details)
    raise AssertionError("abort raises")


class ScriptedServer(grpc.GenericRpcHandler):
    """Serves ``touchline.v1.Replay`` with the given functions of bytes.

    Args:
        handlers: function of a message (or an iterator of messages) and the context, by method name. Other methods are UNIMPLEMENTED.
    """

    def __init__(self, **handlers: Handler) -> None:
        self.handlers = handlers
        self.calls: list[tuple[str, dict[str, str]]] = []
        """Method name and metadata of every call so far."""
        self._server = grpc.server(futures.ThreadPoolExecutor(16))
        self._server.add_generic_rpc_handlers((self,))
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        name = details.method.rpartition("/")[2]
        self.calls.append((name, dict(details.invocation_metadata)))
        handler = self.handlers.get(name)
        if handler is None:
            return None
        return _KINDS.get(name, grpc.unary_unary_rpc_method_handler)(handler)

    def count(self, name: str) -> int:
        """Returns how often a method was called."""
        return sum(called == name for called, _ in self.calls)

    def __enter__(self) -> ScriptedServer:
        self._server.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.stop(0).wait()


def trying_once(client: ReplayClient) -> ReplayClient:
    """Makes a client's calls raise the first error they get instead of retrying, so that no deadline matters on a slow machine."""
    client._rpc.backoff = Backoff(first_s=3600.0)
    return client


def in_turn(*handlers: Handler) -> Handler:
    """Returns a handler that answers the n-th call like the n-th of these handlers, and further ones like the last."""
    left: Iterator[Handler] = iter(handlers[:-1])

    def handle(request: Any, context: grpc.ServicerContext) -> Any:
        return next(left, handlers[-1])(request, context)

    return handle


def failing(code: grpc.StatusCode, reason: str = "", details: str = "as the test wants", retry_after: str = "") -> Handler:
    """Returns a handler that fails."""
    return lambda request, context: fail(context, code, reason, details, retry_after)


def over_limit(retry_after: str = "") -> Handler:
    """Returns a handler that fails like a server over a limit; the delay is in milliseconds."""
    return failing(grpc.StatusCode.RESOURCE_EXHAUSTED, "over-limit", retry_after=retry_after)


def answering(message: bytes) -> Handler:
    """Returns a handler that answers with a message."""
    return lambda request, context: message


def refuse_threads(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Makes starting a thread of this name fail from now on, as if the system had no more threads."""
    start = threading.Thread.start

    def start_others(thread: threading.Thread) -> None:
        if thread.name == name:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_others)
