"""``touchline.v1.Replay``: its methods, and what holds for all of them.

An add (AddEpisode, LoadEpisodes)         file
    token, drain, count of calls          admission.py, access.py, drain.py, call_counters.py
    bytes reserved, message received      receiver.py, budgets.py
    version, restoring, errors            service.py, grpc_status.py
    one episode, or a stream of them      add_calls.py
    turn, decode, inline or on a thread   throttle.py, ingest.py, touchline_protos/codec/
    rate limit, plan, journal, apply      ../tables/table.py, ../limiters/, ../store/write_path.py, ../durability/

A batch (Sample, SampleStream)
    admitted as above, then credits       sample_calls.py, session.py, change_notifier.py
    drawn, gathered into a message        batch_framer.py, ../store/batch_draw.py, ../store/gather.py
    or into a slot of a ring              ring_producer.py, slot_fillers.py, touchline_protos/shm/
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

from touchline_protos import PROTOCOL_METADATA_KEY, PROTOCOL_VERSION
from touchline_protos.v1 import replay_pb2 as pb
from touchline_server.errors import DrainingError, IncompatibleVersionError
from touchline_server.service import convert
from touchline_server.service.add_calls import AddCalls
from touchline_server.service.callers import address_of
from touchline_server.service.episode_calls import EpisodeCalls
from touchline_server.service.grpc_status import abort, status_of
from touchline_server.service.parts import ServiceParts
from touchline_server.service.sample_calls import SampleCalls
from touchline_server.service.status_calls import StatusCalls
from touchline_server.service.table_calls import TableCalls

SERVICE_NAME = "touchline.v1.Replay"

DISCONNECT_S = 5.0
"""Time for gRPC to report that a peer is gone after a failed write to it."""

Context = grpc.aio.ServicerContext[Any, Any]
T = TypeVar("T")


class ReplayService:
    """``touchline.v1.Replay`` on the tables of a server. Lives in one event loop.

    Args:
        parts: what it works with; it makes nothing itself.
    """

    def __init__(self, parts: ServiceParts) -> None:
        self._tables = parts.tables.registry
        self._metrics = parts.metrics
        self._adds = AddCalls(parts)
        self._samples = SampleCalls(parts)
        self._episodes = EpisodeCalls(parts)
        self._table = TableCalls(parts)
        self._status = StatusCalls(parts)

    def handlers(self) -> grpc.GenericRpcHandler[Any, Any]:
        """Returns the service's method handlers.

        gRPC passes bytes: the codec reads and writes the messages with tensors, and bytes that are not a message get a status of ours.
        """

        def unary(method: Any, request: type[Message]) -> grpc.RpcMethodHandler[Any, Any]:
            return grpc.unary_unary_rpc_method_handler(self._guarded(_parsing(method, request)), None, convert.serialize)

        get_episodes = self._guarded(_parsing(self._episodes.get_episodes, pb.GetEpisodesRequest))
        status = self._guarded(_parsing(self._status.status, pb.StatusRequest), while_restoring=True)
        sample = self._guarded(_parsing(self._samples.sample, pb.SampleRequest))
        return grpc.method_handlers_generic_handler(
            SERVICE_NAME,
            {
                "AddEpisode": grpc.unary_unary_rpc_method_handler(self._guarded(self._adds.add_episode), None, convert.serialize),
                "LoadEpisodes": grpc.stream_unary_rpc_method_handler(self._guarded(self._adds.load_episodes), None, convert.serialize),
                "Sample": grpc.unary_unary_rpc_method_handler(sample, None, None),
                "SampleStream": grpc.stream_stream_rpc_method_handler(self._guarded(self._samples.sample_stream), None, None),
                "GetEpisodes": grpc.unary_stream_rpc_method_handler(get_episodes, None, None),
                "UpdatePriorities": unary(self._samples.update_priorities, pb.UpdatePrioritiesRequest),
                "Ready": unary(self._table.ready, pb.ReadyRequest),
                "Info": unary(self._table.info, pb.InfoRequest),
                "Clear": unary(self._table.clear, pb.ClearRequest),
                "CreateTable": unary(self._table.create_table, pb.CreateTableRequest),
                "SetTable": unary(self._table.set_table, pb.SetTableRequest),
                "DropTable": unary(self._table.drop_table, pb.DropTableRequest),
                "ListTables": unary(self._table.list_tables, pb.ListTablesRequest),
                "Status": grpc.unary_stream_rpc_method_handler(status, None, None),
            },
        )

    def _guarded(
        self, method: Callable[[Any, Context], Awaitable[T]], *, while_restoring: bool = False
    ) -> Callable[[Any, Context], Awaitable[T]]:
        """Wraps a method in what holds for all: the protocol's version, no calls while the store is restored, and errors as statuses."""

        async def guarded(request: Any, context: Context) -> T:
            try:
                _check_protocol(context)
                if not while_restoring:
                    self._tables.check_restored()
                return await method(request, context)
            except (asyncio.CancelledError, grpc.aio.AbortError):
                raise
            except Exception as error:
                if context.done() or (isinstance(error, grpc.aio.InternalError) and await _is_gone(context)):
                    # The peer disconnected while it was being answered: there is no one to report to, and nothing went wrong here.
                    raise asyncio.CancelledError from error
                if isinstance(error, DrainingError):
                    raise  # Admission sends the status when it no longer counts the call: a peer that reads nothing does not take a status.
                self._metrics.refused(error, status_of(error).reason.value, address_of(context.peer()))
                await abort(context, error)

        return guarded


def _parsing(method: Callable[[Any, Context], Awaitable[T]], request: type[Message]) -> Callable[[bytes, Context], Awaitable[T]]:
    """Returns a method that takes its request as bytes."""

    async def parsing(data: bytes, context: Context) -> T:
        return await method(convert.parse(request, data), context)

    return parsing


async def _is_gone(context: Context) -> bool:
    """Returns whether the peer is gone. gRPC reports that a moment after a write to it has failed."""
    ended = asyncio.Event()
    context.add_done_callback(lambda _: ended.set())  # type: ignore[arg-type]
    with suppress(TimeoutError):
        await asyncio.wait_for(ended.wait(), DISCONNECT_S)
    return context.done()


def _check_protocol(context: Context) -> None:
    for name, value in context.invocation_metadata() or ():
        version = value if isinstance(value, str) else value.decode(errors="replace")
        if name == PROTOCOL_METADATA_KEY and version.partition(".")[0] != PROTOCOL_VERSION.partition(".")[0]:
            raise IncompatibleVersionError(
                f"the client speaks protocol {version}, this server {PROTOCOL_VERSION}; install a client of major version "
                f"{PROTOCOL_VERSION.partition('.')[0]}"
            )
