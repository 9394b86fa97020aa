"""Text of a peer's in logs, errors and terminals: on one line, whatever it holds.

Names, addresses, metadata and error texts come from the other side. A line break in one would begin a line of the log with a text of its
choice, an escape sequence would repaint a terminal. So every logger of Touchline is made here, with a filter that escapes what is not
printable, and whatever shows a peer's text elsewhere calls :func:`escape`.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterable
from typing import Any


def escape(text: str) -> str:
    """Returns a text on one line, with what is not printable (control characters, separators, direction marks) as in a literal."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in text)


class OneLine(logging.Filter):
    """Keeps a record to one line, and a trace to its own lines; passes every record.

    On a logger it holds for what is logged there, whoever handles it; on a handler for what libraries log, too. A record that has
    ``extra={"own_lines": True}`` is a text of our own, and stays as it is.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Escapes a record in place; returns True."""
        if not getattr(record, "own_lines", False):
            if not isinstance(record.msg, str):
                record.msg, record.args = "%s", (record.msg,)
            # A logger's own text may be a peer's, where there are no arguments.
            record.msg = escape(record.msg)
            if isinstance(record.args, tuple):
                record.args = tuple(_escaped(argument) for argument in record.args)
            elif record.args:
                record.args = {name: _escaped(argument) for name, argument in record.args.items()}
        if record.exc_info and not record.exc_text and record.exc_info[1] is not None:
            record.exc_text = "".join(_trace(record.exc_info[1])).rstrip("\n")
        return True


_FILTER = OneLine()


def get_logger(name: str) -> logging.Logger:
    """Returns a module's logger, which keeps a peer's text on one line."""
    logger = logging.getLogger(name)
    if _FILTER not in logger.filters:
        logger.addFilter(_FILTER)
    return logger


def _escaped(argument: Any) -> Any:
    """Returns an argument of a record as it is where it is a number, or has nothing to escape."""
    if isinstance(argument, int | float):
        return argument
    text = str(argument)
    return argument if text.isprintable() else escape(text)


def _trace(error: BaseException) -> Iterable[str]:
    """Yields the lines of a trace. Frames are our own; texts of errors and notes, which may be a peer's, are indented lines."""
    for part in traceback.format_exception(type(error), error, error.__traceback__):
        yield part if part.startswith(('  File "', "Traceback ", "\nDuring ", "\nThe above ")) else f"  {escape(part.rstrip(chr(10)))}\n"
