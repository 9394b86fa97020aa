"""Asking whether there is enough data yet, and waiting until there is."""

from __future__ import annotations

import time

from touchline._rpc.calls import RpcClient
from touchline._rpc.convert import ready_state_of, whole_number
from touchline._rpc.waits import Wait, waiting
from touchline.errors import DeadlineError, NotReadyError, OverLimitError, TlsError, TouchlineError, UnavailableError
from touchline.types import ReadyState
from touchline_protos.v1 import replay_pb2 as pb

PROBE_TIMEOUT_S = 5.0
"""Deadline of the question whether a server is there, or back."""

POLL_S = 5.0
"""The longest that one call waits for readiness."""


class Readiness:
    """How far a server's table is from being sampled. Safe to use from many threads.

    Args:
        calls: to the server.
        table: of the server; empty is the default one.
    """

    def __init__(self, calls: RpcClient, *, table: str) -> None:
        self._calls = calls
        self._table = table

    def ask(self, min_steps: int, wait_s: float, timeout_s: float, horizon: int | None = None, *, retry: bool = True) -> ReadyState:
        """Returns the state at once, or when it is reached within ``wait_s``.

        Args:
            min_steps: rows; 0 stands for the server's ``min_history``.
            wait_s: the longest wait at the server.
            timeout_s: the call's deadline, on top.
            horizon: of the batches; None takes the server's.
            retry: whether to try again while the server is unavailable, until the deadline.
        """
        request = pb.ReadyRequest(table=self._table, min_steps=min_steps, wait_s=wait_s)
        if horizon is not None:
            request.horizon = whole_number("horizon", horizon, least=1)
        return ready_state_of(self._calls.unary("Ready", request.SerializeToString(), timeout_s=timeout_s, wait_s=wait_s, retry=retry))

    def probe(self, horizon: int | None, timeout_s: float) -> ReadyState:
        """Returns the state as of now, in one attempt."""
        return self.ask(0, 0.0, timeout_s, horizon, retry=False)

    def explain(self, horizon: int | None) -> str:
        """Returns why there is no batch yet, in words: asks the server."""
        try:
            state = self.probe(horizon, PROBE_TIMEOUT_S)
        except TouchlineError as error:
            return str(error)
        return f"{state.describe()}{'; the server has not sent a batch yet' if state.can_sample else ''}"

    def wait(self, min_steps: int | None, timeout_s: float | None, horizon: int | None = None) -> ReadyState:
        """Waits as ``ReplayClient.wait_until_ready`` says, and raises what that does."""
        with waiting("wait_until_ready()", self._calls.transport.address, lambda: "no answer yet") as wait:
            return self._wait(wait, min_steps, timeout_s, horizon)

    def _wait(self, wait: Wait, min_steps: int | None, timeout_s: float | None, horizon: int | None) -> ReadyState:
        steps = 0 if min_steps is None else whole_number("min_steps", min_steps, least=1, most=(1 << 63) - 1)
        ends = float("inf") if timeout_s is None else time.monotonic() + timeout_s
        state: ReadyState | None = None
        while True:
            left_s = ends - time.monotonic()
            try:
                timeout = self._calls.timeout_s if left_s > POLL_S else max(left_s, 1.0)
                state = self.ask(steps, min(POLL_S, max(left_s, 0.0)), timeout, horizon)
            except (UnavailableError, DeadlineError, OverLimitError) as error:
                if isinstance(error, TlsError):
                    raise
                wait.note(str(error))
                if time.monotonic() < ends:
                    continue
                if state is None:
                    raise
            else:
                wait.note(_describe(state, steps))
            if state is not None and state.can_sample and state.min_steps_reached:
                return state
            if state is not None and time.monotonic() >= ends:
                raise NotReadyError(f"not ready within {timeout_s} s: {_describe(state, steps)}", state.counts)


def _describe(state: ReadyState, steps: int) -> str:
    """Returns what is stored and what is waited for; ``steps`` 0 stands for the server's ``min_history``."""
    wanted = f"{steps or state.min_history} steps" + ("" if state.can_sample else " and an episode that is long enough")
    return f"{state.describe()}; expected {wanted}"
