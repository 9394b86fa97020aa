"""Touchline's client: a networked replay buffer for learners and actors.

An actor sends steps, which become episodes::

    with ReplayClient("replay-host:50051", actor="left-foot") as client, EpisodeWriter(client) as writer:
        writer.append({"obs": obs})  # the reset observation
        while not done:
            ...
            writer.append({"obs": obs, "action": action, "reward": reward, "done": done})
        writer.end_episode()

A learner gets batches of B slices of H transitions each, time-major::

    with ReplayClient("replay-host:50051") as client:
        client.wait_until_ready()
        for obs, action, reward, done in client.batches(batch_size=256, horizon=3):
            ...  # obs [H+1, B, *obs_shape], action [H, B, A], reward and done [H, B, 1]

Stored episodes are read back with ``client.episodes()``. Every error that the package raises is a :class:`TouchlineError`; the tree is in
:mod:`touchline.errors`. Importing the package loads neither torch nor tensordict: batches are tensors if torch is installed.
"""

import touchline._rpc.fork  # noqa: F401  must come before the first import of grpc
from touchline._learner.episodes import EpisodeStream
from touchline._learner.stream import BatchStream
from touchline._rpc.credentials import TlsConfig
from touchline._rpc.status_verbs import StatusWatch
from touchline.client import ReplayClient
from touchline.errors import (
    AccessDeniedError,
    ClosedError,
    DeadlineError,
    EpisodeResult,
    ForkError,
    IncompatibleVersionError,
    InvalidArgumentError,
    InvalidEpisodeError,
    KeyConflictError,
    LoadError,
    NotReadyError,
    OverLimitError,
    ServerError,
    SpoolError,
    TlsError,
    TooLargeError,
    TouchlineError,
    UnacknowledgedError,
    UnauthenticatedError,
    UnavailableError,
    UnknownEpisodeError,
    UnknownTableError,
)
from touchline.types import (
    ColumnInfo,
    HeldCaller,
    PriorityCounters,
    RateInfo,
    ReadyState,
    ServerInfo,
    ServerStatus,
    TableInfo,
    WriterCounters,
)
from touchline.writer import EpisodeWriter
from touchline_protos import Batch, Counts
from touchline_protos.codec import EpisodeKey, StoredEpisode

__version__ = "0.2.0"

__all__ = [
    "AccessDeniedError",
    "Batch",
    "BatchStream",
    "ClosedError",
    "ColumnInfo",
    "Counts",
    "DeadlineError",
    "EpisodeKey",
    "EpisodeResult",
    "EpisodeStream",
    "EpisodeWriter",
    "ForkError",
    "HeldCaller",
    "IncompatibleVersionError",
    "InvalidArgumentError",
    "InvalidEpisodeError",
    "KeyConflictError",
    "LoadError",
    "NotReadyError",
    "OverLimitError",
    "PriorityCounters",
    "RateInfo",
    "ReadyState",
    "ReplayClient",
    "ServerError",
    "ServerInfo",
    "ServerStatus",
    "SpoolError",
    "StatusWatch",
    "StoredEpisode",
    "TableInfo",
    "TlsConfig",
    "TlsError",
    "TooLargeError",
    "TouchlineError",
    "UnacknowledgedError",
    "UnauthenticatedError",
    "UnavailableError",
    "UnknownEpisodeError",
    "UnknownTableError",
    "WriterCounters",
    "__version__",
]
