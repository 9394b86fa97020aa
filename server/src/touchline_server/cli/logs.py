"""The server's log on stderr: as text or as JSON, with repeated warnings counted rather than written."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TextIO

TEXT_FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"

REPEAT_S = 60.0
"""Time within which warnings of one kind are counted from the BURST-th on."""

BURST = 5
"""Warnings of one kind that are written within that time."""

MAX_KINDS = 256
"""Kinds of warnings that are told apart; the oldest is forgotten for a new one."""


@dataclass(slots=True)
class _Kind:
    """Warnings of one kind within one REPEAT_S."""

    begun: float
    """Time of the first one."""
    written: int = 0
    left_out: int = 0
    last: logging.LogRecord | None = None
    """The last one that was left out."""


class RepeatingHandler(logging.StreamHandler[TextIO]):
    """Writes records to a stream. Of warnings and errors from one line of code it writes five a minute, and counts the others.

    The next record after that minute, of whatever kind, is preceded by the last one that was left out, with ``(and 412 more like it)``.

    Args:
        stream: the stream; None: stderr.
        clock: monotonic clock, in seconds.
    """

    def __init__(self, stream: TextIO | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(stream if stream is not None else sys.stderr)
        self._clock = clock
        self._kinds: OrderedDict[tuple[str, int, str], _Kind] = OrderedDict()

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a record, unless it repeats others; called with the handler's lock held."""
        now = self._clock()
        self._report(lambda kind: now >= kind.begun + REPEAT_S)
        if record.levelno < logging.WARNING or self._may_be_written(record, now):
            super().emit(record)

    def close(self) -> None:
        """Writes what was left out, and closes the handler."""
        self.acquire()
        try:
            self._report(lambda kind: True)
        finally:
            self.release()
        super().close()

    def _may_be_written(self, record: logging.LogRecord, now: float) -> bool:
        name = (record.pathname, record.lineno, record.levelname)
        kind = self._kinds.get(name)
        if kind is None:
            if len(self._kinds) == MAX_KINDS:
                self._write_left_out(self._kinds.popitem(last=False)[1])
            kind = self._kinds[name] = _Kind(begun=now)
        if kind.written < BURST:
            kind.written += 1
            return True
        kind.left_out += 1
        kind.last = record
        return False

    def _report(self, is_over: Callable[[_Kind], bool]) -> None:
        """Writes how many were left out of each kind whose minute is over. The oldest kinds come first."""
        while self._kinds and is_over(next(iter(self._kinds.values()))):
            self._write_left_out(self._kinds.popitem(last=False)[1])

    def _write_left_out(self, kind: _Kind) -> None:
        if kind.last is None:
            return
        last = logging.makeLogRecord(vars(kind.last))
        if kind.left_out > 1:
            last.msg, last.args = f"{last.getMessage()} (and {kind.left_out - 1} more like it)", None
        super().emit(last)


class JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON: time (ISO 8601, UTC), level, logger, message, and the traceback as ``exception``."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line."""
        fields: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info or record.exc_text:
            fields["exception"] = record.exc_text or self.formatException(record.exc_info)  # type: ignore[arg-type]
        return json.dumps(fields, ensure_ascii=False)


def begin_log(*, level: str, form: str) -> None:
    """Sets up logging to stderr.

    Args:
        level: lowest level that is logged.
        form: ``"text"`` or ``"json"``.
    """
    handler = RepeatingHandler()
    handler.setFormatter(JsonFormatter() if form == "json" else logging.Formatter(TEXT_FORMAT))
    logging.basicConfig(level=level.upper(), handlers=[handler])
