"""Memory of refused episodes, so that an episode that is sent again and again counts once."""

from __future__ import annotations

from collections import OrderedDict

from touchline_protos.codec import Episode, EpisodeKey
from touchline_server.store.dedup import payload_digest

MAX_REMEMBERED = 4096
"""Number of refused episodes remembered, the most recent ones."""


class RefusedEpisodes:
    """Refused episodes by key and payload digest. Not thread-safe: the store holds its lock."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[EpisodeKey, int], None] = OrderedDict()

    def is_new(self, refused: tuple[EpisodeKey, int] | None) -> bool:
        """Adds a refusal; returns whether it is the episode's first. None, an episode without a key, is always new."""
        if refused is None:
            return True
        if refused in self._known:
            self._known.move_to_end(refused)
            return False
        self._known[refused] = None
        if len(self._known) > MAX_REMEMBERED:
            self._known.popitem(last=False)
        return True


def identify(episode: Episode | None) -> tuple[EpisodeKey, int] | None:
    """Returns the key and payload digest of an episode, which may be malformed; None if it has no key."""
    if episode is None or episode.key is None:
        return None
    return episode.key, payload_digest(episode.columns)
