"""Errors after which it is unknown whether an episode is stored."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from touchline.errors import DeadlineError, ServerError, TlsError, UnavailableError
from touchline_protos.codec import EpisodeKey


@contextlib.contextmanager
def add_key_if_outcome_unknown(key: EpisodeKey) -> Iterator[None]:
    """Adds the episode's key, and the advice to send it again, to an error after which the episode may or may not be stored."""
    try:
        yield
    except TlsError:
        raise  # nothing was sent
    except (UnavailableError, DeadlineError, ServerError) as error:
        error.key = key
        error.args = (f"{error}; the episode may have been stored: add it again with key={key!r}, which stores it once",)
        raise
