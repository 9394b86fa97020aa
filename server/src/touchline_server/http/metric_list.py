"""The list of metrics: every figure of a snapshot, under Prometheus's naming. docs/metrics.md is generated from it.

Tables, actors and transports are labels. Actors beyond those that a snapshot names are summed under the actor ``(others)``, so the number
of series is bounded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import TypeAlias

from touchline_protos.types.status import FlowStatus, LatencyStatus, ServerStatus, ServingState, TableStatus, Verdict

DEFAULT_TABLE = "default"
"""Label of the default table, whose name is empty. No other table can have it."""

OTHERS = "(others)"
"""Label of the actors that a snapshot sums."""

STORE_STATES = ("ok", "full", "failed")
"""States of a durable store."""

Sample: TypeAlias = tuple[tuple[str, ...], float | LatencyStatus]
"""Values of the labels, and the value; a histogram's value is a latency."""

Samples: TypeAlias = Callable[[ServerStatus], Iterable[Sample]]
"""Function that takes a metric's samples from a snapshot."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric: what it is called, what it says, and where it stands in a snapshot."""

    name: str
    """Name; a counter's ends in ``_total``."""
    help: str
    labels: tuple[str, ...]
    samples: Samples

    @property
    def kind(self) -> str:
        """Type of the metric: counter, histogram or gauge."""
        if self.name.endswith("_total"):
            return "counter"
        return "histogram" if self.name.endswith("_duration_seconds") or self.name.endswith("_delay_seconds") else "gauge"


def _of_server(name: str) -> Samples:
    return lambda status: [((), getattr(status.server, name))]


def _of_pools(name: str) -> Samples:
    return lambda status: [((pool.name,), getattr(pool, name)) for pool in status.server.pools]


def _of_table(name: str) -> Samples:
    """Returns one sample for each table that has a value. The name may be dotted."""
    value = attrgetter(name)
    return lambda status: [((_label(one.table),), value(one)) for one in status.tables if value(one) is not None]


def _of_totals(name: str) -> Samples:
    """Returns one sample for each table from its flows since the start."""
    return lambda status: [((_label(table.table),), getattr(flow, name)) for table, flow in _totals(status)]


def _of_delivered(name: str) -> Samples:
    """Returns one sample for each table and transport from its flows since the start."""
    return lambda status: [
        ((_label(table.table), one.transport.value), getattr(one, name)) for table, flow in _totals(status) for one in flow.delivered
    ]


def _of_rate(name: str) -> Samples:
    return lambda status: [((_label(one.table),), getattr(one.rate, name)) for one in status.tables if one.rate is not None]


def _of_store(name: str) -> Samples:
    return lambda status: [((_label(one.table),), getattr(one.durability, name)) for one in status.tables if one.durability is not None]


def _of_actors(name: str, *, summed: bool = False) -> Samples:
    """Returns one sample for each actor that has a value; those that a snapshot sums only if ``summed``. A negative age is not known."""
    return lambda status: [
        ((_label(one.table), OTHERS if one.others else one.name), value)
        for one in status.actors
        if (value := getattr(one, name)) is not None and (summed or not one.others) and not (name.endswith("_age_s") and value < 0)
    ]


def _of_waits(*, learners: bool) -> Samples:
    return lambda status: [
        ((_label(table.table), one.cause.value), one.total_s) for table in status.tables for one in table.waits if one.learners == learners
    ]


def _totals(status: ServerStatus) -> Iterator[tuple[TableStatus, FlowStatus]]:
    return ((table, flow) for table in status.tables for flow in table.flows if not flow.window_s)


def _label(table: str) -> str:
    return table or DEFAULT_TABLE


def _ages(status: ServerStatus) -> Iterator[Sample]:
    for table in status.tables:
        for of, age in (("oldest", table.oldest_stored_s), ("median", table.median_stored_s), ("sampled", table.mean_sampled_s)):
            if age >= 0:
                yield (_label(table.table), of), age


def _learners(status: ServerStatus) -> Iterator[Sample]:
    counts = Counter({"ring": 0, "stream": 0, "unary": 0, "device": 0})
    for one in status.learners:
        counts[one.transport.value or "stream"] += one.others or 1
    return (((transport,), number) for transport, number in counts.items())


_TABLE = ("table",)
_DELIVERED = ("table", "transport")
_ACTOR = ("table", "actor")

METRICS: tuple[Metric, ...] = (
    # The server
    Metric(
        "touchline_info",
        "Always 1; the labels have the version of the server and of its wire contract.",
        ("version", "protocol"),
        lambda status: [((status.server.version, status.server.protocol_version), 1.0)],
    ),
    Metric(
        "touchline_state",
        "1 for what the server is doing: restoring, serving or draining; 0 for the others.",
        ("state",),
        lambda status: [((one.value,), float(one is status.server.state)) for one in ServingState if one.value],
    ),
    Metric("touchline_uptime_seconds", "Time since the server started.", (), _of_server("uptime_s")),
    Metric("touchline_ring_bytes", "Shared memory of the rings.", (), _of_server("ring_bytes")),
    Metric("touchline_device_bytes", "Memory of the columns on CUDA devices.", (), _of_server("device_bytes")),
    Metric("touchline_connections", "Connections with a call in progress.", (), _of_server("connections")),
    Metric("touchline_calls_in_progress", "Calls in progress, streams included.", (), _of_server("calls")),
    Metric("touchline_streams", "Sampling streams, loads and reads in progress.", (), _of_server("streams")),
    Metric(
        "touchline_receive_bytes",
        "Bytes reserved for episodes that are being received.",
        (),
        _of_server("receive_bytes"),
    ),
    Metric(
        "touchline_receive_limit_bytes",
        "Limit of the bytes above: limits.max_receive_bytes.",
        (),
        _of_server("receive_limit_bytes"),
    ),
    Metric(
        "touchline_send_bytes",
        "Bytes reserved for batches and episodes that are being sent.",
        (),
        _of_server("send_bytes"),
    ),
    Metric(
        "touchline_send_limit_bytes",
        "Limit of the bytes above: limits.max_send_bytes.",
        (),
        _of_server("send_limit_bytes"),
    ),
    Metric(
        "touchline_pool_threads",
        "Threads of a pool.",
        ("pool",),
        _of_pools("threads"),
    ),
    Metric(
        "touchline_pool_busy_threads",
        "Threads of a pool that work, or wait for a lock or the disk.",
        ("pool",),
        _of_pools("busy"),
    ),
    Metric(
        "touchline_pool_queue_length",
        "Pieces of work that wait for a thread of a pool.",
        ("pool",),
        _of_pools("queued"),
    ),
    Metric(
        "touchline_pool_cpu_cores",
        "CPU time of a pool over the last minute, in cores.",
        ("pool",),
        _of_pools("cpu_share"),
    ),
    Metric(
        "touchline_event_loop_delay_seconds",
        "How late the event loop wakes, looked at every second.",
        (),
        lambda status: [((), status.server.loop_delay)],
    ),
    Metric(
        "touchline_call_duration_seconds",
        "Time from a call's admission to its end, by method; a stream's is how long it lasted.",
        ("method",),
        lambda status: [((one.method,), one.latency) for one in status.server.methods],
    ),
    Metric(
        "touchline_calls_failed_total",
        "Calls that ended with an error, by method; refused ones included.",
        ("method",),
        lambda status: [((one.method,), one.failed) for one in status.server.methods],
    ),
    Metric("touchline_learners", "Learners that are connected, by transport.", ("transport",), _learners),
    Metric(
        "touchline_learner_pending_bytes",
        "Bytes of batches that are made and not taken yet, over all learners.",
        (),
        lambda status: [((), sum(one.pending_bytes for one in status.learners))],
    ),
    Metric(
        "touchline_refusals_total",
        "Refused calls and episodes, by reason. `touchline status` shows the last message of each.",
        ("reason", "table"),
        lambda status: [((one.reason, "" if one.table is None else _label(one.table)), one.count) for one in status.refusals],
    ),
    # Tables
    Metric(
        "touchline_verdict",
        "1 for who waits for whom: idle, balanced, learners_wait, actors_wait or store_full; 0 for the others.",
        ("table", "verdict"),
        lambda status: [
            ((_label(table.table), one.value), float(one is table.verdict)) for table in status.tables for one in Verdict if one.value
        ],
    ),
    Metric("touchline_steps_stored", "Rows stored.", _TABLE, _of_table("counts.steps_stored")),
    Metric("touchline_episodes_stored", "Episodes stored.", _TABLE, _of_table("counts.episodes_stored")),
    Metric("touchline_capacity_steps", "Maximum number of rows.", _TABLE, _of_table("capacity")),
    Metric("touchline_table_bytes", "Memory, or disk space, allocated for the columns.", _TABLE, _of_table("size_bytes")),
    Metric("touchline_episodes_added_total", "Episodes added since the start.", _TABLE, _of_totals("episodes_in")),
    Metric("touchline_steps_added_total", "Rows added since the start.", _TABLE, _of_totals("rows_in")),
    Metric("touchline_added_bytes_total", "Bytes of the columns of these episodes.", _TABLE, _of_totals("bytes_in")),
    Metric(
        "touchline_episodes_evicted_total",
        "Episodes replaced by newer ones, or cleared.",
        _TABLE,
        _of_totals("episodes_evicted"),
    ),
    Metric("touchline_steps_evicted_total", "Rows of these episodes.", _TABLE, _of_totals("rows_evicted")),
    Metric(
        "touchline_episodes_refused_total",
        "Episodes that were malformed, not of the schema or too large, since the table was created.",
        _TABLE,
        _of_table("counts.episodes_refused"),
    ),
    Metric(
        "touchline_episodes_duplicate_total",
        "Episodes sent again under a known key: acknowledged, not stored again.",
        _TABLE,
        _of_table("counts.episodes_duplicate"),
    ),
    Metric(
        "touchline_episodes_not_sampled",
        "Stored episodes that are too short for a slice, as configured.",
        _TABLE,
        _of_table("episodes_not_sampled"),
    ),
    Metric(
        "touchline_batches_delivered_total",
        "Batches with slices of the table; one that is mixed from several tables counts at each.",
        _DELIVERED,
        _of_delivered("batches"),
    ),
    Metric("touchline_slices_delivered_total", "Slices delivered.", _DELIVERED, _of_delivered("slices")),
    Metric("touchline_steps_sampled_total", "Rows of these slices: H + 1 each.", _DELIVERED, _of_delivered("rows")),
    Metric("touchline_delivered_bytes_total", "Bytes of the slices' columns and provenance.", _DELIVERED, _of_delivered("bytes")),
    Metric(
        "touchline_learners_wait_seconds_total",
        "Seconds that learners waited, summed over learners, by cause: data, rate (the rate limit) or sampling.",
        ("table", "cause"),
        _of_waits(learners=True),
    ),
    Metric(
        "touchline_actors_wait_seconds_total",
        "Seconds that actors waited, summed over actors, by cause: rate (the rate limit), budget, throttle or storing.",
        ("table", "cause"),
        _of_waits(learners=False),
    ),
    Metric(
        "touchline_age_seconds",
        "Age of the oldest and of the median stored episode, and mean age of those sampled in the last minute.",
        ("table", "of"),
        _ages,
    ),
    Metric(
        "touchline_policy_version_newest",
        "Highest policy version of the stored episodes.",
        _TABLE,
        _of_table("newest_policy_version"),
    ),
    Metric(
        "touchline_policy_version_stored_mean",
        "Mean policy version of the stored episodes.",
        _TABLE,
        _of_table("mean_stored_policy_version"),
    ),
    Metric(
        "touchline_policy_version_sampled_mean",
        "Mean policy version of the slices sampled in the last minute.",
        _TABLE,
        _of_table("mean_sampled_policy_version"),
    ),
    Metric(
        "touchline_rate_samples_per_insert",
        "Target of the rate limit: slices for each row added.",
        _TABLE,
        _of_rate("samples_per_insert"),
    ),
    Metric(
        "touchline_rate_owed_slices",
        "Slices that learners are behind the rate limit's target; negative if they are ahead of it.",
        _TABLE,
        _of_rate("owed_slices"),
    ),
    Metric("touchline_rate_adds_held", "Actors that the rate limit holds back.", _TABLE, _of_rate("adds_held")),
    Metric("touchline_rate_batches_held", "Learners that the rate limit holds back.", _TABLE, _of_rate("batches_held")),
    # Durable stores
    Metric(
        "touchline_store_state",
        "1 for the state of the durable store: ok, full (no space on the disk) or failed; 0 for the others.",
        ("table", "state"),
        lambda status: [
            ((_label(table.table), state), float(table.durability.state == state))
            for table in status.tables
            if table.durability is not None
            for state in STORE_STATES
        ],
    ),
    Metric(
        "touchline_unsynced_episodes",
        "Episodes that are acknowledged or queued, and not yet committed.",
        _TABLE,
        _of_store("pending_episodes"),
    ),
    Metric("touchline_unsynced_bytes", "Bytes of the columns of these episodes.", _TABLE, _of_store("pending_bytes")),
    Metric(
        "touchline_unsynced_seconds",
        "Time since the oldest commit that is not synced; 0 if all are.",
        _TABLE,
        _of_store("unsynced_s"),
    ),
    Metric("touchline_fsync_duration_seconds", "Time of one fsync of the durable store.", _TABLE, _of_store("sync")),
    Metric("touchline_store_file_bytes", "Size of the durable store's files.", _TABLE, _of_store("file_bytes")),
    Metric("touchline_store_disk_free_bytes", "Free space of their disk.", _TABLE, _of_store("disk_free_bytes")),
    Metric(
        "touchline_store_snapshot_timestamp_seconds",
        "Time of the last snapshot of the store; 0: never, or not known.",
        _TABLE,
        _of_store("last_snapshot_unix_s"),
    ),
    Metric("touchline_restored_steps", "Rows read from the store at the start, so far.", _TABLE, _of_store("restored_rows")),
    Metric("touchline_restore_steps", "Rows in the store at the start.", _TABLE, _of_store("restore_rows")),
    # Actors
    Metric("touchline_actor_episodes_total", "Episodes of an actor that were stored.", _ACTOR, _of_actors("episodes", summed=True)),
    Metric("touchline_actor_steps_total", "Rows of these episodes.", _ACTOR, _of_actors("rows", summed=True)),
    Metric("touchline_actor_refused_total", "Episodes of an actor that were refused.", _ACTOR, _of_actors("refused", summed=True)),
    Metric(
        "touchline_actor_last_episode_age_seconds",
        "Time since the last episode of an actor was stored.",
        _ACTOR,
        _of_actors("last_episode_age_s"),
    ),
    Metric("touchline_actor_mean_return", "Mean return of an actor's episodes.", _ACTOR, _of_actors("mean_reward_sum")),
    Metric("touchline_actor_policy_version", "Policy version of an actor's last episode.", _ACTOR, _of_actors("policy_version")),
    Metric(
        "touchline_actor_spool_episodes",
        "Episodes in an actor's spool, as it said last.",
        _ACTOR,
        _of_actors("spool_episodes", summed=True),
    ),
)
"""Every metric, besides those of the process (``process_*``) and of Python (``python_info``)."""
