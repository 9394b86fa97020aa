"""Recipient of the episodes that a sender sends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from touchline.errors import EpisodeResult, TouchlineError
from touchline_protos.codec import Episode, EpisodeKey


class EpisodeRecipient(Protocol):
    """Part of :class:`~touchline.ReplayClient` that a sender uses."""

    @property
    def address(self) -> str:
        """Address of the server, for log lines."""

    @property
    def timeout_s(self) -> float:
        """Longest wait of an orderly close."""

    def deliver(self, episode: Episode, *, table: str) -> None:
        """Stores one episode in a table, under the key that it carries."""

    def deliver_all(self, episodes: Iterable[tuple[EpisodeKey, Episode | TouchlineError]], *, table: str) -> Iterator[list[EpisodeResult]]:
        """Stores episodes in a table, under the keys that they carry, and yields the results of each call."""
