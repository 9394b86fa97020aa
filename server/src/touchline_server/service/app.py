"""Puts the server together and runs it: the one place where buffer, service, health, reflection and sockets meet."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from touchline_protos.log_lines import get_logger
from touchline_protos.shm.ring import sweep_dead_rings
from touchline_server.buffer import ReplayBuffer
from touchline_server.config.settings import Config
from touchline_server.service.access import check_exposure, read_access
from touchline_server.service.admission import Admission
from touchline_server.service.budgets import Budgets
from touchline_server.service.health import HealthService
from touchline_server.service.receiver import MessageReaders
from touchline_server.service.refusal_log import DropUndecodable
from touchline_server.service.service import SERVICE_NAME, ReplayService
from touchline_server.service.stop_signals import StoppedError, StopSignals
from touchline_server.service.tls import server_credentials
from touchline_server.store.memory import keep_freed_memory

logger = get_logger(__name__)

CLOSING_S = 1.0
"""Time for the last answers to leave. A client that watches the server's health would stay for ever."""


_DROP_UNDECODABLE = DropUndecodable()


LOOKAHEAD_BYTES = 65_535
"""What a peer may send of a call's messages before they are read."""


HANDSHAKE_MS = 20_000
"""Time that a connection gets to be made."""


MIN_PING_INTERVAL_S = 5.0
"""Shortest time between two pings of a client that has nothing else to say; one that keeps pinging more often is hung up on. Clients of
other languages ping every 10 s at most."""


class AddressInUseError(OSError):
    """The server cannot listen where it was told to."""


class ReplayServer:
    """A server on one buffer. Lives in one event loop."""

    def __init__(self, config: Config, buffer: ReplayBuffer | None = None) -> None:
        """``buffer``: the one to serve; a new one where left out. Tokens come from ``auth.tokens_file`` and the environment.

        Raises:
            ConfigError: certificates or tokens that cannot be used, or that would travel in the clear.
        """
        self._config = config.server
        self._limits = config.limits
        self._credentials = server_credentials(config.tls)
        self._access = read_access(config)
        exposure = check_exposure(config, self._access)
        if exposure:
            logger.warning("%s", exposure)
        if self._credentials is not None:
            logger.info("TLS with %s; clients %s", config.tls.cert, "show a certificate" if config.tls.client_ca else "need no certificate")
        if self._access is not None:
            logger.info("tokens: %s", self._access.describe())
        self.buffer = buffer if buffer is not None else ReplayBuffer(config, restore=False)
        self._owns_buffer = buffer is None
        self.address = ""
        """Where clients reach it once it was started: ``HOST:PORT`` or ``unix:PATH``."""

    async def start(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Listens, and reads the durable store where there is one: until that is done, health says NOT_SERVING and calls are told so.

        Args:
            progress: told from another thread how many of how many rows are read.

        Raises:
            AddressInUseError: not possible there.
            ReplayError: the durable store cannot be used.
        """
        self.budgets = budgets = Budgets(self._limits)
        receptions = MessageReaders(budgets, self._limits)
        logging.getLogger("grpc._cython.cygrpc").addFilter(_DROP_UNDECODABLE)
        self.admission = Admission(self._access, max_calls=self._limits.max_calls, receptions=receptions)
        self._server = grpc.aio.server(
            options=(
                # The core refuses a larger message by its head, and assembles none of it.
                ("grpc.max_receive_message_length", budgets.request_bytes),
                ("grpc.max_send_message_length", self._limits.max_message_bytes),
                # What a peer may send ahead of being read, a call. Measured, it grows to tens of MiB, for which no room was taken; what is
                # being read gets a window of its own, up to 1 MiB.
                ("grpc.http2.lookahead_bytes", LOOKAHEAD_BYTES),
                ("grpc.http2.bdp_probe", 0),
                # Otherwise a second server would silently share the port.
                ("grpc.so_reuseport", 0),
                # Who has not said what it wants by then, by TLS or in the clear, is hung up on.
                ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
                # Beyond it a client's calls wait at the client.
                ("grpc.max_concurrent_streams", self._limits.max_connection_calls),
                # A peer that vanished is noticed, and clients may check an idle connection.
                ("grpc.keepalive_time_ms", int(self._config.keepalive_s * 1000)),
                ("grpc.keepalive_timeout_ms", int(self._config.keepalive_s * 1000 / 3)),
                # Where nothing else is on its way gRPC goes by this one, a minute by default.
                ("grpc.http2.ping_timeout_ms", int(self._config.keepalive_s * 1000 / 3)),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.max_pings_without_data", 0),
                # A client that waits quietly pings every 30 s. The core's default, 5 minutes, takes that for abuse and hangs up on it.
                ("grpc.http2.min_ping_interval_without_data_ms", int(MIN_PING_INTERVAL_S * 1000)),
            ),
            interceptors=(self.admission,),
        )
        self._service = ReplayService(self.buffer, budgets, receptions)
        self._health = HealthService(self.buffer)
        self._server.add_generic_rpc_handlers((self._service.handlers(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            (SERVICE_NAME, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME), self._server
        )
        swept = sweep_dead_rings()
        if swept:
            logger.info("removed %d rings that killed servers left in shared memory", swept)
        try:
            self.address = self._listen()
            await self._server.start()
            await asyncio.get_running_loop().run_in_executor(None, self.buffer.restore, progress)
        except BaseException:
            await self._server.stop(0)
            self._service.close()
            raise
        self._service.serve()
        await self._health.serve()

    async def stop(self) -> None:
        """Drains: refuses new work, lets work in progress end within ``server.drain_timeout_s``, and stops."""
        await self._health.enter_graceful_shutdown()
        self._service.drain()
        # gRPC cancels whatever arrives after its own stop has begun, so it comes last: until then newcomers are told to try again.
        ended = await self._service.drained(self._config.drain_timeout_s)
        await self._server.stop(CLOSING_S if ended else 0)
        # Not in the loop: calls that were broken off wait here until no thread works for them any more.
        await asyncio.to_thread(self._service.close)
        await self._service.drained(CLOSING_S)
        if self._owns_buffer:
            await asyncio.to_thread(self.buffer.close)

    def _listen(self) -> str:
        wanted = f"unix:{self._config.unix_socket}" if self._config.unix_socket else _join(self._config.host, self._config.port)
        if self._config.unix_socket and _is_alive(self._config.unix_socket):
            raise AddressInUseError(f"cannot listen on {wanted}: another server does; stop it or choose another --unix-socket")
        try:
            if self._credentials is None:
                port = self._server.add_insecure_port(wanted)
            else:
                port = self._server.add_secure_port(wanted, self._credentials)
        except RuntimeError as error:
            if self._config.unix_socket:
                what = "its folder is not there or not writable, or its path is over 107 characters; choose another --unix-socket"
            else:
                what = (
                    "the address is in use or not this machine's; stop the other server or choose another --host, --port or --unix-socket"
                )
            raise AddressInUseError(f"cannot listen on {wanted}: {what} ({error})") from None
        return wanted if self._config.unix_socket else _join(self._config.host, port)


def run(config: Config, progress: Callable[[int, int], None] | None = None, stop: StopSignals | None = None) -> int:
    """Serves until SIGTERM or SIGINT, then drains. If one comes before it listens, it does not begin to; a second one changes nothing.

    Prints ``listening on HOST:PORT`` once it serves: after the durable store, where there is one, is read.

    Args:
        config: the configuration.
        progress: told from another thread how many of how many rows are read.
        stop: the signals, where they are noted already.

    Returns:
        The process's exit code.

    Raises:
        AddressInUseError: the server cannot listen where it was told to.
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
    # The interpreter's last collection would go through all that torch made, where it was imported: most of a second of CPU, which a busy
    # machine stretches beyond the time that a container gets to stop.
    gc.freeze()
    return 0


async def _serve(config: Config, progress: Callable[[int, int], None] | None, stop: StopSignals) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()

    def note_progress(done: int, total: int) -> None:
        stop.check()
        if progress is not None:
            progress(done, total)

    stop.on_stop(lambda: loop.call_soon_threadsafe(stopping.set))
    try:
        stop.check()
        server = ReplayServer(config)
        await server.start(note_progress)
    except StoppedError:
        logger.info("stopped before it was ready")
        return
    if "torch" in sys.modules:  # only where the columns may be on CUDA
        import torch

        # With two threads on a shared machine gathers were measured to collapse; the parallelism is that of the calls.
        torch.set_num_threads(1)
    if not stop.came:
        print(f"listening on {server.address}", flush=True)
    await stopping.wait()
    logger.info("draining")
    await server.stop()
    logger.info("stopped: %s", server.buffer.counts())


class ServerThread:
    """A real server in a thread of this process, for notebooks and tests; a context manager.

    >>> with ServerThread(Config(server={"port": 0})) as server:
    ...     client = ReplayClient(server.address)
    """

    def __init__(self, config: Config, buffer: ReplayBuffer | None = None) -> None:
        self._server = ReplayServer(config, buffer)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="touchline-server", daemon=True)

    @property
    def address(self) -> str:
        """Where clients reach it."""
        return self._server.address

    @property
    def buffer(self) -> ReplayBuffer:
        """The buffer that it serves."""
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


def _join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _is_alive(path: str) -> bool:
    """Returns whether somebody listens on a Unix socket; gRPC would take its path over."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except OSError:
            return False
    return True
