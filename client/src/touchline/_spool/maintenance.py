"""Maintenance of a spool from outside its writer: inspecting it, requeueing refused episodes, and sending what waits.

Inspecting is harmless while a writer uses the spool. The other two lock the folder as a writer does, and fail while another process has it.
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
    PARTS_PER_EPISODE,
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
    to_spool_error,
)
from touchline._spool.queue import Spool
from touchline.client import ReplayClient
from touchline.errors import DeadlineError, OverLimitError, ServerError, SpoolError, TouchlineError, UnacknowledgedError, UnavailableError
from touchline_protos.codec import CodecError
from touchline_protos.codec.episodes import TABLE_BYTES, read_table
from touchline_protos.files.sqlite import row_checksum

LEAST_LIMIT_BYTES = 1 << 20
"""Lowest limit of a spool, as for a writer."""
PROGRESS_INTERVAL_S = 0.2
"""Time between two calls of the progress callback."""

CALL_TIMEOUT_S = 30.0
"""Longest deadline of a call, in addition to the time for its bytes."""
DAMAGED_ROW = "its row in the spool is not what was written"
"""Reason for an episode whose row is damaged."""

_PASSING = (UnavailableError, DeadlineError, OverLimitError, ServerError, SpoolError)
"""Errors that may pass by themselves; any other is about this client, and stays."""


@dataclass(frozen=True, slots=True)
class SpooledEpisode:
    """Episode in a spool."""

    number: int
    """Id in the spool; later episodes have higher ids."""
    length: int
    """Number of rows."""
    size_bytes: int
    """Size of its message."""
    time_s: float
    """Time at which it was written, in seconds since 1970."""
    reason: str = ""
    """Reason why it is not sent; empty while it waits."""
    table: str = ""
    """Name of the server's table that it is for; empty for the default one, or if the episode cannot be read."""


@dataclass(slots=True)
class SpoolReport:
    """Content of a spool, oldest first."""

    folder: Path
    holder: int | None = None
    """Process id of the writer that uses the spool, 0 if it is not known; None if no process uses it."""
    waiting: list[SpooledEpisode] = field(default_factory=list)
    """Episodes to be sent."""
    refused: list[SpooledEpisode] = field(default_factory=list)
    """Episodes that a server refused for good."""
    damaged: list[SpooledEpisode] = field(default_factory=list)
    """Episodes that are not what was written; damaged payloads of waiting episodes are found only when they are sent."""
    missing: int = 0
    """Number of the most recent episodes that the file has lost, with the end of its log; they may have been acknowledged before."""
    disk_bytes: int = 0
    """Size of the folder's files."""


@dataclass(slots=True)
class SendReport:
    """Outcome for the episodes that waited in a spool. Always ``total == sent + refused + pending``."""

    total: int = 0
    """Episodes that waited."""
    sent: int = 0
    """Acknowledged episodes, stored now or before."""
    steps: int = 0
    """Rows of the acknowledged episodes."""
    refused: int = 0
    """Episodes refused for good, or damaged; they stay in the spool, with the reason."""
    pending: int = 0
    """Episodes not answered; they wait as before."""
    size_bytes: int = 0
    """Size of the answered messages."""
    reasons: dict[str, RefusalSummary] = field(default_factory=dict)
    """Refusals by reason, which is the message with ``#`` in place of numbers; filled in at the end."""
    error: TouchlineError | None = None
    """Error because of which sending is being retried or, at the end, was given up."""


def inspect(folder: Path) -> SpoolReport:
    """Returns the content of a spool; changes nothing, and may be called while a writer uses it.

    Raises:
        SpoolError: the folder is not a spool, or the spool is damaged as a whole or has a newer format.
    """
    require_spool(folder)
    report = SpoolReport(folder)
    try:
        if is_in_use(folder):
            report.holder = read_number(folder / LOCK_NAME)
        marked = read_number(folder / MARK_NAME)  # read before the rows: a writer may add some in between
        report.disk_bytes = _disk_bytes(folder)
    except OSError as error:
        raise SpoolError(f"{folder}: {error.strerror}") from error
    last = 0
    with open_readonly(folder) as connection:
        if connection is not None:
            if report.holder is None:  # a writer checked the file when it opened it, and should not wait for this
                check_structure(connection, folder / FILE_NAME)
            _classify(connection, report)
            last = connection.execute("SELECT max(seq) FROM sqlite_sequence").fetchone()[0]
    report.missing = max(0, marked - (last if isinstance(last, int) else 0))
    return report


def retry(folder: Path) -> int:
    """Requeues the refused episodes of a spool, each at its old place, and returns their number. Damaged episodes stay as they are.

    Raises:
        SpoolError: the folder is not a spool, is in use, or the spool is damaged or cannot be written.
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
    """Sends the episodes that wait in a spool, oldest first, under the keys that they got when they ended.

    Every episode that the server refuses for good stays in the spool with the reason. Episodes that are not answered wait as before.

    Args:
        folder: folder of the spool.
        address: address of the server; TLS and token come from the environment.
        timeout_s: longest time that the server may be away.
        progress: callback with the outcome so far, called several times a second. An exception from it ends the sending.

    Returns:
        The outcome. If episodes are pending, its ``error`` says why: the server was away, or rejects this client.

    Raises:
        SpoolError: the folder is not a spool or is in use, or the spool is damaged as a whole.
        InvalidArgumentError: the address, or the environment's TLS settings or token, are invalid.
    """
    check_free(folder)
    # Refused episodes are for a person to look at: none is deleted to make space for a newer one.
    # The writer's limit is not known here. The size now is within it, and so is a log in proportion to that size.
    spool = Spool(folder, limit_bytes=max(LEAST_LIMIT_BYTES, _disk_bytes(folder)), table=None, max_refused=None)
    try:
        before = _read_episodes(folder)
        report = SendReport(total=spool.resumed, pending=spool.resumed)
        with ReplayClient(address, timeout_s=min(timeout_s, CALL_TIMEOUT_S)) as client:
            sender = EpisodeSender(client, spool, name=f"sending of {folder}", when_full="block")
            sizes = [0, *accumulate(episode.size_bytes for episode in before.waiting)]
            try:
                _wait_until_sent(sender, report, sizes, timeout_s=timeout_s, progress=progress or (lambda _: None))
            finally:
                with contextlib.suppress(UnacknowledgedError):  # the file has the reasons
                    sender.close(0)
                _update(report, sender, sizes)
    finally:
        spool.close()
    known = {episode.number for episode in (*before.refused, *before.damaged) if episode.reason != DAMAGED_ROW}
    after = _read_episodes(folder)
    for episode in (*after.refused, *after.damaged):
        if episode.number not in known:
            add_refusal(report.reasons, episode.number, episode.reason)
    return report


def check_free(folder: Path) -> None:
    """Checks that a folder has a spool that no process uses, and makes nothing in it.

    Raises:
        SpoolError: the folder is not a spool, or is in use.
    """
    require_spool(folder)
    if is_in_use(folder):
        process = read_number(folder / LOCK_NAME)
        raise SpoolError(
            f"{folder} is in use{f' by process {process}' if process else ''}: stop that program first. While it runs, it sends what waits "
            "by itself"
        )


def _disk_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob(f"{FILE_NAME}*"))


def _classify(connection: sqlite3.Connection, report: SpoolReport) -> None:
    """Sorts each episode of a file into a report, by its state."""
    for *row, checksum in connection.execute(f"SELECT {COLUMNS}, row_checksum FROM episodes ORDER BY id"):
        number, state = row[0], row[7]
        if row_checksum(*row) != checksum:
            report.damaged.append(SpooledEpisode(number, 0, 0, 0.0, DAMAGED_ROW))
            continue
        kind = {REFUSED: report.refused, DAMAGED: report.damaged}.get(state, report.waiting)
        kind.append(SpooledEpisode(number, row[4], row[5], row[6], row[8], _table_of(connection, number)))


def _table_of(connection: sqlite3.Connection, number: int) -> str:
    """Returns the table that an episode's message names; empty if the message is damaged."""
    start = f"SELECT substr(data, 1, {TABLE_BYTES}) FROM payloads WHERE number = ?"
    with contextlib.suppress(sqlite3.DatabaseError, UnicodeDecodeError, CodecError, TypeError):
        return read_table(connection.execute(start, (number * PARTS_PER_EPISODE,)).fetchone()[0])
    return ""


def _read_episodes(folder: Path) -> SpoolReport:
    report = SpoolReport(folder)
    with open_readonly(folder) as connection:
        if connection is not None:
            _classify(connection, report)
    return report


def _wait_until_sent(
    sender: EpisodeSender, report: SendReport, sizes: list[int], *, timeout_s: float, progress: Callable[[SendReport], None]
) -> None:
    """Waits until everything is answered, or an error lasts for ``timeout_s`` or will not pass."""
    answered, since = 0, time.monotonic()
    while True:
        done = sender.wait(PROGRESS_INTERVAL_S)
        _update(report, sender, sizes)
        progress(report)
        if done:
            return
        now = time.monotonic()
        if report.error is None or report.sent + report.refused != answered:
            answered, since = report.sent + report.refused, now
        elif not isinstance(report.error, _PASSING) or now - since >= timeout_s:
            return


def _update(report: SendReport, sender: EpisodeSender, sizes: list[int]) -> None:
    counters = sender.counters
    report.sent, report.steps = counters.acknowledged, counters.steps_acknowledged
    report.refused, report.pending = counters.refused, counters.pending
    # Episodes are answered in order.
    report.size_bytes = sizes[min(report.sent + report.refused, len(sizes) - 1)]
    report.error = sender.error if report.pending else None
