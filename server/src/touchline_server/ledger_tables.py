"""The durable half of the ledger: who has sent what, in the tables ``senders``, ``runs`` and ``keys``."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from touchline_protos.codec import EpisodeKey
from touchline_protos.tables import row_checksum
from touchline_server.errors import DamagedStoreError
from touchline_server.ledger import MAX_GAPS, MAX_RECENT, MAX_SENDERS
from touchline_server.records import SenderState


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
        self._keys_since_pruned: dict[int, int] = {}

    def senders(self) -> list[SenderState]:
        """Returns what the ledger knows, the sender that stored longest ago first.

        Raises:
            DamagedStoreError: a row's checksum is wrong.
        """
        states: dict[int, SenderState] = {}
        for number, *values, checksum in self._connection.execute(
            "SELECT id, client_id, incarnation, forgotten_below, checksum FROM senders ORDER BY last_episode"
        ):
            if row_checksum(number, *values) != checksum:
                raise DamagedStoreError(f"{self._path}: a row of the table senders is damaged; {self._advice}")
            states[number] = SenderState(*values)
        for sender, first, after, checksum in self._connection.execute("SELECT * FROM runs ORDER BY sender, first"):
            if sender not in states or row_checksum(sender, first, after) != checksum:
                raise DamagedStoreError(f"{self._path}: a row of the table runs is damaged; {self._advice}")
            states[sender].runs.append((first, after))
        for sender, episode_id, sequence, digest, checksum in self._connection.execute("SELECT * FROM keys ORDER BY sender, episode_id"):
            if sender not in states or row_checksum(sender, episode_id, sequence, digest) != checksum:
                raise DamagedStoreError(f"{self._path}: a row of the table keys is damaged; {self._advice}")
            states[sender].recent.append((sequence, digest, episode_id))
        return list(states.values())

    def insert(self, number: int, state: SenderState, last_episode: int) -> None:
        """Writes a sender's whole state."""
        row = (number, state.client_id, state.incarnation, state.forgotten_below)
        self._connection.execute("INSERT INTO senders VALUES (?, ?, ?, ?, ?, ?)", (*row, last_episode, row_checksum(*row)))
        for first, after in state.runs:
            self._insert_run(number, first, after)
        for sequence, digest, episode_id in state.recent:
            self._insert_key(number, episode_id, sequence, digest)

    def remember(self, key: EpisodeKey, digest: int, episode_id: int) -> None:
        """Does to the tables what :meth:`touchline_server.ledger.KeyLedger.remember` does in memory."""
        execute = self._connection.execute
        sender = self._sender(key, episode_id)
        self._insert_key(sender, episode_id, key.sequence, digest)
        self._keys_since_pruned[sender] = self._keys_since_pruned.get(sender, MAX_RECENT) + 1
        if self._keys_since_pruned[sender] > MAX_RECENT:
            self._keys_since_pruned[sender] = 0
            execute(
                "DELETE FROM keys WHERE sender = ?1 AND episode_id <= "
                "(SELECT episode_id FROM keys WHERE sender = ?1 ORDER BY episode_id DESC LIMIT 1 OFFSET ?2)",
                (sender, MAX_RECENT),
            )
        first, after = key.sequence, key.sequence + 1
        before = execute("SELECT first FROM runs WHERE sender = ? AND after = ?", (sender, first)).fetchone()
        behind = execute("SELECT after FROM runs WHERE sender = ? AND first = ?", (sender, after)).fetchone()
        if behind is not None:
            execute("DELETE FROM runs WHERE sender = ? AND first = ?", (sender, after))
            after = behind[0]
        if before is not None:
            first = before[0]
        self._insert_run(sender, first, after)
        if before is None and behind is None:
            self._bound_gaps(sender)

    def forget(self, key: EpisodeKey, episode_id: int) -> None:
        """Undoes :meth:`remember`, but for numbers that it made room among."""
        execute = self._connection.execute
        name = (key.client_id, key.incarnation)
        found = execute("SELECT id FROM senders WHERE client_id = ? AND incarnation = ?", name).fetchone()
        if found is None:
            return
        execute("DELETE FROM keys WHERE sender = ? AND episode_id = ?", (found[0], episode_id))
        run = execute(
            "SELECT first, after FROM runs WHERE sender = ? AND first <= ? ORDER BY first DESC LIMIT 1", (found[0], key.sequence)
        ).fetchone()
        if run is None or run[1] <= key.sequence:
            return
        execute("DELETE FROM runs WHERE sender = ? AND first = ?", (found[0], run[0]))
        for first, after in ((run[0], key.sequence), (key.sequence + 1, run[1])):
            if first < after:
                self._insert_run(found[0], first, after)

    def _sender(self, key: EpisodeKey, episode_id: int) -> int:
        execute = self._connection.execute
        name = (key.client_id, key.incarnation)
        found = execute("SELECT id FROM senders WHERE client_id = ? AND incarnation = ?", name).fetchone()
        if found is not None:
            execute("UPDATE senders SET last_episode = ? WHERE id = ?", (episode_id, found[0]))
            return int(found[0])
        if execute("SELECT count(*) FROM senders").fetchone()[0] >= MAX_SENDERS:
            oldest = execute("SELECT id FROM senders ORDER BY last_episode LIMIT 1").fetchone()
            for place in ("runs WHERE sender", "keys WHERE sender", "senders WHERE id"):
                execute(f"DELETE FROM {place} = ?", oldest)
            self._keys_since_pruned.pop(oldest[0], None)
        number = execute("SELECT ifnull(max(id), 0) + 1 FROM senders").fetchone()[0]
        self.insert(number, SenderState(*name, 0), episode_id)
        return int(number)

    def _insert_run(self, sender: int, first: int, after: int) -> None:
        row = (sender, first, after)
        self._connection.execute("INSERT OR REPLACE INTO runs VALUES (?, ?, ?, ?)", (*row, row_checksum(*row)))

    def _insert_key(self, sender: int, episode_id: int, sequence: int, digest: int) -> None:
        row = (sender, episode_id, sequence, digest)
        self._connection.execute("INSERT INTO keys VALUES (?, ?, ?, ?, ?)", (*row, row_checksum(*row)))

    def _bound_gaps(self, sender: int) -> None:
        execute = self._connection.execute
        (runs,) = execute("SELECT count(*) FROM runs WHERE sender = ?", (sender,)).fetchone()
        if runs <= MAX_GAPS:
            return
        (first, _), (second, after) = execute("SELECT first, after FROM runs WHERE sender = ? ORDER BY first LIMIT 2", (sender,)).fetchall()
        execute("DELETE FROM runs WHERE sender = ? AND first IN (?, ?)", (sender, first, second))
        self._insert_run(sender, first, after)
        name = execute("SELECT client_id, incarnation FROM senders WHERE id = ?", (sender,)).fetchone()
        execute("UPDATE senders SET forgotten_below = ?, checksum = ? WHERE id = ?", (second, row_checksum(sender, *name, second), sender))
