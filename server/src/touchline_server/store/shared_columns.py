"""Columns that other processes of this host read: one memory a table, in which each column has a place.

On the host it is a sealed memory file, which no one but the server can write. On a CUDA device it is an allocation that other processes
open by CUDA IPC.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping
from typing import Literal, NamedTuple

from touchline_protos.shm import sealed_memory
from touchline_server.store.schema import Schema

PAGE_BYTES = 1 << 12
"""Alignment of a column's place."""

HUGE_PAGE_BYTES = 1 << 21
"""Alignment of the place of a column that is at least this large."""


class SharedColumn(NamedTuple):
    """Where a column lies in the shared memory: row after row, without gaps."""

    offset_bytes: int
    """Position of its first row."""
    size_bytes: int
    """Bytes of all rows."""
    row_bytes: int
    """Bytes of a row."""


class SharedColumns:
    """What a learner needs to read a table's columns.

    The memory stays what it is as long as this object or a learner's mapping lives, also after the columns were released: keep the object,
    not only the descriptor or the handle.

    Args:
        columns: place of each column, by its dotted name.
        size_bytes: size of the memory that a learner maps.
        descriptor: descriptor of the memory file, from now on this object's.
        handle: the CUDA IPC handle.
        device_uuid: UUID of the CUDA device.
        owner: what keeps the device memory allocated.
    """

    def __init__(
        self,
        columns: Mapping[str, SharedColumn],
        size_bytes: int,
        *,
        descriptor: int = -1,
        handle: bytes = b"",
        device_uuid: str = "",
        owner: object = None,
    ) -> None:
        self.columns = dict(columns)
        """Place of each column, by its dotted name; columns without bytes are left out."""
        self.size_bytes = size_bytes
        """Size of the memory that a learner maps."""
        self.kind: Literal["host", "cuda"] = "cuda" if handle else "host"
        """The kind of memory."""
        self.descriptor = descriptor
        """File descriptor of host memory, which can be mapped only to read; -1 for CUDA memory. Never close it."""
        self.handle = handle
        """CUDA IPC handle of the allocation, 64 bytes; empty for host memory."""
        self.device_uuid = device_uuid
        """The CUDA device's UUID, ``GPU-...``; empty for host memory."""
        self._owner = owner
        if descriptor >= 0:
            weakref.finalize(self, os.close, descriptor)


def place_columns(schema: Schema, rows: int) -> tuple[dict[str, SharedColumn], int]:
    """Returns a place for each column that has bytes, in the schema's order, and the size of the memory that they need."""
    places: dict[str, SharedColumn] = {}
    end = 0
    for spec in schema.columns:
        size_bytes = rows * spec.row_bytes
        if size_bytes:
            alignment = HUGE_PAGE_BYTES if size_bytes >= HUGE_PAGE_BYTES else PAGE_BYTES
            offset = -(-end // alignment) * alignment
            places[spec.name] = SharedColumn(offset, size_bytes, spec.row_bytes)
            end = offset + size_bytes
    return places, end


def share_host_memory(schema: Schema, rows: int, *, writable: bool = False) -> tuple[memoryview, SharedColumns]:
    """Returns memory for columns, zero-filled, that learners can map: as the server writes it, and as they read it.

    Args:
        schema: the columns.
        rows: number of rows.
        writable: whether learners may write it too, see ``storage.share_columns``.

    Raises:
        OSError: not enough memory, or the system has no sealed memory files.
    """
    places, size_bytes = place_columns(schema, rows)
    make = sealed_memory.make_writable if writable else sealed_memory.make_read_only
    memory, descriptor = make("touchline-columns", max(size_bytes, 1))
    return memory, SharedColumns(places, len(memory), descriptor=descriptor)
