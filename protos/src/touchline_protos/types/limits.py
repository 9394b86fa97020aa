"""Limits that both sides know: the one place where their numbers stand. Those of names are in :mod:`.names`."""

from __future__ import annotations

DEFAULT_MAX_MESSAGE_BYTES = 64 << 20
"""Largest message, by default, in either direction; what is larger travels in chunks."""

MAX_REQUEST_BYTES = 2 << 20
"""Largest message to a server: every server accepts it, unless its limit on messages is lower, and none reserves memory for much more."""

DEFAULT_MAX_EPISODE_BYTES = 1 << 30
"""Largest episode, by default, summed over its columns."""

DEFAULT_MAX_COLUMNS = 256
"""Largest number of columns in an episode, by default."""

SLOWEST_UPLOAD_BYTES_PER_S = 4 << 20
"""Lowest rate at which an upload is waited for: the client's deadlines and the server's patience both allow for it."""
