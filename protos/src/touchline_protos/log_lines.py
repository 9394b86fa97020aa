"""Keep text that a peer sent on one line, in logs, errors and terminals.

Names, addresses, metadata and error texts come from the other side. A line break in one could forge a line of the log, an escape sequence
could repaint a terminal. So every logger of Touchline is created here, with a filter that escapes unprintable characters, and code that
shows a peer's text elsewhere calls :func:`escape`.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterable
from typing import Any


def escape(text: str) -> str:
    """Returns ``text`` with unprintable characters (control characters, separators, direction marks) escaped as in a Python literal."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in text)


class OneLine(logging.Filter):
    """A filter that escapes each record's message to one line, and each line of its traceback. It passes every record. Thread-safe.

    On a logger it applies to what is logged there, with any handler; on a handler it also applies to what libraries log. A record with
    ``extra={"own_lines": True}`` contains no peer's text and stays as it is.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Escapes a record in place; returns True."""
        if not getattr(record, "own_lines", False):
            if not isinstance(record.msg, str):
                record.msg, record.args = "%s", (record.msg,)
            # Without arguments, the message itself may be a peer's text.
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
    """Returns the logger of a module, with a filter that keeps a peer's text on one line."""
    logger = logging.getLogger(name)
    if _FILTER not in logger.filters:
        logger.addFilter(_FILTER)
    return logger


def _escaped(argument: Any) -> Any:
    """Returns an argument of a record, escaped if its text has anything to escape. Numbers stay numbers, for ``%d``."""
    if isinstance(argument, int | float):
        return argument
    text = str(argument)
    return argument if text.isprintable() else escape(text)


def _trace(error: BaseException) -> Iterable[str]:
    """Yields the lines of a traceback. Those of stack frames stay as they are; texts of errors and notes are escaped and indented."""
    for part in traceback.format_exception(type(error), error, error.__traceback__):
        yield part if part.startswith(('  File "', "Traceback ", "\nDuring ", "\nThe above ")) else f"  {escape(part.rstrip(chr(10)))}\n"
