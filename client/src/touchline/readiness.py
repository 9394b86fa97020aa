"""Asking whether there is enough data yet, and waiting until there is."""

from __future__ import annotations

import time

from touchline.calls import Calls
from touchline.errors import DeadlineError, NotReadyError, OverLimitError, UnavailableError
from touchline.messages import ready_state_of, whole_number
from touchline.types import ReadyState
from touchline_protos.v1 import replay_pb2 as pb

POLL_S = 5.0
"""The longest that one call waits for readiness."""


class Readiness:
    """How far a server's table is from being sampled. Safe to use from many threads.

    Args:
        calls: to the server.
        table: of the server; empty is the default one.
    """

    def __init__(self, calls: Calls, *, table: str) -> None:
        self._calls = calls
        self._table = table

    def ask(self, min_steps: int, wait_s: float, timeout_s: float) -> ReadyState:
        """Returns the state at once, or when it is reached within ``wait_s``; ``min_steps`` 0 stands for the server's ``min_history``."""
        request = pb.ReadyRequest(table=self._table, min_steps=min_steps, wait_s=wait_s).SerializeToString()
        return ready_state_of(self._calls.unary("Ready", request, timeout_s=timeout_s, wait_s=wait_s))

    def wait(self, min_steps: int | None, timeout_s: float | None) -> ReadyState:
        """Waits as ``ReplayClient.wait_until_ready`` says, and raises what that does."""
        steps = 0 if min_steps is None else whole_number("min_steps", min_steps, least=1, most=(1 << 63) - 1)
        ends = float("inf") if timeout_s is None else time.monotonic() + timeout_s
        state: ReadyState | None = None
        while True:
            left_s = ends - time.monotonic()
            try:
                state = self.ask(steps, min(POLL_S, max(left_s, 0.0)), self._calls.timeout_s if left_s > POLL_S else max(left_s, 1.0))
            except (UnavailableError, DeadlineError, OverLimitError):
                if time.monotonic() < ends:
                    continue
                if state is None:
                    raise
            if state is not None and state.can_sample and state.min_steps_reached:
                return state
            if state is not None and time.monotonic() >= ends:
                counts = state.counts
                wanted = f"{steps or state.min_history} steps" + ("" if state.can_sample else " and an episode that is long enough")
                raise NotReadyError(
                    f"not ready within {timeout_s} s: {counts.steps_stored} steps in {counts.episodes_stored} episodes, expected {wanted}",
                    counts,
                )
