"""NPZ files of episodes, one prefix per episode. Read and written one member at a time; the layout is in docs/datasets.md."""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from touchline.datasets.atomic_output import AtomicOutput
from touchline.datasets.errors import DatasetError
from touchline.datasets.provenance import Provenance
from touchline.datasets.single_file import SingleFileSource
from touchline.datasets.size_limit import MAX_METADATA_BYTES, SizeCounter
from touchline.datasets.source import BLOCK_BYTES, DatasetEpisode

FORMAT = "npz"
PROVENANCE = "episode.json"
"""Name of an episode's member that describes its origin."""
METADATA = "touchline.json"
"""Name of the member that describes the file."""

READ_ERRORS = (ValueError, OSError, EOFError, RuntimeError, NotImplementedError, MemoryError, zipfile.BadZipFile, zlib.error)
"""Exceptions that zipfile and numpy raise for a damaged member, or one of another kind."""


class NpzSource(SingleFileSource[zipfile.ZipFile]):
    """The episodes of one NPZ file, in the order in which they first appear in it. Not thread-safe.

    Args:
        path: path of the file.

    Raises:
        DatasetError: it is not an NPZ file, or has another layout.
    """

    format = FORMAT

    def __init__(self, path: Path) -> None:
        try:
            file = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError) as error:
            raise DatasetError(f"{path}: not an NPZ file, or damaged ({error})") from None
        self._members: dict[str, list[str]] = {}
        for member in file.namelist():
            if member == METADATA or member.endswith("/"):
                continue
            episode, slash, _ = member.partition("/")
            if not slash:
                file.close()
                raise DatasetError(
                    f"{path}: {member.removesuffix('.npy')}: an array outside any episode, expected names '<episode>/<column>', as "
                    'in np.savez(path, **{"0/obs": ..., "0/action": ..., "0/reward": ...})'
                )
            self._members.setdefault(episode, []).append(member)
        super().__init__(path, file, list(self._members))
        self.row_convention = self._read_convention()

    def _read(self, position: int, name: str, counter: SizeCounter) -> DatasetEpisode:
        columns: dict[str, Any] = {}
        provenance = Provenance()
        for member in self._members[name]:
            column = member.removeprefix(f"{name}/")
            try:
                if column == PROVENANCE:
                    provenance = Provenance.of_json(self._text(member))
                elif column.endswith(".npy"):
                    self._read_column(member, column.removesuffix(".npy"), columns, counter)
                else:
                    raise DatasetError("expected a member .npy")
            except (DatasetError, *READ_ERRORS) as error:
                return DatasetEpisode(position, {}, error=DatasetError(f"{name}/{column}: cannot be read: {error}"))
        return DatasetEpisode(position, columns, provenance.key, provenance.actor, provenance.policy_version)

    def _read_column(self, member: str, name: str, columns: dict[str, Any], counter: SizeCounter) -> None:
        with self._file.open(member) as file:
            shape, fortran_order, dtype = _read_header(file)
            if not counter.add(name, shape, dtype):
                return
            if name in columns:
                raise DatasetError("given twice, expected every column once")
            columns[name] = _read_values(file, math.prod(shape), dtype).reshape(shape, order="F" if fortran_order else "C")

    def _text(self, member: str) -> bytes:
        with self._file.open(member) as file:
            text = file.read(MAX_METADATA_BYTES + 1)
        if len(text) > MAX_METADATA_BYTES:
            raise DatasetError(f"more than {MAX_METADATA_BYTES:,} bytes of text, expected at most that")
        return text

    def _read_convention(self) -> str:
        if METADATA not in self._file.namelist():
            return "incoming"
        try:
            return str(json.loads(self._text(METADATA))["row_convention"])
        except (DatasetError, *READ_ERRORS, KeyError, TypeError) as error:
            raise DatasetError(f"{self._path}: {METADATA}: cannot be read: {error}") from None


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Returns shape, whether the order is Fortran's, and dtype, as the header of an ``.npy`` announces them.

    Raises:
        ValueError: the header is malformed.
    """
    major, _ = np.lib.format.read_magic(file)
    # Version 3 differs from 2 only in the encoding of field names, and numpy reads it with the same function.
    read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = read(file)
    return shape, fortran_order, dtype


def _read_values(file: IO[bytes], count: int, dtype: np.dtype[Any]) -> np.ndarray:
    """Returns the ``count`` values that follow the header, flat and in the order of the file.

    ``numpy.lib.format.read_array`` would read the header once more, so the member would have to be opened, and partly inflated, twice.

    Raises:
        DatasetError: the member has fewer or more values.
    """
    values = np.empty(count, dtype)
    target = values.view(np.uint8).data
    filled = 0
    while filled < len(target):
        block = file.read(min(len(target) - filled, BLOCK_BYTES))
        if not block:
            raise DatasetError(f"{filled:,} bytes of values, expected {len(target):,}")
        target[filled : filled + len(block)] = block
        filled += len(block)
    # At the end of the member, zipfile compares its checksum.
    if file.read(1):
        raise DatasetError(f"more than {filled:,} bytes of values, expected as many as the header announces")
    return values


class NpzTarget:
    """One NPZ file of episodes, named by their ids. Not thread-safe.

    Args:
        path: path of the file.
        row_convention: convention of the rows.
        force: whether to replace an existing file.
        compress: whether to deflate the members.

    Raises:
        DatasetError: the file cannot be written.
    """

    def __init__(self, path: Path, row_convention: str, *, force: bool, compress: bool) -> None:
        self._output = AtomicOutput(path, force=force)
        self._compression = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
        self._file = zipfile.ZipFile(self._output.partial, "w", self._compression, allowZip64=True)
        self._file.writestr(self._member(METADATA), json.dumps({"version": 1, "row_convention": row_convention}))

    def add(self, columns: Mapping[str, np.ndarray], provenance: Provenance) -> None:
        self._file.writestr(self._member(f"{provenance.id}/{PROVENANCE}"), provenance.json())
        for name, column in columns.items():
            with self._file.open(self._member(f"{provenance.id}/{name}.npy"), "w", force_zip64=True) as file:
                np.lib.format.write_array(file, column, allow_pickle=False)

    def finish(self) -> None:
        self._file.close()
        self._output.commit()

    def discard(self) -> None:
        self._file.close()
        self._output.discard()

    def _member(self, name: str) -> zipfile.ZipInfo:
        # Without a date, so that exporting the same episodes produces the same bytes.
        member = zipfile.ZipInfo(name)
        member.compress_type = self._compression
        return member
