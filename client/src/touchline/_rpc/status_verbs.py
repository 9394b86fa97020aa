"""The verbs of a client that show what the server does."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

from touchline._rpc.calls import RpcClient, reason_of
from touchline._rpc.convert import check_table, number, seconds_or_none, whole_number
from touchline._rpc.deadline import Watchdog
from touchline._rpc.dropping import when_dropped
from touchline._rpc.process_bound import ProcessBound
from touchline.errors import DeadlineError, IncompatibleVersionError, InvalidArgumentError, TouchlineError, UnavailableError
from touchline.types import ServerStatus
from touchline_protos.codec.status import status_of_message
from touchline_protos.types.status import MAX_INTERVAL_S, MAX_NEWEST_EPISODES, MIN_INTERVAL_S
from touchline_protos.v1 import replay_pb2 as pb


class StatusVerbs:
    """Base of :class:`touchline.ReplayClient`. A server of protocol 1.1 or older answers each verb with IncompatibleVersionError."""

    _rpc: RpcClient

    def status(self, *, tables: Iterable[str] | None = None, newest_episodes: int = 0, timeout_s: float | None = None) -> ServerStatus:
        """Returns what the server does: who is connected, what flows, who waits for whom, what is refused, and how the disk does.

        Answers while the server reads its durable store, too. The token needs the role learner or admin; one that is confined to tables
        sees what concerns these.

        Args:
            tables: names of tables; the default one's is empty. None: all that the token may use.
            newest_episodes: most recent episodes to name for each table, up to 64.
            timeout_s: deadline of the call, its retries included; None takes the client's.

        Raises:
            UnknownTableError: there is no table of this name; the text names those that exist.
            IncompatibleVersionError: the server is older than protocol 1.2.
        """
        limit_s = seconds_or_none("timeout_s", timeout_s)
        request = _request(tables, newest_episodes, 0.0)
        try:
            return _status_of(self._rpc.first_answer("Status", request, timeout_s=limit_s))
        except IncompatibleVersionError as error:
            raise _explain(error) from error

    def watch_status(self, interval_s: float = 1.0, *, tables: Iterable[str] | None = None, newest_episodes: int = 0) -> StatusWatch:
        """Returns an endless iterator of :meth:`status`, a snapshot every ``interval_s``, the first one immediately.

        Args:
            interval_s: seconds from one to the next, 0.5 to 3600.
            tables: names of tables; the default one's is empty. None: all that the token may use.
            newest_episodes: most recent episodes to name for each table, up to 64.
        """
        interval_s = number("interval_s", interval_s, least=MIN_INTERVAL_S, most=MAX_INTERVAL_S)
        return StatusWatch(self._rpc, _request(tables, newest_episodes, interval_s), interval_s)


class StatusWatch(ProcessBound):
    """An iterator of snapshots of a server; also a context manager. Made by :meth:`~touchline.ReplayClient.watch_status`.

    One thread iterates; any thread may close.
    """

    _instead = "call watch_status() there, on the client, which may be forked, pickled and copied"

    def __init__(self, rpc: RpcClient, request: bytes, interval_s: float) -> None:
        super().__init__()
        self._source = _Source(rpc, request, interval_s)
        when_dropped(self, self._source.close)

    def __iter__(self) -> Iterator[ServerStatus]:
        return self

    def __next__(self) -> ServerStatus:
        """Returns the next snapshot, waiting for it.

        Raises:
            StopIteration: the watch was closed here.
            UnavailableError, DeadlineError: the server is away, or stopped. The next call connects again.
            TouchlineError: any other error of :meth:`~touchline.ReplayClient.status`.
        """
        self._check_process()
        return self._source.take()

    def close(self) -> None:
        """Ends the call; a ``next`` in progress ends too. Closing again does nothing."""
        if not self._inherited:
            self._source.close()

    def __enter__(self) -> StatusWatch:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _Source:
    """The calls of a watch, one after another."""

    def __init__(self, rpc: RpcClient, request: bytes, interval_s: float) -> None:
        self._rpc = rpc
        self._request = request
        self._limit_s = interval_s + rpc.timeout_s
        self._watchdog = Watchdog(self._limit_s)
        self._call: Any = None
        self._closed = False
        self._late = False

    def take(self) -> ServerStatus:
        """Returns the next snapshot."""
        if self._closed:
            raise StopIteration
        try:
            if self._call is None:
                self._late = False
                self._call = self._rpc.download("Status", self._request)
            self._watchdog.arm(self, time.monotonic() + self._limit_s)
            return _status_of(next(self._call))
        except BaseException as error:
            call, self._call = self._call, None
            if call is not None:
                call.cancel()
            if self._closed:
                raise StopIteration from None
            if not isinstance(error, Exception):
                raise
            raise self._failure(error) from error
        finally:
            self._watchdog.disarm()

    def end(self) -> None:
        """Ends the present call: its next message is overdue."""
        self._late = True
        call = self._call
        if call is not None:
            call.cancel()

    def close(self) -> None:
        """Ends the present call, and makes no other."""
        self._closed = True
        self.end()
        self._watchdog.stop()

    def _failure(self, error: Exception) -> TouchlineError:
        address = self._rpc.channel.address
        if self._late:
            return DeadlineError(f"{address}: no status within {self._limit_s:g} s")
        if isinstance(error, StopIteration):
            return UnavailableError(f"{address}: the server ended the status")
        failure = self._rpc.translate(error)
        return _explain(failure) if isinstance(failure, IncompatibleVersionError) else failure


def _request(tables: Iterable[str] | None, newest_episodes: int, interval_s: float) -> bytes:
    if isinstance(tables, str):
        raise InvalidArgumentError(f"tables: {tables!r}, expected names of tables: [{tables!r}]")
    names = [check_table(table) for table in tables] if tables is not None else []
    if tables is not None and not names:
        raise InvalidArgumentError("tables: none, expected at least one, or None for all")
    newest = whole_number("newest_episodes", newest_episodes, least=0, most=MAX_NEWEST_EPISODES)
    return pb.StatusRequest(tables=names, interval_s=interval_s, newest_episodes=newest).SerializeToString()


def _status_of(answer: bytes) -> ServerStatus:
    return status_of_message(pb.StatusResponse.FromString(answer))


def _explain(error: IncompatibleVersionError) -> IncompatibleVersionError:
    """Returns the error of a server that does not know the method; any other one as it is."""
    return error if reason_of(error) else IncompatibleVersionError(f"{error}; status needs a server of protocol 1.2: update it")
