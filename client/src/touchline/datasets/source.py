"""What all formats have in common on the reading side: a source, its episodes, and a fingerprint of its content."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

from touchline.datasets.size_limit import SizeLimit
from touchline.errors import TouchlineError
from touchline_protos.codec import EpisodeKey

BLOCK_BYTES = 1 << 22
"""Number of bytes that are read from a file at a time."""


@dataclass(frozen=True, slots=True)
class DatasetEpisode:
    """One episode of a source."""

    position: int
    """Position in the source, from 0."""
    columns: Mapping[str, Any]
    """Arrays or tensors [rows, ...] by name, possibly nested. They may share the source's memory, so they are valid until it is closed."""
    key: EpisodeKey | None = None
    """Key under which the episode was stored before; None if the source does not say."""
    actor: str = ""
    """Name of the actor that played it; empty if the source does not say."""
    policy_version: int = 0
    """Version of the policy that acted; 0 if the source does not say."""
    error: TouchlineError | None = None
    """Reason why the episode cannot be read; ``columns`` is empty then. None if it was read."""


class Digest:
    """A fingerprint of a source's content. Renaming a file leaves it as it is; changing a byte changes it. Not thread-safe.

    Args:
        progress: called with the number of file bytes hashed since the last call.
    """

    def __init__(self, progress: Callable[[int], None]) -> None:
        self._progress = progress
        self._hash = blake2b(digest_size=16)

    def add(self, data: bytes) -> None:
        """Hashes a value. Its length goes in first, so ``b"ab", b"c"`` and ``b"a", b"bc"`` differ."""
        self._hash.update(len(data).to_bytes(8, "little"))
        self._hash.update(data)

    def add_file(self, path: Path) -> None:
        """Hashes the content of a file, a block at a time."""
        self._hash.update(path.stat().st_size.to_bytes(8, "little"))
        with path.open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                self._hash.update(block)
                self._progress(len(block))

    def hex(self) -> str:
        """Returns the fingerprint: 32 hexadecimal digits."""
        return self._hash.hexdigest()


class Source(Protocol):
    """The episodes of a file, a folder or a data set, open for reading. Not thread-safe. The caller that opened it closes it."""

    @property
    def format(self) -> str:
        """Name of the format."""

    @property
    def size_bytes(self) -> int:
        """Size of all its files."""

    @property
    def row_convention(self) -> str | None:
        """Convention of its rows, ``incoming`` or ``outgoing``; None if it holds transitions, which become rows of either."""

    def __len__(self) -> int:
        """Returns the number of episodes."""

    def episodes(self, first: int = 0, *, incoming: bool = True, limit: SizeLimit | None = None) -> Iterator[DatasetEpisode]:
        """Yields the episodes in order. One that cannot be read is yielded with its error.

        Args:
            first: position of the first episode.
            incoming: row convention for sources that hold transitions.
            limit: maximum size of an episode; one that announces more is yielded with an error and not read. Columns that its transforms
                drop need not be read either. None is 1 GiB.
        """

    def fingerprint(self, digest: Digest) -> None:
        """Adds all content that the episodes are made of to ``digest``."""

    def close(self) -> None:
        """Closes its files."""


def escape(name: str) -> str:
    """Returns ``name`` without ``/`` and NUL, which mean something else in HDF5. Inverse of :func:`unescape`."""
    return name.replace("%", "%25").replace("/", "%2F").replace("\0", "%00")


def unescape(name: str) -> str:
    """Returns the name that :func:`escape` was given."""
    return name.replace("%00", "\0").replace("%2F", "/").replace("%25", "%")
