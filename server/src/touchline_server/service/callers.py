"""Who makes a call."""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote

import grpc

from touchline_server.metrics.server_metrics import Caller


def caller_of(context: grpc.aio.ServicerContext[Any, Any]) -> Caller:
    """Returns who makes a call, for the metrics."""
    return Caller(context.peer(), context.invocation_metadata() or ())  # type: ignore[arg-type]


def address_of(peer: str) -> str:
    """Returns the address in gRPC's name of a connection: ``127.0.0.1:40000``, ``[::1]:40000``, or ``unix:``."""
    kind, _, address = peer.partition(":")
    return unquote(address) if kind in ("ipv4", "ipv6") else peer
