"""What the commands say, on stdout and stderr, and how they end."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NoReturn

import typer
from rich.console import Console
from rich.text import Text

from touchline._actor.rejections import Refusals
from touchline.client import ReplayClient
from touchline.datasets import DatasetError
from touchline.errors import DeadlineError, SpoolError, TouchlineError, UnavailableError
from touchline_protos.log_lines import escape

EXIT_FAILED = 1
"""Something was refused, or could not be done."""
EXIT_USAGE = 2
"""The command line cannot be used."""
EXIT_INTERRUPTED = 130
"""Ctrl-C."""
PROBE_S = 3.0
"""How long a server may take to say that it is there, before anything is read."""


def speed(episodes: int, size_bytes: int, seconds: float) -> str:
    """Returns how fast it went, to stand behind what was done; empty where nothing was."""
    if seconds <= 0 or not episodes:
        return ""
    return f" in {seconds:,.1f} s ({episodes / seconds:,.0f} episodes/s, {size_bytes / seconds / 1e6:,.1f} MB/s)"


def amount(count: int, unit: str) -> str:
    """Returns a number of things in words."""
    return f"{count:,} {unit}{'' if count == 1 else 's'}"


def say(text: str, style: str = "") -> None:
    """Prints one line as it is: rich's markup, highlighting and wrapping are not for data, and what is not printable is escaped."""
    Console(soft_wrap=True).print(Text(escape(text), style=style), soft_wrap=True)


def say_reasons(reasons: Mapping[str, Refusals]) -> None:
    """Prints why episodes were refused, the most common reason first."""
    for reason, refusals in sorted(reasons.items(), key=lambda item: -item[1].count):
        say(f"    {refusals.count:,} × {reason}")
        for position, message in refusals.examples:
            say(f"      episode {position}: {message}")
        if refusals.count > len(refusals.examples):
            say(f"      and {refusals.count - len(refusals.examples):,} more")


def probe(address: str) -> None:
    """Asks the server whether it is there, before a source is read for nothing."""
    with ReplayClient(address, timeout_s=PROBE_S) as client:
        try:
            client.info()
        except (UnavailableError, DeadlineError) as error:
            hint = "Is it up (touchline-server serve), and is --address or TOUCHLINE_ADDRESS right?"
            fail(f"no server: {escape(str(error))}\n{hint}", EXIT_FAILED)


@contextmanager
def failing_well(interrupted: str) -> Iterator[Callable[[], None]]:
    """Ends the command with a message in the place of a traceback; gives what raises KeyboardInterrupt after Ctrl-C, to be called often."""
    pressed = False

    def press(number: int, frame: object) -> None:
        nonlocal pressed
        pressed = True
        # Where Python runs this in a callback of a weak reference, it prints the exception and goes on: so it is kept as well.
        raise KeyboardInterrupt

    def check() -> None:
        if pressed:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, press)
    try:
        yield check
    except KeyboardInterrupt:
        fail(interrupted, EXIT_INTERRUPTED)
    except (UnavailableError, DeadlineError) as error:
        fail(f"no answer: {escape(str(error))}\nThe same command may be run again.", EXIT_FAILED)
    except (DatasetError, SpoolError) as error:
        fail(escape(str(error)), EXIT_FAILED)
    except TouchlineError as error:
        fail(f"{type(error).__name__}: {escape(str(error))}", EXIT_FAILED)
    except OSError as error:
        fail(escape(str(error)), EXIT_FAILED)


def complain(message: str) -> None:
    """Prints what is wrong on stderr."""
    typer.echo(f"touchline: {message}", err=True)


def fail(message: str, status: int) -> NoReturn:
    """Says what is wrong and ends the command."""
    complain(message)
    raise typer.Exit(status)
