"""Touchline's server side: the in-process replay buffer, and the service that serves it.

>>> from touchline_server import ReplayBuffer, read_cfg
>>> buffer = ReplayBuffer(read_cfg())
"""

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from touchline_protos import Batch, Counts
    from touchline_protos.codec import StoredEpisode
    from touchline_server.buffer import ReplayBuffer
    from touchline_server.config.settings import Config, ConfigError, read_cfg
    from touchline_server.errors import (
        DamagedStoreError,
        DrainingError,
        IncompatibleVersionError,
        InvalidArgumentError,
        InvalidEpisodeError,
        KeyConflictError,
        NotReadyError,
        OverLimitError,
        ReplayError,
        RestoringError,
        SchemaChangedError,
        StorageFailedError,
        StorageFullError,
        StorageUncertainError,
        StoreInUseError,
        StoreMismatchError,
        TooLargeError,
        UnavailableError,
        UnknownEpisodeError,
        UnknownTableError,
    )

__version__ = "0.2.0"

__all__ = [
    "Batch",
    "Config",
    "ConfigError",
    "Counts",
    "DamagedStoreError",
    "DrainingError",
    "IncompatibleVersionError",
    "InvalidArgumentError",
    "InvalidEpisodeError",
    "KeyConflictError",
    "NotReadyError",
    "OverLimitError",
    "ReplayBuffer",
    "ReplayError",
    "RestoringError",
    "SchemaChangedError",
    "StorageFailedError",
    "StorageFullError",
    "StorageUncertainError",
    "StoreInUseError",
    "StoreMismatchError",
    "StoredEpisode",
    "TooLargeError",
    "UnavailableError",
    "UnknownEpisodeError",
    "UnknownTableError",
    "__version__",
    "read_cfg",
]

_ELSEWHERE = {
    "Batch": "touchline_protos",
    "Counts": "touchline_protos",
    "StoredEpisode": "touchline_protos.codec",
    "ReplayBuffer": "touchline_server.buffer",
    "Config": "touchline_server.config.settings",
    "ConfigError": "touchline_server.config.settings",
    "read_cfg": "touchline_server.config.settings",
}
"""Module of each name; all other names are errors."""


def __getattr__(name: str) -> Any:
    # Imported on first use: a health check, `--help` and a server's first line need neither numpy nor pydantic.
    if name not in __all__:
        errors = import_module("touchline_server.errors")
        if name not in errors.RENAMED:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        warnings.warn(f"touchline_server.{name} is now {errors.RENAMED[name]}", DeprecationWarning, stacklevel=2)
        return getattr(errors, errors.RENAMED[name])
    value = getattr(import_module(_ELSEWHERE.get(name, "touchline_server.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
