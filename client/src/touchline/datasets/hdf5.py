"""HDF5 files of episodes: one group an episode. Read and written a dataset at a time; the layout is in docs/datasets.md."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from touchline.datasets.atomic_output import AtomicOutput
from touchline.datasets.chunks import check_chunks
from touchline.datasets.errors import DatasetError
from touchline.datasets.provenance import Provenance
from touchline.datasets.single_file import SingleFileSource
from touchline.datasets.size_limit import SizeCounter
from touchline.datasets.source import DatasetEpisode, escape, unescape
from touchline.installing import install_command
from touchline_protos.types.flatten import MAX_NESTING

try:
    import h5py
except ImportError as error:
    raise DatasetError(f"HDF5 files need h5py ({error}): {install_command('hdf5')}") from error

FORMAT = "hdf5"
EPISODES = "episodes"
"""Group of the episodes' groups."""
MAX_DIGITS = 100
"""Of a number in a name; a longer one is text."""


class Hdf5Source(SingleFileSource[Any]):
    """Episodes of one HDF5 file, in the natural order of their groups' names: ``episode_2`` is before ``episode_10``.

    Raises:
        DatasetError: it is none, or not laid out so.
    """

    format = FORMAT

    def __init__(self, path: Path) -> None:
        try:
            file = h5py.File(path, "r")
        except OSError as error:
            raise DatasetError(f"{path}: no HDF5 file, or a damaged one ({error})") from None
        group = file.get(EPISODES)
        if not isinstance(group, h5py.Group):
            found = ", ".join(list(file)[:5]) or "nothing"
            file.close()
            raise DatasetError(f"{path}: no group '{EPISODES}' with a group for each episode (found {found}); see docs/datasets.md")
        try:
            _check_own(file, EPISODES, group)
        except DatasetError as error:
            file.close()
            raise DatasetError(f"{path}: {error}") from None
        super().__init__(path, file, sorted(group, key=_natural))
        self._episodes = group
        self.row_convention = str(file.attrs.get("row_convention", "incoming"))

    def _read(self, position: int, name: str, tally: SizeCounter) -> DatasetEpisode:
        try:
            group = self._episodes[name]
            if not isinstance(group, h5py.Group):
                raise DatasetError("not a group")
            _check_own(self._file, name, group)
            provenance = Provenance.of_attributes(group.attrs)
            columns = dict(_columns(self._file, group, "", tally))
        except (DatasetError, OSError, RuntimeError, KeyError, ValueError, TypeError, MemoryError) as error:
            return DatasetEpisode(position, {}, error=DatasetError(f"{EPISODES}/{name}: cannot be read: {error}"))
        return DatasetEpisode(position, columns, provenance.key, provenance.actor, provenance.policy_version)


def _columns(file: Any, group: Any, prefix: str, tally: SizeCounter, depth: int = 0) -> Iterator[tuple[str, Any]]:
    if depth > MAX_NESTING:
        raise DatasetError(f"{prefix}: nested more than {MAX_NESTING} levels deep")
    for name in group:
        label = prefix + unescape(name)
        if "." in name and prefix.startswith("obs."):
            raise DatasetError(f"{label}: a dot in the name, which batches would give back as nested; expected a group for each level")
        # Other files are not the source: their content is not in its fingerprint, nor for whoever made it to choose.
        if isinstance(group.get(name, getlink=True), h5py.ExternalLink):
            raise DatasetError(f"{label}: a link to another file, which is not followed")
        value = group[name]
        _check_own(file, label, value)
        if isinstance(value, h5py.Dataset) and (value.external or value.is_virtual):
            raise DatasetError(f"{label}: its values are in another file, which is not read")
        if isinstance(value, h5py.Group):
            tally.visit(label)
            yield from _columns(file, value, f"{label}.", tally, depth + 1)
        elif isinstance(value, h5py.Dataset):
            if announced(label, value, tally):
                yield label, value[()]
        else:
            raise DatasetError(f"{label}: {type(value).__name__}, expected a dataset")


def announced(name: str, dataset: Any, tally: SizeCounter) -> bool:
    """Counts a dataset before it is read, and returns whether it is wanted.

    Args:
        name: of its column.
        dataset: an ``h5py.Dataset``.
        tally: of its episode.

    Raises:
        DatasetError: it is too large, or would take too much memory to read.
    """
    if dataset.shape is None:
        raise DatasetError(f"{name}: no values, expected [rows, ...]")
    if not tally.take(name, tuple(map(int, dataset.shape)), dataset.dtype):
        return False
    check_chunks(name, dataset, tally.max_bytes)
    return True


def _check_own(file: Any, name: str, value: Any) -> None:
    """Raises DatasetError where a value is another file's: a link of its own, or one that leads through another, can name one."""
    if h5py.h5o.get_info(value.id).fileno != h5py.h5o.get_info(file.id).fileno:
        raise DatasetError(f"{name}: in another file, which is not read")


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Returns a sort key by which numbers in a name count as numbers."""
    return [
        (0, int(part), "") if part.isdecimal() and len(part) <= MAX_DIGITS else (1, 0, part) for part in re.split(r"(\d+)", name) if part
    ] + [(2, 0, name)]


class Hdf5Target:
    """One HDF5 file of episodes, under their ids.

    Args:
        path: of the file.
        row_convention: of the rows.
        force: replace a file that is there.
        compress: gzip the columns, their bytes shuffled before.

    Raises:
        DatasetError: it cannot be written there.
    """

    def __init__(self, path: Path, row_convention: str, *, force: bool, compress: bool) -> None:
        self._placement = AtomicOutput(path, force=force)
        self._compress = compress
        self._file = h5py.File(self._placement.partial, "w")
        self._file.attrs.update({"version": 1, "row_convention": row_convention})
        self._episodes = self._file.create_group(EPISODES)

    def add(self, columns: Mapping[str, np.ndarray], provenance: Provenance) -> None:
        # Groups that remember the order of what is put into them: it is the columns'.
        group = self._episodes.create_group(str(provenance.id), track_order=True)
        group.attrs.update(provenance.attributes())
        for name, column in columns.items():
            *groups, leaf = (escape(part) for part in name.split("."))
            parent = group
            for part in groups:
                parent = parent[part] if part in parent else parent.create_group(part, track_order=True)
            smaller = {"compression": "gzip", "shuffle": True} if self._compress and column.size else {}
            parent.create_dataset(leaf, data=column, **smaller)

    def finish(self) -> None:
        self._file.close()
        self._placement.commit()

    def discard(self) -> None:
        self._file.close()
        self._placement.discard()
