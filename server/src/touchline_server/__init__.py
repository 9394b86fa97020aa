"""Touchline's server side: the in-process replay buffer, and the service that serves it.

>>> from touchline_server import ReplayBuffer, read_cfg
>>> buffer = ReplayBuffer(read_cfg())
"""

from typing import TYPE_CHECKING, Any

from touchline_protos import Batch, Counts
from touchline_protos.codec import StoredEpisode
from touchline_server.config import Config, ConfigError, read_cfg
from touchline_server.errors import (
    DamagedStoreError,
    DrainingError,
    IncompatibleVersionError,
    InvalidEpisodeError,
    InvalidRequestError,
    KeyConflictError,
    NotReadyError,
    OverloadedError,
    ReplayError,
    RestoringError,
    SchemaChangedError,
    StorageFailedError,
    StorageFullError,
    StoreInUseError,
    StoreMismatchError,
    TooLargeError,
    UnknownEpisodeError,
    UnknownTableError,
)

if TYPE_CHECKING:
    from touchline_server.buffer import ReplayBuffer

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "Config",
    "ConfigError",
    "Counts",
    "DamagedStoreError",
    "DrainingError",
    "IncompatibleVersionError",
    "InvalidEpisodeError",
    "InvalidRequestError",
    "KeyConflictError",
    "NotReadyError",
    "OverloadedError",
    "ReplayBuffer",
    "ReplayError",
    "RestoringError",
    "SchemaChangedError",
    "StorageFailedError",
    "StorageFullError",
    "StoreInUseError",
    "StoreMismatchError",
    "StoredEpisode",
    "TooLargeError",
    "UnknownEpisodeError",
    "UnknownTableError",
    "__version__",
    "read_cfg",
]


def __getattr__(name: str) -> Any:
    # The buffer brings torch and torchrl: seconds that `touchline-server healthcheck` and `--help` have no use for.
    if name == "ReplayBuffer":
        from touchline_server.buffer import ReplayBuffer

        return ReplayBuffer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
