"""What a snapshot says of one table: what is stored, and its newest episodes."""

from __future__ import annotations

import math
from collections import OrderedDict
from weakref import WeakKeyDictionary

import numpy as np

from touchline_protos.types.dtypes import BFLOAT16
from touchline_protos.types.status import MAX_NEWEST_EPISODES, DurabilityStatus, EpisodeSummary, HeldCaller, RateInfo, TableStatus
from touchline_server.limiters.samples_per_insert import RateStatus
from touchline_server.limiters.waiting import Held
from touchline_server.service.grpc_status import shorten
from touchline_server.store.index import IndexEntry
from touchline_server.tables.table import Table

MAX_WAITERS = 16
"""Most callers on each side of a rate limit that are named."""

REWARD = "reward"
"""Column whose sum is an episode's return."""


def table_status(table: Table) -> TableStatus:
    """Returns what a table holds."""
    columns, fill = table.store.columns, table.fill()
    return TableStatus(
        table=table.name,
        counts=table.store.counts(),
        capacity=table.store.capacity,
        size_bytes=columns.size_bytes if columns is not None else 0,
        device=columns.where if columns is not None else "",
        episodes_not_sampled=fill.episodes - fill.eligible,
        episodes_eligible=fill.eligible,
        rate=rate_info(table.rate.status()) if table.rate.active else None,
        durability=_durability(table) if table.config.durable_dir else None,
    )


def rate_info(status: RateStatus) -> RateInfo:
    """Returns how a rate limit stands."""

    def held(callers: list[Held]) -> tuple[HeldCaller, ...]:
        return tuple(HeldCaller(shorten(caller.who), caller.waiting_s) for caller in callers[:MAX_WAITERS])

    return RateInfo(
        samples_per_insert=status.rate.samples_per_insert,
        tolerance=status.rate.tolerance,
        min_steps=status.rate.min_steps,
        steps_added=status.steps_added,
        slices_delivered=status.slices_delivered,
        recent_steps_added=status.recent_steps_added,
        recent_slices_delivered=status.recent_slices_delivered,
        owed_slices=status.owed_slices,
        adds_held=len(status.adds_held),
        batches_held=len(status.batches_held),
        adds=held(status.adds_held),
        batches=held(status.batches_held),
        adds_wait_for=status.adds_wait_for,
        batches_wait_for=status.batches_wait_for,
    )


def _durability(table: Table) -> DurabilityStatus:
    monitor = table.storage_monitor
    restored_rows, restore_rows = table.restore_progress
    return DurabilityStatus(
        mode=table.config.storage.durability,
        state=monitor.state.value if monitor is not None else "",
        reason=monitor.reason if monitor is not None else "",
        restored=table.restored,
        restored_rows=restored_rows,
        restore_rows=restore_rows,
    )


class EpisodeSummaries:
    """The newest episodes of each table. Their returns are kept, so that each is summed once. One thread at a time."""

    def __init__(self) -> None:
        self._returns: WeakKeyDictionary[Table, OrderedDict[int, float | None]] = WeakKeyDictionary()

    def newest(self, table: Table, count: int) -> tuple[EpisodeSummary, ...]:
        """Returns up to ``count`` of the most recent episodes, newest first."""
        known = self._returns.setdefault(table, OrderedDict())
        schema = table.store.schema
        row_bytes = schema.row_bytes if schema is not None else 0
        summaries = []
        for entry in table.store.newest(count):
            if entry.episode_id not in known:
                known[entry.episode_id] = _return_of(table, entry)
            summaries.append(
                EpisodeSummary(
                    episode_id=entry.episode_id,
                    actor=entry.origin.actor,
                    rows=entry.length,
                    reward_sum=known[entry.episode_id],
                    bytes=entry.length * row_bytes,
                    policy_version=entry.origin.policy_version,
                )
            )
        while len(known) > 2 * MAX_NEWEST_EPISODES:
            known.popitem(last=False)
        return tuple(summaries)


def _return_of(table: Table, entry: IndexEntry) -> float | None:
    """Returns the sum of an episode's rewards; None if it is not finite, or the episode was evicted."""
    with table.store.hold([entry]) as (columns, held):
        if columns is None or not held:
            return None
        spec = next(spec for spec in columns.schema.columns if spec.name == REWARD)
        reward = np.empty((entry.length, *spec.shape), spec.dtype)
        columns.copy_bytes(REWARD, entry.first_row, 0, reward.reshape(-1).view(np.uint8))
    return finite_sum(reward)


def finite_sum(reward: np.ndarray) -> float | None:
    """Returns the sum of a column; None if it is not finite."""
    if reward.dtype == BFLOAT16:
        # A bfloat16 is the upper half of a float32.
        reward = (reward.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    total = float(reward.sum(dtype=np.float64))
    return total if math.isfinite(total) else None
