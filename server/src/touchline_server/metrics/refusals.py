"""What was refused, by reason."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Container

from touchline_protos.types.status import RefusalStatus

MAX_REFUSALS = 128
"""Combinations of a reason and a table that are kept: those that happened last."""

MAX_TEXT_CHARS = 500
"""Characters of a message that are kept."""


class Refusals:
    """Counts of refused calls and episodes. One thread at a time."""

    def __init__(self) -> None:
        self._refusals: OrderedDict[tuple[str, str | None], RefusalStatus] = OrderedDict()

    def count(self, reason: str, table: str | None, message: str, who: str) -> None:
        """Counts a refusal.

        Args:
            reason: the reason, as programs read it.
            table: table of the refused episode; None if the refusal concerns none.
            message: text of the error.
            who: name of the actor, or address.
        """
        before = self._refusals.pop((reason, table), None)
        self._refusals[reason, table] = RefusalStatus(
            reason=reason,
            table=table,
            count=before.count + 1 if before is not None else 1,
            last_message=message[:MAX_TEXT_CHARS],
            last_who=who,
            last_unix_s=time.time(),
        )
        if len(self._refusals) > MAX_REFUSALS:
            self._refusals.popitem(last=False)

    def keep(self, tables: Container[str]) -> None:
        """Removes the refusals of all other tables."""
        for key in [key for key in self._refusals if key[1] is not None and key[1] not in tables]:
            del self._refusals[key]

    def status(self) -> tuple[RefusalStatus, ...]:
        """Returns the refusals, the most recent first."""
        return tuple(reversed(self._refusals.values()))
