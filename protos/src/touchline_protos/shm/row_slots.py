"""The slots of a ring in which the server writes row numbers instead of bodies: see ``RowsSetup`` in the ``.proto``."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

_ALIGNMENT = 64
_INT64 = np.dtype("<i8")


class RowSlots(NamedTuple):
    """Where the row numbers and the provenance stand in a slot."""

    batch_size: int
    """B, slices in a batch."""
    tables: int
    """Number of tables."""
    provenance_bytes: int
    """Bytes of a body from its first tensor of the provenance on."""

    @property
    def provenance_offset(self) -> int:
        """Position of these bytes in a slot."""
        return self.slices_offset + _padded(8 * self.tables)

    @property
    def slices_offset(self) -> int:
        """Position of the number of slices of each table in a slot."""
        return _padded(16 * self.batch_size)

    @property
    def size_bytes(self) -> int:
        """Bytes of a slot that are in use."""
        return self.provenance_offset + self.provenance_bytes

    def rows(self, memory: Any, offset_bytes: int = 0) -> np.ndarray:
        """Returns the row numbers of the slot at ``offset_bytes``, [2, B] int64: a view.

        Step t of a slice is row ``rows[0] + min(t, rows[1])``, less its table's number of rows if it is not less than these.
        """
        return np.ndarray((2, self.batch_size), _INT64, memory, offset_bytes)

    def slices(self, memory: Any, offset_bytes: int = 0) -> np.ndarray:
        """Returns the number of consecutive slices of each table in the slot at ``offset_bytes``, [tables] int64: a view."""
        return np.ndarray((self.tables,), _INT64, memory, offset_bytes + self.slices_offset)


def _padded(size_bytes: int) -> int:
    return -(-size_bytes // _ALIGNMENT) * _ALIGNMENT
