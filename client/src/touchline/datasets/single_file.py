"""Base class of sources that are one open file, whatever its format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from touchline.datasets.size_limit import SizeCounter, SizeLimit
from touchline.datasets.source import DatasetEpisode, Digest


class Closable(Protocol):
    """An open file, as the format's package represents it."""

    def close(self) -> None: ...


File = TypeVar("File", bound=Closable)


class SingleFileSource(ABC, Generic[File]):
    """The episodes of one file, each under its own name; see :class:`~touchline.datasets.source.Source`.

    Args:
        path: path of the file.
        file: the open file; closed with the source.
        names: names of the episodes, in order.
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
            yield self._read(position, self._names[position], limit.counter())

    def fingerprint(self, digest: Digest) -> None:
        digest.add_file(self._path)

    def close(self) -> None:
        self._file.close()

    @abstractmethod
    def _read(self, position: int, name: str, counter: SizeCounter) -> DatasetEpisode:
        """Reads one episode, and returns it or the error that prevents it.

        Args:
            position: position of the episode.
            name: name of the episode in the file.
            counter: counts each column before it is read.
        """
