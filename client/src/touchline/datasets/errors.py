"""Errors of data sets, a branch of the client's tree::

TouchlineError
└── DatasetError                  a source or a target cannot be read or written; the server is not involved
    └── UnsupportedEpisodeError   the target's format cannot represent this one episode
"""

from touchline.errors import TouchlineError


class DatasetError(TouchlineError):
    """A source cannot be read, or a target cannot be written. The message names it, says what was found, and what to do."""


class UnsupportedEpisodeError(DatasetError):
    """The target's format cannot represent this episode. An export skips it and goes on with the others."""
