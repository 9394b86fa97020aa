"""The process of a learner that takes its batches from a server in another process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from benchmarks.local import batch_columns
from benchmarks.protocol import serve
from benchmarks.timing import SliceTimer
from benchmarks.workloads import WORKLOADS, Content
from touchline import ReplayClient
from touchline_protos import Batch

PREFETCH = 16
"""Batches that may be in flight for a stream or a ring if a batch is small."""

MAX_PREFETCH_BYTES = 160 << 20
"""Size of the batches in flight; at least 2 may be."""


def open_stream(client: ReplayClient, *, path: str, prefetch: int, device: str | None = None) -> Iterator[Batch]:
    """Returns a client's batches, of which one was taken, so that they are in flight.

    Args:
        client: client of the server.
        path: ``stream``, ``ring`` or ``device``.
        prefetch: number of batches in flight.
        device: device that batches are copied to; None leaves them on the host.

    Raises:
        RuntimeError: they come on another path.
    """
    # The old argument where it means the same, since `benchmarks compare` runs this with older clients too.
    old = path == "stream" or (path == "ring" and device is None)
    options: dict[str, Any] = {"ring": path == "ring"} if old else {"transport": path}
    stream = client.batches(prefetch=prefetch, device=device, **options)
    first = next(stream)
    if stream.transport != path:
        raise RuntimeError(f"batches come by {stream.transport!r}, expected {path!r}: {stream.transport_reason}")
    del first
    return stream


class RemoteSubject:
    """Batches of a server, as arrays.

    Args:
        address: the server's address.
        content: the rows that the server stores.
        path: ``unary``, ``stream`` or ``ring``.
        prefetch: number of batches in flight; 0 leaves it to :data:`PREFETCH`.
    """

    def __init__(self, address: str, content: Content, *, path: str, prefetch: int = 0) -> None:
        self.content = content
        self._path = path
        self.client = ReplayClient(address, as_numpy=True, timeout_s=60.0)
        """The learner's client."""
        self._batches: Iterator[Batch] | None = None
        fitting = max(MAX_PREFETCH_BYTES // content.workload.batch_bytes, 2)
        self.prefetch = prefetch or min(PREFETCH, fitting)

    def take(self) -> Batch:
        """Returns the next batch."""
        if self._path == "unary":
            return self.client.sample()
        if self._batches is None:
            self._batches = open_stream(self.client, path=self._path, prefetch=self.prefetch)
        return next(self._batches)

    def noted(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """Returns obs and reward."""
        return batch.obs, batch.reward

    def arrays(self, batch: Batch) -> Mapping[str, np.ndarray]:
        """Returns the batch's arrays."""
        return batch_columns(batch)


class Learner:
    """Holds subjects by name; makes and runs those that the driver asks for."""

    def __init__(self) -> None:
        self._timers: dict[str, SliceTimer] = {}

    def make(self, name: str, *, address: str, workload: str, rows: int, path: str, prefetch: int = 0) -> dict[str, int]:
        """Makes a subject as ``name``."""
        subject = RemoteSubject(address, Content(WORKLOADS[workload].resized(rows)), path=path, prefetch=prefetch)
        self._timers[name] = SliceTimer(subject)
        return {"prefetch": 1 if path == "unary" else subject.prefetch}

    def run(self, name: str, *, seconds: float, server_pid: int) -> dict[str, float]:
        """Runs a slice; see :meth:`SliceTimer.run`."""
        return self._timers[name].run(seconds, server_pid=server_pid)

    def methods(self) -> dict[str, Any]:
        """Returns the methods that the driver may call."""
        return {"make": self.make, "run": self.run}


if __name__ == "__main__":
    serve(Learner().methods())
