"""Parameters of the laws: those of a table, and those that a request sets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from touchline_server.errors import InvalidArgumentError


class LawOptions(NamedTuple):
    """A request's parameters of its law. None takes the table's; a law ignores those of others."""

    recent_steps: int | None = None
    """``recent``: rows that are recent."""
    recent_half_life: float | None = None
    """``recent``: rows after which a start is half as likely."""
    beta: float | None = None
    """``prioritized``: exponent of the weights."""


NO_OPTIONS = LawOptions()
"""Options of a request that sets none."""


@dataclass(frozen=True, slots=True)
class LawSettings:
    """A table's parameters of its laws."""

    capacity: int
    """Rows of the ring."""
    incoming: bool = True
    """Whether a row holds the transition that led to it, so that those of a slice are in its rows 1 to H; otherwise in 0 to H - 1."""
    priority_alpha: float = 0.6
    """``prioritized``: exponent of the priorities."""
    priority_beta: float = 0.4
    """``prioritized``: exponent of the weights."""
    priority_eta: float = 0.9
    """``prioritized``: share of the highest priority of a slice; the rest is the mean's."""


def check_options(options: LawOptions) -> LawOptions:
    """Returns a request's options.

    Raises:
        InvalidArgumentError: one is out of range.
    """
    beta = options.beta
    if beta is not None and not 0 <= beta <= 1:
        raise InvalidArgumentError(f"beta: {beta}, expected 0 to 1")
    return options
