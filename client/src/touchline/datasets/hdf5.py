"""HDF5 files of episodes, one group per episode. Read and written one HDF5 dataset at a time; the layout is in docs/datasets.md."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from touchline.datasets.atomic_output import AtomicOutput
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
"""Name of the group that holds the episodes' groups."""
MAX_DIGITS = 100
"""Maximum length of a number in a name; a longer one is sorted as text, because int() takes quadratic time."""


class Hdf5Source(SingleFileSource[Any]):
    """The episodes of one HDF5 file, in natural order of their names: ``episode_2`` comes before ``episode_10``. Not thread-safe.

    Args:
        path: path of the file.

    Raises:
        DatasetError: it is not an HDF5 file, or has another layout.
    """

    format = FORMAT

    def __init__(self, path: Path) -> None:
        try:
            file = h5py.File(path, "r")
        except OSError as error:
            raise DatasetError(f"{path}: not an HDF5 file, or damaged ({error})") from None
        group = file.get(EPISODES)
        if not isinstance(group, h5py.Group):
            found = ", ".join(list(file)[:5]) or "nothing"
            file.close()
            raise DatasetError(f"{path}: found {found}, expected a group '{EPISODES}' with one group per episode; see docs/datasets.md")
        try:
            _check_same_file(file, EPISODES, group)
        except DatasetError as error:
            file.close()
            raise DatasetError(f"{path}: {error}") from None
        super().__init__(path, file, sorted(group, key=_natural_key))
        self._episodes = group
        self.row_convention = str(file.attrs.get("row_convention", "incoming"))

    def _read(self, position: int, name: str, counter: SizeCounter) -> DatasetEpisode:
        try:
            group = self._episodes[name]
            if not isinstance(group, h5py.Group):
                raise DatasetError("not a group")
            _check_same_file(self._file, name, group)
            provenance = Provenance.of_attributes(group.attrs)
            columns = dict(_columns(self._file, group, "", counter))
        except (DatasetError, OSError, RuntimeError, KeyError, ValueError, TypeError, MemoryError) as error:
            return DatasetEpisode(position, {}, error=DatasetError(f"{EPISODES}/{name}: cannot be read: {error}"))
        return DatasetEpisode(position, columns, provenance.key, provenance.actor, provenance.policy_version)


def _columns(file: Any, group: Any, prefix: str, counter: SizeCounter, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Yields the columns of a group and of the groups in it, by dotted name."""
    if depth > MAX_NESTING:
        raise DatasetError(f"{prefix}: nested more than {MAX_NESTING} levels deep")
    for name in group:
        label = prefix + unescape(name)
        if "." in name and prefix.startswith("obs."):
            raise DatasetError(f"{label}: a dot in the name, which batches would return as a nested mapping; expected a group per level")
        # The fingerprint covers this file only, and a link must not make a load read a file that the user did not name.
        if isinstance(group.get(name, getlink=True), h5py.ExternalLink):
            raise DatasetError(f"{label}: a link to another file, which is not followed")
        value = group[name]
        _check_same_file(file, label, value)
        if isinstance(value, h5py.Dataset) and (value.external or value.is_virtual):
            raise DatasetError(f"{label}: its values are in another file, which is not read")
        if isinstance(value, h5py.Group):
            counter.add_name(label)
            yield from _columns(file, value, f"{label}.", counter, depth + 1)
        elif isinstance(value, h5py.Dataset):
            if count_dataset(label, value, counter):
                yield label, value[()]
        else:
            raise DatasetError(f"{label}: {type(value).__name__}, expected a dataset")


def count_dataset(name: str, dataset: Any, counter: SizeCounter) -> bool:
    """Adds an ``h5py.Dataset`` to its episode's counter, and returns whether it is to be read.

    Raises:
        DatasetError: it has no shape, or the episode is too large with it.
    """
    if dataset.shape is None:
        raise DatasetError(f"{name}: no values, expected [rows, ...]")
    return counter.add(name, tuple(map(int, dataset.shape)), dataset.dtype)


def _check_same_file(file: Any, name: str, value: Any) -> None:
    """Raises DatasetError if a value is in another file, which a link may lead to through any number of others."""
    if h5py.h5o.get_info(value.id).fileno != h5py.h5o.get_info(file.id).fileno:
        raise DatasetError(f"{name}: in another file, which is not read")


def _natural_key(name: str) -> list[tuple[int, int, str]]:
    """Returns a sort key that orders the numbers in a name by value, before any text, and breaks ties (``1``, ``01``) by the name."""
    return [
        (0, int(part), "") if part.isdecimal() and len(part) <= MAX_DIGITS else (1, 0, part) for part in re.split(r"(\d+)", name) if part
    ] + [(2, 0, name)]


class Hdf5Target:
    """One HDF5 file of episodes, named by their ids. Not thread-safe.

    Args:
        path: path of the file.
        row_convention: convention of the rows.
        force: whether to replace an existing file.
        compress: whether to compress columns with gzip, after shuffling their bytes.

    Raises:
        DatasetError: the file cannot be written.
    """

    def __init__(self, path: Path, row_convention: str, *, force: bool, compress: bool) -> None:
        self._output = AtomicOutput(path, force=force)
        self._compress = compress
        self._file = h5py.File(self._output.partial, "w")
        self._file.attrs.update({"version": 1, "row_convention": row_convention})
        self._episodes = self._file.create_group(EPISODES)

    def add(self, columns: Mapping[str, np.ndarray], provenance: Provenance) -> None:
        # track_order keeps the columns in their order; by default HDF5 lists a group by name.
        group = self._episodes.create_group(str(provenance.id), track_order=True)
        group.attrs.update(provenance.attributes())
        for name, column in columns.items():
            *groups, leaf = (escape(part) for part in name.split("."))
            parent = group
            for part in groups:
                parent = parent[part] if part in parent else parent.create_group(part, track_order=True)
            options = {"compression": "gzip", "shuffle": True} if self._compress and column.size else {}
            parent.create_dataset(leaf, data=column, **options)

    def finish(self) -> None:
        self._file.close()
        self._output.commit()

    def discard(self) -> None:
        self._file.close()
        self._output.discard()
