"""Asking whether enough data is stored yet, and waiting until it is."""

from __future__ import annotations

import time
from collections.abc import Sequence

from touchline._rpc.calls import RpcClient
from touchline._rpc.convert import ready_state_of, server_info_of, tables_of, whole_number
from touchline._rpc.waits import Wait, waiting
from touchline.errors import DeadlineError, NotReadyError, OverLimitError, TlsError, TouchlineError, UnavailableError
from touchline.types import ReadyState
from touchline_protos.v1 import replay_pb2 as pb

PROBE_TIMEOUT_S = 5.0
"""Deadline of a call that asks whether the server is up, or back."""

NO_BATCH_YET = "the server has not sent a batch yet"
"""Reason for a wait that nothing else explains."""

POLL_INTERVAL_S = 5.0
"""Longest time that one call waits at the server for readiness."""


class Readiness:
    """How far a server's table is from being sampled. Thread-safe.

    Args:
        rpc: client of the server's service.
        table: table on the server; empty for the default one.
    """

    def __init__(self, rpc: RpcClient, *, table: str) -> None:
        self._rpc = rpc
        self._table = table

    def ask(
        self, *, min_steps: int = 0, wait_s: float = 0.0, timeout_s: float | None = None, horizon: int | None = None, retry: bool = True
    ) -> ReadyState:
        """Returns the state, as soon as the table is ready or ``wait_s`` has passed.

        Args:
            min_steps: rows that have to be stored; 0 stands for the server's ``min_history``.
            wait_s: longest wait at the server.
            timeout_s: deadline of the call, ``wait_s`` not included; None takes the client's.
            horizon: transitions in the slices to come; None takes the server's.
            retry: try again while the server is unavailable, until the deadline.
        """
        request = pb.ReadyRequest(table=self._table, min_steps=min_steps, wait_s=wait_s)
        if horizon is not None:
            request.horizon = whole_number("horizon", horizon, least=1)
        return ready_state_of(self._rpc.unary("Ready", request.SerializeToString(), timeout_s=timeout_s, wait_s=wait_s, retry=retry))

    def probe(self, horizon: int | None, timeout_s: float) -> ReadyState:
        """Returns the present state, in one attempt."""
        return self.ask(timeout_s=timeout_s, horizon=horizon, retry=False)

    def explain(self, horizon: int | None) -> str:
        """Asks the server and returns, in words, why there is no batch yet."""
        try:
            state = self.probe(horizon, PROBE_TIMEOUT_S)
            limit = self.limit() if state.can_sample else ""
        except TouchlineError as error:
            return str(error)
        return f"{state.describe()}{f'; {limit or NO_BATCH_YET}' if state.can_sample else ''}"

    def limit(self) -> str:
        """Asks the server once and returns which rate limit holds batches back, and why; empty if none does, or if it does not answer."""
        request = pb.InfoRequest(table=self._table).SerializeToString()
        try:
            rate = server_info_of(self._rpc.unary("Info", request, timeout_s=PROBE_TIMEOUT_S, retry=False)).rate
        except TouchlineError:
            return ""
        if rate is None or not rate.batches_wait_for:
            return ""
        return f"the rate limit{f' of table {self._table!r}' if self._table else ''} holds batches back: {rate.batches_wait_for}"

    def wait(self, min_steps: int | None, timeout_s: float | None, horizon: int | None = None) -> ReadyState:
        """Waits as :meth:`~touchline.ReplayClient.wait_until_ready` describes, with the same errors."""
        steps = 0 if min_steps is None else whole_number("min_steps", min_steps, least=1, most=(1 << 63) - 1)
        ends = float("inf") if timeout_s is None else time.monotonic() + timeout_s
        state: ReadyState | None = None
        with waiting("wait_until_ready()", self._rpc.channel.address, lambda: "no answer yet") as wait:
            while True:
                state = self._ask_once(wait, steps, horizon, ends, known=state is not None) or state
                if state is not None and state.can_sample and state.min_steps_reached:
                    return state
                if state is not None and time.monotonic() >= ends:
                    raise NotReadyError(f"not ready within {timeout_s} s: {_describe(state, steps)}", state.counts)

    def _ask_once(self, wait: Wait, steps: int, horizon: int | None, ends: float, *, known: bool) -> ReadyState | None:
        """Returns the state, or None while the server is away; raises its error once the time is over and no state is ``known``."""
        left_s = ends - time.monotonic()
        try:
            timeout_s = self._rpc.timeout_s if left_s > POLL_INTERVAL_S else max(left_s, 1.0)
            wait_s = min(POLL_INTERVAL_S, max(left_s, 0.0))
            state = self.ask(min_steps=steps, wait_s=wait_s, timeout_s=timeout_s, horizon=horizon)
        except (UnavailableError, DeadlineError, OverLimitError) as error:
            if isinstance(error, TlsError):
                raise
            wait.note(str(error))
            if time.monotonic() >= ends and not known:
                raise
            return None
        wait.note(_describe(state, steps))
        return state


class MixReadiness(Readiness):
    """How far the tables of a mix are from being sampled. Thread-safe.

    Args:
        rpc: client of the server's service.
        tables: names of the tables.
    """

    def __init__(self, rpc: RpcClient, tables: Sequence[str]) -> None:
        super().__init__(rpc, table=tables[0])
        self._tables = {name: Readiness(rpc, table=name) for name in tables}

    def probe(self, horizon: int | None, timeout_s: float) -> ReadyState:
        """Returns the present state of the first table that cannot be sampled; if all can, of the last one."""
        for readiness in self._tables.values():
            state = readiness.probe(horizon, timeout_s)
            if not state.can_sample:
                break
        return state

    def limit(self) -> str:
        """Asks the server about each table and returns which rate limits hold batches back, and why; empty if none does."""
        return "; ".join(filter(None, (readiness.limit() for readiness in self._tables.values())))

    def explain(self, horizon: int | None) -> str:
        """Asks the server about each table and returns, in words, why there is no batch yet."""
        return "; ".join(f"table {name!r}: {readiness.explain(horizon)}" for name, readiness in self._tables.items())


def readiness_of(rpc: RpcClient, request: pb.SampleRequest) -> Readiness:
    """Returns the readiness of the table, or of the mix, that a request is about."""
    tables = tables_of(request)
    return Readiness(rpc, table=tables[0]) if len(tables) == 1 else MixReadiness(rpc, tables)


def _describe(state: ReadyState, steps: int) -> str:
    """Returns what is stored and what is expected; ``steps`` 0 stands for the server's ``min_history``."""
    expected = f"{steps or state.min_history} steps" + ("" if state.can_sample else " and an episode that is long enough")
    return f"{state.describe()}; expected {expected}"
