"""A source of episodes that is one open file, whatever its format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from touchline.datasets.size_limit import SizeCounter, SizeLimit
from touchline.datasets.source import DatasetEpisode, Digest


class Closable(Protocol):
    """What a format's package has open."""

    def close(self) -> None: ...


File = TypeVar("File", bound=Closable)


class SingleFileSource(ABC, Generic[File]):
    """Episodes of one file, each under a name in it; see :class:`~touchline.datasets.source.Source`.

    Args:
        path: of the file.
        file: it, open; closed with the source.
        names: of the episodes, in their order.
    """

    def __init__(self, path: Path, file: File, names: Sequence[str]) -> None:
        self._path = path
        self._file = file
        self._names = names

    @property
    def size_bytes(self) -> int:
        return self._path.stat().st_size

    def __len__(self) -> int:
        return len(self._names)

    def episodes(self, first: int = 0, *, incoming: bool = True, limit: SizeLimit | None = None) -> Iterator[DatasetEpisode]:
        limit = limit or SizeLimit()
        for position in range(first, len(self._names)):
            yield self._read(position, self._names[position], limit.tally())

    def fingerprint(self, digest: Digest) -> None:
        digest.add_file(self._path)

    def close(self) -> None:
        self._file.close()

    @abstractmethod
    def _read(self, position: int, name: str, tally: SizeCounter) -> DatasetEpisode:
        """Returns the episode of a name, with the error where it cannot be read; what it announces is counted before it is read."""
