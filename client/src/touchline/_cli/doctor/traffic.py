"""Checks of what happens at the server: who waits for whom, what was refused lately, and what is left in actors' spools."""

from __future__ import annotations

import re
from collections.abc import Iterator

from touchline._cli.doctor.findings import Finding, Level
from touchline._cli.doctor.server import NO_TABLE
from touchline._rpc.credentials import TOKEN_VARIABLE
from touchline.client import ReplayClient
from touchline.errors import IncompatibleVersionError
from touchline.types import ServerStatus, TableStatus, Verdict, WaitCause
from touchline_protos.log_lines import escape
from touchline_protos.types.reasons import Reason

RECENT_S = 600.0
"""Age up to which a refusal is reported."""

MAX_REASONS = 5
"""Most reasons of refusals that are reported, the most recent ones."""

PROBE = re.compile(rf"{NO_TABLE}|to call SetTable\b")
"""Part of the texts with which the calls of :func:`.server.check_roles` are refused."""

LEARNERS, ACTORS = True, False

ADVICE_OF_WAIT = {
    (LEARNERS, WaitCause.DATA): "Learners wait for data: start actors, or add episodes of more than horizon rows.",
    (LEARNERS, WaitCause.RATE): "Learners wait for the rate limit: add actors, or raise it: touchline table set rate.samples_per_insert=N.",
    (LEARNERS, WaitCause.SAMPLING): (
        "Learners wait for the server: run them on its machine, where batches come through shared memory, or raise server.sample_workers."
    ),
    (ACTORS, WaitCause.RATE): "Actors wait for learners: start one, or lower the limit: touchline table set rate.samples_per_insert=N.",
    (ACTORS, WaitCause.BUDGET): "Actors wait for bytes to send into: raise limits.max_receive_bytes.",
    (ACTORS, WaitCause.THROTTLE): "Actors wait because learners go first: lower server.sample_share.",
    (
        ACTORS,
        WaitCause.STORING,
    ): "Actors wait for the disk and other adds: a faster disk, storage.durability = 'batch', or larger server.add_workers.",
}
"""What to do if one side waits, by what it waits for most."""

ADVICE_OF_REASON = {
    Reason.INVALID_ARGUMENT: "The text names the range, and the key that sets it.",
    Reason.INVALID_EPISODE: "The text names the column; docs/troubleshooting.md, Episodes that are refused, has the remedies.",
    Reason.UNKNOWN_TABLE: "Use one of the tables that the text names, or create it: touchline table create NAME.",
    Reason.UNKNOWN_EPISODE: "It was evicted or cleared: read episodes with skip_missing=True.",
    Reason.KEY_CONFLICT: "Take keys from client.next_key(), and give each sender a client_id of its own.",
    Reason.TOO_LARGE: "The text names the limit: send smaller episodes, EpisodeWriter(max_steps=...), or raise it.",
    Reason.OVER_LIMIT: "It is retried. If it happens again and again, raise the key that the text names, or free the disk.",
    Reason.NOT_READY: "Nothing was long enough to sample: use sample(wait_s=...), batches() or a smaller horizon.",
    Reason.INCOMPATIBLE_VERSION: "Install touchline and touchline-server of the same major version.",
    Reason.UNAUTHENTICATED: f"Give that caller a token of the server's auth.tokens_file: {TOKEN_VARIABLE}.",
    Reason.PERMISSION_DENIED: "Give that caller a token with the role, or for the table, that the text names.",
    Reason.RESTORING: "Nothing, it is retried: the server was reading its durable store.",
    Reason.DRAINING: "Nothing, it is retried: the server was stopping.",
    Reason.SCHEMA_CHANGED: "Nothing, batches() opens its stream again: the table was cleared.",
    Reason.STORAGE_FAILED: "Repair the disk of storage.data_dir, and restart the server, which verifies what is stored.",
    Reason.INTERNAL: "The server's log has the traceback; please report it.",
}
"""What to do about calls and episodes that are refused, by the reason."""


def check_traffic(client: ReplayClient, table: str) -> Iterator[Finding]:
    """Yields who waited for whom at the table in the last minute, what was refused, and what actors have not sent yet.

    Yields nothing from a server that does not know.
    """
    try:
        status = client.status(tables=[table])
    except IncompatibleVersionError:
        return
    yield from _check_waits(status.tables[0])
    yield from _check_refusals(status, table)
    yield from _check_spools(status, table)


def _check_waits(table: TableStatus) -> Iterator[Finding]:
    figures = {"verdict": table.verdict.value, "learners_waited_s": table.learners_waited_s, "actors_waited_s": table.actors_waited_s}
    text = escape(table.verdict_text) or str(table.verdict).replace("_", " ")
    if text:
        advice = advice_of(table)
        yield Finding("waits", Level.WARNING if advice else Level.OK, text, advice, figures)


def advice_of(table: TableStatus) -> str:
    """Returns what to do about a table's verdict; empty if nothing has to be done."""
    if table.verdict is Verdict.STORE_FULL:
        return "Free space on the disk of the server's storage.data_dir, or repair it and restart the server."
    if table.verdict not in (Verdict.LEARNERS_WAIT, Verdict.ACTORS_WAIT):
        return ""
    side = LEARNERS if table.verdict is Verdict.LEARNERS_WAIT else ACTORS
    waits = [wait for wait in table.waits if wait.learners is side]
    most = max(waits, key=lambda wait: wait.waited_s).cause if waits else WaitCause.UNSPECIFIED
    return ADVICE_OF_WAIT.get((side, most), "touchline top shows who waits.")


def _check_refusals(status: ServerStatus, table: str) -> Iterator[Finding]:
    recent = [
        refusal
        for refusal in status.refusals
        if refusal.table in (None, table) and status.time_unix_s - refusal.last_unix_s < RECENT_S and not PROBE.search(refusal.last_message)
    ]
    for one in sorted(recent, key=lambda refusal: refusal.last_unix_s, reverse=True)[:MAX_REASONS]:
        text = f"{one.count:,} refused as {one.reason}, the last one to {escape(one.last_who) or '-'}: {escape(one.last_message)}"
        advice = next((advice for reason, advice in ADVICE_OF_REASON.items() if reason == one.reason), "")
        yield Finding("refused", Level.NOTE, text, advice, {"reason": one.reason, "count": one.count})


def _check_spools(status: ServerStatus, table: str) -> Iterator[Finding]:
    left = {actor.name: actor.spool_episodes for actor in status.actors if actor.table == table and actor.spool_episodes}
    if left:
        most = max(left, key=lambda name: left[name] or 0)
        total = sum(number or 0 for number in left.values())
        text = f"{total:,} episodes wait in the spools of {len(left):,} actors, most at {escape(most) or '-'}: {left[most]:,}"
        advice = "If there are more each time, see that actor's log, and on its machine: touchline spool show DIR."
        yield Finding("spools", Level.NOTE, text, advice, {"actors": len(left), "episodes": total})
