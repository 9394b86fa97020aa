"""What every format speaks of: a source of episodes, and its episodes."""

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
"""What is read of a file at a time."""


@dataclass(frozen=True, slots=True)
class DatasetEpisode:
    """One episode of a source."""

    position: int
    """In the source, from 0."""
    columns: Mapping[str, Any]
    """Arrays or tensors [rows, ...] by name, perhaps nested. They may share the source's memory, until it is closed."""
    key: EpisodeKey | None = None
    """That it was stored under, where the source says so."""
    actor: str = ""
    """Who played it, where the source says so."""
    policy_version: int = 0
    """Of the policy that acted, where the source says so."""
    error: TouchlineError | None = None
    """Why it could not be read; there are no columns then."""


class Digest:
    """The fingerprint of what a source consists of, by its content alone: renaming changes nothing, changing a byte does.

    Args:
        progress: called with the number of bytes that went in since the last call.
    """

    def __init__(self, progress: Callable[[int], None]) -> None:
        self._progress = progress
        self._hash = blake2b(digest_size=16)

    def add(self, data: bytes) -> None:
        """Takes a value in, apart from its neighbours."""
        self._hash.update(len(data).to_bytes(8, "little"))
        self._hash.update(data)

    def add_file(self, path: Path) -> None:
        """Takes a file's content in, block by block."""
        self._hash.update(path.stat().st_size.to_bytes(8, "little"))
        with path.open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                self._hash.update(block)
                self._progress(len(block))

    def hex(self) -> str:
        """Returns it, 32 digits."""
        return self._hash.hexdigest()


class Source(Protocol):
    """Episodes in a file or folder. For one thread; closed by whoever opened it."""

    @property
    def format(self) -> str:
        """Name of the format."""

    @property
    def size_bytes(self) -> int:
        """Of its files."""

    @property
    def row_convention(self) -> str | None:
        """That its rows are in; None where they are made as they are wanted."""

    def __len__(self) -> int:
        """Number of episodes."""

    def episodes(self, first: int = 0, *, incoming: bool = True, limit: SizeLimit | None = None) -> Iterator[DatasetEpisode]:
        """Yields the episodes one by one from position ``first`` on; one that cannot be read is yielded with its error.

        Args:
            first: position of the first one.
            incoming: the row convention that rows are made in, where they are made.
            limit: an episode that announces more is yielded with an error, and not read; columns that its changes leave out need not be
                read either. None: 1 GiB.
        """

    def fingerprint(self, digest: Digest) -> None:
        """Puts all content that its episodes come from into the digest."""

    def close(self) -> None:
        """Lets go of its files."""


def escape(name: str) -> str:
    """Returns a name that has neither ``/`` nor NUL, which HDF5 gives a meaning of its own; see :func:`unescape`."""
    return name.replace("%", "%25").replace("/", "%2F").replace("\0", "%00")


def unescape(name: str) -> str:
    """Returns the name that :func:`escape` was given."""
    return name.replace("%00", "\0").replace("%2F", "/").replace("%25", "%")
