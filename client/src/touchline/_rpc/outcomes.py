"""Errors after which it is not known whether an episode is stored."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from touchline.errors import DeadlineError, ServerError, TlsError, UnavailableError
from touchline_protos.codec import EpisodeKey


@contextlib.contextmanager
def outcome_told(key: EpisodeKey) -> Iterator[None]:
    """Has an error after which it is not known whether an episode is stored say so, and under which key to add it again."""
    try:
        yield
    except TlsError:
        raise  # nothing was sent
    except (UnavailableError, DeadlineError, ServerError) as error:
        error.key = key
        error.args = (f"{error}; the episode may have been stored: add it again with key={key!r}, which stores it once",)
        raise
