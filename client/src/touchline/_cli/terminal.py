"""What the commands print on stdout and stderr, and how they exit."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from touchline._actor.refusal_summary import RefusalSummary
from touchline.client import ReplayClient
from touchline.datasets import DatasetError
from touchline.errors import DeadlineError, SpoolError, TouchlineError, UnavailableError
from touchline.types import ColumnInfo
from touchline_protos.log_lines import escape

EXIT_FAILED = 1
"""Exit status if something was refused or failed."""
EXIT_USAGE = 2
"""Exit status if the command line is wrong."""
EXIT_WARNING = 3
"""Exit status if everything works, but something should be done."""
EXIT_INTERRUPTED = 130
"""Exit status after Ctrl-C."""
PROBE_TIMEOUT_S = 3.0
"""How long a server may take to answer before anything is read."""


def format_rate(episodes: int, size_bytes: int, seconds: float) -> str:
    """Returns duration and throughput, to append to what was done; empty if nothing was."""
    if seconds <= 0 or not episodes:
        return ""
    return f" in {seconds:,.1f} s ({episodes / seconds:,.0f} episodes/s, {size_bytes / seconds / 1e6:,.1f} MB/s)"


def pluralize(count: int, unit: str) -> str:
    """Returns a count with its unit, in the plural unless it is 1."""
    return f"{count:,} {unit}{'' if count == 1 else 's'}"


def print_line(text: str, style: str = "") -> None:
    """Prints one line on stdout, verbatim except that unprintable characters are escaped.

    Data must not be interpreted, so rich's markup, highlighting and wrapping are off.
    """
    Console(soft_wrap=True).print(Text(escape(text), style=style), soft_wrap=True)


def print_json(value: Any, *, indent: int | None = 2) -> None:
    """Prints a JSON document on stdout.

    Dataclasses become objects, paths and errors their text; numbers that JSON does not have become null.
    """
    typer.echo(json.dumps(_plain(value), indent=indent, allow_nan=False))


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path | Exception) else value


def print_grid(widths: Sequence[int], cells: Sequence[tuple[str, str]]) -> None:
    """Prints cells, each with a style, side by side: the last one wraps below itself on a terminal, and stays on one line otherwise.

    Args:
        widths: width of each cell but the last.
        cells: text and style of each cell.
    """
    console = Console()
    if not console.is_terminal:
        padded = [f"{escape(text):<{width}}" for (text, _), width in zip(cells, [*widths, 0], strict=True)]
        typer.echo("  ".join(padded).rstrip())
        return
    grid = Table.grid(padding=(0, 2), pad_edge=False)
    for width in widths:
        grid.add_column(width=width)
    grid.add_column()
    grid.add_row(*(Text(escape(text), style=style) for text, style in cells))
    console.print(grid)


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table: as wide as the terminal, or as its texts need if stdout is none. A header that begins with ``<`` is of texts.

    Args:
        headers: names of the columns; those of numbers are aligned to the right.
        rows: texts, one for each column.
    """
    console = Console()
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for header in headers:
        table.add_column(header.lstrip("<"), justify="left" if header.startswith("<") else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(escape(text)) for text in row))
    if not console.is_terminal:
        console = Console(width=1000)  # whole texts, for grep and awk
    console.print(table)


def print_columns(columns: Mapping[str, ColumnInfo]) -> None:
    """Prints the dtype and the shape of one row of each column."""
    width = max((len(name) for name in columns), default=0)
    for name, column in columns.items():
        print_line(f"  {name:<{width}}  {column.dtype} {list(column.shape)}")


def print_reasons(reasons: Mapping[str, RefusalSummary]) -> None:
    """Prints why episodes were refused, the most common reason first."""
    for reason, refusals in sorted(reasons.items(), key=lambda item: -item[1].count):
        print_line(f"    {refusals.count:,} × {reason}")
        for position, message in refusals.examples:
            print_line(f"      episode {position}: {message}")
        if refusals.count > len(refusals.examples):
            print_line(f"      and {refusals.count - len(refusals.examples):,} more")


def print_error(message: str) -> None:
    """Prints an error on stderr. Text from a server or a file must be escaped by the caller."""
    typer.echo(f"touchline: {message}", err=True)


def exit_with(message: str, status: int) -> NoReturn:
    """Prints an error and ends the command with an exit status."""
    print_error(message)
    raise typer.Exit(status)


def confirm(question: str, *, failed: str, hint: str) -> None:
    """Asks a question on the terminal, and ends the command unless the answer is yes.

    Args:
        question: text of the question.
        failed: message of the end: what was not done.
        hint: what to do if there is no terminal.
    """
    if not sys.stdin.isatty():
        exit_with(f"{failed}: there is no terminal to ask on; {hint}", EXIT_USAGE)
    if not typer.confirm(question, err=True):
        exit_with(failed, EXIT_FAILED)


def describe_place(address: str, table: str) -> str:
    """Returns a server's address and, unless it is the default one, the name of a table on it."""
    return f"{address}, table {escape(table)!r}" if table else address


def check_reachable(address: str, *, table: str = "") -> None:
    """Ends the command if the server does not answer for a table, before any source is read."""
    with ReplayClient(address, table=table, timeout_s=PROBE_TIMEOUT_S) as client:
        try:
            client.info()
        except (UnavailableError, DeadlineError) as error:
            hint = "Check that it is running (touchline-server serve) and that --address or TOUCHLINE_ADDRESS is right."
            exit_with(f"no server: {escape(str(error))}\n{hint}", EXIT_FAILED)


@contextmanager
def report_errors(interrupted: str) -> Iterator[Callable[[], None]]:
    """Prints an error in place of a traceback and ends the command with the exit status that belongs to it.

    Args:
        interrupted: what to print after Ctrl-C.

    Yields:
        A function that raises KeyboardInterrupt once Ctrl-C was pressed; call it often.
    """
    pressed = False

    def handle(number: int, frame: object) -> None:
        nonlocal pressed
        # Python prints an exception that is raised while it runs the callback of a weak reference, and continues. So remember it as well.
        pressed = True
        raise KeyboardInterrupt

    def check_interrupted() -> None:
        if pressed:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, handle)
    try:
        yield check_interrupted
    except KeyboardInterrupt:
        exit_with(interrupted, EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader of stdout has had enough, like `head`; nothing is flushed to it at the end either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit from None
    except (UnavailableError, DeadlineError) as error:
        exit_with(
            f"no answer: {escape(str(error))}\nRun the same command again to retry; touchline doctor says what is wrong.", EXIT_FAILED
        )
    except (DatasetError, SpoolError, OSError) as error:
        exit_with(escape(str(error)), EXIT_FAILED)
    except TouchlineError as error:
        exit_with(f"{type(error).__name__}: {escape(str(error))}", EXIT_FAILED)
