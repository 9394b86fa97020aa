"""NPZ files of episodes: one prefix an episode. Read and written member by member; the layout is in docs/datasets.md."""

from __future__ import annotations

import io
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
from touchline.datasets.size_limit import MAX_ABOUT_BYTES, SizeCounter
from touchline.datasets.source import DatasetEpisode

FORMAT = "npz"
PROVENANCE = "episode.json"
"""Member of an episode that says where it came from."""
ABOUT = "touchline.json"
"""Member that says what the file is."""

HEAD_BYTES = 12 + 10_000
"""Of a member ``.npy``, that its header is in: longer ones numpy does not read."""

DAMAGE = (ValueError, OSError, EOFError, RuntimeError, NotImplementedError, MemoryError, zipfile.BadZipFile, zlib.error)
"""What reading a member may raise, where the file is damaged or not what it seems."""


class NpzSource(SingleFileSource[zipfile.ZipFile]):
    """Episodes of one NPZ file.

    Raises:
        DatasetError: it is none, or not laid out so.
    """

    format = FORMAT

    def __init__(self, path: Path) -> None:
        try:
            file = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError) as error:
            raise DatasetError(f"{path}: no NPZ file, or a damaged one ({error})") from None
        self._members: dict[str, list[str]] = {}
        for member in file.namelist():
            if member == ABOUT or member.endswith("/"):
                continue
            episode, slash, _ = member.partition("/")
            if not slash:
                file.close()
                raise DatasetError(
                    f"{path}: {member.removesuffix('.npy')}: an array outside of any episode, expected names '<episode>/<column>', as "
                    'in np.savez(path, **{"0/obs": ..., "0/action": ..., "0/reward": ...})'
                )
            self._members.setdefault(episode, []).append(member)
        super().__init__(path, file, list(self._members))
        self.row_convention = self._read_convention()

    def _read(self, position: int, name: str, tally: SizeCounter) -> DatasetEpisode:
        columns: dict[str, Any] = {}
        provenance = Provenance()
        for member in self._members[name]:
            column = member.removeprefix(f"{name}/")
            try:
                if column == PROVENANCE:
                    provenance = Provenance.of_json(self._text(member))
                elif column.endswith(".npy"):
                    self._read_column(member, column.removesuffix(".npy"), columns, tally)
                else:
                    raise DatasetError("expected a member .npy")
            except (DatasetError, *DAMAGE) as error:
                return DatasetEpisode(position, {}, error=DatasetError(f"{name}/{column}: cannot be read: {error}"))
        return DatasetEpisode(position, columns, provenance.key, provenance.actor, provenance.policy_version)

    def _read_column(self, member: str, column: str, columns: dict[str, Any], tally: SizeCounter) -> None:
        with self._file.open(member) as file:
            head = file.read(HEAD_BYTES)
            shape, dtype, offset = _announced(head)
            if not tally.take(column, shape, dtype):
                return
            if column in columns:
                raise DatasetError("given twice, expected every column once")
            announced, found = offset + math.prod(shape) * dtype.itemsize, self._file.getinfo(member).file_size
            if announced > found:
                raise DatasetError(
                    f"{dtype} {shape} with its header are {announced:,} bytes, expected no more than the member has, {found:,}"
                )
            columns[column] = np.lib.format.read_array(_Resumed(head, file), allow_pickle=False)

    def _text(self, member: str) -> bytes:
        found = self._file.getinfo(member).file_size
        if found > MAX_ABOUT_BYTES:
            raise DatasetError(f"{found:,} bytes, expected at most {MAX_ABOUT_BYTES:,}")
        # However long it says that it is: no more comes out.
        with self._file.open(member) as file:
            return file.read(MAX_ABOUT_BYTES)

    def _read_convention(self) -> str:
        if ABOUT not in self._file.namelist():
            return "incoming"
        try:
            about = json.loads(self._text(ABOUT))
            return str(about["row_convention"])
        except (DatasetError, *DAMAGE, KeyError, TypeError) as error:
            raise DatasetError(f"{self._path}: {ABOUT}: cannot be read: {error}") from None


class _Resumed:
    """A member from its beginning, of which the head was read: rewound, its checksum would no longer be compared."""

    def __init__(self, head: bytes, file: IO[bytes]) -> None:
        self._head = head
        self._file = file

    def read(self, size: int = -1) -> bytes:
        if not self._head:
            return self._file.read(size)
        size = len(self._head) if size < 0 else size
        part, self._head = self._head[:size], self._head[size:]
        return part


def _announced(head: bytes) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Returns the shape and dtype that the head of an ``.npy`` announces, and where its values begin.

    Raises:
        ValueError: it is none.
    """
    file = io.BytesIO(head)
    major, _ = np.lib.format.read_magic(file)
    # Version 3 differs from 2 in the encoding of names alone.
    read_header = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(file)
    return shape, dtype, file.tell()


class NpzTarget:
    """One NPZ file of episodes, under their ids.

    Args:
        path: of the file.
        row_convention: of the rows.
        force: replace a file that is there.
        compress: deflate the members.

    Raises:
        DatasetError: it cannot be written there.
    """

    def __init__(self, path: Path, row_convention: str, *, force: bool, compress: bool) -> None:
        self._placement = AtomicOutput(path, force=force)
        self._compression = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
        self._file = zipfile.ZipFile(self._placement.partial, "w", self._compression, allowZip64=True)
        self._file.writestr(self._member(ABOUT), json.dumps({"version": 1, "row_convention": row_convention}))

    def add(self, columns: Mapping[str, np.ndarray], provenance: Provenance) -> None:
        self._file.writestr(self._member(f"{provenance.id}/{PROVENANCE}"), provenance.json())
        for name, column in columns.items():
            with self._file.open(self._member(f"{provenance.id}/{name}.npy"), "w", force_zip64=True) as file:
                np.lib.format.write_array(file, column, allow_pickle=False)

    def finish(self) -> None:
        self._file.close()
        self._placement.commit()

    def discard(self) -> None:
        self._file.close()
        self._placement.discard()

    def _member(self, name: str) -> zipfile.ZipInfo:
        # Of no date: the same episodes make the same file.
        member = zipfile.ZipInfo(name)
        member.compress_type = self._compression
        return member
