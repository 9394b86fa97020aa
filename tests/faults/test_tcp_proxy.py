"""The proxy that the fault tests rely on does what it promises, and no more."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from support.tcp_proxy import Line, TcpProxy

TIMEOUT_S = 60.0
SILENCE_S = 0.3
"""Time without data that counts as silence."""


@pytest.fixture
def echo() -> Iterator[str]:
    """Yields the address of a server that echoes its input."""
    listener = socket.create_server(("127.0.0.1", 0))

    def answer(connection: socket.socket) -> None:
        with connection:
            try:
                while data := connection.recv(1 << 16):
                    connection.sendall(data)
            except OSError:
                pass

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    yield f"127.0.0.1:{listener.getsockname()[1]}"
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join()


def connect(proxy: TcpProxy) -> socket.socket:
    host, _, port = proxy.address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=TIMEOUT_S)


def exchange(connection: socket.socket, data: bytes) -> bytes:
    """Sends bytes and reads the same number back."""
    sender = threading.Thread(target=connection.sendall, args=(data,), daemon=True)
    sender.start()
    found = bytearray()
    while len(found) < len(data):
        piece = connection.recv(1 << 16)
        assert piece, "hung up"
        found += piece
    sender.join()
    return bytes(found)


def test_bytes_come_back_as_they_were_also_in_mass(echo: str) -> None:
    data = bytes(range(256)) * 20_000

    with TcpProxy(echo) as proxy, connect(proxy) as connection:
        assert exchange(connection, data) == data
        assert (proxy.connections, proxy.resets) == (1, 0)


def test_end_of_one_direction_is_passed_on(echo: str) -> None:
    with TcpProxy(echo) as proxy, connect(proxy) as connection:
        connection.sendall(b"last")
        connection.shutdown(socket.SHUT_WR)

        assert [connection.recv(100), connection.recv(100)] == [b"last", b""]


def test_pause_is_silence_and_resume_delivers_what_was_sent_meanwhile(echo: str) -> None:
    with TcpProxy(echo) as proxy, connect(proxy) as connection:
        assert exchange(connection, b"before") == b"before"
        proxy.pause()
        connection.sendall(b"meanwhile")
        connection.settimeout(SILENCE_S)
        with pytest.raises(TimeoutError):
            connection.recv(100)
        # A peer that connects meanwhile is heard afterwards, too.
        with connect(proxy) as newcomer:
            newcomer.sendall(b"new")
            proxy.resume()
            connection.settimeout(TIMEOUT_S)

            assert (connection.recv(100), newcomer.recv(100)) == (b"meanwhile", b"new")


def test_cut_resets_and_refuses_until_restored(echo: str) -> None:
    with TcpProxy(echo) as proxy, connect(proxy) as connection:
        exchange(connection, b"before")
        proxy.cut()
        with pytest.raises(ConnectionResetError):
            connection.recv(100)
        with pytest.raises(ConnectionRefusedError):
            connect(proxy)
        proxy.restore()

        with connect(proxy) as again:
            assert exchange(again, b"after") == b"after"
        assert proxy.resets == 1


def test_reset_ends_connections_and_takes_new_ones_also_while_paused(echo: str) -> None:
    with TcpProxy(echo) as proxy, connect(proxy) as connection:
        exchange(connection, b"before")
        proxy.pause()
        proxy.reset()
        with pytest.raises(ConnectionResetError):
            connection.recv(100)
        proxy.resume()

        with connect(proxy) as again:
            assert exchange(again, b"after") == b"after"


@pytest.mark.parametrize(
    ("line", "least_s"),
    [
        (Line(delay_s=0.1), 0.2),
        (Line(bytes_per_s=400_000), 0.25),
        (Line(stall_share=1.0, stall_s=0.05), 0.1),
    ],
)
def test_line_takes_its_time(line: Line, least_s: float, echo: str) -> None:
    data = bytes(100_000)

    with TcpProxy(echo, line) as proxy, connect(proxy) as connection:
        begin = time.monotonic()
        assert exchange(connection, data) == data
        assert time.monotonic() - begin >= least_s


def test_line_resets_by_chance_and_a_server_that_is_gone_is_a_reset(echo: str) -> None:
    with TcpProxy(echo, Line(reset_share=1.0)) as proxy:
        with connect(proxy) as connection:
            connection.sendall(b"lost")
            with pytest.raises(ConnectionResetError):
                connection.recv(100)
        proxy.shape(Line())
        proxy.target = "127.0.0.1:1"
        with pytest.raises(ConnectionResetError), connect(proxy) as connection:
            connection.recv(100)
        proxy.target = echo
        with connect(proxy) as connection:
            assert exchange(connection, b"after") == b"after"
