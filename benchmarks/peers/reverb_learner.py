"""The process of a learner that takes its batches from Reverb."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import reverb  # type: ignore[import-not-found]

from benchmarks.peers.reverb_tables import item_signature, unpack
from benchmarks.protocol import serve
from benchmarks.timing import SliceTimer
from benchmarks.workloads import WORKLOADS, Content

Columns = dict[str, np.ndarray]


class ReverbSubject:
    """Batches of a Reverb table, [B, H+1, ...] as Reverb has them: making them time-major would cost it a copy more.

    Args:
        address: the server's address.
        content: the rows that the server stores.
        table: table to sample from.
        packed: whether all columns are packed into one.
        sampler: ``dataset`` (a ``TrajectoryDataset`` whose items TensorFlow batches) or ``client`` (``Client.sample``).
        workers: threads of a dataset that fetch.
        in_flight: items that each of them requests at a time.
    """

    def __init__(self, address: str, content: Content, *, table: str, packed: bool, sampler: str, workers: int, in_flight: int) -> None:
        self.content = content
        self._address, self._table, self._packed = address, table, packed
        self._workers, self._in_flight = workers, in_flight
        self._batches: Iterator[Columns] = self._dataset() if sampler == "dataset" else self._client()

    def take(self) -> Columns:
        """Returns the next batch."""
        return next(self._batches)

    def noted(self, batch: Columns) -> tuple[np.ndarray, np.ndarray]:
        """Returns obs and reward, time-major, as views."""
        return batch["obs"].swapaxes(0, 1), batch["reward"][:, 1:].T

    def arrays(self, batch: Columns) -> Mapping[str, np.ndarray]:
        """Returns the batch, time-major, rows 1..H of action, reward and done."""
        later = {name: batch[name].swapaxes(0, 1)[1:] for name in ("action", "reward", "done")}
        return {"obs": np.ascontiguousarray(batch["obs"].swapaxes(0, 1)), **later}

    def _dataset(self) -> Iterator[Columns]:
        workload = self.content.workload
        signature = item_signature(workload, packed=self._packed)
        dataset = reverb.TrajectoryDataset(
            server_address=self._address,
            table=self._table,
            dtypes={name: spec.dtype for name, spec in signature.items()},
            shapes={name: spec.shape for name, spec in signature.items()},
            max_in_flight_samples_per_worker=self._in_flight,
            num_workers_per_iterator=self._workers,
        )
        batches = dataset.batch(workload.batch_size, drop_remainder=True).prefetch(2)
        for sample in batches.as_numpy_iterator():
            yield unpack(workload, sample.data, packed=self._packed)

    def _client(self) -> Iterator[Columns]:
        workload = self.content.workload
        client = reverb.Client(self._address)
        names = list(item_signature(workload, packed=self._packed))
        while True:
            samples = client.sample(self._table, workload.batch_size, emit_timesteps=False, unpack_as_table_signature=True)
            rows: dict[str, list[np.ndarray]] = {name: [] for name in names}
            for sample in samples:
                for name in names:
                    rows[name].append(sample.data[name])
            yield unpack(workload, {name: np.stack(some) for name, some in rows.items()}, packed=self._packed)


class Learner:
    """Holds subjects by name; makes and runs those that the driver asks for."""

    def __init__(self) -> None:
        self._timers: dict[str, SliceTimer] = {}

    def make(self, name: str, *, address: str, workload: str, rows: int, **options: Any) -> None:
        """Makes a subject as ``name``; options as :class:`ReverbSubject` has them."""
        subject = ReverbSubject(address, Content(WORKLOADS[workload].resized(rows)), **options)
        self._timers[name] = SliceTimer(subject)

    def run(self, name: str, *, seconds: float, server_pid: int) -> dict[str, float]:
        """Runs a slice; see :meth:`SliceTimer.run`."""
        return self._timers[name].run(seconds, server_pid=server_pid)

    def drop(self, name: str) -> None:
        """Removes a subject and closes what it had open."""
        del self._timers[name]


if __name__ == "__main__":
    learner = Learner()
    serve({"make": learner.make, "run": learner.run, "drop": learner.drop})
