"""Stored episodes, read back from the server one at a time.

:class:`EpisodeStream` is what a user iterates. :class:`EpisodeSource` makes the calls; one that breaks off is followed by another for the
episodes that are left.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from touchline._rpc.calls import RpcClient, delay_before_retry, is_passing
from touchline._rpc.deadline import Watchdog
from touchline._rpc.dropping import when_dropped
from touchline._rpc.process_bound import ProcessBound
from touchline._rpc.waits import Wait, waiting
from touchline.errors import ClosedError, DeadlineError, ServerError, TouchlineError, UnavailableError
from touchline_protos.codec import CodecError, EpisodeDecoder, EpisodeSelection, StoredEpisode
from touchline_protos.log_lines import get_logger
from touchline_protos.v1 import replay_pb2 as pb

MAX_FRUITLESS = 5
"""Number of calls in a row that broke off within their first episode, after which reading ends; not before ``timeout_s`` has passed."""

logger = get_logger(__name__)


class EpisodeStream(ProcessBound):
    """An iterator of whole stored episodes, by ascending id; also a context manager. Made by :meth:`~touchline.ReplayClient.episodes`.

    ::

        with client.episodes(actor="left-foot", columns=["obs", "reward"]) as stored:
            print(stored.total, "episodes")
            for episode in stored:
                episode.columns["obs"]  # [T+1, *obs_shape]

    The episodes' arrays are the caller's. One thread iterates; any thread may close. Close the stream to stop before its end; one that is
    dropped ends its call once it is collected. In a forked child the stream is still the parent's: using it there raises ForkError, closing
    it does nothing.
    """

    _instead = "call episodes() there, on the client, which may be forked, pickled and copied"

    def __init__(self, source: EpisodeSource) -> None:
        super().__init__()
        self._source = source
        self._closed = False
        when_dropped(self, source.close)

    def __iter__(self) -> Iterator[StoredEpisode]:
        return self

    def __next__(self) -> StoredEpisode:
        """Returns the next episode, waiting for it.

        Raises:
            StopIteration: all episodes were read, or the stream was closed here.
            UnknownEpisodeError: an id is not stored.
            InvalidArgumentError: a column does not exist, or the server does not accept an argument.
            UnavailableError: the server was away for longer than ``timeout_s`` or came back without the episodes, or the connection broke
                off within one episode for ``timeout_s`` and at least five times. The next call tries again.
            OverLimitError: the server was over a limit for longer than ``timeout_s``.
            DeadlineError: no message came within ``timeout_s`` although the server was up.
            ForkError: the stream was opened by the parent of this forked child.
            TouchlineError: any other error of the tree in :mod:`touchline.errors`.
        """
        if self._closed:
            raise StopIteration
        self._check_process()
        try:
            episode = self._source.take()
        except ClosedError:
            if self._closed:
                raise StopIteration from None
            raise
        if episode is None:
            self.close()
            raise StopIteration
        return episode

    @property
    def total(self) -> int:
        """Number of episodes to read when reading began; begins it if necessary.

        Episodes that are evicted before their turn do not come. Raises as ``next`` does.
        """
        self._check_process()
        return self._source.selection.episodes

    @property
    def total_steps(self) -> int:
        """Number of rows in these episodes. Raises as ``next`` does."""
        self._check_process()
        return self._source.selection.steps

    def close(self) -> None:
        """Ends the call. Closing again does nothing."""
        self._closed = True
        if not self._inherited:
            self._source.close()

    def __enter__(self) -> EpisodeStream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class _Progress:
    """Position of the reading. Replaced as a whole, so that Ctrl-C finds the episodes and their ids together, or neither."""

    seen_id: int = -1
    """Highest id that was dealt with."""
    ready: deque[StoredEpisode] = field(default_factory=deque)
    """Episodes up to that id that were not taken yet."""


class EpisodeSource:
    """Episodes from GetEpisodes; a call that breaks off is followed by one for the rest. One thread takes, any closes.

    Args:
        rpc: client of the server's service.
        request: selection of the episodes; not changed.
        timeout_s: longest wait for the next message, retries included.
        empty: no episode is asked for, so the server is not called.
    """

    def __init__(self, rpc: RpcClient, request: pb.GetEpisodesRequest, *, timeout_s: float, empty: bool = False) -> None:
        self._rpc = rpc
        self._request = request
        self._timeout_s = timeout_s
        self._selection: EpisodeSelection | None = EpisodeSelection() if empty else None
        self._progress = _Progress()
        self._fruitless = 0
        self._fruitless_since = 0.0
        self._delays = rpc.delays()
        self._session: _Session | None = None
        self._finished = False
        self._watchdog = Watchdog(timeout_s)
        self._closed = threading.Event()

    @property
    def selection(self) -> EpisodeSelection:
        """Episodes that there were to read when the first call began."""
        if self._selection is None:
            self._advance()
        assert self._selection is not None
        return self._selection

    def take(self) -> StoredEpisode | None:
        """Returns the next episode, None at the end; raises as :meth:`EpisodeStream.__next__` does."""
        while not self._progress.ready and not self._finished:
            self._advance()
        ready = self._progress.ready
        return ready.popleft() if ready else None

    def close(self) -> None:
        """Ends the call; a ``take`` in progress raises ClosedError."""
        self._closed.set()
        session = self._session
        if session is not None:
            session.end()
        self._watchdog.stop()

    def _advance(self) -> None:
        """Receives until there is progress or the end; makes another call whenever one breaks off."""
        with waiting("episodes()", self._rpc.channel.address, lambda: "no message yet") as wait:
            try:
                self._advance_within(wait, time.monotonic() + self._timeout_s)
            except BaseException:
                # After Ctrl-C it is unknown which message was dealt with: another call begins after the last whole episode.
                self._drop_session()
                raise

    def _advance_within(self, wait: Wait, ends: float) -> None:
        if not self._fruitless:
            self._delays = self._rpc.delays()
        last: TouchlineError | None = None
        while not self._finished:
            if self._closed.is_set():
                raise ClosedError("the stream was closed")
            if self._selection is not None and self._progress.seen_id >= self._selection.last_episode_id:
                self._finish()
                return
            session = self._session or self._open()
            try:
                self._watchdog.arm(session, ends)
                episodes = session.receive()
            except TouchlineError as error:
                self._drop_session()
                wait.note(str(error))
                self._wait_after(error, session, ends, last)
                last = error
                continue
            finally:
                self._watchdog.disarm()
            if self._take_over(session, episodes):
                return

    def _wait_after(self, error: TouchlineError, session: _Session, ends: float, last: TouchlineError | None) -> None:
        """Waits before the next attempt, or raises the error that ends the reading; ``last`` is the error before this one."""
        if self._closed.is_set():
            return
        if time.monotonic() >= ends and session.ended:
            if last is not None:
                raise last from error
            raise DeadlineError(f"{self._rpc.channel.address}: no message within {self._timeout_s} s") from error
        if not is_passing(error):
            raise error
        delay_s = delay_before_retry(error, next(self._delays))
        if session.frames > 1 and not session.fruitful:
            self._count_fruitless(error, session)
            delay_s = min(delay_s, max(ends - time.monotonic(), 0.0) / 2)  # that count decides when to end, not this deadline
        if time.monotonic() + delay_s >= ends:
            raise error
        logger.info("reading was interrupted, trying again: %s", error)
        self._closed.wait(delay_s)

    def _count_fruitless(self, error: TouchlineError, session: _Session) -> None:
        """Counts a call that broke off within its first episode, which the next call starts over; raises if that keeps happening."""
        now = time.monotonic()
        if not self._fruitless:
            self._fruitless_since = now
        self._fruitless += 1
        lost_s = now - self._fruitless_since
        if self._fruitless < MAX_FRUITLESS or lost_s < self._timeout_s:
            return
        count, self._fruitless = self._fruitless, 0  # a caller that goes on after this error has as many attempts again
        raise UnavailableError(
            f"{self._rpc.channel.address}: the connection broke off within an episode {count} times in {lost_s:.1f} s (after "
            f"{session.size_bytes / 1e6:,.1f} MB the last time), expected a whole episode: one that breaks off is read from its start. Use "
            f"a steadier network, fewer columns (columns=), or shorter episodes (max_steps of the writer): {error}"
        ) from error

    def _take_over(self, session: _Session, episodes: list[StoredEpisode] | None) -> bool:
        """Takes over the episodes of a message; returns whether that is progress beyond what was known before the call."""
        selection = session.decoder.selection
        if episodes is None or selection is None:
            self._finish()
            return True
        if self._selection is None:
            self._selection = selection
            return True
        if selection.store_generation != self._selection.store_generation:
            raise UnavailableError(
                f"{self._rpc.channel.address}: the server came back without the episodes that were being read, expected the same ones; "
                "call episodes() again"
            )
        if session.decoder.seen_id > self._progress.seen_id:
            self._fruitless, session.fruitful = 0, True
            self._progress = _Progress(session.decoder.seen_id, deque([*self._progress.ready, *episodes]))
        return session.frames > 1

    def _finish(self) -> None:
        self._drop_session()
        self._finished = True
        self._watchdog.stop()

    def _open(self) -> _Session:
        session = self._session = _Session(self._rpc, self._remaining_request())
        if self._closed.is_set():  # close() ran in another thread before it could see the session
            session.end()
        return session

    def _remaining_request(self) -> pb.GetEpisodesRequest:
        """Returns the request for the episodes after the last whole one, among those that there were when the first call began."""
        if self._selection is None:
            return self._request
        left = pb.GetEpisodesRequest()
        left.CopyFrom(self._request)
        if left.episode_ids:
            left.episode_ids[:] = [number for number in left.episode_ids if number > self._progress.seen_id]
            left.skip_missing = True  # all were stored when the first call began: a missing one was evicted since
        else:
            left.first_episode_id = max(self._progress.seen_id + 1, self._selection.first_episode_id)
            left.last_episode_id = self._selection.last_episode_id
            left.ClearField("newest")
        return left

    def _drop_session(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.end()


class _Session:
    """One call of GetEpisodes."""

    def __init__(self, rpc: RpcClient, request: pb.GetEpisodesRequest) -> None:
        self._rpc = rpc
        self.decoder = EpisodeDecoder()
        self.frames = 0
        """Number of messages so far."""
        self.size_bytes = 0
        """Bytes in these messages."""
        self.fruitful = False
        """Whether these messages completed at least one new episode."""
        self.ended = False
        """Whether this side ended the call."""
        self._call: Any = rpc.download("GetEpisodes", request.SerializeToString())

    def receive(self) -> list[StoredEpisode] | None:
        """Returns the episodes that the next message completes, None at the end.

        Raises:
            TouchlineError: the call broke off, or its messages are malformed.
        """
        address = self._rpc.channel.address
        try:
            message = next(self._call)
            self.frames += 1
            self.size_bytes += len(message)
            return self.decoder.feed(message)
        except StopIteration:
            if self.decoder.selection is None or self.decoder.in_progress:
                raise ServerError(f"{address}: the server ended the stream within an episode, or before it began") from None
            return None
        except CodecError as error:
            raise ServerError(f"{address}: malformed frame: {error}") from error
        except Exception as error:
            raise self._rpc.translate(error) from error

    def end(self) -> None:
        """Ends the call, from any thread."""
        self.ended = True
        self._call.cancel()
