"""How the commands print and exit."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn

import typer

from touchline_server.config.source import ConfigError
from touchline_server.errors import ReplayError

EXIT_FAILED = 1
"""Exit status if the command could not do its work, or found something wrong."""
EXIT_USAGE = 2
"""Exit status if the command line or the configuration is wrong."""
EXIT_INTERRUPTED = 130
"""Exit status after Ctrl-C."""


def exit_with(message: str, status: int) -> NoReturn:
    """Prints an error on stderr and ends the command with an exit status."""
    typer.echo(f"touchline-server: {message}", err=True)
    raise typer.Exit(status)


def print_findings(findings: Sequence[str], summary: str) -> None:
    """Prints findings about a store on stdout, one a line with unprintable characters escaped, and a summary after them."""
    from touchline_protos.log_lines import escape

    for finding in findings:
        typer.echo(escape(finding))
    typer.echo(summary)


def print_json(document: dict[str, Any]) -> None:
    """Prints the result of a command on stdout, for programs."""
    typer.echo(json.dumps(document, indent=2))


@contextmanager
def report_errors(*, interrupted: str) -> Iterator[None]:
    """Prints an error in place of a traceback, and ends the command with the exit status that belongs to it.

    Args:
        interrupted: message after Ctrl-C.
    """
    try:
        yield
    except KeyboardInterrupt:
        exit_with(interrupted, EXIT_INTERRUPTED)
    except ConfigError as error:
        exit_with(str(error), EXIT_USAGE)
    except ReplayError as error:
        exit_with(str(error), EXIT_FAILED)


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """Shows progress on stderr: a bar on a terminal, otherwise a line at the end.

    Yields:
        A function that takes the amount done and the total. Nothing is shown before its first call.
    """
    with ExitStack() as stack:
        bar: Any = None
        shown = 0

        def show(done: int, total: int) -> None:
            nonlocal bar, shown
            if bar is None:
                bar = stack.enter_context(typer.progressbar(length=total, label=label, file=sys.stderr))
            bar.update(done - shown)
            shown = done
            if done >= total:
                stack.close()

        yield show


@contextmanager
def progress_bars(label: Callable[[str], str]) -> Iterator[Callable[[str, int, int], None]]:
    """Shows the progress of one thing after another, each as :func:`progress_bar` does.

    Args:
        label: function that returns the label of a thing by its name.

    Yields:
        A function that takes a thing's name, the amount done and the total.
    """
    with ExitStack() as stack:
        bars: dict[str, Callable[[int, int], None]] = {}

        def show(name: str, done: int, total: int) -> None:
            if name not in bars:
                bars[name] = stack.enter_context(progress_bar(label(name)))
            bars[name](done, total)

        yield show
