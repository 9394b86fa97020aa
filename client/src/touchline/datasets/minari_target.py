"""Write Minari data sets, which Minari loads like any other and :mod:`touchline.datasets.minari` reads back bit for bit.

Minari stores transitions, so the columns that it has a place for go there: ``obs``, ``action``, ``reward``, and ``done`` as terminations.
The others become infos. What a column holds in the row without a transition goes into the episode's metadata, unless it is the usual NaN.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from touchline.datasets.atomic_output import AtomicOutput
from touchline.datasets.errors import DatasetError, UnsupportedEpisodeError
from touchline.datasets.minari import ABOUT, PREFIX, ROW0, implied_truncations
from touchline.datasets.provenance import Provenance
from touchline.datasets.source import escape
from touchline.datasets.transitions import transitions_of, unusual_undefined_row
from touchline.installing import install_command
from touchline_protos.types.dtypes import BFLOAT16, dtype_name

try:
    from gymnasium import spaces
    from minari import __version__
    from minari.data_collector.episode_buffer import EpisodeBuffer
    from minari.dataset.minari_dataset import parse_dataset_id
    from minari.dataset.minari_storage import METADATA_FILE_NAME, MinariStorage
    from minari.namespace import create_namespace, list_local_namespaces
    from minari.storage.datasets_root_dir import get_dataset_path
except ImportError as error:
    raise DatasetError(f"Minari data sets need minari ({error}): {install_command('minari')}") from error

FLUSH_BYTES = 64 << 20
"""Payload that is collected before it is passed to Minari, which rewrites its metadata each time."""
FLUSH_EPISODES = 256
"""Maximum number of episodes that are collected."""


class MinariTarget:
    """One Minari data set, stored as HDF5, with lossless images. Not thread-safe.

    Args:
        place: ``minari:<id>``, or a folder whose name is an id: ``<name>-v<number>``.
        row_convention: convention of the rows.
        force: whether to replace an existing data set.

    Raises:
        DatasetError: the data set cannot be written, or the id is malformed.
    """

    def __init__(self, place: str, row_convention: str, *, force: bool) -> None:
        self._place = place
        named = place.startswith(PREFIX)
        self._id = place.removeprefix(PREFIX) if named else Path(place).name
        try:
            self._namespace = parse_dataset_id(self._id)[0]
        except (ValueError, TypeError):
            raise DatasetError(f"{place}: id {self._id!r}, expected <name>-v<number> or <namespace>/<name>-v<number>") from None
        self._named = named
        self._incoming = row_convention == "incoming"
        # Minari resolves a relative folder against itself, so it is given an absolute one.
        folder = (get_dataset_path(self._id) if named else Path(place)).absolute()
        if named:
            folder.parent.mkdir(parents=True, exist_ok=True)
        self._output = AtomicOutput(folder, force=force, replaceable=lambda existing: (existing / "data" / METADATA_FILE_NAME).is_file())
        self._storage: Any = None
        self._pending: list[EpisodeBuffer] = []
        self._metadata: list[dict[str, Any]] = []
        self._pending_bytes = 0

    def add(self, columns: Mapping[str, np.ndarray], provenance: Provenance) -> None:
        if self._storage is None:
            self._storage = self._create(columns)
        rows = len(columns["reward"])
        if rows < 2:
            raise UnsupportedEpisodeError("a single row, expected at least 2: Minari stores transitions")
        self._pending.append(self._buffer(columns))
        kept = {f"{ABOUT}/{name}": value for name, value in provenance.attributes().items()}
        for name in ("action", "reward", "done"):
            row0 = unusual_undefined_row(columns[name], incoming=self._incoming) if name in columns else None
            if row0 is not None and not (name == "done" and columns[name].dtype == BFLOAT16):
                kept[f"{ABOUT}/{ROW0}{name}"] = row0[0]
        self._metadata.append(kept)
        self._pending_bytes += sum(column.nbytes for column in columns.values())
        if self._pending_bytes >= FLUSH_BYTES or len(self._pending) >= FLUSH_EPISODES:
            self._flush()

    def finish(self) -> None:
        self._flush()
        if self._named and self._namespace is not None and self._namespace not in list_local_namespaces():
            create_namespace(self._namespace)
        self._output.commit()

    def discard(self) -> None:
        self._output.discard()

    def _create(self, columns: Mapping[str, np.ndarray]) -> Any:
        for required in ("action", "reward"):
            if required not in columns:
                raise DatasetError(f"{self._place}: no column {required}, which a Minari data set must have")
        if columns["reward"][0].size > 1:
            raise DatasetError(
                f"{self._place}: reward: of {columns['reward'][0].size} agents in lockstep; Minari stores one reward per step, use hdf5"
            )
        for name, column in columns.items():
            if not all(column.shape[1:]):
                raise DatasetError(f"{self._place}: {name}: shape {column.shape[1:]} per row; Minari cannot store empty arrays, use hdf5")
            if column.dtype == BFLOAT16 and (name in ("action", "reward") or name.partition(".")[0] == "obs"):
                raise DatasetError(f"{self._place}: {name}: bfloat16; Minari has no such dtype, use hdf5")
        self._output.partial.mkdir()
        observations = {name: _space(column) for name, column in columns.items() if name.partition(".")[0] == "obs"}
        if not observations:
            raise DatasetError(f"{self._place}: no column obs, which a Minari data set must have")
        storage = MinariStorage.new(
            self._output.partial / "data",
            observation_space=_dict_space(_nested(observations)),
            action_space=_space(columns["action"]),
            data_format="hdf5",
            jpeg_encoding=False,
        )
        about = {
            "version": 1,
            "row_convention": "incoming" if self._incoming else "outgoing",
            "columns": {name: {"dtype": dtype_name(column.dtype), "shape": list(column.shape[1:])} for name, column in columns.items()},
        }
        storage.update_metadata({"dataset_id": self._id, "minari_version": __version__, ABOUT: about})
        return storage

    def _buffer(self, columns: Mapping[str, np.ndarray]) -> EpisodeBuffer:
        """Returns the episode as Minari represents it; each column without a place of its own becomes an info, all rows of it."""
        infos = {
            name: column for name, column in columns.items() if name not in ("action", "reward", "done") and name.partition(".")[0] != "obs"
        }
        rewards = transitions_of(columns["reward"], incoming=self._incoming).reshape(-1)
        terminations = np.zeros(len(rewards), np.bool_)
        if "done" in columns:
            done = transitions_of(columns["done"], incoming=self._incoming).reshape(-1)
            terminations = _is_set(done)
            if done.dtype == BFLOAT16 or terminations.astype(done.dtype).tobytes() != done.tobytes():
                infos["done"] = columns["done"]
        truncations = implied_truncations(terminations)
        if "truncated" in columns and columns["truncated"][0].size == 1:
            truncations = _is_set(transitions_of(columns["truncated"], incoming=self._incoming).reshape(-1))
        return EpisodeBuffer(
            observations=_nested({name: column for name, column in columns.items() if name.partition(".")[0] == "obs"}),
            actions=transitions_of(columns["action"], incoming=self._incoming),
            rewards=rewards,
            terminations=terminations,
            truncations=truncations,
            infos={escape(name): column for name, column in infos.items()},
        )

    def _flush(self) -> None:
        if not self._pending:
            return
        first = self._storage.total_episodes
        self._storage.update_episodes(self._pending)
        self._storage.update_episode_metadata(self._metadata, range(first, first + len(self._pending)))
        self._pending, self._metadata, self._pending_bytes = [], [], 0


def _nested(columns: Mapping[str, Any]) -> Any:
    """Returns the column ``obs``, or nested dicts of the columns ``obs.*``."""
    if "obs" in columns:
        return columns["obs"]
    nested: dict[str, Any] = {}
    for name, value in columns.items():
        *groups, leaf = (escape(part) for part in name.split(".")[1:])
        level = nested
        for group in groups:
            level = level.setdefault(group, {})
        level[leaf] = value
    return nested


def _dict_space(level: Any) -> Any:
    return spaces.Dict({name: _dict_space(part) for name, part in level.items()}) if isinstance(level, dict) else level


def _space(column: np.ndarray) -> Any:
    """Returns a space of a row's shape that contains every value of the column's dtype."""
    dtype, shape = column.dtype, column.shape[1:]
    if dtype == np.bool_:
        return spaces.Box(0, 1, shape, np.bool_)
    if dtype.kind == "f":
        return spaces.Box(-np.inf, np.inf, shape, dtype.type)
    limits = np.iinfo(dtype)
    return spaces.Box(limits.min, limits.max, shape, dtype.type)


def _is_set(values: np.ndarray) -> np.ndarray:
    """Returns bool: whether each value is not zero. A bfloat16 is zero if all its bits but the sign are."""
    return (values.view(np.uint16) & 0x7FFF) != 0 if values.dtype == BFLOAT16 else values != 0
