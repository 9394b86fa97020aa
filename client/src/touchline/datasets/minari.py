"""Minari's data sets (Younis et al. 2024): offline data of Gymnasium environments, in the local folder of Minari or any other.

Minari keeps transitions: T + 1 observations beside T actions, rewards, terminations and truncations. Rows are made of them in the manner of
the recorders: ``done`` is the termination, as float32. Where that and the episode's end do not tell the truncations (an episode that was
both, say), all episodes of the data set get a column ``truncated`` as well, so that nothing is lost.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from touchline.datasets.errors import DatasetError
from touchline.datasets.minari_sizes import TOO_MANY_PIXELS, MinariSizes
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
"""Before the id of a data set in Minari's own folder."""
ABOUT = "touchline"
"""Key of the metadata under which an export says what the columns were; and of the episodes'."""
ROW0 = "row0_"
"""Before a column's name, in an episode's metadata: what the row held that has no transition."""
FAILURES = (
    *(OSError, KeyError, ValueError, TypeError, AssertionError, RuntimeError, IndexError, AttributeError, MemoryError),
    TOO_MANY_PIXELS,
)
"""What Minari may raise where a data set is damaged or not what it seems; it makes what its own code and tests rule out an assertion."""
IDENTITY_KEYS = ("observation_space", "action_space", "env_spec", "data_format", "jpeg_encoding", ABOUT)
"""Metadata that the episodes depend on."""


class MinariSource:
    """Episodes of one data set.

    Args:
        place: ``minari:<id>``, or the data set's folder, or the ``data`` within it.
        infos: store the infos that are arrays, too: as columns ``info.<name>``.

    Raises:
        DatasetError: there is none, or Minari cannot read it.
    """

    format = FORMAT

    def __init__(self, place: str, *, infos: bool = False) -> None:
        self._folder = folder_of(place).absolute()
        self._infos = infos
        self._sizes: MinariSizes | None = None
        try:
            self._check_count()
            self._dataset = MinariDataset(self._folder)
            self._about = _about(self._dataset.storage.metadata.get(ABOUT))
            if self._dataset.storage.FORMAT == "hdf5":
                self._sizes = MinariSizes(self._folder, self._dataset.storage)
        except (ImportError, *FAILURES) as error:
            raise DatasetError(f"{place}: Minari cannot read it: {type(error).__name__}: {error}") from None
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
                if self._sizes is not None:
                    self._sizes.check(int(self._dataset.episode_indices[position]), limit)
                yield self._read(position, incoming, limit)
            except TouchlineError as error:
                yield DatasetEpisode(position, {}, error=error)
            except FAILURES as error:
                yield DatasetEpisode(position, {}, error=DatasetError(f"episode {position}: {type(error).__name__}: {error}"))

    def fingerprint(self, digest: Digest) -> None:
        metadata = MinariStorage.read_raw_metadata(self._folder)
        digest.add(json.dumps({key: metadata[key] for key in IDENTITY_KEYS if key in metadata}, sort_keys=True).encode())
        digest.add(b"infos" if self._infos else b"")
        for path in self._files():
            digest.add(str(path.relative_to(self._folder)).encode())
            digest.add_file(path)

    def close(self) -> None:
        if self._sizes is not None:
            self._sizes.close()

    def _check_count(self) -> None:
        """Raises ValueError where the metadata announces more episodes than the files could have: Minari makes a list of them."""
        announced, size_bytes = MinariStorage.read_raw_metadata(self._folder)["total_episodes"], self.size_bytes
        if announced > size_bytes:
            raise ValueError(f"total_episodes: {announced}, expected no more than its files have bytes, {size_bytes}")

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
            raise DatasetError("action: several (a Dict or Tuple space), expected one array")
        terminations, truncations = _flags("terminations", episode.terminations), _flags("truncations", episode.truncations)
        columns["action"] = rows_of(actions, incoming=incoming)
        columns["reward"] = rows_of(_array("reward", episode.rewards), incoming=incoming)
        columns["done"] = rows_of(terminations.astype(np.float32), incoming=incoming)
        if self._truncated_needed(limit):
            columns["truncated"] = rows_of(truncations, incoming=incoming)
        if self._infos and episode.infos:
            columns["info"] = dict(_infos(episode.infos, len(terminations) + 1))
        return DatasetEpisode(position, columns)

    def _truncated_needed(self, limit: SizeLimit) -> bool:
        """Returns whether some episode's truncations are not what its end tells. Reads the flags of all, once."""
        if self._needs_truncated is None:
            self._needs_truncated = any(not _implied(terminations, truncations) for terminations, truncations in self._flags(limit))
        return self._needs_truncated

    def _flags(self, limit: SizeLimit) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        if self._sizes is not None:
            yield from self._sizes.flags(self._dataset.episode_indices, limit)
        else:
            for episode in self._dataset:
                yield np.asarray(episode.terminations), np.asarray(episode.truncations)


def folder_of(place: str) -> Path:
    """Returns the folder of a data set's data.

    Raises:
        DatasetError: there is none.
    """
    if place.startswith(PREFIX):
        name = place.removeprefix(PREFIX)
        folder = get_dataset_path(name) / "data"
        if not folder.is_dir() or not name:
            raise DatasetError(
                f"{place}: not in Minari's folder {get_dataset_path()}; `minari download {name}`, or set MINARI_DATASETS_PATH"
            )
        return folder
    folder = Path(place)
    for found in (folder / "data", folder):
        if (found / METADATA_FILE_NAME).is_file():
            return found
    raise DatasetError(f"{place}: no Minari data set: neither data/{METADATA_FILE_NAME} nor {METADATA_FILE_NAME} is in it")


def implied_truncations(terminations: np.ndarray) -> np.ndarray:
    """Returns the truncations that an episode's end tells: one that was not terminated was truncated with its last transition."""
    truncations = np.zeros(len(terminations), np.bool_)
    if len(terminations):
        truncations[-1] = not terminations[-1]
    return truncations


def _implied(terminations: np.ndarray, truncations: np.ndarray) -> bool:
    return bool(np.array_equal(truncations.astype(np.bool_), implied_truncations(terminations)))


def _about(value: Any) -> dict[str, Any]:
    """Returns what an export wrote about its columns; empty where this is none."""
    if value is None:
        return {}
    if value.get("version") != 1 or not isinstance(value.get("columns"), dict):
        raise ValueError(f"metadata key {ABOUT!r}: version {value.get('version')!r}, expected 1")
    return dict(value)


def _rebuild(episode: Any, kept: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the columns that were exported, in their order, to the bit."""
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
            if row0 is not None:
                undefined_at = slice(0, 1) if incoming else slice(-1, None)
                column[undefined_at] = np.asarray(row0).reshape(1, *shape)
            columns[name] = column
        else:
            columns[name] = np.asarray(infos[name])
    return columns


def _nested(name: str, value: Any) -> Any:
    """Returns observations or actions as the recorders nest them: a dict of a Dict, a dict ``0``, ``1``, ... of a Tuple."""
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
        return cast(name, to_array(name, value), np.dtype(np.bool_), rounding=False, why="as Minari has them")
    except ColumnError as error:
        raise DatasetError(str(error)) from None


def _infos(infos: Mapping[str, Any], rows: int) -> Iterator[tuple[str, Any]]:
    for name, value in infos.items():
        if isinstance(value, Mapping):
            part = dict(_infos(value, rows))
            if part:
                yield str(name), part
            continue
        array = np.asarray(value)
        if array.dtype.kind in "biuf" and array.ndim and len(array) == rows:
            yield str(name), array
