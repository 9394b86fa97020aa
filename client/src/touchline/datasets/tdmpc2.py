"""Read TD-MPC2's multi-task data sets: ``.pt`` files of a TensorDict [episodes, rows], as published by Hansen et al. (2024).

Only tensors are unpickled (``torch.load(weights_only=True)``). A plain dict of columns stands in for TensorDict's class and for the
function that rebuilds one, so tensordict itself is not needed. Files are memory-mapped, except those written before torch 1.6, which
cannot be.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from touchline._tdmpc2.column_names import columns_of
from touchline.datasets.errors import DatasetError
from touchline.datasets.size_limit import SizeLimit
from touchline.datasets.source import DatasetEpisode, Digest
from touchline.errors import InvalidEpisodeError
from touchline.installing import install_command
from touchline_protos.types.flatten import MAX_NESTING, ColumnError, to_array

try:
    import torch
except ImportError as error:
    raise DatasetError(f".pt files need torch ({error}): {install_command('torch')}") from error

FORMAT = "tdmpc2"


class SavedColumns(dict[str, Any]):
    """The columns of a TensorDict, in whose place the restricted unpickler creates it. Runs no code of the file's."""

    def __setstate__(self, state: Any) -> None:
        # Every version of tensordict since 0.1 saves the columns under this name.
        columns = state.get("_tensordict") if isinstance(state, dict) else None
        if not isinstance(columns, dict):
            raise pickle.UnpicklingError("a TensorDict without columns")
        self.update(columns)


def rebuild(kind: Any, state: Any) -> SavedColumns:
    """Replaces tensordict's function of the same purpose."""
    columns = SavedColumns()
    columns.__setstate__(state)
    return columns


_ALLOWED: list[Any] = [
    (SavedColumns, "tensordict._td.TensorDict"),
    (SavedColumns, "tensordict.tensordict.TensorDict"),
    (rebuild, "tensordict._reductions._make_td"),
]


class TDMPC2Source:
    """The episodes of one or several ``.pt`` files. A file is open while its episodes are read. Not thread-safe.

    Args:
        paths: the files, in order.
        trust_pickle: whether to unpickle arbitrary objects, for files that the restricted unpickler refuses. Runs any code in them.

    Raises:
        DatasetError: a file was not written by ``torch.save``, or its columns are not [episodes, rows, ...].
    """

    format = FORMAT
    row_convention = "incoming"

    def __init__(self, paths: list[Path], *, trust_pickle: bool = False) -> None:
        self._paths = paths
        self._trust_pickle = trust_pickle
        self._lengths = [_count(path, self._open(path)) for path in paths]

    @property
    def size_bytes(self) -> int:
        return sum(path.stat().st_size for path in self._paths)

    def __len__(self) -> int:
        return sum(self._lengths)

    def episodes(self, first: int = 0, *, incoming: bool = True, limit: SizeLimit | None = None) -> Iterator[DatasetEpisode]:
        limit = limit or SizeLimit()
        position = 0
        for path, length in zip(self._paths, self._lengths, strict=True):
            if first < position + length:
                columns = dict(_leaves(path, self._open(path), ""))
                names, error = _names_to_read(columns, limit)
                for row in range(max(first - position, 0), length):
                    yield DatasetEpisode(position + row, {name: columns[name][row] for name in names}, error=error)
            position += length

    def fingerprint(self, digest: Digest) -> None:
        for path in self._paths:
            digest.add_file(path)

    def close(self) -> None:
        pass

    def _open(self, path: Path) -> dict[str, Any]:
        loaded = _load(path, self._trust_pickle)
        try:
            return columns_of(loaded)
        except InvalidEpisodeError as error:
            raise DatasetError(f"{path}: {error}") from None


def _load(path: Path, trust_pickle: bool) -> Any:
    """Returns what a file contains, its tensors memory-mapped if the layout permits (since torch 1.6)."""
    for mmap in (True, False):
        try:
            if trust_pickle:
                return torch.load(path, map_location="cpu", mmap=mmap, weights_only=False)
            with torch.serialization.safe_globals(_ALLOWED):
                return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
        except pickle.UnpicklingError as error:
            if trust_pickle:
                raise DatasetError(f"{path}: not written by torch.save ({_first_line(error)})") from None
            raise DatasetError(
                f"{path}: {_found_by(error)}, expected a TensorDict or a dict of tensors. If you trust its author, --trust-pickle "
                "(trust_pickle=True) unpickles anything, and runs whatever code the file contains"
            ) from None
        except RuntimeError as error:
            if mmap and "mmap" in str(error):
                continue
            raise DatasetError(f"{path}: not written by torch.save, or damaged ({_first_line(error)})") from None
        except (EOFError, ValueError, AttributeError, ImportError, TypeError, KeyError, IndexError, OverflowError, MemoryError) as error:
            raise DatasetError(f"{path}: cannot be read ({type(error).__name__}: {_first_line(error)})") from None
    raise AssertionError("unreachable")


def _found_by(error: Exception) -> str:
    """Returns what the restricted unpickler refused, as torch's message says it."""
    text = str(error)
    if "GLOBAL " in text:
        return f"it holds {text.split('GLOBAL ', 1)[1].split(' ', 1)[0]}"
    return f"not written by torch.save, or damaged ({text.rsplit('WeightsUnpickler error: ', 1)[-1].splitlines()[0].strip()})"


def _first_line(error: Exception) -> str:
    """Returns the first line of an error's text, without torch's advice to its developers."""
    return (str(error).splitlines() or [""])[0].partition("  (Could this")[0]


def _count(path: Path, columns: Mapping[str, Any]) -> int:
    """Returns the number of episodes in columns [episodes, rows, ...].

    Raises:
        DatasetError: the columns do not all have that shape.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name, value in _leaves(path, columns, ""):
        if name in shapes:
            raise DatasetError(f"{path}: {name}: given twice, expected every column once")
        shapes[name] = tuple(value.shape)
    if not shapes:
        raise DatasetError(f"{path}: no columns, expected at least obs, action and reward")
    for name, shape in shapes.items():
        if len(shape) < 2:
            raise DatasetError(f"{path}: {name}: shape {shape}, expected (episodes, rows, ...)")
    first = next(iter(shapes))
    for name, shape in shapes.items():
        if shape[:2] != shapes[first][:2]:
            raise DatasetError(f"{path}: {name}: shape {shape}, expected {shapes[first][:2]} episodes and rows to match {first}")
    return int(shapes[first][0])


def _leaves(path: Path, level: Any, prefix: str, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Yields the tensors of nested mappings by dotted name."""
    if depth > MAX_NESTING:
        raise DatasetError(f"{path}: {prefix}: nested more than {MAX_NESTING} levels deep")
    for name in level.keys():  # noqa: SIM118  a TensorDict iterates over its rows, not its keys
        value = level[name]
        label = f"{prefix}{name}"
        if not isinstance(name, str):
            raise DatasetError(f"{path}: {label}: a name of type {type(name).__name__}, expected str")
        if hasattr(value, "keys"):
            yield from _leaves(path, value, f"{label}.", depth + 1)
        elif not isinstance(value, torch.Tensor):
            raise DatasetError(f"{path}: {label}: {type(value).__name__}, expected a tensor")
        elif value.layout != torch.strided or value.is_quantized or value.is_meta:
            kind = "quantized" if value.is_quantized else "meta" if value.is_meta else str(value.layout).removeprefix("torch.")
            raise DatasetError(f"{path}: {label}: a {kind} tensor, expected one with a value for every element")
        else:
            yield label, value


def _names_to_read(columns: Mapping[str, Any], limit: SizeLimit) -> tuple[list[str], DatasetError | None]:
    """Returns the names of the columns to read, and the error if the file's episodes are too large; all have the same size."""
    counter = limit.counter()
    try:
        # The shape decides, not the file's size: an expanded tensor has more values than the file.
        return [name for name, value in columns.items() if counter.add(name, value.shape[1:], to_array(name, value[:0]).dtype)], None
    except (DatasetError, ColumnError, TypeError) as error:
        return [], error if isinstance(error, DatasetError) else DatasetError(str(error))
