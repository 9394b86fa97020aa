"""The episode browser: lists of stored episodes, their columns for plots, and their images. Every method runs on a reader thread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from touchline_protos.types.dtypes import BFLOAT16, dtype_name
from touchline_server.errors import InvalidArgumentError, TooLargeError, UnknownEpisodeError
from touchline_server.http.images import encode_png, is_image, newest_frame, thin_out
from touchline_server.store.episode_store import EpisodeStore
from touchline_server.store.index import IndexEntry
from touchline_server.store.reader import PIECE_BYTES, pieces
from touchline_server.store.schema import ColumnSpec
from touchline_server.tables.registry import TableRegistry

MAX_EPISODES = 100
"""Most episodes of one list."""

MAX_POINTS = 1_000
"""Points of a plot; a longer episode is shown by the extremes of equal stretches."""

MAX_DIMS = 8
"""Dimensions of a column in one answer."""

MAX_WHOLE_BYTES = 8 << 20
"""Size of the largest column that is read as a whole; of a larger one only some rows are read."""

MAX_IMAGE_BYTES = 16 << 20
"""Size of the largest row that is shown as an image."""

MAX_SIDE = 1_024
"""Most pixels of a side of a picture."""


class EpisodeBrowser:
    """Reads stored episodes for the page. Thread-safe.

    Args:
        tables: tables of the server.
    """

    def __init__(self, tables: TableRegistry) -> None:
        self._tables = tables

    def newest(self, table: str, *, below: int | None, actor: str | None, limit: int) -> dict[str, Any]:
        """Returns the newest episodes, newest first.

        Args:
            table: name of the table.
            below: only episodes with smaller ids; None: all.
            actor: only episodes of this actor; None: of every one.
            limit: most episodes.
        """
        if not 1 <= limit <= MAX_EPISODES:
            raise InvalidArgumentError(f"limit: {limit}, expected 1 to {MAX_EPISODES}")
        store = self._tables.get(table).store
        entries = store.newest(limit, below_id=below, actor=actor)
        row_bytes = store.schema.row_bytes if store.schema is not None else 0
        listed = [_summary(store, entry, row_bytes) for entry in entries]
        return {"table": table, "episodes": listed, "more": len(entries) == limit}

    def show(self, table: str, episode_id: int, *, columns: Sequence[str], first_dim: int) -> dict[str, Any]:
        """Returns an episode: its summary, and its columns for plots.

        Args:
            table: name of the table.
            episode_id: id of the episode.
            columns: names of the columns; empty: all.
            first_dim: first dimension to return of each column, for those with more than 8.
        """
        store, entry, specs = self._find(table, episode_id)
        unknown = set(columns) - {spec.name for spec in specs}
        if unknown:
            raise InvalidArgumentError(f"column: {min(unknown)!r}, expected one of {', '.join(spec.name for spec in specs)}")
        if first_dim < 0:
            raise InvalidArgumentError(f"first_dim: {first_dim}, expected 0 or more")
        summary = _summary(store, entry, sum(spec.row_bytes for spec in specs))
        shown = [_column(store, entry, spec, first_dim) for spec in specs if not columns or spec.name in columns]
        undefined_row = 0 if store.incoming else entry.length - 1
        return {"table": table, **summary, "undefined_row": undefined_row, "columns": shown}

    def frame(self, table: str, episode_id: int, *, column: str, row: int, max_side: int) -> bytes:
        """Returns a row of an image column as a PNG: of a stack of frames, the newest.

        Args:
            table: name of the table.
            episode_id: id of the episode.
            column: name of the column.
            row: row of the episode.
            max_side: most pixels of a side; further ones are left out.
        """
        store, entry, specs = self._find(table, episode_id)
        spec = next((spec for spec in specs if spec.name == column), None)
        if spec is None or not is_image(spec.dtype, spec.shape):
            images = [spec.name for spec in specs if is_image(spec.dtype, spec.shape)]
            raise InvalidArgumentError(f"column: {column!r}, expected an image column: {', '.join(images) or 'there is none'}")
        if not 0 <= row < entry.length or not 1 <= max_side <= MAX_SIDE:
            raise InvalidArgumentError(f"row: {row}, side: {max_side}; expected 0 to {entry.length - 1}, and 1 to {MAX_SIDE}")
        if spec.row_bytes > MAX_IMAGE_BYTES:
            raise TooLargeError(f"column: a row of {column} has {spec.row_bytes} bytes, expected at most {MAX_IMAGE_BYTES} to show it")
        (pixels,) = _read_rows(store, entry, spec, [row])
        return encode_png(thin_out(newest_frame(pixels), max_side))

    def _find(self, table: str, episode_id: int) -> tuple[EpisodeStore, IndexEntry, tuple[ColumnSpec, ...]]:
        store = self._tables.get(table).store
        entries, schema = store.entries_of([episode_id]), store.schema
        if not entries or schema is None:
            raise UnknownEpisodeError(f"episode {episode_id} is not stored; it was evicted, or never added")
        return store, entries[0], schema.columns


def _summary(store: EpisodeStore, entry: IndexEntry, row_bytes: int) -> dict[str, Any]:
    return {
        "episode_id": entry.episode_id,
        "actor": entry.origin.actor,
        "policy_version": entry.origin.policy_version,
        "rows": entry.length,
        "bytes": entry.length * row_bytes,
        "reward_sum": _reward_sum(store, entry),
    }


def _reward_sum(store: EpisodeStore, entry: IndexEntry) -> float | None:
    """Returns the sum of the rewards that are defined; None if it is not finite, or the episode was evicted meanwhile."""
    spec = next((spec for spec in store.schema.columns if spec.name == "reward"), None) if store.schema is not None else None
    if spec is None:
        return None
    try:
        rewards = _as_numbers(_read_rows(store, entry, spec, range(entry.length)))
    except UnknownEpisodeError:
        return None
    total = float((rewards[1:] if store.incoming else rewards[:-1]).sum())
    return total if np.isfinite(total) else None


def _column(store: EpisodeStore, entry: IndexEntry, spec: ColumnSpec, first_dim: int) -> dict[str, Any]:
    """Returns a column for the page: what it is, and unless it is an image up to ``MAX_DIMS`` dimensions as points of a plot."""
    shown = {"name": spec.name, "dtype": dtype_name(spec.dtype), "shape": list(spec.shape)}
    if is_image(spec.dtype, spec.shape):
        return shown | {"kind": "image"}
    dims = int(np.prod(spec.shape, dtype=np.int64))
    if not dims or not entry.length:
        return shown | {"kind": "empty"}
    first = min(first_dim, dims - 1)
    whole = entry.length * spec.row_bytes <= MAX_WHOLE_BYTES
    rows = np.arange(entry.length) if whole else np.unique(np.linspace(0, entry.length - 1, MAX_POINTS).astype(np.int64))
    values = _as_numbers(_read_rows(store, entry, spec, rows.tolist())).reshape(len(rows), dims)[:, first : first + MAX_DIMS]
    rows, values = _extremes(rows, values)
    points = [[float(value) if np.isfinite(value) else None for value in column] for column in values.T]
    return shown | {"kind": "plot", "dims": dims, "first_dim": first, "rows": rows.tolist(), "values": points}


def _extremes(rows: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns at most ``MAX_POINTS`` points, [n] and [n, D]: of each stretch of rows its minimum and its maximum, so no spike is lost."""
    if len(rows) <= MAX_POINTS:
        return rows, values
    borders = np.unique(np.linspace(0, len(rows), MAX_POINTS // 2 + 1).astype(np.int64))[:-1]
    low, high = np.fmin.reduceat(values, borders, axis=0), np.fmax.reduceat(values, borders, axis=0)
    middles = (borders + np.append(borders[1:], len(rows))) // 2
    found = np.stack((low, high), axis=1).reshape(-1, values.shape[1])
    return rows[np.stack((borders, middles), axis=1).reshape(-1)], found


def _as_numbers(values: np.ndarray) -> np.ndarray:
    """Returns a column's values as float64."""
    if values.dtype == BFLOAT16:
        return (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return values.astype(np.float64)


def _read_rows(store: EpisodeStore, entry: IndexEntry, spec: ColumnSpec, rows: Sequence[int]) -> np.ndarray:
    """Returns rows of an episode's column, [len(rows), *shape], in ascending order; a piece of about 1 MiB is pinned at a time.

    Raises:
        UnknownEpisodeError: the episode was evicted meanwhile.
    """
    out = np.empty((len(rows), *spec.shape), spec.dtype)
    size = spec.row_bytes
    flat = out.reshape(-1).view(np.uint8)
    consecutive = isinstance(rows, range) or len(rows) == rows[-1] - rows[0] + 1
    copies = (
        [(rows[0] * size + offset, offset, length) for offset, length in pieces(len(rows) * size, PIECE_BYTES)]
        if consecutive
        else [(row * size, at * size, size) for at, row in enumerate(rows)]
    )
    for source, target, length in copies:
        with store.hold([entry]) as (columns, held):
            if columns is None or not held:
                raise UnknownEpisodeError(f"episode {entry.episode_id} was evicted while it was read")
            columns.copy_bytes(spec.name, entry.first_row, source, flat[target : target + length])
    return out
