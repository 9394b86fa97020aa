"""Parameters of the laws: those of a table, and those that a request sets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from touchline_server.errors import InvalidArgumentError


class LawOptions(NamedTuple):
    """A request's parameters of its law. None takes the table's."""

    recent_steps: int | None = None
    """``recent``: rows that are recent."""
    recent_half_life: float | None = None
    """``recent``: rows after which a start is half as likely."""
    beta: float | None = None
    """``prioritized``: exponent of the weights."""

    def of_law(self, law: str) -> LawOptions:
        """Returns the parameters that a law takes, without those of other laws."""
        return LawOptions(**{name: value for name, value in self._asdict().items() if _LAW_OF[name] == law})


_LAW_OF = {"recent_steps": "recent", "recent_half_life": "recent", "beta": "prioritized"}
"""The law that takes each parameter."""

NO_OPTIONS = LawOptions()
"""Options of a request that sets none."""


@dataclass(frozen=True, slots=True)
class LawSettings:
    """A table's parameters of its laws."""

    capacity: int
    """Rows of the ring, spare ones included."""
    recent_steps: int | None = None
    """``recent``: newest rows that starts are drawn from."""
    recent_half_life: float | None = None
    """``recent``: rows after which a start is half as likely."""
    priority_alpha: float = 0.6
    """``prioritized``: exponent of the priorities."""
    priority_beta: float = 0.4
    """``prioritized``: exponent of the weights."""
    priority_eta: float = 0.9
    """``prioritized``: share of the highest priority of a slice; the rest is the mean's."""


def check_options(law: str, options: LawOptions, settings: LawSettings, *, reach: int) -> None:
    """Checks a request's parameters of its law.

    Args:
        law: the law's name.
        options: the request's parameters.
        settings: the table's.
        reach: transitions that follow each start at least.

    Raises:
        InvalidArgumentError: one is out of range, or they do not fit each other or the law.
    """
    if options.beta is not None and not 0 <= options.beta <= 1:
        raise InvalidArgumentError(f"beta: {options.beta}, expected 0 to 1")
    check_taken(options, (law,))
    if law == "recent":
        _check_window(options, settings, reach)


def check_taken(options: LawOptions, laws: Sequence[str]) -> None:
    """Raises InvalidArgumentError if a request sets a parameter that none of its laws takes: of its table, or of those of a mix."""
    for name, value in options._asdict().items():
        if value is not None and _LAW_OF[name] not in laws:
            found = f"the law {laws[0]!r}" if len(laws) == 1 else f"the laws {', '.join(map(repr, laws))} of the mix"
            raise InvalidArgumentError(f"{name}: {value} under {found}, expected it only under {_LAW_OF[name]!r}")


def recent_window(options: LawOptions, settings: LawSettings) -> tuple[int | None, float | None]:
    """Returns the newest rows to draw from, and the half-life: exactly one of them. A request's replaces both of the table's.

    Raises:
        InvalidArgumentError: none or both are given.
    """
    if options.recent_steps is None and options.recent_half_life is None:
        steps, half_life = settings.recent_steps, settings.recent_half_life
    else:
        steps, half_life = options.recent_steps, options.recent_half_life
    if (steps is None) == (half_life is None):
        found = "neither" if steps is None else "both"
        raise InvalidArgumentError(f"law: 'recent' with {found} of recent_steps and recent_half_life, expected one of them")
    return steps, half_life


def check_pad(pad: str) -> bool:
    """Returns whether slices may run over their episode's end.

    Raises:
        InvalidArgumentError: the value is neither "none" nor "end".
    """
    if pad not in ("none", "end"):
        raise InvalidArgumentError(f"pad: {pad!r}, expected 'none' or 'end'")
    return pad == "end"


def _check_window(options: LawOptions, settings: LawSettings, reach: int) -> None:
    steps, half_life = recent_window(options, settings)
    if steps is not None and steps <= reach:
        raise InvalidArgumentError(f"recent_steps: {steps}, expected at least {reach + 1}, the rows of the shortest slice")
    if half_life is not None and not 1 <= half_life < math.inf:
        raise InvalidArgumentError(f"recent_half_life: {half_life}, expected at least 1 row, and a finite number")
