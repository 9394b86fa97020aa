"""What a snapshot says of one table: what is stored, and its newest episodes."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from weakref import WeakKeyDictionary

import numpy as np

from touchline_protos.types.dtypes import BFLOAT16
from touchline_protos.types.status import MAX_NEWEST_EPISODES, DurabilityStatus, EpisodeSummary, HeldCaller, RateInfo, TableStatus
from touchline_server.limiters.samples_per_insert import RateStatus
from touchline_server.limiters.waiting import Held
from touchline_server.metrics.learners import Learner
from touchline_server.metrics.server_metrics import Report
from touchline_server.metrics.table_metrics import Stored, TableMetrics
from touchline_server.selectors.entries import ID, POLICY_VERSION
from touchline_server.service.grpc_status import shorten
from touchline_server.service.verdict import verdict_of
from touchline_server.store.index import IndexEntry
from touchline_server.tables.table import Table

MAX_ENTRIES = 4096
"""Episodes of which ages and policy versions are taken, evenly spaced by age, if there are more."""

MAX_WAITERS = 16
"""Most callers on each side of a rate limit that are named."""

REWARD = "reward"
"""Column whose sum is an episode's return."""


def table_status(table: Table, metrics: TableMetrics | None, learners: Sequence[Learner], now: float) -> TableStatus:
    """Returns what a table holds, and what comes in and goes out.

    Args:
        table: the table.
        metrics: counts of the table; None if nothing is counted, or it is still being restored.
        learners: the learners that are connected.
        now: the present, by the metrics' clock.
    """
    columns, fill, counts = table.store.columns, table.fill(), table.store.counts()
    status = TableStatus(
        table=table.name,
        counts=counts,
        capacity=table.store.capacity,
        size_bytes=columns.size_bytes if columns is not None else 0,
        device=columns.where if columns is not None else "",
        episodes_not_sampled=fill.episodes - fill.eligible,
        episodes_eligible=fill.eligible,
        rate=rate_info(table.rate.status()) if table.rate.active else None,
        durability=_durability(table, now) if table.config.durable_dir else None,
    )
    return status if metrics is None else _with_metrics(status, table, metrics, learners, now, full=fill.full)


def _with_metrics(
    status: TableStatus, table: Table, metrics: TableMetrics, learners: Sequence[Learner], now: float, *, full: bool
) -> TableStatus:
    stored = report_of(table).stored
    own = [learner for learner in learners if table.name in learner.tables]
    flows, waits = metrics.flows(now, stored, own), metrics.waits(now, stored, own)
    minute = flows[0]
    monitor = table.storage_monitor
    verdict, text = verdict_of(
        waits,
        span_s=minute.span_s,
        actors=metrics.actors.active(now),
        learners=sum(not learner.closed for learner in own),
        moved=bool(minute.rows_in or minute.delivered),
        full=monitor.reason if monitor is not None else "",
    )
    rows_per_s = minute.rows_in / minute.span_s if minute.span_s else 0.0
    entries = table.store.some_entries(MAX_ENTRIES)
    sampled_version, sampled_age_s = metrics.sampled(now)
    return replace(
        status,
        verdict=verdict,
        verdict_text=text,
        learners_waited_s=sum(wait.waited_s for wait in waits if wait.learners),
        actors_waited_s=sum(wait.waited_s for wait in waits if not wait.learners),
        waits=waits,
        flows=flows,
        seconds_until_full=0.0 if full else (status.capacity - status.counts.steps_stored) / rows_per_s if rows_per_s else -1.0,
        oldest_stored_s=metrics.age_of(int(entries[0, ID]), now) if len(entries) else -1.0,
        median_stored_s=metrics.age_of(int(entries[len(entries) // 2, ID]), now) if len(entries) else -1.0,
        mean_sampled_s=sampled_age_s,
        newest_policy_version=int(entries[:, POLICY_VERSION].max()) if len(entries) else None,
        mean_stored_policy_version=float(entries[:, POLICY_VERSION].mean()) if len(entries) else None,
        mean_sampled_policy_version=sampled_version,
    )


def report_of(table: Table) -> Report:
    """Returns what a table reports to the metrics at each tick."""
    counts = table.store.counts()
    stored = Stored(counts.episodes_added, counts.steps_added, table.store.bytes_added, counts.steps_evicted, counts.episodes_evicted)
    return Report(table.name, stored, table.store.next_id, table.store.take_draw)


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


def _durability(table: Table, now: float) -> DurabilityStatus:
    monitor, committer = table.storage_monitor, table.committer
    restored_rows, restore_rows = table.restore_progress
    status = DurabilityStatus(
        mode=table.config.storage.durability,
        state=monitor.state.value if monitor is not None else "",
        reason=monitor.reason if monitor is not None else "",
        restored=table.restored,
        restored_rows=restored_rows,
        restore_rows=restore_rows,
    )
    if committer is None:
        return status
    journal, (episodes, size_bytes) = committer.database_journal, committer.pending()
    status = replace(
        status, pending_episodes=episodes, pending_bytes=size_bytes, unsynced_s=journal.unsynced_s, sync=journal.syncs.status(now)
    )
    try:
        status = replace(status, file_bytes=journal.file_bytes(), disk_free_bytes=journal.disk_free_bytes())
        return replace(status, last_snapshot_unix_s=journal.last_snapshot_s())
    except OSError:  # the folder is gone, which the monitor reports
        return status


class EpisodeSummaries:
    """The newest episodes of each table. Their returns are kept, so that each is summed once. One thread at a time."""

    def __init__(self) -> None:
        self._returns: WeakKeyDictionary[Table, OrderedDict[int, float | None]] = WeakKeyDictionary()

    def newest(self, table: Table, count: int, age_of: Callable[[int], float]) -> tuple[EpisodeSummary, ...]:
        """Returns up to ``count`` of the most recent episodes, newest first; ``age_of`` returns the time since an episode was stored."""
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
                    age_s=age_of(entry.episode_id),
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
    return return_of(reward, incoming=table.store.incoming)


def return_of(reward: np.ndarray, *, incoming: bool) -> float | None:
    """Returns the sum of an episode's rewards; None if it is not finite.

    Args:
        reward: [rows, ...]: the column. Of lockstep matches, all agents' rewards are summed.
        incoming: the row convention: the first row's reward is undefined, otherwise the last row's.
    """
    if reward.dtype == BFLOAT16:
        # A bfloat16 is the upper half of a float32.
        reward = (reward.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    defined = reward[1:] if incoming else reward[:-1]
    # Other dtypes may overflow. For float32, numpy's pairwise sum is exact enough, and takes a third of the time.
    total = float(np.add.reduce(defined, axis=None, dtype=None if defined.dtype == np.float32 else np.float64))
    return total if math.isfinite(total) else None
