"""Rows read directly from the pages of a database file and its log, whatever happened to the structures that lead to them.

SQLite gives up at the first page that it needs and cannot read; a recovery wants every row whose own bytes are left. The format is
https://sqlite.org/fileformat2.html: sections 1.6 (b-tree pages), 2.1 (records) and 4 (log). Nothing found here is certain to be a row
of the store before its checksum is verified.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from touchline_server.durability.database import TABLES

PAGE_BYTES = TABLES.page_bytes
MAGIC = b"SQLite format 3\0"

_TABLE_LEAF, _INDEX_LEAF, _INDEX_INTERIOR = 0x0D, 0x0A, 0x02
_LEAST_LOCAL = (PAGE_BYTES - 12) * 32 // 255 - 23
_MOST_LOCAL_TABLE = PAGE_BYTES - 35
_MOST_LOCAL_INDEX = (PAGE_BYTES - 12) * 64 // 255 - 23
_INT_BYTES = (0, 1, 2, 3, 4, 6, 8)
_LOG_MAGIC = b"\x37\x7f\x06"
_LOG_HEADER_BYTES, _FRAME_HEADER_BYTES = 32, 24
_FRAME_BYTES = _FRAME_HEADER_BYTES + PAGE_BYTES
PREFIX_BYTES = 4096
"""Bytes of a cell that :meth:`PageFile.row` reads by default: every value of a row except the data of a column."""

Value = int | float | str | bytes | None


@dataclass(frozen=True, slots=True)
class Cell:
    """The place of a row in a file."""

    rowid: int | None
    """Row number; None in an index, and so in a table WITHOUT ROWID."""
    size_bytes: int
    """Size of the whole record."""
    local: bytes
    """The part of the record in the page itself."""
    overflow: int
    """Number of the page with the next part; 0 if there is none."""


class PageFile:
    """A database's pages; those in its log supersede those in the file. Read-only. A context manager.

    Raises:
        OSError: a file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._log: _Log | None = None
        try:
            log = Path(f"{path}-wal")
            self._log = _Log(log) if log.exists() else None
            self._pages = -(-os.fstat(self._file).st_size // PAGE_BYTES)
            if self._log is not None and self._log.newest:
                self._pages = self._log.size or max(self._pages, *self._log.newest)
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        """Returns the number of pages."""
        return self._pages

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files."""
        os.close(self._file)
        if self._log is not None:
            self._log.close()

    def page(self, number: int) -> bytes:
        """Returns the last committed version of a page, the first being number 1; zeros if the file is truncated before it."""
        if self._log is not None and number in self._log.newest:
            return self._log.page(self._log.newest[number])
        return self._page_of_file(number)

    def cells(self) -> Iterator[Cell]:
        """Yields each cell that could be a row, deleted and moved ones included."""
        # Free pages as well: a damaged or outdated list of free pages may contain pages in use.
        for number in range(2, self._pages + 1):
            for page in self._versions(number):
                yield from _cells(page)

    def row(self, cell: Cell, *, whole: bool = False) -> list[Value]:
        """Returns a cell's values: all of them, or those within its first :data:`PREFIX_BYTES`.

        Raises:
            ValueError: the cell is not a row, or is incomplete.
        """
        wanted = cell.size_bytes if whole else min(cell.size_bytes, PREFIX_BYTES)
        if cell.size_bytes > self._pages * PAGE_BYTES:
            raise ValueError("longer than the file")
        return _values(self._payload(cell, wanted))

    def _payload(self, cell: Cell, wanted: int) -> bytes:
        parts, size, following = [cell.local], len(cell.local), cell.overflow
        while size < wanted:
            if not 2 <= following <= self._pages:
                raise ValueError("its continuation is missing")
            page = self.page(following)
            following = int.from_bytes(page[:4])
            parts.append(page[4 : 4 + cell.size_bytes - size])
            size += len(parts[-1])
        return b"".join(parts)

    def _versions(self, number: int) -> Iterator[bytes]:
        """Yields a page; if its newest version is damaged, also the older ones, which have most of its rows."""
        log = self._log
        if log is None or number not in log.newest:
            yield self._page_of_file(number)
            return
        yield log.page(log.newest[number])
        if log.newest[number] in log.damaged:
            for frame in log.older(number):
                yield log.page(frame)
            yield self._page_of_file(number)

    def _page_of_file(self, number: int) -> bytes:
        return os.pread(self._file, PAGE_BYTES, (number - 1) * PAGE_BYTES).ljust(PAGE_BYTES, b"\0")


class _Log:
    """The committed frames of a write-ahead log's last generation."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.newest: dict[int, int] = {}
        """The last frame of each page."""
        self.damaged: set[int] = set()
        """Frames that are damaged, or that cannot be verified because the frame before is damaged."""
        self.size = 0
        """Number of pages of the database after the last commit; 0 if unknown."""
        self._pages: list[tuple[int, int]] = []
        header = os.pread(self._file, _LOG_HEADER_BYTES, 0).ljust(_LOG_HEADER_BYTES, b"\0")
        order = ">" if header[3] & 1 else "<"
        before = struct.unpack(">II", header[24:32])
        whole = header[:3] == _LOG_MAGIC and _checksum(header[:24], (0, 0), order) == before
        # If the header is damaged, the salts of the first intact frame.
        salts = header[16:24] if whole else None
        uncommitted: list[tuple[int, int]] = []
        for frame in range((os.fstat(self._file).st_size - _LOG_HEADER_BYTES) // _FRAME_BYTES):
            data = os.pread(self._file, _FRAME_BYTES, self._offset(frame))
            page, commit = struct.unpack(">II", data[:8])
            found = struct.unpack(">II", data[16:24])
            whole = _checksum(data[_FRAME_HEADER_BYTES:], _checksum(data[:8], before, order), order) == found
            before = found
            salts = data[8:16] if salts is None and whole else salts
            if salts is not None and data[8:16] != salts:
                continue  # from an earlier generation that is not overwritten yet, or its header is damaged
            if not whole:
                self.damaged.add(frame)
            uncommitted.append((page, frame))
            if commit:
                self._pages += uncommitted
                uncommitted.clear()
                self.size = commit if whole else 0
        self.newest = {page: frame for page, frame in self._pages if page}

    def older(self, page: int) -> list[int]:
        """Returns the frames of a page before its newest one, the later one first."""
        return [frame for number, frame in reversed(self._pages) if number == page][1:]

    def page(self, frame: int) -> bytes:
        return os.pread(self._file, PAGE_BYTES, self._offset(frame) + _FRAME_HEADER_BYTES)

    def close(self) -> None:
        os.close(self._file)

    @staticmethod
    def _offset(frame: int) -> int:
        return _LOG_HEADER_BYTES + frame * _FRAME_BYTES


def _weights(pairs: int) -> np.ndarray:
    """Returns the weight of each pair of words in the two sums of a checksum, [2, 2, pairs] uint32, modulo 2**32."""
    # Each pair (x1, x2) maps (s1, s2) to (s1 + s2 + x1, s1 + 2 s2 + x1 + x2), so weights are Fibonacci numbers, growing from the last pair
    # to the first.
    weights = np.empty((2, 2, pairs), np.uint32)
    columns = [(1, 1), (0, 1)]  # the weights of x1 and x2 of the last pair in s1 and s2
    for pair in range(pairs - 1, -1, -1):
        for word, (one, two) in enumerate(columns):
            weights[:, word, pair] = one, two
        columns = [((one + two) % 2**32, (one + 2 * two) % 2**32) for one, two in columns]
    return weights


_WEIGHTS = {size: _weights(size // 8) for size in (8, 24, PAGE_BYTES)}


def _checksum(data: bytes, seed: tuple[int, int], order: str) -> tuple[int, int]:
    """Returns SQLite's running checksum of the log (section 4.2) after these bytes.

    Args:
        data: the bytes, of one of the sizes in ``_WEIGHTS``.
        seed: the checksum before them.
        order: byte order of the log, ``<`` or ``>``.
    """
    words = np.frombuffer(data, f"{order}u4").astype(np.uint32).reshape(-1, 2)
    # The seed has the same weight as if it were added to the first pair.
    words[0] += np.array(((seed[0] + seed[1]) % 2**32, seed[1]), np.uint32)
    one, two = (_WEIGHTS[len(data)] * words.T).sum(axis=(1, 2), dtype=np.uint64)
    return int(one) % 2**32, int(two) % 2**32


def _cells(page: bytes) -> Iterator[Cell]:
    """Yields the cells of a page that has rows, except for impossible ones."""
    kind = page[0]
    if kind not in (_TABLE_LEAF, _INDEX_LEAF, _INDEX_INTERIOR):
        return
    count, begin = int.from_bytes(page[3:5]), 12 if kind == _INDEX_INTERIOR else 8
    if count > (PAGE_BYTES - begin) // 6:
        return
    most = _MOST_LOCAL_TABLE if kind == _TABLE_LEAF else _MOST_LOCAL_INDEX
    for (position,) in struct.iter_unpack(">H", page[begin : begin + 2 * count]):
        rowid = None
        try:
            size, at = _varint(page, position + 4 if kind == _INDEX_INTERIOR else position)
            if kind == _TABLE_LEAF:
                rowid, at = _varint(page, at)
        except IndexError:
            continue
        local = size
        if size > most:
            local = _LEAST_LOCAL + (size - _LEAST_LOCAL) % (PAGE_BYTES - 4)
            local = local if local <= most else _LEAST_LOCAL
        end = at + local
        if end + 4 * (local < size) > PAGE_BYTES:
            continue
        yield Cell(rowid, size, page[at:end], int.from_bytes(page[end : end + 4]) if local < size else 0)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Returns a variable-length integer of one to nine bytes, signed, and the position behind it; raises IndexError if it is truncated."""
    value = 0
    for end in range(at + 1, at + 9):
        byte = data[end - 1]
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, end
    value = value << 8 | data[at + 8]
    return value - (1 << 64) if value >= 1 << 63 else value, at + 9


def _values(record: bytes) -> list[Value]:
    """Returns the values of a record, except for truncated ones at its end; raises ValueError if it is malformed."""
    try:
        head, at = _varint(record, 0)
        kinds = []
        while at < head:
            kind, at = _varint(record, at)
            kinds.append(kind)
    except IndexError:
        raise ValueError("not a record") from None
    values: list[Value] = []
    for kind in kinds:
        if kind in (10, 11) or kind < 0:
            raise ValueError("not a record")
        size = (kind - 12) // 2 if kind >= 12 else 8 if kind == 7 else _INT_BYTES[kind] if kind <= 6 else 0
        data = record[at : at + size]
        at += size
        if len(data) < size:
            break
        if kind >= 12:
            values.append(data.decode() if kind % 2 else data)
        elif kind == 7:
            values.append(struct.unpack(">d", data)[0])
        else:
            values.append(None if kind == 0 else kind - 8 if kind >= 8 else int.from_bytes(data, signed=True))
    return values
