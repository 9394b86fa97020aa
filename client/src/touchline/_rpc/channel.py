"""The channel to one server: opened on first use, and once more in a forked child."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

from touchline._rpc import fork
from touchline._rpc.credentials import Credentials
from touchline._rpc.dropping import when_dropped
from touchline.errors import ClosedError, ForkError, InvalidArgumentError

_SERVICE = "/touchline.v1.Replay/"

KEEPALIVE_S = 30.0
"""Silence on a connection with a call in progress after which the client pings the server. Servers allow a ping every 5 s."""
KEEPALIVE_TIMEOUT_S = 10.0
"""Longest time until the server's answer to a ping."""


def check_address(address: str) -> str:
    """Returns the address if it is ``host:port``, ``[ipv6]:port`` or ``unix:/path``.

    Raises:
        InvalidArgumentError: the address has another form.
    """
    if isinstance(address, str) and address.startswith("unix:"):
        if len(address) > len("unix:"):
            return address
    elif isinstance(address, str) and "//" not in address:
        host, _, port = address.rpartition(":")
        bracketed = host.startswith("[") and host.endswith("]")
        if host and (bracketed or ":" not in host) and port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16:
            return address
    raise InvalidArgumentError(f"address: {address!r}, expected 'host:port', '[ipv6]:port' or 'unix:/path'")


class ServerChannel:
    """One gRPC channel and the service's methods on it, as callables from bytes to bytes. Thread-safe.

    The channel is closed once nothing that makes calls refers to this object any more: no client, stream or writer.

    Args:
        address: ``host:port`` or ``unix:/path``.
        max_message_bytes: size limit of one request or response.
        credentials: credentials of the channel and its calls; None reads the environment.
    """

    def __init__(self, address: str, *, max_message_bytes: int, credentials: Credentials | None = None) -> None:
        self.address = check_address(address)
        self.credentials = Credentials(address) if credentials is None else credentials
        """Credentials of the channel and its calls."""
        self.metadata = self.credentials.metadata
        """Metadata sent with every call."""
        self.tls = self.credentials.tls
        """Whether the channel uses TLS."""
        self.server_name = self.credentials.server_name
        """Name that the server's certificate must have; empty for the host of the address."""
        self._options = [
            ("grpc.max_send_message_length", max_message_bytes),
            ("grpc.max_receive_message_length", max_message_bytes),
            # A proxy in the environment is meant for the web; gRPC would use it even for 127.0.0.1.
            ("grpc.enable_http_proxy", 0),
            # Finds a peer that vanished without closing the connection; the server allows pings this often.
            ("grpc.keepalive_time_ms", int(KEEPALIVE_S * 1000)),
            ("grpc.keepalive_timeout_ms", int(KEEPALIVE_TIMEOUT_S * 1000)),
            # Without other traffic gRPC uses this limit instead of the keepalive's; its default is a minute.
            ("grpc.http2.ping_timeout_ms", int(KEEPALIVE_TIMEOUT_S * 1000)),
            ("grpc.http2.max_pings_without_data", 0),
            # A server that restarts is back within seconds: do not back off for minutes.
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1_000),
            # Share no connection with another client, so that closing one never disturbs the other.
            ("grpc.use_local_subchannel_pool", 1),
        ]
        self._lock = threading.Lock()
        self._grpc_channel: Any = None
        self._methods: dict[tuple[str, str], Callable[..., Any]] = {}
        self._finalizer: weakref.finalize[Any, Any] | None = None
        self._closed = False
        self._unusable = False
        fork.register_after_fork(self)

    @property
    def closed(self) -> bool:
        """Whether the channel was closed."""
        return self._closed

    def method(self, kind: str, name: str) -> Callable[..., Any]:
        """Returns a callable for a method of the service; requests and responses are bytes.

        Args:
            kind: ``unary_unary``, ``unary_stream``, ``stream_unary`` or ``stream_stream``.
            name: name of the method, such as ``AddEpisode``.

        Raises:
            ClosedError: the channel was closed.
            ForkError: gRPC cannot work in this forked child.
        """
        found = self._methods.get((kind, name))
        if found is not None:
            return found
        with self._lock:
            if self._closed:
                raise ClosedError(f"the client of {self.address} was closed")
            if self._unusable:
                raise ForkError(
                    "gRPC was imported before touchline and without fork support, so this forked child cannot use the client: "
                    "import touchline first, or set GRPC_ENABLE_FORK_SUPPORT=1"
                )
            if self._grpc_channel is None:
                self._grpc_channel = self.credentials.open(self.address, self._options)
                self._finalizer = when_dropped(self, self._grpc_channel.close)
            made: Callable[..., Any] = getattr(self._grpc_channel, kind)(_SERVICE + name)
            self._methods[kind, name] = made
            return made

    def close(self) -> None:
        """Closes the channel; calls in progress end with an error. Closing again does nothing."""
        with self._lock:
            self._closed = True
            channel, self._grpc_channel = self._grpc_channel, None
            self._methods = {}
        if channel is not None:
            if self._finalizer is not None:
                self._finalizer.detach()
            channel.close()

    def after_fork_in_child(self) -> None:
        """Drops the parent's channel without touching it; the next call opens one of the child's own."""
        if self._grpc_channel is not None:
            fork.leak_parent_object((self._grpc_channel, self._methods))
            self._unusable = not fork.SUPPORTED
        self._grpc_channel = None
        self._methods = {}
        self._lock = threading.Lock()
