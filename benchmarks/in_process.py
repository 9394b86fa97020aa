"""The process of all subjects that live in the learner's own process."""

from __future__ import annotations

import os
from typing import Any

import torch

from benchmarks.local import GatherLimit, LocalSubject, LocalWritingSubject
from benchmarks.protocol import resident_bytes, serve
from benchmarks.tdmpc2 import Tdmpc2Subject, WritingSubject
from benchmarks.timing import BatchSubject, SliceTimer, seconds_per_call
from benchmarks.workloads import WORKLOADS, Content


class InProcess:
    """Holds subjects by name; makes and runs those that the driver asks for."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._timers: dict[str, SliceTimer] = {}
        self._locals: dict[str, LocalSubject] = {}

    def make_tdmpc2(self, name: str, *, workload: str, rows: int, cache: bool, writing: bool) -> dict[str, float]:
        """Makes TD-MPC2's buffer as ``name``."""
        content = Content(WORKLOADS[workload].resized(rows))
        before = resident_bytes(os.getpid())
        subject = Tdmpc2Subject(content, cache=cache)
        grown = resident_bytes(os.getpid()) - before
        made: BatchSubject = WritingSubject(subject) if writing else subject
        self._timers[name] = SliceTimer(made)
        return {"resident_bytes": grown, "rows": rows}

    def make_local(self, name: str, *, workload: str, rows: int, writing: bool = False) -> dict[str, float]:
        """Makes Touchline's in-process buffer as ``name``."""
        content = Content(WORKLOADS[workload].resized(rows))
        before = resident_bytes(os.getpid())
        subject = LocalSubject(content)
        grown = resident_bytes(os.getpid()) - before
        self._locals[name] = subject
        made: BatchSubject = LocalWritingSubject(subject) if writing else subject
        self._timers[name] = SliceTimer(made)
        return {"resident_bytes": grown, "rows": rows}

    def make_limit(self, name: str, *, over: str, provenance: bool) -> None:
        """Makes the gather limit over the columns of a local buffer."""
        self._timers[name] = SliceTimer(GatherLimit(self._locals[over], provenance=provenance))

    def run(self, name: str, *, seconds: float) -> dict[str, float]:
        """Runs a slice; see :meth:`SliceTimer.run`."""
        return self._timers[name].run(seconds)

    def draw(self, name: str, *, seconds: float) -> dict[str, float]:
        """Returns the cost of drawing the rows of a batch in a local buffer."""
        return {"draw_s": seconds_per_call(self._locals[name].draw, seconds)}

    def methods(self) -> dict[str, Any]:
        """Returns the methods that the driver may call."""
        return {name: getattr(self, name) for name in ("make_tdmpc2", "make_local", "make_limit", "run", "draw")}


if __name__ == "__main__":
    serve(InProcess().methods())
