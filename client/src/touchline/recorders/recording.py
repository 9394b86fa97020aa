"""What all recorders share: lines of episodes, each with a writer of its own."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypedDict
from urllib.parse import quote

import numpy as np

from touchline._actor.queue import OverflowPolicy
from touchline._rpc.convert import check_dtype
from touchline.client import ReplayClient
from touchline.errors import UnacknowledgedError
from touchline.recorders.converters import Convert
from touchline.recorders.track import EpisodeTrack, Transform
from touchline.types import WriterCounters
from touchline.writer import SPOOL_LIMIT_BYTES, EpisodeWriter

if TYPE_CHECKING:
    from typing_extensions import Unpack  # the standard library's from Python 3.11 on


class RecordingOptions(TypedDict, total=False):
    """Keywords that every recorder takes."""

    actor: str
    """Name of the actor; the client's where left out. With several lines of episodes ``/<number or agent>`` is added to it."""
    policy_version: int
    """Of the policy that acts, 0 where left out; may be changed later by ``recording.policy_version``."""
    max_steps: int | None
    """Transitions after which an episode is cut in two, so that endless ones go out too; never, where left out."""
    max_pending: int | None
    """Episodes of a line that may wait to be sent; where left out 64, or, with a spool, as many as fit."""
    spool_dir: str | os.PathLike[str] | None
    """Folder on the disk that keeps what is not acknowledged, see :class:`~touchline.EpisodeWriter`; in memory only, where left out. With
    several lines of episodes each has a folder in it, named after its number or agent: what waits for a line goes out when a recorder
    with that line starts on the folder again."""
    spool_limit_bytes: int
    """What the spool of a line may take on the disk; 1 GiB where left out."""
    when_full: OverflowPolicy
    """``"block"``, where left out: the environment is held up while too many episodes wait; ``"drop-oldest"`` or ``"drop-newest"``."""
    dtype: Any
    """``"float32"`` stores float64 values as float32; where left out, what the client does."""
    transform: Transform
    """Makes of each row what is stored: to flatten observations, to add a ``task`` column, ... Row 0 has ``obs`` alone, the others have
    ``obs``, ``action``, ``reward`` and ``done``. Where it has a parameter ``info``, ``transform(row, info=...)`` also gets what the
    environment gave as info with that row: interventions, success. dm_env has no info: there it is ``discount`` and ``step_type``."""


def float64_dtype(client: ReplayClient, options: RecordingOptions) -> np.dtype[Any] | None:
    """Returns the dtype that float64 is stored as; None for no cast.

    Raises:
        InvalidArgumentError: not float32.
    """
    given = options.get("dtype")
    return client.dtype if given is None else check_dtype(given)


class Recording:
    """The sending side of a recorder, its attribute ``recording``.

    One thread plays; ``flush`` and ``counters`` may be used from any.

    Args:
        client: sends the episodes; close the recorder before it.
        options: see :class:`RecordingOptions`.
    """

    def __init__(self, client: ReplayClient, **options: Unpack[RecordingOptions]) -> None:
        self._client = client
        self._actor = options.get("actor", client.actor)
        self._transform = options.get("transform")
        self._dtype = float64_dtype(client, options)
        self._policy_version = options.get("policy_version", 0)
        self._max_steps = options.get("max_steps")
        self._max_pending = options.get("max_pending")
        spool_dir = options.get("spool_dir")
        self._spool_dir = None if spool_dir is None else Path(spool_dir)
        self._spool_limit_bytes = options.get("spool_limit_bytes", SPOOL_LIMIT_BYTES)
        self._when_full = options.get("when_full", "block")
        self._writers: list[EpisodeWriter] = []
        self._closing = ExitStack()

    def new_track(self, observe: Convert, name: object = None) -> EpisodeTrack:
        """Returns a new line of episodes; ``observe`` makes arrays of its observations, ``name`` is added to the actor's name."""
        spool_dir = self._spool_dir
        if spool_dir is not None and name is not None:
            spool_dir /= f"line-{quote(str(name), safe='')}"
        writer = EpisodeWriter(
            self._client,
            actor=self._actor if name is None else f"{self._actor}/{name}",
            policy_version=self._policy_version,
            max_steps=self._max_steps,
            max_pending=self._max_pending,
            spool_dir=spool_dir,
            spool_limit_bytes=self._spool_limit_bytes,
            when_full=self._when_full,
            dtype=self._dtype,
        )
        self._writers.append(self._closing.enter_context(writer))
        return EpisodeTrack(writer, observe, self._transform)

    @property
    def policy_version(self) -> int:
        """Version of the policy that acts. A new value counts from the next episodes on."""
        return self._policy_version

    @policy_version.setter
    def policy_version(self, version: int) -> None:
        for writer in self._writers:
            writer.policy_version = version
        self._policy_version = version

    @property
    def counters(self) -> WriterCounters:
        """What was recorded and acknowledged so far, over all lines."""
        each = [writer.counters for writer in self._writers]
        return WriterCounters(**{field.name: sum(getattr(one, field.name) for one in each) for field in fields(WriterCounters)})

    def flush(self, timeout_s: float | None = None) -> None:
        """Waits until every ended episode is acknowledged, ``timeout_s`` for each line.

        Raises:
            UnacknowledgedError: some were refused, or are not acknowledged in time; those go on being sent.
        """
        for writer in self._writers:
            writer.flush(timeout_s)

    def close(self, timeout_s: float | None = None) -> None:
        """Ends the unfinished episodes and returns once everything is acknowledged, or, with a spool, waits there for the next start.
        Closing again does nothing.

        Args:
            timeout_s: the longest wait, for all lines together; None waits as long as it takes, also for a server that is away; with a
                spool, the client's ``timeout_s`` for each line.

        Raises:
            UnacknowledgedError: some episodes were refused or, without a spool, are not acknowledged in time. The latter go on being sent
                while the client is open.
            SpoolError: an unfinished episode cannot be written to the spool. The other lines are closed all the same.
        """
        if timeout_s is None:
            self._closing.close()
            return
        self._closing.pop_all()
        ends = time.monotonic() + timeout_s
        reports: list[UnacknowledgedError] = []

        def close_one(writer: EpisodeWriter) -> None:
            try:
                writer.close(max(0.0, ends - time.monotonic()))
            except UnacknowledgedError as error:
                reports.append(error)

        with ExitStack() as closing:
            for writer in reversed(self._writers):
                closing.callback(close_one, writer)
        if reports:
            raise UnacknowledgedError("; ".join(map(str, reports)), [result for report in reports for result in report.results])

    def close_on_exit(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Closes as the end of a ``with`` does: after an error in its body the unfinished episodes are discarded, and nothing hides it."""
        self._closing.__exit__(kind, error, trace)
