"""A TCP proxy on loopback that behaves like a bad network: it slows down, stalls, falls silent, hangs up, refuses, and comes back.

TCP loses no bytes, so packet loss appears as TCP shows it: a piece that waits for its retransmission, and now and then a lost
connection.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
from collections.abc import Coroutine
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

PIECE_BYTES = 1 << 14
"""Largest piece that is forwarded in one go."""
UNDER_WAY_BYTES = 1 << 18
"""Most bytes of one direction on the line; beyond that, the sender is held up."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Line:
    """Behaviour of a network line, applied to each direction of each connection separately."""

    delay_s: float = 0.0
    """Latency from one end to the other."""
    bytes_per_s: float = 0.0
    """Maximum rate; 0 for no limit."""
    stall_share: float = 0.0
    """Share of pieces that wait another ``stall_s``, and hold up all pieces after them."""
    stall_s: float = 0.0
    reset_share: float = 0.0
    """Share of pieces at which the connection is reset instead."""


class TcpProxy:
    """Forwards connections to a server. A context manager; its methods may be called from any thread and have taken effect on return.

    Args:
        target: ``HOST:PORT`` of the server.
        line: initial behaviour of the line.
        seed: seed of everything random.
    """

    def __init__(self, target: str, line: Line | None = None, *, seed: int = 0) -> None:
        self.target = target
        """Address that new connections are forwarded to; may be changed."""
        self.connections = 0
        """Connections accepted so far."""
        self.resets = 0
        """Connections that ended with a reset, for any reason."""
        self._line = line or Line()
        self._rng = random.Random(seed)
        self._links: set[_Link] = set()
        # Holds the port while nothing listens on it: without a listener the kernel refuses connections.
        self._holder = _bound(0)
        self._port = self._holder.getsockname()[1]
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._loop = asyncio.new_event_loop()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tcp-proxy", daemon=True)

    @property
    def address(self) -> str:
        """Address that clients connect to."""
        return f"127.0.0.1:{self._port}"

    def shape(self, line: Line) -> None:
        """Changes the line for everything that is forwarded from now on, including on open connections."""
        self._line = line

    def pause(self) -> None:
        """Pulls the cable: nothing arrives and no side is notified. What is sent meanwhile arrives after :meth:`resume`."""
        self._run(self._set_flowing(False))

    def resume(self) -> None:
        """Plugs the cable in again."""
        self._run(self._set_flowing(True))

    def reset(self) -> None:
        """Resets every connection; accepts new ones."""
        self._run(self._reset())

    def cut(self) -> None:
        """Resets every connection and refuses new ones."""
        self._run(self._cut())

    def restore(self) -> None:
        """Accepts connections again after :meth:`cut`."""
        self._run(self._listen())

    def __enter__(self) -> Self:
        self._thread.start()
        self._run(self._listen())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._run(self._cut())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._holder.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    async def _set_flowing(self, flowing: bool) -> None:
        if flowing:
            self._flowing.set()
        else:
            self._flowing.clear()

    async def _listen(self) -> None:
        self._listener = _bound(self._port)
        self._listener.listen(1024)
        self._accepting = asyncio.create_task(self._accept(self._listener))

    async def _reset(self) -> None:
        links = list(self._links)
        for link in links:
            link.reset()
        await asyncio.gather(*(link.ended.wait() for link in links))

    async def _cut(self) -> None:
        if self._accepting is not None and self._listener is not None:
            self._accepting.cancel()
            await asyncio.gather(self._accepting, return_exceptions=True)
            self._listener.close()
            self._accepting = self._listener = None
        await self._reset()

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            client, _ = await self._loop.sock_accept(listener)
            self.connections += 1
            link = _Link(client, self)
            self._links.add(link)
            link.task = asyncio.create_task(link.run())

    # Used by the links.

    @property
    def line(self) -> Line:
        return self._line

    @property
    def flowing(self) -> asyncio.Event:
        return self._flowing

    def chance(self, share: float) -> bool:
        return share > 0 and self._rng.random() < share

    def forget(self, link: _Link) -> None:
        self._links.discard(link)


class _ResetError(Exception):
    """Raised when the line resets the connection."""


class _Link:
    """One connection and its continuation to the server."""

    def __init__(self, client: socket.socket, proxy: TcpProxy) -> None:
        self._proxy = proxy
        self._ends = [client, socket.socket()]
        self.task: asyncio.Task[None] | None = None
        self.ended = asyncio.Event()

    def reset(self) -> None:
        if self.task is not None:
            self.task.cancel()

    async def run(self) -> None:
        client, server = self._ends
        loop = asyncio.get_running_loop()
        for end in self._ends:
            end.setblocking(False)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            await self._proxy.flowing.wait()
            host, _, port = self._proxy.target.rpartition(":")
            await loop.sock_connect(server, (host, int(port)))
            async with asyncio.TaskGroup() as directions:
                directions.create_task(self._carry(client, server))
                directions.create_task(self._carry(server, client))
        except* (OSError, _ResetError, asyncio.CancelledError):
            self._proxy.resets += 1
            for end in self._ends:
                # A close that lingers for zero seconds is a reset.
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        finally:
            for end in self._ends:
                end.close()
            self._proxy.forget(self)
            self.ended.set()

    async def _carry(self, source: socket.socket, target: socket.socket) -> None:
        """Carries one direction: reads as long as the line takes more, delivers each piece when it is due."""
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(UNDER_WAY_BYTES // PIECE_BYTES)

        async def deliver() -> None:
            while True:
                due, piece = await pieces.get()
                await asyncio.sleep(due - loop.time())
                await self._proxy.flowing.wait()
                if self._proxy.chance(self._proxy.line.reset_share):
                    raise _ResetError
                if not piece:
                    target.shutdown(socket.SHUT_WR)
                    return
                await loop.sock_sendall(target, piece)

        async with asyncio.TaskGroup() as both:
            both.create_task(deliver())
            free_at = 0.0
            piece = b" "
            while piece:
                piece = await loop.sock_recv(source, PIECE_BYTES)
                line = self._proxy.line
                free_at = max(free_at, loop.time())
                if line.bytes_per_s:
                    free_at += len(piece) / line.bytes_per_s
                if self._proxy.chance(line.stall_share):
                    free_at += line.stall_s
                await pieces.put((free_at + line.delay_s, piece))


def _bound(port: int) -> socket.socket:
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    bound.bind(("127.0.0.1", port))
    bound.setblocking(False)
    return bound
