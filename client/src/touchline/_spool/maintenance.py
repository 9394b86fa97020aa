"""Upkeep of a robot's spool from outside of the writer: what lies in it, having refused episodes sent again, and sending what waits.

To look is harmless while a writer uses the spool; the other two take the folder as a writer does, and are refused while another has it.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

from touchline._actor.refusal_summary import RefusalSummary, add_refusal
from touchline._actor.sender import EpisodeSender
from touchline._spool.file import (
    COLUMNS,
    DAMAGED,
    FILE_NAME,
    LOCK_NAME,
    MARK_NAME,
    REFUSED,
    SQLITE_ERRORS,
    WAITING,
    FolderLock,
    check_structure,
    is_in_use,
    open_database,
    open_readonly,
    read_number,
    require_spool,
    set_state,
    table_of,
    to_spool_error,
)
from touchline._spool.queue import Spool
from touchline.client import ReplayClient
from touchline.errors import DeadlineError, OverLimitError, ServerError, SpoolError, TouchlineError, UnacknowledgedError, UnavailableError
from touchline_protos.files.sqlite import row_checksum

LEAST_LIMIT_BYTES = 1 << 20
"""As of a writer's spool."""
POLL_INTERVAL_S = 0.2
"""How often it is told how far sending is."""

CALL_TIMEOUT_S = 30.0
"""Longest deadline of a call, without what the bytes take."""
DAMAGED_ROW = "its row in the spool is not what was written"
"""Reason of an episode whose own entry cannot be read."""

_PASSING = (UnavailableError, DeadlineError, OverLimitError, ServerError, SpoolError)
"""What may be over by itself; anything else is about this client, and stays."""


@dataclass(frozen=True, slots=True)
class SpooledEpisode:
    """An episode in a spool."""

    number: int
    """In the spool: later ones have higher numbers."""
    length: int
    """Rows."""
    size_bytes: int
    """Of its message."""
    time_s: float
    """When it was put there, in seconds since 1970."""
    reason: str = ""
    """Why it is not sent; empty where it waits."""


@dataclass(slots=True)
class SpoolReport:
    """What lies in a spool, oldest first."""

    folder: Path
    table: str = ""
    """Of the server, that the episodes are for; empty is the default one."""
    holder: int | None = None
    """Process that uses it, 0 where its number is not known; None where nobody does."""
    waiting: list[SpooledEpisode] = field(default_factory=list)
    """To be sent."""
    refused: list[SpooledEpisode] = field(default_factory=list)
    """By a server, for good."""
    damaged: list[SpooledEpisode] = field(default_factory=list)
    """Not what was written. Of those that wait, only what is noticed without reading their payloads."""
    missing: int = 0
    """The newest that were taken over and are not there: the log was damaged or cut. Perhaps acknowledged before."""
    disk_bytes: int = 0
    """What the folder's files take."""


@dataclass(slots=True)
class SendReport:
    """What became of the episodes that waited in a spool. Always ``total == sent + refused + pending``."""

    total: int = 0
    """Episodes that waited."""
    sent: int = 0
    """Of these, acknowledged: stored now, or before."""
    steps: int = 0
    """Rows of those."""
    refused: int = 0
    """Of these, refused for good, or damaged; they stay in the spool, with the reason."""
    pending: int = 0
    """Of these, not answered; they wait as before."""
    size_bytes: int = 0
    """Of the messages that were answered."""
    reasons: dict[str, RefusalSummary] = field(default_factory=dict)
    """Why, by the message with ``#`` for its numbers; known at the end."""
    error: TouchlineError | None = None
    """Why sending is being tried again or, at the end, why it was given up."""


def inspect(folder: Path) -> SpoolReport:
    """Returns what lies in a spool; changes nothing, and may be called while a writer uses it.

    Raises:
        SpoolError: it is not a spool, damaged as a whole, or of a newer format.
    """
    require_spool(folder)
    report = SpoolReport(folder)
    try:
        if is_in_use(folder):
            report.holder = read_number(folder / LOCK_NAME)
        marked = read_number(folder / MARK_NAME)  # before the rows, which may get more meanwhile
        report.disk_bytes = _disk_bytes(folder)
    except OSError as error:
        raise SpoolError(f"{folder}: {error.strerror}") from error
    last = 0
    with open_readonly(folder) as connection:
        if connection is not None:
            if report.holder is None:  # who uses it has read all of it, and should not wait for this
                check_structure(connection, folder / FILE_NAME)
            report.table = table_of(connection) or ""
            _classify(connection, report)
            last = connection.execute("SELECT max(seq) FROM sqlite_sequence").fetchone()[0]
    report.missing = max(0, marked - (last if isinstance(last, int) else 0))
    return report


def retry(folder: Path) -> int:
    """Has the refused episodes of a spool wait again, each at its old place, and returns how many they are. Damaged ones stay.

    Raises:
        SpoolError: it is not a spool, somebody uses it, it is damaged, or cannot be written.
    """
    check_free(folder)
    folder = folder.resolve()
    holder = FolderLock(folder)
    try:
        with contextlib.closing(open_database(folder, table=None)) as connection:
            report = SpoolReport(folder)
            _classify(connection, report)
            connection.execute("BEGIN IMMEDIATE")
            for episode in report.refused:
                set_state(connection, episode.number, WAITING, "")
            connection.execute("COMMIT")
    except SQLITE_ERRORS as error:
        raise to_spool_error(error, folder / FILE_NAME) from error
    finally:
        holder.release()
    return len(report.refused)


def send(folder: Path, address: str, *, timeout_s: float = 60.0, progress: Callable[[SendReport], None] | None = None) -> SendReport:
    """Sends what waits in a spool, oldest first, under the keys that the episodes were given when they ended.

    What the server refuses for good stays in the spool with the reason, all of it. What is not answered waits as before.

    Args:
        folder: of the spool.
        address: of the server; TLS and token are the environment's.
        timeout_s: how long the server may be away.
        watch: called several times a second, with what became of them so far. What it raises ends the sending.

    Returns:
        What became of them. Its ``trouble`` says why, where some are left: the server was away, or does not let this client in.

    Raises:
        SpoolError: it is not a spool, somebody uses it, or it is damaged as a whole.
        InvalidArgumentError: the address, or what the environment says of TLS or the token.
    """
    check_free(folder)
    # Refused ones are for a person to look at: none is deleted for a newer one.
    # What it takes now is within its writer's limit, whatever that is, and so is a log in proportion to it.
    spool = Spool(folder, limit_bytes=max(LEAST_LIMIT_BYTES, _disk_bytes(folder)), table=None, max_refused=None)
    try:
        before = _read_episodes(folder)
        report = SendReport(total=spool.resumed[0], pending=spool.resumed[0])
        with ReplayClient(address, table=spool.table, timeout_s=min(timeout_s, CALL_TIMEOUT_S)) as client:
            sender = EpisodeSender(client, spool, name=f"sending of {folder}", when_full="block")
            sizes = [0, *accumulate(episode.size_bytes for episode in before.waiting)]
            try:
                _wait_until_sent(sender, report, sizes, timeout_s=timeout_s, progress=progress or (lambda _: None))
            finally:
                with contextlib.suppress(UnacknowledgedError):  # the file says which, and why
                    sender.close(0)
                _update(report, sender, sizes)
    finally:
        spool.close()
    told = {episode.number for episode in (*before.refused, *before.damaged) if episode.reason != DAMAGED_ROW}
    after = _read_episodes(folder)
    for episode in (*after.refused, *after.damaged):
        if episode.number not in told:
            add_refusal(report.reasons, episode.number, episode.reason)
    return report


def check_free(folder: Path) -> None:
    """Refuses a folder that cannot be changed from outside, before anything is made in it.

    Raises:
        SpoolError: it is not a spool, or somebody uses it.
    """
    require_spool(folder)
    if is_in_use(folder):
        process = read_number(folder / LOCK_NAME)
        raise SpoolError(
            f"{folder} is in use{f' by process {process}' if process else ''}: end that program first. While it runs, it sends what waits "
            "by itself"
        )


def _disk_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob(f"{FILE_NAME}*"))


def _classify(connection: sqlite3.Connection, report: SpoolReport) -> None:
    """Notes each episode where it belongs."""
    for *row, checksum in connection.execute(f"SELECT {COLUMNS}, row_checksum FROM episodes ORDER BY id"):
        number, state = row[0], row[7]
        if row_checksum(*row) != checksum:
            report.damaged.append(SpooledEpisode(number, 0, 0, 0.0, DAMAGED_ROW))
            continue
        kind = {REFUSED: report.refused, DAMAGED: report.damaged}.get(state, report.waiting)
        kind.append(SpooledEpisode(number, row[4], row[5], row[6], row[8]))


def _read_episodes(folder: Path) -> SpoolReport:
    report = SpoolReport(folder)
    with open_readonly(folder) as connection:
        if connection is not None:
            _classify(connection, report)
    return report


def _wait_until_sent(
    sender: EpisodeSender, report: SendReport, sizes: list[int], *, timeout_s: float, progress: Callable[[SendReport], None]
) -> None:
    """Waits until everything is answered, or what is in the way does not pass."""
    settled, since = 0, time.monotonic()
    while True:
        done = sender.wait(POLL_INTERVAL_S)
        _update(report, sender, sizes)
        progress(report)
        if done:
            return
        now = time.monotonic()
        if report.error is None or report.sent + report.refused != settled:
            settled, since = report.sent + report.refused, now
        elif not isinstance(report.error, _PASSING) or now - since >= timeout_s:
            return


def _update(report: SendReport, sender: EpisodeSender, sizes: list[int]) -> None:
    counters = sender.counters
    report.sent, report.steps = counters.acknowledged, counters.steps_acknowledged
    report.refused, report.pending = counters.refused, counters.pending
    # They are answered in their order.
    report.size_bytes = sizes[min(report.sent + report.refused, len(sizes) - 1)]
    report.error = sender.trouble if report.pending else None
