"""The durable half of the ledger: who has sent what, in the tables ``senders``, ``runs`` and ``keys``."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from pathlib import Path

from touchline_protos.codec import EpisodeKey
from touchline_protos.files.sqlite import row_checksum
from touchline_server.errors import DamagedStoreError
from touchline_server.store import dedup
from touchline_server.store.dedup import DedupLedger, runs_to_keep


class LedgerTables:
    """The statements on them, inside transactions of the caller's. For whoever holds the store's write lock.

    Args:
        connection: to the file.
        path: of the file, for messages.
        advice: what to do about damage, for messages.
    """

    def __init__(self, connection: sqlite3.Connection, path: Path, advice: str) -> None:
        self._connection = connection
        self._path = path
        self._advice = advice
        self._sizes: dict[str, int] | None = None
        """How many rows each table has; None where that has to be counted."""

    def load(self, keys: DedupLedger) -> None:
        """Has an empty ledger know what the tables know.

        Raises:
            DamagedStoreError: a row's checksum is wrong, or a row makes no sense beside the others.
        """
        names: dict[int, bytes] = {}
        for number, *values, checksum in self._connection.execute(
            "SELECT id, client_id, incarnation, forgotten_below, checksum FROM senders ORDER BY last_episode"
        ):
            if row_checksum(number, *values) != checksum:
                raise self._damaged("senders")
            client_id, incarnation, below = values
            names[number] = keys.restore(client_id, incarnation, forgotten_below=below)
        for sender, first, after, checksum in self._connection.execute("SELECT * FROM runs ORDER BY sender, first"):
            if sender not in names or row_checksum(sender, first, after) != checksum:
                raise self._damaged("runs")
            try:
                keys.restore_run(names[sender], first, after)
            except ValueError:
                raise self._damaged("runs") from None
        for episode_id, sender, sequence, digest, checksum in self._connection.execute("SELECT * FROM keys ORDER BY episode_id"):
            if sender not in names or row_checksum(episode_id, sender, sequence, digest) != checksum:
                raise self._damaged("keys")
            keys.restore_recent(names[sender], sequence, digest, episode_id)

    def remember(self, key: EpisodeKey, digest: int, episode_id: int) -> None:
        """Does to the tables what :meth:`touchline_server.store.dedup.DedupLedger.remember` does in memory, step by step."""
        sizes = self._counted()
        sender = self._sender(key, episode_id)
        self.insert_key(episode_id, sender, key.sequence, digest)
        sizes["keys"] += 1
        if sizes["keys"] > dedup.MAX_RECENT:
            self._delete("keys", "episode_id = (SELECT min(episode_id) FROM keys)")
        self._add_number(sender, key.sequence)
        if sizes["runs"] > dedup.MAX_ALL_RUNS:
            self._bound_runs()

    def forget(self, key: EpisodeKey, episode_id: int) -> None:
        """Undoes :meth:`remember`, but for what was forgotten for it."""
        execute = self._connection.execute
        self._delete("keys", "episode_id = ?", episode_id)
        found = execute(
            "SELECT sender, first, after FROM runs JOIN senders ON sender = id "
            "WHERE client_id = ? AND incarnation = ? AND first <= ? ORDER BY first DESC LIMIT 1",
            (key.client_id, key.incarnation, key.sequence),
        ).fetchone()
        if found is None or found[2] <= key.sequence:
            return
        sender, first, after = found
        self._delete("runs", "sender = ? AND first = ?", sender, first)
        for part in ((first, key.sequence), (key.sequence + 1, after)):
            if part[0] < part[1]:
                self._add_run(sender, *part)
        if first + 1 == after:
            self._delete(
                "senders", "id = ? AND forgotten_below = 0 AND id NOT IN (SELECT sender FROM runs WHERE sender = ?)", sender, sender
            )

    def rolled_back(self) -> None:
        """Is told that the transaction has ended without a change."""
        self._sizes = None

    def insert_sender(self, number: int, client_id: str, incarnation: int, *, forgotten_below: int, last_episode: int) -> None:
        """Writes a sender's row."""
        row = (number, client_id, incarnation, forgotten_below)
        self._connection.execute("INSERT INTO senders VALUES (?, ?, ?, ?, ?, ?)", (*row, last_episode, row_checksum(*row)))

    def insert_runs(self, sender: int, runs: Iterable[tuple[int, int]]) -> None:
        """Writes runs of a sender's numbers: [first, after) of each."""
        for row in ((sender, first, after) for first, after in runs):
            self._connection.execute("INSERT INTO runs VALUES (?, ?, ?, ?)", (*row, row_checksum(*row)))

    def insert_key(self, episode_id: int, sender: int, sequence: int, digest: int) -> None:
        """Writes what is known of an episode."""
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
        first, after = sequence, sequence + 1
        before = execute("SELECT first FROM runs WHERE sender = ? AND after = ?", (sender, first)).fetchone()
        behind = execute("SELECT after FROM runs WHERE sender = ? AND first = ?", (sender, after)).fetchone()
        if behind is not None:
            self._delete("runs", "sender = ? AND first = ?", sender, after)
            after = behind[0]
        if before is not None:
            first = before[0]
            row = (sender, first, after)
            execute("UPDATE runs SET after = ?, checksum = ? WHERE sender = ? AND first = ?", (after, row_checksum(*row), sender, first))
            return
        self._add_run(sender, first, after)
        if behind is None:
            (runs,) = execute("SELECT count(*) FROM runs WHERE sender = ?", (sender,)).fetchone()
            self._keep(sender, runs, dedup.MAX_RUNS)

    def _add_run(self, sender: int, first: int, after: int) -> None:
        self.insert_runs(sender, [(first, after)])
        self._counted()["runs"] += 1

    def _bound_runs(self) -> None:
        sizes = self._connection.execute(
            "SELECT id, size FROM senders JOIN (SELECT sender, count(*) AS size FROM runs GROUP BY sender) ON sender = id "
            "ORDER BY last_episode"
        ).fetchall()
        for (sender, runs), keep in zip(sizes, runs_to_keep([runs for _, runs in sizes]), strict=True):
            self._keep(sender, runs, keep)

    def _keep(self, sender: int, runs: int, keep: int) -> None:
        """Forgets the oldest of so many runs of a sender."""
        if runs <= keep:
            return
        execute = self._connection.execute
        (below,) = execute("SELECT first FROM runs WHERE sender = ? ORDER BY first LIMIT 1 OFFSET ?", (sender, runs - keep)).fetchone()
        self._delete("runs", "sender = ? AND first < ?", sender, below)
        name = execute("SELECT client_id, incarnation FROM senders WHERE id = ?", (sender,)).fetchone()
        execute("UPDATE senders SET forgotten_below = ?, checksum = ? WHERE id = ?", (below, row_checksum(sender, *name, below), sender))

    def _damaged(self, table: str) -> DamagedStoreError:
        return DamagedStoreError(f"{self._path}: a row of the table {table} is damaged; {self._advice}")
