"""Episodes that are stored together: their rows stand one behind the other, so each column is written with one copy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from touchline_protos.codec import Episode, EpisodeKey
from touchline_protos.types.episode_batch import to_host
from touchline_server.store.inserts import AddRequest

if TYPE_CHECKING:
    import torch


class Origin(NamedTuple):
    """What an episode carries besides its columns."""

    actor: str
    policy_version: int
    key: EpisodeKey | None


@dataclass(frozen=True, eq=False, slots=True)
class EpisodeBlock:
    """Episodes and their rows. None has a key, so each of them is stored."""

    columns: Mapping[str, Any]
    """Column by dotted name, [rows, ...]: arrays or, on a device, tensors."""
    requests: Sequence[AddRequest]
    """A request for each episode, in the order of their rows. On a device, their columns have only dtypes, shapes and first rows."""
    device: torch.device | None = None
    """The tensors' device; None for arrays."""

    @property
    def rows(self) -> int:
        """Number of rows of all episodes."""
        return sum(request.episode.length for request in self.requests)

    def parts(self, max_rows: int) -> Iterator[EpisodeBlock]:
        """Yields the block in parts of at most this many rows each, and at least an episode."""
        begin, first, rows = 0, 0, 0
        for number, request in enumerate(self.requests):
            length = request.episode.length
            if rows and rows + length > max_rows:
                yield self._part(begin, rows, self.requests[first:number])
                begin, first, rows = begin + rows, number, 0
            rows += length
        yield self._part(begin, rows, self.requests[first:]) if first else self

    def in_host_memory(self) -> EpisodeBlock:
        """Returns the block with arrays. The requests stay as they are."""
        return self if self.device is None else replace(self, columns=to_host(self.columns), device=None)

    def _part(self, begin: int, rows: int, requests: Sequence[AddRequest]) -> EpisodeBlock:
        return EpisodeBlock({name: column[begin : begin + rows] for name, column in self.columns.items()}, requests, self.device)


def host_block(columns: Mapping[str, np.ndarray], lengths: Sequence[int], origins: Sequence[Origin]) -> EpisodeBlock:
    """Returns a block of episodes in host memory.

    Args:
        columns: [episodes, T, ...] by dotted name, checked to fit each other. Shared if no row is left out.
        lengths: rows of each episode, the first of its T.
        origins: what else each episode carries.
    """
    keep = kept_rows(lengths, next(iter(columns.values())).shape[1])
    packed = {name: _flat(column) if keep is None else _flat(column)[keep] for name, column in columns.items()}
    requests, begin = [], 0
    for length, origin in zip(lengths, origins, strict=True):
        episode = {name: column[begin : begin + length] for name, column in packed.items()}
        requests.append(AddRequest(Episode(episode, key=origin.key, actor=origin.actor, policy_version=origin.policy_version), 0))
        begin += length
    return EpisodeBlock(packed, requests)


def kept_rows(lengths: Sequence[int], rows: int) -> np.ndarray | None:
    """Returns the flat rows, [n] int64 of [episodes * rows], that belong to the episodes; None if all do."""
    if min(lengths) == rows:
        return None
    return np.flatnonzero(np.arange(rows) < np.asarray(lengths)[:, None])


def _flat(column: np.ndarray) -> np.ndarray:
    return column.reshape(column.shape[0] * column.shape[1], *column.shape[2:])
