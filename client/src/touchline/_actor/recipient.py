"""Who takes the episodes that a writer sends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from touchline.errors import EpisodeResult, TouchlineError
from touchline_protos.codec import Episode, EpisodeKey


class EpisodeRecipient(Protocol):
    """What :class:`~touchline.ReplayClient` is to a sender."""

    @property
    def address(self) -> str:
        """Of the server, for the log."""

    @property
    def timeout_s(self) -> float:
        """How long an orderly end waits."""

    def deliver(self, episode: Episode) -> None:
        """Stores one episode, under the key that it carries."""

    def deliver_all(self, episodes: Iterable[tuple[EpisodeKey, Episode | TouchlineError]]) -> Iterator[list[EpisodeResult]]:
        """Stores episodes that already carry their keys, and yields what became of them, call by call."""
