"""The process of an actor: adds episodes to a server, flat out or at a pace, until it is asked to stop."""

from __future__ import annotations

import threading
import time
from typing import Any

from benchmarks.pacing import ready_tags
from benchmarks.protocol import serve
from benchmarks.workloads import WORKLOADS, Content
from touchline import ReplayClient
from touchline_protos.codec import Episode

TOGETHER_EPISODES = 64
"""Most episodes of one call, flat out."""

TOGETHER_BYTES = 16 << 20
"""Payload of one call, unless a single episode has more."""


class Actor:
    """Adds episodes that it made in advance over and over, each time under a new key."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._failure: BaseException | None = None
        self._steps = 0

    def prepare(self, *, address: str, workload: str, rows: int, number: int) -> None:
        """Connects, and makes episodes.

        Args:
            address: the server's address.
            workload: name of the workload.
            rows: rows of the server's store.
            number: number of this actor; selects its episodes, so no two actors may share one.
        """
        content = Content(WORKLOADS[workload].resized(rows))
        size = content.workload.row_bytes * content.workload.max_length
        self._client = ReplayClient(address, actor=f"actor-{number}", timeout_s=60.0)
        self._episodes = [(tag, content.episode(tag)) for tag in ready_tags(number, episode_bytes=size)]
        self._together = max(1, min(TOGETHER_EPISODES, TOGETHER_BYTES // size))

    def fill(self, *, address: str, workload: str, rows: int) -> int:
        """Fills a server with the first episodes of a workload; returns how many steps."""
        content = Content(WORKLOADS[workload].resized(rows))
        steps = 0
        with ReplayClient(address, actor="filler", timeout_s=120.0) as client:
            for tag in content.tags_to_fill(rows):
                client.add(content.episode(tag), policy_version=tag)
                steps += int(content.length(tag))
        return steps

    def start(self, *, steps_per_s: float, one_by_one: bool = False) -> None:
        """Begins to add.

        Args:
            steps_per_s: the pace; 0 is flat out.
            one_by_one: flat out, each episode has a call of its own, and the next waits for its answer; else several share a call, as
                in a load and as those that wait in an ``EpisodeWriter`` do.
        """
        self._stopping.clear()
        self._steps = 0
        self._begin = time.perf_counter()
        together = 1 if steps_per_s or one_by_one else self._together
        self._thread = threading.Thread(target=self._work, args=(steps_per_s, together), daemon=True)
        self._thread.start()

    def stop(self) -> dict[str, float]:
        """Ends it; returns the acknowledged ``steps_per_s``.

        Raises:
            BaseException: whatever ended it before.
        """
        assert self._thread is not None
        self._stopping.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        return {"steps_per_s": self._steps / (time.perf_counter() - self._begin)}

    def insert(self, *, seconds: float, one_by_one: bool = False) -> dict[str, float]:
        """Adds flat out for ``seconds``; returns the acknowledged ``steps_per_s`` and this process's ``cpu_s`` a step."""
        before = time.process_time()
        self.start(steps_per_s=0.0, one_by_one=one_by_one)
        self._stopping.wait(seconds)
        result = self.stop()
        return {**result, "cpu_s": (time.process_time() - before) / max(self._steps, 1)}

    def _work(self, steps_per_s: float, together: int) -> None:
        try:
            due = time.perf_counter()
            number = 0
            while not self._stopping.is_set():
                if together > 1:
                    self._steps += self._add_together(number, together)
                    number += together
                    continue
                tag, episode = self._episodes[number % len(self._episodes)]
                if steps_per_s:
                    # An actor has played an episode before it adds it; one that is late does not make up for it by a burst.
                    due = max(due + len(episode["reward"]) / steps_per_s, time.perf_counter() - 1.0)
                    if self._stopping.wait(max(due - time.perf_counter(), 0.0)):
                        return
                self._client.add(episode, policy_version=tag)
                self._steps += len(episode["reward"])
                number += 1
        except BaseException as error:
            self._failure = error

    def _add_together(self, first: int, count: int) -> int:
        """Adds ``count`` of the episodes in one call and returns how many steps are acknowledged."""
        episodes = []
        for number in range(first, first + count):
            tag, columns = self._episodes[number % len(self._episodes)]
            episodes.append(Episode(columns, key=self._client.next_key(), actor=self._client.actor, policy_version=tag))
        for results in self._client.deliver_all((episode.key, episode) for episode in episodes):
            for result in results:
                if result.error is not None:
                    raise result.error
        return sum(episode.length for episode in episodes)

    def methods(self) -> dict[str, Any]:
        """Returns the methods that the driver may call."""
        return {name: getattr(self, name) for name in ("prepare", "fill", "start", "stop", "insert")}


if __name__ == "__main__":
    serve(Actor().methods())
