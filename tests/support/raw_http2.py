"""A minimal HTTP/2 peer that can do what no gRPC library does: begin messages without ending them, and send any bytes as metadata."""

from __future__ import annotations

import select
import socket
import struct
import time
from collections.abc import Iterable
from types import TracebackType
from typing import Self

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, ACK, END_HEADERS = 1, 1, 4
INITIAL_WINDOW_SIZE = 4
MAX_FRAME_BYTES = 16_384
QUIET_S = 0.5
"""Silence after which a server is considered to accept nothing more."""


class Stream:
    """One call, and the rest of its message that has not been sent."""

    def __init__(self, number: int, window: int) -> None:
        self.number = number
        self.window = window
        self.left = 0
        """Bytes of the message that flow control still holds back."""
        self.sent = 0
        """Bytes of messages that flow control let through."""
        self.ended = False
        """Whether the server has ended it."""


class RawConnection:
    """A connection without TLS; a context manager. One thread at a time.

    Args:
        address: ``HOST:PORT``.
    """

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)))
        self._received = b""
        self._window = 65_535
        self._initial = 65_535
        self._streams: dict[int, Stream] = {}
        self._socket.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(SETTINGS, 0, 0, b""))

    @property
    def port(self) -> int:
        """The peer's own port, which the server uses to name it."""
        return int(self._socket.getsockname()[1])

    def call(self, path: str, *, announced: int = 0, message: bytes | None = None, metadata: Iterable[tuple[bytes, bytes]] = ()) -> Stream:
        """Begins a call of a method, with a whole ``message`` or one of ``announced`` bytes, all but the last of which go out."""
        stream = Stream(2 * len(self._streams) + 1, self._initial)
        self._streams[stream.number] = stream
        fields = [
            (b":method", b"POST"),
            (b":scheme", b"http"),
            (b":path", path.encode()),
            (b":authority", b"test"),
            (b"content-type", b"application/grpc"),
            (b"te", b"trailers"),
            *metadata,
        ]
        block = b"".join(b"\x00" + _text(name) + _text(value) for name, value in fields)
        self._socket.sendall(_frame(HEADERS, END_HEADERS, stream.number, block))
        if message is not None:
            self._data(stream, struct.pack(">BI", 0, len(message)) + message)
        if announced:
            self.begin(stream, announced=announced)
        return stream

    def begin(self, stream: Stream, *, announced: int) -> None:
        """Begins a message of ``announced`` bytes, all but the last of which go out with :meth:`pump`."""
        self._data(stream, struct.pack(">BI", 0, announced))
        stream.left = announced - 1

    def pump(self, *, quiet_s: float = QUIET_S, most_bytes: float = float("inf")) -> None:
        """Sends what flow control permits, until it permits nothing for ``quiet_s`` seconds, or ``most_bytes`` were sent."""
        while sum(stream.sent for stream in self._streams.values()) < most_bytes:
            progress = self._read(0.0) or self._send()
            if not progress and not self._read(quiet_s):
                return

    def wait_ended(self, streams: Iterable[Stream], *, limit_s: float) -> bool:
        """Returns whether the server has ended these calls within ``limit_s`` seconds."""
        end, streams = time.monotonic() + limit_s, list(streams)
        while not all(stream.ended for stream in streams) and time.monotonic() < end:
            self._read(0.1)
        return all(stream.ended for stream in streams)

    def close(self) -> None:
        """Closes the connection."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _send(self) -> bool:
        sent = False
        for stream in self._streams.values():
            while not stream.ended and (size := min(stream.left, stream.window, self._window, MAX_FRAME_BYTES)) > 0:
                self._data(stream, bytes(size))
                stream.left -= size
                sent = True
                if not select.select((), (self._socket,), (), 0)[1]:
                    return True
        return sent

    def _data(self, stream: Stream, data: bytes) -> None:
        self._socket.sendall(_frame(DATA, 0, stream.number, data))
        stream.window -= len(data)
        stream.sent += len(data)
        self._window -= len(data)

    def _read(self, wait_s: float) -> bool:
        if not select.select((self._socket,), (), (), wait_s)[0]:
            return False
        try:
            data = self._socket.recv(1 << 20)
        except ConnectionError:
            data = b""
        if not data:
            for stream in self._streams.values():
                stream.ended = True
            return False
        self._received += data
        while len(self._received) >= 9:
            size = int.from_bytes(self._received[:3], "big")
            if len(self._received) < 9 + size:
                break
            kind, flags, number = self._received[3], self._received[4], int.from_bytes(self._received[5:9], "big")
            self._take(kind, flags, number, self._received[9 : 9 + size])
            self._received = self._received[9 + size :]
        return True

    def _take(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        stream = self._streams.get(number)
        if kind == SETTINGS and not flags & ACK:
            for position in range(0, len(payload), 6):
                name, value = struct.unpack(">HI", payload[position : position + 6])
                if name == INITIAL_WINDOW_SIZE:
                    for one in self._streams.values():
                        one.window += value - self._initial
                    self._initial = value
            self._socket.sendall(_frame(SETTINGS, ACK, 0, b""))
        elif kind == PING and not flags & ACK:
            self._socket.sendall(_frame(PING, ACK, 0, payload))
        elif kind == WINDOW_UPDATE and number == 0:
            self._window += int.from_bytes(payload, "big")
        elif kind == WINDOW_UPDATE and stream is not None:
            stream.window += int.from_bytes(payload, "big")
        elif stream is not None and (kind == RST_STREAM or (kind in (HEADERS, DATA) and flags & END_STREAM)):
            stream.ended = True


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def _text(value: bytes) -> bytes:
    """Returns a string literal of HPACK, without Huffman coding."""
    if len(value) < 127:
        return bytes((len(value),)) + value
    rest, size = len(value) - 127, bytearray(b"\x7f")
    while rest >= 128:
        size.append(rest % 128 | 128)
        rest //= 128
    return bytes(size) + bytes((rest,)) + value
