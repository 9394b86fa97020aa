"""Reads stored episodes back: selects them and copies their rows, a piece at a time.

An episode is read in pieces of about 1 MiB. The rows of a piece are pinned while it is copied, so an add waits for at most one piece.
Before each piece the episode is looked up again, so an episode that was evicted between two pieces is left out, and rows of two
episodes are never mixed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from touchline_protos.codec import EpisodeSelection, StoredEpisode, TensorSpec
from touchline_server.errors import InvalidArgumentError, UnknownEpisodeError
from touchline_server.selectors.entries import ACTOR, ID, LENGTH
from touchline_server.store.episode_store import EpisodeStore
from touchline_server.store.index import IndexEntry
from touchline_server.store.schema import ColumnSpec, Schema

PIECE_BYTES = 1 << 20
"""Size of a piece, the unit of pinning and copying."""

MAX_EPISODE_IDS = 1_000_000
"""Maximum number of ids in a query."""

AHEAD = 64
"""Number of episodes that are located together."""

MAX_NAMED = 10
"""Number of missing ids that an error names."""


@dataclass(frozen=True, slots=True)
class EpisodeQuery:
    """A selection of episodes and of their columns.

    Raises:
        InvalidArgumentError: the fields exclude each other, or are out of range.
    """

    ids: Sequence[int] | None = None
    """Ids of the episodes, in any order; excludes the next four fields."""
    first: int | None = None
    """Lowest id, inclusive."""
    last: int | None = None
    """Highest id, inclusive."""
    actor: str | None = None
    """Name of the actor whose episodes are selected."""
    newest: int | None = None
    """Number of episodes: only the newest of the episodes that match."""
    columns: Sequence[str] | None = None
    """Names of columns; ``obs`` also stands for ``obs.*``. None or empty for all."""
    skip_missing: bool = False
    """Whether ids that are not stored are skipped instead of raising an error."""

    def __post_init__(self) -> None:
        others = {"first": self.first, "last": self.last, "actor": self.actor, "newest": self.newest}
        given = [name for name, value in others.items() if value is not None]
        if self.ids is not None and given:
            raise InvalidArgumentError(f"ids and {given[0]}: expected either ids, or any of {', '.join(others)}")
        if self.ids is not None and len(self.ids) > MAX_EPISODE_IDS:
            raise InvalidArgumentError(f"ids: {len(self.ids)}, expected at most {MAX_EPISODE_IDS} at a time")
        if self.skip_missing and self.ids is None:
            raise InvalidArgumentError("skip_missing without ids, expected it only with ids")
        if self.newest is not None and self.newest < 1:
            raise InvalidArgumentError(f"newest: {self.newest}, expected 1 or more")
        _check_id("first", self.first)
        _check_id("last", self.last)
        # There may be a million, and this is the event loop: check them one by one only if one is wrong.
        if self.ids and not (_is_id(min(self.ids)) and _is_id(max(self.ids))):
            for at, number in enumerate(self.ids):
                _check_id(f"ids[{at}]", number)


def _is_id(number: int) -> bool:
    return -(2**63) <= number < 2**63 - 1


def _check_id(name: str, number: int | None) -> None:
    if number is not None and not _is_id(number):
        raise InvalidArgumentError(f"{name}: {number}, expected a 64-bit integer below its largest")


class EpisodeReader:
    """Reads the episodes that were stored and matched a query at construction, in ascending order of ids. One thread at a time.

    Args:
        store: the store to read from.
        query: the selection of episodes.

    Raises:
        UnknownEpisodeError: an id is not stored, and the query does not skip it.
        InvalidArgumentError: the schema does not have a column of the query.
    """

    def __init__(self, store: EpisodeStore, query: EpisodeQuery) -> None:
        self._store = store
        self._actor = query.actor
        self._ahead: deque[IndexEntry] = deque()
        entries = store.entries()
        schema = store.schema
        self.columns: tuple[ColumnSpec, ...] = chosen_columns(schema, query.columns or ()) if schema is not None else ()
        """Selected columns, in the schema's order."""
        self._schema = schema
        self.row_bytes = sum(spec.row_bytes for spec in self.columns)
        """Size of a row of the selected columns."""
        chosen = entries[self._chosen(entries, query)]
        self._ids: deque[int] | None = deque(chosen[:, ID].tolist()) if query.ids is not None else None
        self.selection = (
            EpisodeSelection(int(chosen[0, ID]), int(chosen[-1, ID]), len(chosen), int(chosen[:, LENGTH].sum()), store.store_generation)
            if len(chosen)
            else EpisodeSelection(store_generation=store.store_generation)
        )
        """Summary of the selected episodes."""
        self._next = self.selection.first_episode_id

    def take(self, max_bytes: float, limit: int = AHEAD) -> list[IndexEntry]:
        """Returns the next episodes, up to ``limit`` and ``max_bytes``, but at least one; an empty list at the end."""
        taken: list[IndexEntry] = []
        while len(taken) < limit and (self._ahead or self._locate()):
            size_bytes = self._ahead[0].length * self.row_bytes
            if taken and size_bytes > max_bytes:
                break
            max_bytes -= size_bytes
            taken.append(self._ahead.popleft())
        return taken

    def copy(self, entry: IndexEntry, column: int, offset_bytes: int, out: np.ndarray) -> bool:
        """Copies a piece of a column's bytes.

        Args:
            entry: entry of the episode, from :meth:`take`.
            column: position in :attr:`columns`.
            offset_bytes: offset of the piece in the column's bytes.
            out: [size] uint8, filled with the piece.

        Returns:
            Whether the episode is still stored; if not, ``out`` is unchanged.
        """
        with self._store.hold([entry]) as (columns, held):
            if columns is None or not held:
                return False
            columns.copy_bytes(self.columns[column].name, entry.first_row, offset_bytes, out)
            return True

    def copy_whole(self, entries: Sequence[IndexEntry], outs: Sequence[Sequence[np.ndarray]]) -> bool:
        """Copies small episodes together.

        Args:
            entries: entries of the episodes, from :meth:`take`.
            outs: arrays [size] uint8 for each episode and each of :attr:`columns`, filled with its bytes.

        Returns:
            Whether all are still stored; if not, the arrays are unchanged.
        """
        with self._store.hold(entries) as (columns, held):
            if columns is None or len(held) < len(entries):
                return False
            for entry, arrays in zip(entries, outs, strict=True):
                for spec, out in zip(self.columns, arrays, strict=True):
                    columns.copy_bytes(spec.name, entry.first_row, 0, out)
            return True

    def still_stored(self, entries: Sequence[IndexEntry]) -> list[IndexEntry]:
        """Returns the entries that have not been evicted meanwhile."""
        return self._store.entries_of([entry.episode_id for entry in entries])

    def specs(self, entry: IndexEntry) -> list[TensorSpec]:
        """Returns name, dtype and shape [rows, ...] of an episode's selected columns."""
        return [TensorSpec(spec.name, spec.dtype, (entry.length, *spec.shape)) for spec in self.columns]

    def episodes(self) -> Iterator[StoredEpisode]:
        """Yields the episodes as fresh arrays; leaves out those evicted meanwhile."""
        while taken := self.take(0, limit=1):
            episode = self.read(taken[0])
            if episode is not None:
                yield episode

    def read(self, entry: IndexEntry) -> StoredEpisode | None:
        """Returns an episode as fresh arrays; None if it was evicted meanwhile."""
        arrays = {spec.name: np.empty(spec.shape, spec.dtype) for spec in self.specs(entry)}
        outs = [array.reshape(-1).view(np.uint8) for array in arrays.values()]
        if entry.length * self.row_bytes <= PIECE_BYTES:
            whole = self.copy_whole([entry], [outs])
        else:
            whole = all(
                self.copy(entry, column, offset, out[offset : offset + size])
                for column, out in enumerate(outs)
                for offset, size in pieces(out.size, PIECE_BYTES)
            )
        if not whole:
            return None
        return StoredEpisode(entry.episode_id, arrays, entry.origin.key, entry.origin.actor, entry.origin.policy_version, entry.length)

    def _locate(self) -> bool:
        """Locates more episodes; returns whether there are any."""
        if self._ids is not None:
            while self._ids and not self._ahead:
                ids = [self._ids.popleft() for _ in range(min(AHEAD, len(self._ids)))]
                self._ahead.extend(self._store.entries_of(ids))
        else:
            self._ahead.extend(self._store.entries_between(self._next, self.selection.last_episode_id, actor=self._actor, limit=AHEAD))
            if self._ahead:
                self._next = self._ahead[-1].episode_id + 1
        return bool(self._ahead)

    def _chosen(self, entries: np.ndarray, query: EpisodeQuery) -> np.ndarray:
        """Returns the selected entries: a mask [n] bool, or ascending positions."""
        ids = entries[:, ID]
        if query.ids is not None:
            wanted = np.unique(np.array(query.ids, dtype=np.int64))
            missing = wanted[~np.isin(wanted, ids)]
            if len(missing) and not query.skip_missing:
                named = ", ".join(str(number) for number in missing[:MAX_NAMED].tolist())
                more = f" and {len(missing) - MAX_NAMED} more" if len(missing) > MAX_NAMED else ""
                raise UnknownEpisodeError(f"ids: {named}{more} not stored, expected stored ones, or skip_missing to leave others out")
            return np.isin(ids, wanted)
        chosen = np.ones(len(ids), np.bool_)
        if query.first is not None:
            chosen &= ids >= query.first
        if query.last is not None:
            chosen &= ids <= query.last
        if query.actor is not None:
            number = self._store.actors.find(query.actor)
            chosen &= entries[:, ACTOR] == (-1 if number is None else number)
        return np.flatnonzero(chosen)[-query.newest :] if query.newest is not None else chosen


def chosen_columns(schema: Schema, names: Sequence[str]) -> tuple[ColumnSpec, ...]:
    """Returns the columns with these names or in groups with these names; all columns if ``names`` is empty.

    Raises:
        InvalidArgumentError: a name is neither a column nor a group.
    """
    if not names:
        return schema.columns
    wanted = set(names)
    for name in sorted(wanted):
        if not any(spec.name == name or spec.name.startswith(f"{name}.") for spec in schema.columns):
            raise InvalidArgumentError(f"columns: {name!r}, expected some of {', '.join(spec.name for spec in schema.columns)}")
    return tuple(spec for spec in schema.columns if any(spec.name == name or spec.name.startswith(f"{name}.") for name in wanted))


def pieces(size_bytes: int, piece_bytes: int) -> Iterator[tuple[int, int]]:
    """Yields offset and size of each piece of up to ``piece_bytes``."""
    for offset in range(0, size_bytes, piece_bytes):
        yield offset, min(piece_bytes, size_bytes - offset)
