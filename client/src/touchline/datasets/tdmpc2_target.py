"""Write TD-MPC2's ``.pt`` files: TensorDicts [episodes, rows], which its own trainer loads.

Columns are first collected in temporary files and memory-mapped from there when they are saved, so the episodes are never all in memory.
During the export they take their size on the disk a second time.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from touchline.datasets.atomic_output import AtomicOutput
from touchline.datasets.errors import DatasetError
from touchline.datasets.provenance import Provenance
from touchline.installing import install_command
from touchline_protos.types.dtypes import BFLOAT16

try:
    import torch
    from tensordict import TensorDict
except ImportError as error:
    raise DatasetError(f"writing .pt files needs torch and tensordict ({error}): {install_command('torch')}") from error


class TDMPC2Target:
    """One ``.pt`` file of episodes with equal numbers of rows, or a folder with one file per number of rows. Not thread-safe.

    Args:
        path: path of the file (``.pt``) or of the folder.
        row_convention: convention of the rows, which must be ``incoming``, TD-MPC2's.
        force: whether to replace an existing file, or a folder that contains only ``.pt`` files.

    Raises:
        DatasetError: the path cannot be written, or the rows are of the other convention.
    """

    def __init__(self, path: Path, row_convention: str, *, force: bool) -> None:
        if row_convention != "incoming":
            raise DatasetError(
                f"{path}: row convention {row_convention!r}, expected 'incoming' as in TD-MPC2; use hdf5, which supports both"
            )
        self._one_file = path.suffix.lower() in (".pt", ".pth")
        self._output = AtomicOutput(path, force=force, replaceable=_has_only_pt_files)
        self._output.partial.mkdir()
        self._groups: dict[int, _Group] = {}

    def add(self, columns: Mapping[str, np.ndarray], provenance: Provenance) -> None:
        if "terminated" in columns:
            raise DatasetError(f"{self._output.place}: terminated: a column of this name would be read back as done; use hdf5")
        rows = len(next(iter(columns.values())))
        group = self._groups.get(rows)
        if group is None:
            if self._groups and self._one_file:
                raise DatasetError(
                    f"{self._output.place}: episodes of {next(iter(self._groups))} and of {rows} rows, expected equal numbers of rows "
                    "in one file, as in TD-MPC2; name a folder with --format tdmpc2 (format='tdmpc2') for one file each, or use hdf5"
                )
            group = self._groups[rows] = _Group(self._output.partial / f"rows_{rows:06d}", columns)
        group.add(columns)

    def finish(self) -> None:
        saved = self._output.partial / "saved"
        saved.mkdir()
        for rows, group in self._groups.items():
            group.save(saved / f"rows_{rows:06d}.pt")
        self._output.commit(next(saved.iterdir()) if self._one_file else saved)

    def discard(self) -> None:
        for group in self._groups.values():
            group.close()
        self._output.discard()


class _Group:
    """The episodes with one number of rows: one temporary file per column, which holds the episodes' bytes one after another."""

    def __init__(self, folder: Path, columns: Mapping[str, np.ndarray]) -> None:
        folder.mkdir()
        self._count = 0
        self._like = {name: column[:0] for name, column in columns.items()}
        self._rows = len(next(iter(columns.values())))
        self._paths = {name: folder / str(number) for number, name in enumerate(columns)}
        self._files = {name: path.open("wb") for name, path in self._paths.items()}

    def add(self, columns: Mapping[str, np.ndarray]) -> None:
        self._count += 1
        for name, file in self._files.items():
            file.write(np.ascontiguousarray(columns[name]).reshape(-1).view(np.uint8).data)

    def save(self, path: Path) -> None:
        self.close()
        nested: dict[str, Any] = {}
        for name in self._paths:
            *groups, leaf = ("terminated" if name == "done" else name).split(".")
            level = nested
            for group in groups:
                level = level.setdefault(group, {})
            level[leaf] = self._tensor(name)
        torch.save(TensorDict(nested, batch_size=[self._count, self._rows]), path)

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _tensor(self, name: str) -> Any:
        """Returns a column [episodes, rows, ...], memory-mapped from its file."""
        like = self._like[name]
        shape = (self._count, self._rows, *like.shape[1:])
        dtype = torch.bfloat16 if like.dtype == BFLOAT16 else torch.from_numpy(np.empty(0, like.dtype)).dtype
        size = int(np.prod(shape, dtype=np.int64))
        if not size:
            return torch.empty(shape, dtype=dtype)
        return torch.from_file(str(self._paths[name]), shared=False, size=size, dtype=dtype).view(shape)


def _has_only_pt_files(folder: Path) -> bool:
    """Returns whether a folder is one that an export has written."""
    return all(path.is_file() and path.suffix == ".pt" for path in folder.iterdir())
