"""Callers that were refused, in the log: who, from where, what, why; one line each, and not one for each of their calls."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable

from touchline_protos.log_lines import get_logger
from touchline_server.errors import InvalidArgumentError

logger = get_logger(__name__)

REPEAT_S = 60.0
"""Between two lines of the same caller about the same thing; the second one says how many were between them."""

MAX_CALLERS = 256
"""Callers that are told apart, and lines within REPEAT_S; beyond them the rest is counted together."""


class RefusalLog:
    """Lives in the event loop.

    Args:
        clock: gives seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._callers: OrderedDict[tuple[str, str], tuple[float, int]] = OrderedDict()
        """By host and reason: when a line was logged, and how many calls were refused since. The one longest ago first."""
        self._others = 0

    def note(self, peer: str, method: str, error: Exception) -> None:
        """Logs a refused call, unless the same caller's was logged a short while ago.

        Args:
            peer: its name in gRPC, ``ipv4:HOST:PORT``.
            method: that it called.
            error: that it got; says who it is, as far as that is known.
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
    """Drops gRPC's own record of metadata that it cannot decode, which quotes it, be it a token. Such calls are refused and logged here."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Returns whether the record may pass."""
        return not str(record.msg).startswith("Invalid encoding on ")


def check_metadata(metadata: Iterable[tuple[str, str | bytes]]) -> None:
    """Returns if metadata is text as gRPC wants it; what it could not decode it hands over as other characters.

    Raises:
        InvalidArgumentError: a value is not printable ASCII. It is not quoted: it may be a secret.
    """
    for key, value in metadata:
        if not key.endswith("-bin") and not (isinstance(value, str) and value.isascii() and value.isprintable()):
            raise InvalidArgumentError(
                f"the metadata {key!r} is not printable ASCII, expected that, or bytes under a key that ends in -bin"
            )


def _host(peer: str) -> str:
    return peer.rpartition(":")[0] if peer.startswith(("ipv4:", "ipv6:")) else peer
