"""The process that measures one checkout of the project for :mod:`benchmarks.compare`.

It imports the product code of that checkout and uses only its public interface, so it can run checkouts of different ages.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import touchline
import touchline_protos
import touchline_server
from benchmarks.learner import RemoteSubject
from benchmarks.local import LocalSubject
from benchmarks.protocol import serve
from benchmarks.servers import ServerProcess
from benchmarks.timing import SliceTimer
from benchmarks.workloads import W1, WORKLOADS, Content
from touchline import ReplayClient

INSERT_ROWS = 200_000
"""Capacity of the stores that inserts go to: filled within the warm-up, so that every insert evicts."""

INSERT_THREADS = 2


class Checkout:
    """The runs of one checkout, by name. Everything is made before the first slice and kept to the end."""

    def __init__(self) -> None:
        self._resources = ExitStack()
        self._runs: dict[str, Callable[[float], float]] = {}

    def where(self) -> list[str]:
        """Returns the folders from which the product code was imported."""
        return [str(Path(str(module.__file__)).parent) for module in (touchline, touchline_protos, touchline_server)]

    def make_local(self, *, rows: int) -> None:
        """Makes ``sample`` and ``add``: a buffer of workload W1 in this process."""
        subject = LocalSubject(Content(W1.resized(rows)))
        timer = SliceTimer(subject)
        self._runs["sample"] = lambda seconds: timer.run(seconds)["batches_per_s"]
        self._runs["add"] = lambda seconds: _rate(subject.add_next, seconds)

    def make_batches(self, *, workload: str, rows: int) -> None:
        """Makes ``<workload> ring`` and ``<workload> stream``: batches of one server of this checkout."""
        content = Content(WORKLOADS[workload].resized(rows))
        server = self._resources.enter_context(ServerProcess(content.workload))
        with ReplayClient(server.address, timeout_s=60.0) as client:
            for tag in content.tags_to_fill(rows):
                client.add(content.episode(tag), policy_version=tag)
        for path in ("ring", "stream"):
            timer = SliceTimer(RemoteSubject(server.address, content, path=path))
            self._runs[f"{workload} {path}"] = lambda seconds, timer=timer: timer.run(seconds)["batches_per_s"]  # type: ignore[misc]

    def make_inserts(self, *, name: str, durability: str) -> None:
        """Makes ``name``: episodes of workload W1 that two threads add, each waiting for its acknowledgements.

        Args:
            name: name of the run.
            durability: ``storage.durability``, or ``none`` for a server without a data_dir.
        """
        data_dir = "" if durability == "none" else tempfile.mkdtemp(prefix="touchline-compare-")
        if data_dir:
            self._resources.callback(shutil.rmtree, data_dir)
        content = Content(W1.resized(INSERT_ROWS))
        mode = durability if data_dir else "batch"
        server = self._resources.enter_context(ServerProcess(content.workload, data_dir=data_dir, durability=mode))
        client = self._resources.enter_context(ReplayClient(server.address, timeout_s=60.0))
        episodes = [content.episode(tag) for tag in range(INSERT_THREADS)]
        for _ in range(INSERT_ROWS // W1.max_length):
            client.add(episodes[0])

        def insert(seconds: float) -> float:
            rates = [0.0] * INSERT_THREADS

            def work(number: int) -> None:
                rates[number] = _rate(lambda: client.add(episodes[number]), seconds)

            threads = [threading.Thread(target=work, args=(number,)) for number in range(INSERT_THREADS)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            return sum(rates)

        self._runs[name] = insert

    def run(self, name: str, *, seconds: float) -> float:
        """Runs one slice; returns batches or episodes a second."""
        return self._runs[name](seconds)

    def close(self) -> None:
        """Ends the servers and removes their folders."""
        self._resources.close()

    def methods(self) -> dict[str, Any]:
        """Returns the methods that the driver may call."""
        return {name: getattr(self, name) for name in ("where", "make_local", "make_batches", "make_inserts", "run", "close")}


def _rate(work: Callable[[], Any], seconds: float) -> float:
    """Returns calls a second."""
    count, begin = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - begin) < seconds:
        work()
        count += 1
    return count / elapsed


if __name__ == "__main__":
    serve(Checkout().methods())
