"""The composition root: builds the server from buffer, service, health, reflection and sockets, and runs it."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from touchline_protos.log_lines import get_logger
from touchline_protos.shm.ring import sweep_dead_rings
from touchline_server.buffer import ReplayBuffer
from touchline_server.config.addresses import join_address
from touchline_server.config.settings import Config
from touchline_server.metrics.server_metrics import Metrics, NullMetrics, ServerMetrics
from touchline_server.service.access import Access, check_exposure, read_access
from touchline_server.service.add_pools import AddPools
from touchline_server.service.admission import Admission
from touchline_server.service.budgets import Budgets
from touchline_server.service.call_counters import CallCounters
from touchline_server.service.change_notifier import ChangeNotifier
from touchline_server.service.drain import Drain
from touchline_server.service.health import HealthService
from touchline_server.service.http_access import check_http, start_http
from touchline_server.service.ingest import EpisodeIngest
from touchline_server.service.parts import ServiceParts
from touchline_server.service.receiver import MessageReaders
from touchline_server.service.refusal_log import DropUndecodable
from touchline_server.service.ring_pool import RingPool
from touchline_server.service.service import SERVICE_NAME, ReplayService
from touchline_server.service.status_log import INTERVAL_S as STATUS_INTERVAL_S
from touchline_server.service.status_log import StatusLog
from touchline_server.service.status_report import StatusReport
from touchline_server.service.stop_signals import StoppedError, StopSignals
from touchline_server.service.table_access import TableAccess
from touchline_server.service.throttle import AddThrottle
from touchline_server.service.tls import server_credentials
from touchline_server.store.allocation import with_sharing_decided
from touchline_server.store.memory import keep_freed_memory
from touchline_server.tables.registry import RestoreProgress, TableRegistry

if TYPE_CHECKING:
    from touchline_server.http.server import HttpServer

logger = get_logger(__name__)

CLOSING_S = 1.0
"""Time for the last answers to be sent. Without a limit, a client that watches the server's health would keep the server from stopping."""

LOOKAHEAD_BYTES = 65_535
"""Bytes of a call's messages that a peer may send before the server reads them."""

HANDSHAKE_MS = 20_000
"""Time for a connection to be established, TLS included."""

MIN_PING_INTERVAL_S = 5.0
"""Shortest interval between two pings of an idle client; one that pings more often is disconnected. Clients of other languages ping every
10 s at most."""


_DROP_UNDECODABLE = DropUndecodable()


class AddressInUseError(OSError):
    """The server cannot listen at the configured address."""


def build_parts(config: Config, tables: TableRegistry, access: Access | None = None) -> ServiceParts:
    """Builds the parts of a service. Call it in the event loop in which the service is to live.

    Instruments (metrics) belong here too: made here, handed on in :class:`ServiceParts`, with a null object if there are none.
    """
    budgets = Budgets(config.limits)
    changes = ChangeNotifier(asyncio.get_running_loop())
    drain = Drain(changes.notify_all)
    throttle = AddThrottle(config.server.sample_share)
    add_pools = AddPools(tables, config.server.add_workers)
    calls = CallCounters(config.limits)
    rings = RingPool(config.ring)
    readers = MessageReaders(budgets, config.limits)
    counted = ServerMetrics(readers.messages.waits) if config.metrics.enabled else None
    metrics: Metrics = counted if counted is not None else NullMetrics()
    table_pool = ThreadPoolExecutor(1, thread_name_prefix="touchline-table")
    sample_pool = ThreadPoolExecutor(config.server.sample_workers, thread_name_prefix="touchline-sample")

    def pools() -> dict[str, Sequence[ThreadPoolExecutor]]:
        return {"add": add_pools.of_tables(), "decode": (add_pools.decoding,), "sample": (sample_pool,), "table": (table_pool,)}

    return ServiceParts(
        tables=TableAccess(tables, access),
        limits=config.limits,
        budgets=budgets,
        readers=readers,
        calls=calls,
        changes=changes,
        drain=drain,
        throttle=throttle,
        ingest=EpisodeIngest(add_pools, throttle, changes, drain, config.limits, metrics=metrics),
        rings=rings,
        add_pools=add_pools,
        table_pool=table_pool,
        sample_pool=sample_pool,
        metrics=metrics,
        status=StatusReport(tables, budgets, calls, drain, rings, metrics=counted, pools=pools),
    )


class ReplayServer:
    """A server on one buffer. Lives in one event loop.

    Args:
        config: the configuration; tokens come from ``auth.tokens_file`` and the environment.
        buffer: the buffer to serve, which stays the caller's; None: a new one, closed by :meth:`stop`.
        http: whether to serve the web page too, as ``[http]`` says.

    Raises:
        ConfigError: certificates or tokens cannot be used, tokens would be sent unencrypted, or
            the web page cannot be served as ``[http]`` says.
    """

    def __init__(self, config: Config, buffer: ReplayBuffer | None = None, *, http: bool = True) -> None:
        self._config = config
        self._credentials = server_credentials(config.tls)
        self._access = read_access(config)
        _log_access(config, self._access)
        self._serves_http = http and check_http(config, self._access) is None
        self.buffer = buffer if buffer is not None else ReplayBuffer(with_sharing_decided(config), restore=False)
        self._owns_buffer = buffer is None
        self._http: HttpServer | None = None
        self.address = ""
        """Address of the server once it has started: ``HOST:PORT`` or ``unix:PATH``."""

    @property
    def http_address(self) -> str:
        """Address of the web page once the server has started, ``HOST:PORT``; empty if there is none."""
        return self._http.address if self._http is not None else ""

    @property
    def page_url(self) -> str:
        """The web page's address as a browser takes it; empty if there is no page."""
        return self._http.url if self._http is not None else ""

    async def start(self, progress: RestoreProgress | None = None) -> None:
        """Listens, then restores the durable store if there is one. Until that is done, health says NOT_SERVING and calls are refused.

        Args:
            progress: called from another thread with the table, its rows restored so far and its rows in all.

        Raises:
            AddressInUseError: the server cannot listen at the configured address.
            ReplayError: a table's durable store cannot be used.
        """
        self.parts = build_parts(self._config, self.buffer.registry, self._access)
        self._health = HealthService(self.buffer.registry)
        self._server = self._build_server()
        swept = sweep_dead_rings()
        if swept:
            logger.info("removed %d rings that killed servers left in shared memory", swept)
        try:
            self.address = self._listen()
            await self._server.start()
            self._start_http()
            await asyncio.get_running_loop().run_in_executor(None, self.buffer.registry.restore, progress)
        except BaseException:
            await self._stop_http()
            await self._server.stop(0)
            self.parts.close()
            raise
        self.parts.status.tick()
        self._watches = [asyncio.create_task(one) for one in (self._log_states(), self.parts.status.run())]
        await self._health.serve()

    async def stop(self) -> None:
        """Drains: refuses new work, gives calls in progress ``server.drain_timeout_s`` to end, and stops."""
        await self._health.enter_graceful_shutdown()
        for watch in self._watches:
            watch.cancel()
        self.parts.drain.begin()
        calls = self.parts.calls.replay
        # gRPC cancels every call that arrives once its own stop has begun, so that comes last. Until then new calls get an error that asks
        # their client to try again.
        ended = await calls.wait_idle(self._config.server.drain_timeout_s)
        await self._server.stop(CLOSING_S if ended else 0)
        await self._stop_http()
        # Not in the loop: cancelled calls wait there until no thread works for them any more.
        await asyncio.to_thread(self.parts.close)
        await calls.wait_idle(CLOSING_S)
        if self._owns_buffer:
            await asyncio.to_thread(self.buffer.close)

    async def _log_states(self) -> None:
        """Logs what changes, and which callers the tables' rate limits have held back for long. Runs until it is cancelled."""
        log = StatusLog(self._config.server.log_summary_s)
        while True:
            log.note(self.parts.status.snapshot(shared=True), time.monotonic())
            for table in self.buffer.registry:
                table.rate.log_held()
            await asyncio.sleep(STATUS_INTERVAL_S)

    def _build_server(self) -> grpc.aio.Server:
        parts = self.parts
        logging.getLogger("grpc._cython.cygrpc").addFilter(_DROP_UNDECODABLE)
        admission = Admission(self._access, parts.calls, parts.readers, parts.drain, metrics=parts.metrics)
        server = grpc.aio.server(options=_options(self._config, parts.budgets), interceptors=(admission,))
        server.add_generic_rpc_handlers((ReplayService(parts).handlers(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        health_service = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
        reflection.enable_server_reflection((SERVICE_NAME, health_service, reflection.SERVICE_NAME), server)
        return server

    def _start_http(self) -> None:
        if self._serves_http:
            try:
                self._http = start_http(self._config, self.parts, self._access)
            except OSError as error:
                raise AddressInUseError(str(error)) from None

    async def _stop_http(self) -> None:
        if self._http is not None:
            await asyncio.to_thread(self._http.stop)

    def _listen(self) -> str:
        config = self._config.server
        address = f"unix:{config.unix_socket}" if config.unix_socket else join_address(config.host, config.port)
        if config.unix_socket and _is_alive(config.unix_socket):
            raise AddressInUseError(f"cannot listen on {address}: another server does; stop it or choose another --unix-socket")
        try:
            if self._credentials is None:
                port = self._server.add_insecure_port(address)
            else:
                port = self._server.add_secure_port(address, self._credentials)
        except RuntimeError as error:
            if config.unix_socket:
                what = "its folder does not exist or is not writable, or its path is over 107 characters; choose another --unix-socket"
            else:
                what = (
                    "the address is in use or not this machine's; stop the other server or choose another --host, --port or --unix-socket"
                )
            raise AddressInUseError(f"cannot listen on {address}: {what} ({error})") from None
        return address if config.unix_socket else join_address(config.host, port)


def _options(config: Config, budgets: Budgets) -> tuple[tuple[str, Any], ...]:
    keepalive_ms = int(config.server.keepalive_s * 1000)
    return (
        # The core refuses a larger message when it has read its header, and assembles none of it.
        ("grpc.max_receive_message_length", budgets.request_bytes),
        ("grpc.max_send_message_length", config.limits.max_message_bytes),
        # Bytes that a peer may send before they are read, per call. The default was measured to grow to tens of MiB, for which nothing is
        # reserved; a message that is being read gets a window of its own, up to 1 MiB.
        ("grpc.http2.lookahead_bytes", LOOKAHEAD_BYTES),
        ("grpc.http2.bdp_probe", 0),
        # Otherwise a second server would silently share the port.
        ("grpc.so_reuseport", 0),
        # A peer that has not finished its handshake by then is disconnected, with TLS or without.
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
        # A client's further calls wait on the client's side.
        ("grpc.max_concurrent_streams", config.limits.max_connection_calls),
        # So that a peer that vanished is noticed, and clients may check an idle connection.
        ("grpc.keepalive_time_ms", keepalive_ms),
        ("grpc.keepalive_timeout_ms", keepalive_ms // 3),
        # gRPC uses this one if nothing else is being sent; its default is a minute.
        ("grpc.http2.ping_timeout_ms", keepalive_ms // 3),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        # An idle client pings every 30 s. With the core's default of 5 minutes that counts as abuse, and it would be disconnected.
        ("grpc.http2.min_ping_interval_without_data_ms", int(MIN_PING_INTERVAL_S * 1000)),
    )


def run(config: Config, progress: RestoreProgress | None = None, stop: StopSignals | None = None) -> int:
    """Serves until SIGTERM or SIGINT, then drains. A signal before the server listens keeps it from starting; further ones are ignored.

    Prints ``listening on HOST:PORT`` once the server serves, that is, after the durable store (if any) is restored, and on the next line
    the web page's address, if there is a page.

    Args:
        config: the configuration.
        progress: called from another thread with the table, its rows restored so far and its rows in all.
        stop: the signals, if they are handled already; None: handle them from now on.

    Returns:
        The process's exit code.

    Raises:
        AddressInUseError: the server cannot listen at the configured address.
        ReplayError: the durable store cannot be used.
    """
    keep_freed_memory()
    logger.info("configuration: %s", config.changed() or "every key has its default")
    logger.debug("configuration in force:\n%s", config.to_toml(), extra={"own_lines": True})
    stop = stop or StopSignals().install()
    try:
        asyncio.run(_serve(config, progress, stop))
    finally:
        stop.finish()
    # Otherwise the interpreter's last collection visits all that torch has created, if it was imported: most of a second of CPU, which on a
    # busy machine can exceed the time that a container gets to stop.
    gc.freeze()
    return 0


async def _serve(config: Config, progress: RestoreProgress | None, stop: StopSignals) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()

    def note_progress(table: str, done: int, total: int) -> None:
        stop.check()
        if progress is not None:
            progress(table, done, total)

    stop.on_stop(lambda: loop.call_soon_threadsafe(stopping.set))
    try:
        stop.check()
        server = ReplayServer(config)
        await server.start(note_progress)
    except StoppedError:
        logger.info("stopped before it was ready")
        return
    if "torch" in sys.modules:  # imported only if the columns may be on CUDA
        import torch

        # With two threads, gathers were measured to become many times slower on a shared machine; calls run in parallel anyway.
        torch.set_num_threads(1)
    if not stop.came:
        page = f"\nweb page on {server.page_url}" if server.page_url else ""
        print(f"listening on {server.address}{page}", flush=True)
    await stopping.wait()
    logger.info("draining")
    await server.stop()
    for table in server.buffer.registry:
        logger.info("stopped: %s%s", f"table {table.name!r}: " if table.name else "", table.store.counts())


class ServerThread:
    """A real server in a thread of this process, for notebooks and tests. A context manager.

    >>> with ServerThread(Config(server={"port": 0})) as server:
    ...     client = ReplayClient(server.address)

    Args:
        config: the configuration.
        buffer: the buffer to serve, which stays the caller's; None: a new one.
        http: whether to serve the web page too, as ``[http]`` says.
    """

    def __init__(self, config: Config, buffer: ReplayBuffer | None = None, *, http: bool = False) -> None:
        self._server = ReplayServer(config, buffer, http=http)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="touchline-server", daemon=True)

    @property
    def address(self) -> str:
        """Address of the server."""
        return self._server.address

    @property
    def http_address(self) -> str:
        """Address of the web page, ``HOST:PORT``; empty if there is none."""
        return self._server.http_address

    @property
    def buffer(self) -> ReplayBuffer:
        """The buffer that the server serves."""
        return self._server.buffer

    def __enter__(self) -> Self:
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self._server.start(), self._loop).result()
        except BaseException:
            self._end_loop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        asyncio.run_coroutine_threadsafe(self._server.stop(), self._loop).result()
        self._end_loop()

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _log_access(config: Config, access: Access | None) -> None:
    """Logs who can reach the server. Raises ConfigError if tokens would be sent unencrypted."""
    exposure = check_exposure(config, access)
    if exposure:
        logger.warning("%s", exposure)
    if config.tls.cert:
        logger.info("TLS with %s; clients %s", config.tls.cert, "show a certificate" if config.tls.client_ca else "need no certificate")
    if access is not None:
        logger.info("tokens: %s", access.describe())


def _is_alive(path: str) -> bool:
    """Returns whether a process listens on a Unix socket. gRPC itself would replace the socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except OSError:
            return False
    return True
