"""Read Minari data sets (Younis et al., 2024): offline data of Gymnasium environments.

Minari stores transitions: T + 1 observations, and T actions, rewards, terminations and truncations. They become rows as the recorders make
them: ``done`` is the termination, as float32. Usually the truncations follow from that: an episode that ends without a termination was
truncated. If any episode's do not (it was both terminated and truncated, for example), all episodes of the data set get a column
``truncated`` too, so that nothing is lost.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from touchline.datasets.errors import DatasetError
from touchline.datasets.minari_file import TOO_MANY_PIXELS, MinariFile
from touchline.datasets.provenance import Provenance
from touchline.datasets.size_limit import SizeLimit
from touchline.datasets.source import DatasetEpisode, Digest, escape, unescape
from touchline.datasets.transitions import rows_of
from touchline.errors import TouchlineError
from touchline.installing import install_command
from touchline_protos.types.casting import ColumnError, cast
from touchline_protos.types.flatten import to_array

try:
    from minari import MinariDataset
    from minari.dataset.minari_storage import METADATA_FILE_NAME, MinariStorage
    from minari.storage.datasets_root_dir import get_dataset_path
except ImportError as error:
    raise DatasetError(f"Minari data sets need minari ({error}): {install_command('minari')}") from error

FORMAT = "minari"
PREFIX = "minari:"
"""Prefix of the id of a data set in Minari's own folder."""
ABOUT = "touchline"
"""Metadata key of what an export adds: the columns in the data set's metadata, the origin in an episode's."""
ROW0 = "row0_"
"""Prefix of the keys, in an episode's metadata, of what each column held in the row without a transition."""
READ_ERRORS = (
    *(OSError, KeyError, ValueError, TypeError, AssertionError, RuntimeError, IndexError, AttributeError, MemoryError),
    TOO_MANY_PIXELS,
)
"""Exceptions that Minari raises for a damaged data set; for what its own code never writes, it relies on assertions."""
IDENTITY_KEYS = ("observation_space", "action_space", "env_spec", "data_format", "jpeg_encoding", ABOUT)
"""Metadata keys that decide what the episodes are, and so belong to the fingerprint."""


class MinariSource:
    """The episodes of one Minari data set. Not thread-safe.

    Args:
        place: ``minari:<id>``, the folder of the data set, or the folder ``data`` in it.
        infos: whether the arrays among the infos become columns ``info.<name>``.

    Raises:
        DatasetError: there is no such data set, or Minari cannot read it.
    """

    format = FORMAT

    def __init__(self, place: str, *, infos: bool = False) -> None:
        self._folder = folder_of(place).absolute()
        self._infos = infos
        self._file: MinariFile | None = None  # only data sets stored as HDF5 have one
        try:
            self._dataset = MinariDataset(self._folder)
            self._about = _about(self._dataset.storage.metadata.get(ABOUT))
            if self._dataset.storage.FORMAT == "hdf5":
                self._file = MinariFile(self._folder, self._dataset.storage)
        except (ImportError, *READ_ERRORS) as error:
            raise DatasetError(f"{place}: Minari cannot read it ({type(error).__name__}: {error})") from None
        self._needs_truncated: bool | None = None

    @property
    def row_convention(self) -> str | None:
        return str(self._about["row_convention"]) if self._about else None

    @property
    def size_bytes(self) -> int:
        return sum(path.stat().st_size for path in self._files())

    def __len__(self) -> int:
        return int(self._dataset.total_episodes)

    def episodes(self, first: int = 0, *, incoming: bool = True, limit: SizeLimit | None = None) -> Iterator[DatasetEpisode]:
        limit = limit or SizeLimit()
        for position in range(first, len(self)):
            try:
                if self._file is not None:
                    self._file.check_size(int(self._dataset.episode_indices[position]), limit)
                yield self._read(position, incoming, limit)
            except TouchlineError as error:
                yield DatasetEpisode(position, {}, error=error)
            except READ_ERRORS as error:
                yield DatasetEpisode(position, {}, error=DatasetError(f"episode {position}: {type(error).__name__}: {error}"))

    def fingerprint(self, digest: Digest) -> None:
        metadata = MinariStorage.read_raw_metadata(self._folder)
        digest.add(json.dumps({key: metadata[key] for key in IDENTITY_KEYS if key in metadata}, sort_keys=True).encode())
        digest.add(b"infos" if self._infos else b"")
        for path in self._files():
            digest.add(str(path.relative_to(self._folder)).encode())
            digest.add_file(path)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _files(self) -> list[Path]:
        return sorted(path for path in self._folder.rglob("*") if path.is_file() and path != self._folder / METADATA_FILE_NAME)

    def _read(self, position: int, incoming: bool, limit: SizeLimit) -> DatasetEpisode:
        episode = self._dataset[position]
        metadata = next(iter(self._dataset.storage.get_episode_metadata([episode.id])))
        if self._about:
            kept = metadata.get(ABOUT, {})
            provenance = Provenance.of_attributes(kept)
            columns = _rebuild(episode, kept, self._about)
            return DatasetEpisode(position, columns, provenance.key, provenance.actor, provenance.policy_version)
        columns = {"obs": _nested("obs", episode.observations)}
        actions = _nested("action", episode.actions)
        if isinstance(actions, Mapping):
            raise DatasetError("action: a Dict or Tuple space, expected one array")
        terminations, truncations = _flags("terminations", episode.terminations), _flags("truncations", episode.truncations)
        columns["action"] = rows_of(actions, incoming=incoming)
        columns["reward"] = rows_of(_array("reward", episode.rewards), incoming=incoming)
        columns["done"] = rows_of(terminations.astype(np.float32), incoming=incoming)
        if self._needs_truncated_column(limit):
            columns["truncated"] = rows_of(truncations, incoming=incoming)
        if self._infos and episode.infos:
            columns["info"] = dict(_infos(episode.infos, len(terminations) + 1))
        return DatasetEpisode(position, columns)

    def _needs_truncated_column(self, limit: SizeLimit) -> bool:
        """Returns whether any episode's truncations do not follow from its terminations. Reads those of all episodes, once."""
        if self._needs_truncated is None:
            self._needs_truncated = any(not _are_implied(terminations, truncations) for terminations, truncations in self._flags(limit))
        return self._needs_truncated

    def _flags(self, limit: SizeLimit) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        if self._file is not None:
            yield from self._file.flags(self._dataset.episode_indices, limit)
        else:
            for episode in self._dataset:
                yield np.asarray(episode.terminations), np.asarray(episode.truncations)


def folder_of(place: str) -> Path:
    """Returns the folder that holds a data set's data.

    Raises:
        DatasetError: there is no such data set.
    """
    if place.startswith(PREFIX):
        name = place.removeprefix(PREFIX)
        folder = get_dataset_path(name) / "data"
        if not folder.is_dir() or not name:
            raise DatasetError(
                f"{place}: not in Minari's folder {get_dataset_path()}; run `minari download {name}`, or set MINARI_DATASETS_PATH"
            )
        return folder
    folder = Path(place)
    for found in (folder / "data", folder):
        if (found / METADATA_FILE_NAME).is_file():
            return found
    raise DatasetError(f"{place}: not a Minari data set, expected data/{METADATA_FILE_NAME} or {METADATA_FILE_NAME} in it")


def implied_truncations(terminations: np.ndarray) -> np.ndarray:
    """Returns [T] bool: the truncations that follow from the terminations [T].

    An episode that did not end with a termination was truncated after its last transition.
    """
    truncations = np.zeros(len(terminations), np.bool_)
    if len(terminations):
        truncations[-1] = not terminations[-1]
    return truncations


def _are_implied(terminations: np.ndarray, truncations: np.ndarray) -> bool:
    return bool(np.array_equal(truncations.astype(np.bool_), implied_truncations(terminations)))


def _about(value: Any) -> dict[str, Any]:
    """Returns what an export wrote about the columns; empty if Touchline did not write the data set."""
    if value is None:
        return {}
    if value.get("version") != 1 or not isinstance(value.get("columns"), dict):
        raise ValueError(f"metadata key {ABOUT!r}: version {value.get('version')!r}, expected 1")
    return dict(value)


def _rebuild(episode: Any, kept: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the columns of an exported episode: the same bits, in the same order."""
    incoming = about["row_convention"] == "incoming"
    infos = {unescape(name): value for name, value in (episode.infos or {}).items()}
    transitions = {"action": episode.actions, "reward": episode.rewards, "done": episode.terminations}
    columns: dict[str, Any] = {}
    for name, spec in about["columns"].items():
        shape = tuple(spec["shape"])
        if name == "obs" or name.startswith("obs."):
            value = episode.observations
            for part in name.split(".")[1:]:
                value = value[escape(part)]
            columns[name] = np.asarray(value)
        elif name in transitions and name not in infos:
            values = np.asarray(transitions[name])
            values = values.astype(spec["dtype"]) if name == "done" else values
            column = rows_of(values.reshape(len(values), *shape), incoming=incoming)
            row0 = kept.get(f"{ROW0}{name}")
            if row0 is not None:  # not the usual NaN that rows_of() puts there
                undefined_at = slice(0, 1) if incoming else slice(-1, None)
                column[undefined_at] = np.asarray(row0).reshape(1, *shape)
            columns[name] = column
        else:
            columns[name] = np.asarray(infos[name])
    return columns


def _nested(name: str, value: Any) -> Any:
    """Returns observations or actions nested as the recorders do: a dict for a Dict space, a dict ``"0"``, ``"1"``, ... for a Tuple."""
    if isinstance(value, Mapping):
        return {str(key): _nested(f"{name}.{key}", part) for key, part in value.items()}
    if isinstance(value, tuple):
        return {str(number): _nested(f"{name}.{number}", part) for number, part in enumerate(value)}
    return _array(name, value)


def _array(name: str, value: Any) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise DatasetError(f"{name}: {array.dtype.name} values, expected numbers")
    return array


def _flags(name: str, value: Any) -> np.ndarray:
    try:
        return cast(name, to_array(name, value), np.dtype(np.bool_), rounding=False, why="as Minari stores it")
    except ColumnError as error:
        raise DatasetError(str(error)) from None


def _infos(infos: Mapping[str, Any], rows: int) -> Iterator[tuple[str, Any]]:
    """Yields the infos that are arrays of numbers with ``rows`` rows, nested as they are."""
    for name, value in infos.items():
        if isinstance(value, Mapping):
            part = dict(_infos(value, rows))
            if part:
                yield str(name), part
            continue
        array = np.asarray(value)
        if array.dtype.kind in "biuf" and array.ndim and len(array) == rows:
            yield str(name), array
