"""The part that all recorders share: tracks of episodes, each with a writer of its own."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
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
from touchline.recorders.lockstep import AgentSpaces, LockstepTrack
from touchline.recorders.track import EpisodeTrack, Transform
from touchline.types import WriterCounters
from touchline.writer import SPOOL_LIMIT_BYTES, EpisodeWriter
from touchline_protos.log_lines import get_logger

if TYPE_CHECKING:
    from typing_extensions import Unpack  # the standard library's from Python 3.11 on

logger = get_logger(__name__)


class RecordingOptions(TypedDict, total=False):
    """Keyword arguments of every recorder."""

    table: str
    """Table on the server that the episodes are for; the client's if absent."""
    actor: str
    """Name of the actor; the client's if absent. A recorder with several tracks appends ``/<index or agent>``."""
    policy_version: int
    """Version of the acting policy, 0 if absent; ``recording.policy_version`` changes it later."""
    max_steps: int | None
    """Transitions after which an episode is cut, so that endless episodes are sent in pieces; if absent, episodes are not cut."""
    max_pending: int | None
    """Episodes of a track that may wait to be sent; if absent 64, or, with a spool, as many as fit."""
    spool_dir: str | os.PathLike[str] | None
    """Folder on a local disk for episodes that are not acknowledged yet, see :class:`~touchline.EpisodeWriter`; if absent, they wait in
    memory. A recorder with several tracks keeps a folder for each in it, named after its index or agent: a track's episodes are sent when a
    recorder with that track opens the folder again."""
    spool_limit_bytes: int
    """Bytes that the spool of a track may take on the disk; 1 GiB if absent."""
    when_full: OverflowPolicy
    """``"block"`` (if absent) blocks ``step`` and ``reset`` while too many wait; ``"drop-oldest"``, ``"drop-newest"`` drop one."""
    dtype: Any
    """``"float32"`` stores float64 values as float32; the client's setting if absent."""
    transform: Transform
    """Maps each row to the row that is stored, for example to flatten observations or to add a ``task`` column. Row 0 has only ``obs``, the
    others have ``obs``, ``action``, ``reward`` and ``done``; in lockstep each has ``alive``, too. If it has a parameter ``info``, it is
    called as ``transform(row, info=...)`` with the environment's info for that row: interventions, success. dm_env has no info; there it is
    ``discount`` and ``step_type``."""


def float64_dtype(client: ReplayClient, options: RecordingOptions) -> np.dtype[Any] | None:
    """Returns the dtype that float64 is stored as; None keeps float64.

    Raises:
        InvalidArgumentError: ``dtype`` is not float32.
    """
    given = options.get("dtype")
    return client.dtype if given is None else check_dtype(given)


class Recording:
    """Sending side of a recorder: its attribute ``recording``. ::

        env.recording.policy_version += 1  # counts from the next episode on
        env.recording.flush(timeout_s=10.0)  # raises if episodes are not acknowledged by then
        print(env.recording.counters.acknowledged)

    ``flush`` and ``counters`` may be used from any thread, the rest from the thread that steps the environment.

    Args:
        client: client that sends the episodes; close the recorder first.
        options: see :class:`RecordingOptions`.
    """

    def __init__(self, client: ReplayClient, **options: Unpack[RecordingOptions]) -> None:
        self._client = client
        self._table = options.get("table", client.table)
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
        self.agents: tuple[Any, ...] = ()
        """Agents in lockstep, in the order of their axis in every column; empty without lockstep."""
        self._writers: list[EpisodeWriter] = []
        self._closing = ExitStack()

    def new_lockstep(self, agents: Sequence[Any], spaces: AgentSpaces) -> LockstepTrack:
        """Returns the track of whole matches, and keeps the order of their agents.

        Args:
            agents: all agents, in the order of their axis.
            spaces: spaces of all agents.
        """
        self.agents = tuple(agents)
        order = ", ".join(f"{index} {agent}" for index, agent in enumerate(self.agents))
        logger.info("actor %r: agents in lockstep: %s", self._actor, order)
        return LockstepTrack(self.new_track(spaces.observe), self.agents, spaces)

    def new_track(self, observe: Convert, name: object = None) -> EpisodeTrack:
        """Returns a new track of episodes.

        Args:
            observe: converts the track's observations to (nested) arrays.
            name: appended to the actor's name; None appends nothing.
        """
        spool_dir = self._spool_dir
        if spool_dir is not None and name is not None:
            # "line-" stays: these folders are on disks, and hold episodes that are not sent yet.
            spool_dir /= f"line-{quote(str(name), safe='')}"
        writer = EpisodeWriter(
            self._client,
            table=self._table,
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
        """Version of the acting policy. A new value applies from the next episodes on."""
        return self._policy_version

    @policy_version.setter
    def policy_version(self, version: int) -> None:
        for writer in self._writers:
            writer.policy_version = version
        self._policy_version = version

    @property
    def counters(self) -> WriterCounters:
        """Counters of all tracks, summed."""
        each = [writer.counters for writer in self._writers]
        return WriterCounters(**{field.name: sum(getattr(one, field.name) for one in each) for field in fields(WriterCounters)})

    def flush(self, timeout_s: float | None = None) -> None:
        """Waits until every ended episode is acknowledged, up to ``timeout_s`` for each track.

        Raises:
            UnacknowledgedError: episodes were refused, or are not acknowledged in time; the latter are still being sent.
        """
        for writer in self._writers:
            writer.flush(timeout_s)

    def close(self, timeout_s: float | None = None) -> None:
        """Truncates the episodes in progress and waits until all episodes are acknowledged. Closing again does nothing.

        With a spool, episodes that are not acknowledged in time stay on the disk for the next start.

        Args:
            timeout_s: longest wait, for all tracks together. None waits without limit, also for an absent server; with a spool, it waits
                the client's ``timeout_s`` for each track.

        Raises:
            UnacknowledgedError: episodes were refused or, without a spool, are not acknowledged in time. The latter are still being sent
                while the client is open.
            SpoolError: an episode in progress cannot be written to the spool. The other tracks are closed nevertheless.
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
        """Closes at the end of a ``with``. After an error in its body, episodes in progress are discarded and the error stays visible."""
        self._closing.__exit__(kind, error, trace)
