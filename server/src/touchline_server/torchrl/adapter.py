"""A writer and a sampler that make the store a regular ``torchrl.data.ReplayBuffer``.

Batches for learners do not go this way: indexing a TensorDict costs several times the gather itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase
from torchrl.data import ReplayBuffer, SliceSampler
from torchrl.data.replay_buffers import Storage
from torchrl.data.replay_buffers.writers import RoundRobinWriter

from touchline_protos.codec import Episode
from touchline_protos.types.flatten import ColumnError, flatten_columns
from touchline_server.errors import InvalidArgumentError, InvalidEpisodeError, NotReadyError
from touchline_server.selectors.entries import FIRST_ROW, LENGTH
from touchline_server.store.columns import Columns
from touchline_server.store.pinned_draw import locate, pad_draw
from touchline_server.tables.table import Table
from touchline_server.torchrl.internals import adopt, exclude_writes, make_storage, note_written, release


class EpisodeRingWriter(RoundRobinWriter):  # type: ignore[misc]
    """Writes whole episodes into the ring and evicts whole ones, where TorchRL's round robin overwrites row by row.

    Everything goes through the store, so TorchRL also sees the episodes that are added elsewhere.
    """

    def __init__(self, table: Table) -> None:
        super().__init__()
        self._table = table
        self._store = table.store

    def register_storage(self, storage: Storage) -> None:
        """Attaches to the store's storage and catches up with what it holds."""
        super().register_storage(storage)
        with self._store.writes.lock:
            columns = self._store.columns
            if columns is not None:
                for entry in self._store.entries():
                    rows = np.arange(entry[FIRST_ROW], entry[FIRST_ROW] + entry[LENGTH])
                    self._follow(columns, np.remainder(rows, self._store.physical_rows))
            self._store.follow_writes(self._follow, self._forget)

    def add(self, data: Any) -> int:
        """Refused: the ring holds whole episodes.

        Raises:
            InvalidEpisodeError: always.
        """
        raise InvalidEpisodeError("add() stores a single step, the ring holds whole episodes; give all steps of an episode to extend()")

    def write_at(self, index: int | torch.Tensor, data: Any) -> int:
        """Refused: rows of stored episodes do not change.

        Raises:
            InvalidEpisodeError: always.
        """
        raise InvalidEpisodeError("write_at() would change stored episodes; give all steps of an episode to extend()")

    def extend(self, data: Any) -> torch.Tensor:
        """Stores whole episodes.

        Args:
            data: a TensorDict of shape [rows]: one episode, or several that an ``episode`` column distinguishes, which is not stored.

        Returns:
            The rows that they occupy, [rows] int64.

        Raises:
            InvalidEpisodeError: an episode is malformed; those before it are stored.
        """
        rows = []
        for columns in _split_episodes(data):
            episode = Episode(columns)
            first_row = self._table.add(episode).first_row
            rows.append(torch.arange(first_row, first_row + episode.length).remainder(self._store.physical_rows))
        return torch.cat(rows)

    def dumps(self, path: str | Path) -> None:
        """Refused: TorchRL's checkpoint does not hold the episode index.

        Raises:
            InvalidArgumentError: always.
        """
        raise InvalidArgumentError("TorchRL's checkpoint does not hold the episode index, so what it saves could not be sampled again")

    def loads(self, path: str | Path) -> None:
        """Refused, as :meth:`dumps`.

        Raises:
            InvalidArgumentError: always.
        """
        self.dumps(path)

    def _empty(self, empty_write_count: bool = True) -> None:
        self._table.clear()
        super()._empty(empty_write_count)

    def _forget(self) -> None:
        release(self._storage)
        super()._empty(empty_write_count=False)

    def _follow(self, columns: Columns, rows: np.ndarray) -> None:
        if not self._storage.initialized:
            adopt(self._storage, columns.tensors)
        self._cursor = int(rows[-1] + 1) % self._store.physical_rows
        self._write_count += len(rows)
        note_written(self._storage, rows)


class EpisodeSliceSampler(SliceSampler):  # type: ignore[misc]
    """Draws slices from the store's index, where TorchRL's ``SliceSampler`` derives borders from a column after each write."""

    def __init__(self, table: Table) -> None:
        super().__init__(slice_len=table.config.horizon + 1)
        self._store = table.store
        self._limiter = table.limiter
        self._law = table.config.sampling.law
        self._pad = table.config.sampling.pad == "end"
        self._random = table.seeds.stream()

    def sample(self, storage: Storage, batch_size: int) -> tuple[tuple[torch.Tensor, ...], dict[Any, Any]]:
        """Returns the rows of ``batch_size // slice_len`` slices, one slice after the other, and where each row came from.

        If the table pads slices, ``valid`` says which rows are real: those after the last real one repeat it.

        Args:
            storage: the storage of the store's columns.
            batch_size: number of rows, a multiple of the slice's length.

        Raises:
            NotReadyError: no episode is long enough, or the table's rate limit does not allow a batch now.
        """
        steps, slices = self._adjusted_batch_size(batch_size)
        random = self._random
        if self._rng is not None:
            random = np.random.default_rng(int(torch.randint(2**62, (), generator=self._rng)))
        if not self._limiter.reserve_batches(1, slices):
            raise NotReadyError(f"the rate limit holds batches back: {self._limiter.explain_batches()}")
        try:
            sample = self._draw(slices, steps, random)
        except BaseException:
            self._limiter.cancel_batches(1, slices)
            raise
        self._limiter.delivered(1, slices)
        return sample

    def _draw(self, slices: int, steps: int, random: np.random.Generator) -> tuple[tuple[torch.Tensor, ...], dict[Any, Any]]:
        with self._store.draw(slices, steps - 1, self._law, random, pad=self._pad) as pinned:
            pinned.columns.note_foreign_reads()
            pinned.columns.follow_writes()
            draw = pad_draw(pinned.draw, steps - 1) if self._pad else pinned.draw
            (drawn,) = locate(draw, pinned.columns, batches=1, horizon=steps - 1).rows
            rows = torch.from_numpy(np.ascontiguousarray(drawn.T).reshape(-1))
            truncated = torch.zeros(slices, steps, dtype=torch.bool)
            real = np.full(slices, steps) if draw.valid is None else 1 + draw.valid.sum(axis=0)[:, 0]
            truncated[torch.arange(slices), torch.from_numpy(real - 1)] = True
            info = {
                "episode": torch.from_numpy(draw.episode_id).repeat_interleave(steps),
                "probability": torch.from_numpy(draw.probability).repeat_interleave(steps),
                self.truncated_key: truncated.view(-1, 1),
            }
            if draw.valid is not None:
                info["valid"] = torch.from_numpy(np.arange(steps) < real[:, None]).view(-1, 1)
        return (rows.to(pinned.columns.device),), info

    def _sampleable_count(self, storage: Storage, batch_size: int) -> int:
        steps, _ = self._adjusted_batch_size(batch_size)
        return int(self._store.can_sample(1 if self._pad else steps - 1))


class EpisodeReplayBuffer(ReplayBuffer):  # type: ignore[misc]
    """TorchRL's buffer over the store.

    It holds the store's write lock while it samples, extends or empties: TorchRL gathers after its sampler has drawn, and without the
    lock the rows could be overwritten in between.
    """

    def __init__(self, table: Table, *, batch_size: int) -> None:
        store = table.store
        super().__init__(
            storage=make_storage(store.physical_rows),
            writer=EpisodeRingWriter(table),
            sampler=EpisodeSliceSampler(table),
            batch_size=batch_size,
        )
        self._episodes = store
        exclude_writes(self, store.writes.lock)

    def empty(self, empty_write_count: bool = True) -> None:
        """Evicts all episodes and forgets the schema, as ``clear`` does; also resets TorchRL's count of written rows unless told not to."""
        with self._episodes.writes.lock:
            super().empty(empty_write_count)


def make_torchrl_buffer(table: Table) -> ReplayBuffer:
    """Returns a TorchRL buffer over a table; its ``batch_size`` is in rows: slices x (horizon + 1)."""
    return EpisodeReplayBuffer(table, batch_size=table.config.batch_size * (table.config.horizon + 1))


def _split_episodes(data: TensorDictBase) -> Iterator[dict[str, np.ndarray]]:
    shape = tuple(getattr(data, "batch_size", (0,)))
    if len(shape) != 1:
        raise InvalidEpisodeError(
            f"extend() takes a TensorDict of shape [rows], found {list(shape)}; flatten it, with a column episode that numbers the rows"
        )
    try:
        columns = flatten_columns(data)
    except ColumnError as error:
        raise InvalidEpisodeError(f"extend() takes a TensorDict of shape [rows] ({error})") from None
    numbers = columns.pop("episode", None)
    if numbers is None:
        yield columns
        return
    if any(array.shape[:1] != (numbers.size,) for array in columns.values()):
        raise InvalidEpisodeError(f"episode: shape {numbers.shape}, expected one number a row of the other columns")
    if np.isnan(numbers).any():
        raise InvalidEpisodeError("episode: NaN, expected the number of an episode")
    borders = np.flatnonzero(np.diff(numbers.reshape(-1))) + 1
    for begin, end in zip([0, *borders], [*borders, numbers.size], strict=True):
        yield {name: array[begin:end] for name, array in columns.items()}
