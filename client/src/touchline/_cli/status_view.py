"""What ``touchline status`` and ``touchline top`` show of a server: lines of text and rows of tables, made from one snapshot."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from touchline._cli.amounts import count_text, duration_text, share_text, size_text
from touchline._cli.terminal import pluralize
from touchline.types import (
    ActorStatus,
    DurabilityStatus,
    FlowStatus,
    LearnerStatus,
    RefusalStatus,
    ServerState,
    ServerStatus,
    ServingState,
    TableStatus,
    Transport,
    Verdict,
)

VERDICT_STYLES = {
    Verdict.BALANCED: "green",
    Verdict.IDLE: "cyan",
    Verdict.LEARNERS_WAIT: "yellow",
    Verdict.ACTORS_WAIT: "yellow",
    Verdict.STORE_FULL: "bold red",
    Verdict.UNSPECIFIED: "",
}
"""Style of each verdict."""

MINUTE_S = 60.0


def table_name(name: str) -> str:
    """Returns the name of a table for people."""
    return name or "(default)"


def flow_of(table: TableStatus, window_s: float) -> FlowStatus:
    """Returns the flow of a window, empty if the server did not send it."""
    return next((flow for flow in table.flows if flow.window_s == window_s), FlowStatus())


def per_s(amount: float, flow: FlowStatus) -> float:
    """Returns an amount of a flow for each second that it covers."""
    return amount / flow.span_s if flow.span_s > 0 else 0.0


def server_lines(server: ServerState, address: str) -> list[str]:
    """Returns the server as a whole in two lines."""
    state = str(server.state) or "state not known"
    budgets = [
        f"{name} {share_text(used / limit)} of its budget"
        for name, used, limit in (
            ("receiving", server.receive_bytes, server.receive_limit_bytes),
            ("sending", server.send_bytes, server.send_limit_bytes),
        )
        if limit
    ]
    memory = [f"memory {size_text(server.memory_bytes)}", f"rings {size_text(server.ring_bytes)}"]
    if server.device_bytes:
        memory.append(f"device {size_text(server.device_bytes)}")
    return [
        f"touchline-server {server.version} at {address}: {state}, up {duration_text(server.uptime_s)}",
        ", ".join(
            [
                *memory,
                f"CPU {server.cpu_share:.2f} cores",
                f"event loop late by {duration_text(server.loop_delay.p99_s)} (p99)",
                pluralize(server.connections, "connection"),
                pluralize(server.calls, "call"),
                pluralize(server.streams, "stream"),
                *budgets,
            ]
        ),
    ]


def table_lines(table: TableStatus) -> Iterator[tuple[str, str]]:
    """Yields what there is to say about a table, as labels and texts."""
    minute, ever = flow_of(table, MINUTE_S), flow_of(table, 0.0)
    counts = table.counts
    share = counts.steps_stored / table.capacity if table.capacity else 0.0
    full = (
        ""
        if table.seconds_until_full < 0
        else f", evicting {count_text(per_s(minute.rows_evicted, minute))} rows/s"
        if not table.seconds_until_full
        else f", full in {duration_text(table.seconds_until_full)}"
    )
    place = f" on {table.device}" if table.device else ""
    yield (
        "stored",
        (
            f"{counts.episodes_stored:,} episodes, {counts.steps_stored:,} of {table.capacity:,} steps ({share_text(share)}{full}), "
            f"{size_text(table.size_bytes)}{place}"
        ),
    )
    yield (
        "in",
        (
            f"{count_text(per_s(minute.rows_in, minute))} rows/s, {count_text(per_s(minute.episodes_in, minute))} episodes/s, "
            f"{size_text(per_s(minute.bytes_in, minute))}/s; {count_text(ever.rows_in)} rows since the start"
        ),
    )
    yield "out", _delivered_text(minute, ever)
    yield "replay", _replay_text(table, minute, ever)
    yield from _age_lines(table)
    if table.durability is not None:
        yield "disk", durability_text(table.durability)
    if table.episodes_not_sampled:
        yield "too short", f"{table.episodes_not_sampled:,} episodes are never sampled as configured: too short for the horizon"


def _delivered_text(minute: FlowStatus, ever: FlowStatus) -> str:
    ways = [
        f"{count_text(per_s(one.batches, minute))} batches/s, {size_text(per_s(one.bytes, minute))}/s by {one.transport}"
        for one in minute.delivered
        if one.batches
    ]
    total = sum(one.batches for one in ever.delivered)
    return f"{'; '.join(ways) or 'nothing in the last minute'}; {count_text(total)} since the start"


def _replay_text(table: TableStatus, minute: FlowStatus, ever: FlowStatus) -> str:
    recent, overall = (_ratio_text(flow.replay_ratio) for flow in (minute, ever))
    text = f"{recent} rows sampled per row added, {overall} since the start"
    if table.rate is not None and table.rate.samples_per_insert:
        now = _ratio_text(table.rate.ratio)
        text += f"; limit {table.rate.samples_per_insert:g} slices a step, {now} so far"
        text += f", holds {table.rate.adds_held} actors and {table.rate.batches_held} learners"
    return text


def _ratio_text(ratio: float | None) -> str:
    return "-" if ratio is None else count_text(ratio)


def _age_lines(table: TableStatus) -> Iterator[tuple[str, str]]:
    ages = [
        f"{name} {duration_text(age_s)}"
        for name, age_s in (
            ("oldest", table.oldest_stored_s),
            ("median", table.median_stored_s),
            ("sampled", table.mean_sampled_s),
        )
        if age_s >= 0
    ]
    newest = table.newest_policy_version
    if newest:
        ages.append(f"policy version {newest}")
        behind = [
            f"{name} {newest - mean:.1f}"
            for name, mean in (("stored", table.mean_stored_policy_version), ("sampled", table.mean_sampled_policy_version))
            if mean is not None
        ]
        if behind:
            ages.append(f"behind it on average: {', '.join(behind)}")
    if ages:
        yield "age", ", ".join(ages)


def durability_text(durability: DurabilityStatus) -> str:
    """Returns a durable store in words."""
    if not durability.restored and not durability.state:
        done = durability.restored_rows / durability.restore_rows if durability.restore_rows else 0.0
        return f"restoring: {durability.restored_rows:,} of {durability.restore_rows:,} rows ({share_text(done)})"
    snapshot = "never" if not durability.last_snapshot_unix_s else f"{duration_text(time.time() - durability.last_snapshot_unix_s)} ago"
    parts = [
        f"{durability.mode}, {durability.state or 'state not known'}" + (f" ({durability.reason})" if durability.reason else ""),
        f"{durability.pending_episodes:,} episodes not yet on disk",
        f"fsync {duration_text(durability.sync.p50_s)} (p99 {duration_text(durability.sync.p99_s)})",
        f"{size_text(durability.file_bytes)}, {size_text(durability.disk_free_bytes)} free",
        f"last snapshot {snapshot}",
    ]
    return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class Connection:
    """An actor or a learner as a row of a table; numbers that are not known are None."""

    kind: str
    """``actor`` or ``learner``."""
    name: str
    """Name of the actor; number of the learner's stream, or its address."""
    pending_bytes: int | None
    """Bytes that wait: in the actor's spool, or made for the learner and not taken. What grows first if one side is too slow."""
    waits_share: float
    """Share of the last minute that it waited."""
    rate: float
    """Rows a second that an actor added, or batches a second that a learner took, in the last minute."""
    total: int
    """Episodes of an actor, batches of a learner."""
    latency_s: float | None
    """Age of an actor's last episode; 99th percentile of a learner's wait for a batch."""
    address: str
    tables: str
    client: str
    detail: str
    """Return, length and policy version of an actor; transport of a learner, and why it has no ring."""


def connections_of(status: ServerStatus) -> list[Connection]:
    """Returns the actors and learners of a snapshot."""
    return [*map(_of_actor, status.actors), *map(_of_learner, status.learners)]


def _of_actor(actor: ActorStatus) -> Connection:
    detail = [] if actor.mean_reward_sum is None else [f"return {actor.mean_reward_sum:.4g}"]
    detail += [f"{actor.mean_rows:,.0f} rows"] if actor.episodes else []
    detail += [f"policy {actor.policy_version}"] if actor.policy_version else []
    detail += [f"{actor.refused:,} refused"] if actor.refused else []
    detail += [f"{actor.duplicates:,} duplicates"] if actor.duplicates else []
    return Connection(
        kind="actor",
        name=f"{actor.others:,} others" if actor.others else actor.name or "-",
        pending_bytes=actor.spool_bytes,
        waits_share=min(actor.waited_s / MINUTE_S, 1.0) if not actor.others else 0.0,
        rate=actor.rows_per_s,
        total=actor.episodes,
        latency_s=actor.last_episode_age_s if actor.last_episode_age_s >= 0 else None,
        address=actor.address,
        tables=table_name(actor.table),
        client=actor.client_version,
        detail=", ".join(detail),
    )


def _of_learner(learner: LearnerStatus) -> Connection:
    detail = str(learner.transport) or "-"
    detail += f", {learner.batch_size} x {learner.horizon}" if learner.batch_size else ""
    if learner.transport is Transport.STREAM and learner.ring_refused:
        detail += f": {learner.ring_refused}"
    name = f"{learner.others:,} others" if learner.others else f"#{learner.learner_id}" if learner.learner_id else "callers of sample()"
    return Connection(
        kind="learner",
        name=name,
        pending_bytes=learner.pending_bytes,
        waits_share=learner.waits_share,
        rate=learner.batches_per_s,
        total=learner.batches,
        latency_s=learner.wait.p99_s if learner.wait.count else None,
        address=learner.address,
        tables=" ".join(map(table_name, learner.tables)),
        client=learner.client_version,
        detail=detail,
    )


def refusal_line(refusal: RefusalStatus, now_unix_s: float) -> str:
    """Returns what was refused for one reason, with the last message."""
    ago = duration_text(max(now_unix_s - refusal.last_unix_s, 0.0))
    where = "" if refusal.table is None else f", table {table_name(refusal.table)}"
    return f"{refusal.count:,} x {refusal.reason}{where}; the last one {ago} ago, {refusal.last_who or '-'}: {refusal.last_message}"


def is_restoring(status: ServerStatus) -> bool:
    """Returns whether the server still reads its durable store."""
    return status.server.state is ServingState.RESTORING
