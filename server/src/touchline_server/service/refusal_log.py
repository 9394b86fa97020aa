"""Logs refused callers: the token, the address, the method and the reason; one line per caller rather than one per call."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable

from touchline_protos.log_lines import get_logger
from touchline_server.errors import InvalidArgumentError

logger = get_logger(__name__)

REPEAT_S = 60.0
"""Shortest interval between two lines about the same caller and reason; the second one counts the calls in between."""

MAX_CALLERS = 256
"""Maximum number of callers that are distinguished, and of lines within REPEAT_S; further callers are counted together."""


class RefusalLog:
    """Logs refused calls, at a limited rate. Lives in the event loop.

    Args:
        clock: monotonic clock, in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._callers: OrderedDict[tuple[str, str], tuple[float, int]] = OrderedDict()
        """Time of the last line and calls refused since, by host and reason; the oldest line first."""
        self._others = 0

    def note(self, peer: str, method: str, error: Exception) -> None:
        """Logs a refused call, unless a call of the same caller was logged recently.

        Args:
            peer: gRPC's name of the connection, ``ipv4:HOST:PORT``.
            method: full name of the called method.
            error: error that the caller receives; names the token, if it is known.
        """
        caller = (_host(peer), str(error))
        now = self._clock()
        known = self._callers.get(caller)
        if known is not None and now < known[0] + REPEAT_S:
            self._callers[caller] = (known[0], known[1] + 1)
            return
        if known is None and len(self._callers) == MAX_CALLERS:
            if now < next(iter(self._callers.values()))[0] + REPEAT_S:
                self._others += 1
                return
            self._callers.popitem(last=False)
        since = known[1] if known is not None else 0
        self._callers[caller] = (now, 0)
        self._callers.move_to_end(caller)
        more = f" ({since} more since the last such line)" if since else ""
        others = f" ({self._others} calls of too many other callers were refused without a line)" if self._others else ""
        self._others = 0
        logger.warning("refused %s, which called %s: %s%s%s", peer or "a caller", method, error, more, others)


class DropUndecodable(logging.Filter):
    """Drops gRPC's own log record about undecodable metadata: it quotes the value, which may be a token. Such calls are logged here."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Returns whether the record is kept."""
        return not str(record.msg).startswith("Invalid encoding on ")


def check_metadata(metadata: Iterable[tuple[str, str | bytes]]) -> None:
    """Returns if the metadata is text as gRPC specifies it. A value that gRPC could not decode arrives as other characters.

    Raises:
        InvalidArgumentError: a value is not printable ASCII. The error does not quote it, since it may be a secret.
    """
    for key, value in metadata:
        if not key.endswith("-bin") and not (isinstance(value, str) and value.isascii() and value.isprintable()):
            raise InvalidArgumentError(
                f"the metadata {key!r} is not printable ASCII, expected that, or bytes under a key that ends in -bin"
            )


def _host(peer: str) -> str:
    return peer.rpartition(":")[0] if peer.startswith(("ipv4:", "ipv6:")) else peer
