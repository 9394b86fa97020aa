"""The result of a draw: which slices, and how probable each was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from touchline_protos.types.batch import OPTIONAL_PROVENANCE, PROVENANCE
from touchline_server.selectors.entries import ACTOR, FIRST_ROW, ID, LENGTH, POLICY_VERSION


@dataclass(frozen=True, slots=True)
class DrawnRows:
    """What a law with priorities remembers of drawn slices, to find them again when their priorities come back. All are [slices]."""

    update: Callable[[DrawnRows, int, int, np.ndarray], int]
    """The selector's :meth:`~touchline_server.selectors.selector.Selector.update_drawn`."""
    rows: np.ndarray
    """int64: physical row of each slice's first step."""
    entries: np.ndarray
    """[slices, 6] int64: index entry of each slice's episode."""
    position: np.ndarray
    """uint32: position of each slice's episode among those that were stored."""
    dropped: int
    """Episodes that had been dropped: together with the position this counts the episodes from the first one that was ever stored."""


@dataclass(frozen=True, slots=True)
class Draw:
    """Slices, drawn but not gathered. All arrays are [slices] int64 unless they say otherwise."""

    first_row: np.ndarray
    """Row of each slice's first step, counted from the begin of the ring and not yet wrapped: below 2 x capacity."""
    episode_id: np.ndarray
    start: np.ndarray
    """Step of the episode that is the slice's row 0."""
    actor: np.ndarray
    policy_version: np.ndarray
    probability: np.ndarray
    """float64: probability with which the law draws this slice."""
    weight: np.ndarray | None = None
    """float32: importance-sampling weight; None unless the law has priorities."""
    table: np.ndarray | None = None
    """Position of the slice's table in the mix; None unless the batch is mixed."""
    valid: np.ndarray | None = None
    """[H, slices, 1] bool: whether a transition is real; None unless slices are padded."""
    length: np.ndarray | None = None
    """Rows of each slice's episode, from the selector."""
    drawn: DrawnRows | None = None
    """The same slices for the law, if it has priorities; None in a part of several draws."""

    @classmethod
    def of(
        cls,
        entries: np.ndarray,
        start: np.ndarray,
        probability: np.ndarray,
        weight: np.ndarray | None = None,
        *,
        drawn: DrawnRows | None = None,
    ) -> Draw:
        """Returns slices of stored episodes.

        Args:
            entries: [slices, 6] int64: index entry of each slice's episode.
            start: [slices] int64: step of the episode that is the slice's row 0.
            probability: [slices] float64.
            weight: [slices] float32; None unless the law has priorities.
            drawn: see :attr:`drawn`.
        """
        return cls(
            first_row=entries[:, FIRST_ROW] + start,
            episode_id=entries[:, ID],
            start=start,
            actor=entries[:, ACTOR],
            policy_version=entries[:, POLICY_VERSION],
            probability=probability,
            weight=weight,
            length=entries[:, LENGTH],
            drawn=drawn,
        )

    @property
    def optional(self) -> tuple[str, ...]:
        """Names of the optional fields that this draw has, in wire order."""
        if self.weight is None and self.table is None and self.valid is None:
            return ()  # most draws; asked for each of them
        return tuple(name for name, _ in OPTIONAL_PROVENANCE if getattr(self, name) is not None)

    def provenance(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yields name and array of each field that batches of this draw carry."""
        for name, _ in PROVENANCE:
            yield name, getattr(self, name)
        for name, _ in OPTIONAL_PROVENANCE:
            values = getattr(self, name)
            if values is not None:
                yield name, values

    def between(self, begin: int, end: int) -> Draw:
        """Returns slices ``begin`` to ``end`` - 1: views."""
        return Draw(
            self.first_row[begin:end],
            self.episode_id[begin:end],
            self.start[begin:end],
            self.actor[begin:end],
            self.policy_version[begin:end],
            self.probability[begin:end],
            None if self.weight is None else self.weight[begin:end],
            None if self.table is None else self.table[begin:end],
            None if self.valid is None else self.valid[:, begin:end],
            None if self.length is None else self.length[begin:end],
        )

    @classmethod
    def concatenate(cls, draws: Sequence[Draw]) -> Draw:
        """Returns the slices of several draws of one law, in their order; they are not padded yet."""
        if len(draws) == 1:
            return draws[0]
        joined = {name: [getattr(draw, name) for draw in draws] for name in _ARRAYS}
        arrays: dict[str, Any] = {name: np.concatenate(parts) for name, parts in joined.items() if parts[0] is not None}
        return cls(**arrays)

    def replaced(self, where: np.ndarray, other: Draw) -> Draw:
        """Returns a copy with the slices of another draw of the same law at the positions ``where``, [slices] bool."""
        changed: dict[str, Any] = {name: getattr(self, name).copy() for name in _ARRAYS if getattr(self, name) is not None}
        for name, array in changed.items():
            array[where] = getattr(other, name)
        return replace(self, drawn=None, **changed)


_ARRAYS = ("first_row", "episode_id", "start", "actor", "policy_version", "probability", "weight", "length")
"""Fields of the draws of selectors."""
