"""What can go wrong with a data set, as one tree::

TouchlineError
└── DatasetError            a source or a target that cannot be read or written; nothing of a server
    └── UnholdableError     a target's format cannot hold this one episode
"""

from touchline.errors import TouchlineError


class DatasetError(TouchlineError):
    """A source cannot be read, or a target cannot be written. The message names it, what was found and what to do."""


class UnholdableError(DatasetError):
    """The format of a target cannot hold this episode, but others."""
