"""The durable half of the deduplication ledger: the tables ``senders``, ``runs`` and ``keys``.

A row of ``runs`` is an interval of sequence numbers; its columns ``first`` and ``after`` are the start and the stop.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from pathlib import Path

from touchline_protos.codec import EpisodeKey
from touchline_protos.files.sqlite import row_checksum
from touchline_server.errors import DamagedStoreError
from touchline_server.store import dedup
from touchline_server.store.dedup import DedupLedger, intervals_to_keep


class LedgerTables:
    """The statements on these tables, inside the caller's transactions. For the holder of the write lock.

    Args:
        connection: connection to the file.
        path: path of the file, for messages.
        advice: what to do about damage, for messages.
    """

    def __init__(self, connection: sqlite3.Connection, path: Path, advice: str) -> None:
        self._connection = connection
        self._path = path
        self._advice = advice
        self._sizes: dict[str, int] | None = None
        """Number of rows of each table; None if they have to be counted."""

    def load(self, keys: DedupLedger) -> None:
        """Restores an empty ledger from the tables.

        Raises:
            DamagedStoreError: a row's checksum is wrong, or a row contradicts another.
        """
        names: dict[int, bytes] = {}
        for number, *values, checksum in self._connection.execute(
            "SELECT id, client_id, incarnation, forgotten_below, checksum FROM senders ORDER BY last_episode"
        ):
            if row_checksum(number, *values) != checksum:
                raise self._damaged("senders")
            client_id, incarnation, below = values
            names[number] = keys.restore(client_id, incarnation, forgotten_below=below)
        for sender, start, stop, checksum in self._connection.execute("SELECT * FROM runs ORDER BY sender, first"):
            if sender not in names or row_checksum(sender, start, stop) != checksum:
                raise self._damaged("runs")
            try:
                keys.restore_interval(names[sender], start, stop)
            except ValueError:
                raise self._damaged("runs") from None
        for episode_id, sender, sequence, digest, checksum in self._connection.execute("SELECT * FROM keys ORDER BY episode_id"):
            if sender not in names or row_checksum(episode_id, sender, sequence, digest) != checksum:
                raise self._damaged("keys")
            keys.restore_recent(names[sender], sequence, digest, episode_id)

    def remember(self, key: EpisodeKey, digest: int, episode_id: int) -> None:
        """Does to the tables, step by step, what :meth:`touchline_server.store.dedup.DedupLedger.remember` does in memory."""
        sizes = self._counted()
        sender = self._sender(key, episode_id)
        self.insert_key(episode_id, sender, key.sequence, digest)
        sizes["keys"] += 1
        if sizes["keys"] > dedup.MAX_RECENT:
            self._delete("keys", "episode_id = (SELECT min(episode_id) FROM keys)")
        self._add_number(sender, key.sequence)
        if sizes["runs"] > dedup.MAX_ALL_INTERVALS:
            self._bound_intervals()

    def forget(self, key: EpisodeKey, episode_id: int) -> None:
        """Undoes :meth:`remember`, except for what was forgotten meanwhile and the order of the senders."""
        execute = self._connection.execute
        self._delete("keys", "episode_id = ?", episode_id)
        found = execute(
            "SELECT sender, first, after FROM runs JOIN senders ON sender = id "
            "WHERE client_id = ? AND incarnation = ? AND first <= ? ORDER BY first DESC LIMIT 1",
            (key.client_id, key.incarnation, key.sequence),
        ).fetchone()
        if found is None or found[2] <= key.sequence:
            return
        sender, start, stop = found
        self._delete("runs", "sender = ? AND first = ?", sender, start)
        for rest_start, rest_stop in ((start, key.sequence), (key.sequence + 1, stop)):
            if rest_start < rest_stop:
                self._add_interval(sender, rest_start, rest_stop)
        if start + 1 == stop:
            self._delete(
                "senders", "id = ? AND forgotten_below = 0 AND id NOT IN (SELECT sender FROM runs WHERE sender = ?)", sender, sender
            )

    def rolled_back(self) -> None:
        """Resets what is known of the tables' sizes, because the transaction was rolled back."""
        self._sizes = None

    def insert_sender(self, number: int, client_id: str, incarnation: int, *, forgotten_below: int, last_episode: int) -> None:
        """Writes a sender's row."""
        row = (number, client_id, incarnation, forgotten_below)
        self._connection.execute("INSERT INTO senders VALUES (?, ?, ?, ?, ?, ?)", (*row, last_episode, row_checksum(*row)))

    def insert_intervals(self, sender: int, intervals: Iterable[tuple[int, int]]) -> None:
        """Writes intervals of a sender's numbers: start and stop of each."""
        for row in ((sender, start, stop) for start, stop in intervals):
            self._connection.execute("INSERT INTO runs VALUES (?, ?, ?, ?)", (*row, row_checksum(*row)))

    def insert_key(self, episode_id: int, sender: int, sequence: int, digest: int) -> None:
        """Writes a recent episode's row."""
        row = (episode_id, sender, sequence, digest)
        self._connection.execute("INSERT INTO keys VALUES (?, ?, ?, ?, ?)", (*row, row_checksum(*row)))

    def _counted(self) -> dict[str, int]:
        if self._sizes is None:
            self._sizes = {
                table: self._connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in ("senders", "runs", "keys")
            }
        return self._sizes

    def _delete(self, table: str, which: str, *values: object) -> None:
        self._counted()[table] -= self._connection.execute(f"DELETE FROM {table} WHERE {which}", values).rowcount

    def _sender(self, key: EpisodeKey, episode_id: int) -> int:
        execute = self._connection.execute
        name = (key.client_id, key.incarnation)
        found = execute("SELECT id FROM senders WHERE client_id = ? AND incarnation = ?", name).fetchone()
        if found is not None:
            execute("UPDATE senders SET last_episode = ? WHERE id = ?", (episode_id, found[0]))
            return int(found[0])
        (number,) = execute("SELECT ifnull(max(id), 0) + 1 FROM senders").fetchone()
        self.insert_sender(number, *name, forgotten_below=0, last_episode=episode_id)
        sizes = self._counted()
        sizes["senders"] += 1
        while sizes["senders"] > dedup.MAX_SENDERS:
            oldest, last_episode = execute("SELECT id, last_episode FROM senders ORDER BY last_episode LIMIT 1").fetchone()
            self._delete("keys", "episode_id <= ? AND sender = ?", last_episode, oldest)
            self._delete("runs", "sender = ?", oldest)
            self._delete("senders", "id = ?", oldest)
        return int(number)

    def _add_number(self, sender: int, sequence: int) -> None:
        execute = self._connection.execute
        start, stop = sequence, sequence + 1
        below = execute("SELECT first FROM runs WHERE sender = ? AND after = ?", (sender, start)).fetchone()
        above = execute("SELECT after FROM runs WHERE sender = ? AND first = ?", (sender, stop)).fetchone()
        if above is not None:
            self._delete("runs", "sender = ? AND first = ?", sender, stop)
            stop = above[0]
        if below is not None:
            start = below[0]
            checksum = row_checksum(sender, start, stop)
            execute("UPDATE runs SET after = ?, checksum = ? WHERE sender = ? AND first = ?", (stop, checksum, sender, start))
            return
        self._add_interval(sender, start, stop)
        if above is None:
            (intervals,) = execute("SELECT count(*) FROM runs WHERE sender = ?", (sender,)).fetchone()
            self._keep(sender, intervals, dedup.MAX_INTERVALS)

    def _add_interval(self, sender: int, start: int, stop: int) -> None:
        self.insert_intervals(sender, [(start, stop)])
        self._counted()["runs"] += 1

    def _bound_intervals(self) -> None:
        sizes = self._connection.execute(
            "SELECT id, size FROM senders JOIN (SELECT sender, count(*) AS size FROM runs GROUP BY sender) ON sender = id "
            "ORDER BY last_episode"
        ).fetchall()
        for (sender, intervals), keep in zip(sizes, intervals_to_keep([intervals for _, intervals in sizes]), strict=True):
            self._keep(sender, intervals, keep)

    def _keep(self, sender: int, intervals: int, keep: int) -> None:
        """Drops all but the newest ``keep`` of a sender's intervals."""
        if intervals <= keep:
            return
        execute = self._connection.execute
        (below,) = execute("SELECT first FROM runs WHERE sender = ? ORDER BY first LIMIT 1 OFFSET ?", (sender, intervals - keep)).fetchone()
        self._delete("runs", "sender = ? AND first < ?", sender, below)
        name = execute("SELECT client_id, incarnation FROM senders WHERE id = ?", (sender,)).fetchone()
        execute("UPDATE senders SET forgotten_below = ?, checksum = ? WHERE id = ?", (below, row_checksum(sender, *name, below), sender))

    def _damaged(self, table: str) -> DamagedStoreError:
        return DamagedStoreError(f"{self._path}: a row of the table {table} is damaged; {self._advice}")
