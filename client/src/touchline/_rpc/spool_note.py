"""What a call with episodes says of the spool that they come from, for the status of the server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from touchline_protos.types.metadata import SPOOL_METADATA_KEY

_note: ContextVar[tuple[tuple[str, str], ...]] = ContextVar("touchline_spool_note", default=())


@contextmanager
def from_spool(episodes: int, size_bytes: int) -> Iterator[None]:
    """Adds a note to the calls that this thread makes in the block.

    Args:
        episodes: number of episodes that wait in the spool besides those of the call.
        size_bytes: bytes that the spool occupies on disk.
    """
    token = _note.set(((SPOOL_METADATA_KEY, f"{max(episodes, 0)},{size_bytes}"),))
    try:
        yield
    finally:
        _note.reset(token)


def spool_metadata() -> tuple[tuple[str, str], ...]:
    """Returns the note as metadata; empty outside of such a block."""
    return _note.get()
