"""Touchline's server side: the in-process replay buffer, and the service that serves it.

>>> from touchline_server import ReplayBuffer, read_cfg
>>> buffer = ReplayBuffer(read_cfg())
"""

from touchline_protos import Batch, Counts
from touchline_server.buffer import ReplayBuffer
from touchline_server.config import Config, ConfigError, read_cfg
from touchline_server.errors import (
    DrainingError,
    IncompatibleVersionError,
    InvalidEpisodeError,
    InvalidRequestError,
    KeyConflictError,
    NotReadyError,
    OverloadedError,
    ReplayError,
    TooLargeError,
    UnknownTableError,
)

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "Config",
    "ConfigError",
    "Counts",
    "DrainingError",
    "IncompatibleVersionError",
    "InvalidEpisodeError",
    "InvalidRequestError",
    "KeyConflictError",
    "NotReadyError",
    "OverloadedError",
    "ReplayBuffer",
    "ReplayError",
    "TooLargeError",
    "UnknownTableError",
    "__version__",
    "read_cfg",
]
