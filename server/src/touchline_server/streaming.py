"""A sampling session: the learner grants credits, the server pushes frames.

Small batches are bound by the messages and not by their bytes, so several go into one frame; big ones are bound by page faults and
copies, so they go in chunks of about 1 MiB, each gathered straight into its message.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from touchline_protos.v1 import replay_pb2 as pb
from touchline_server.buffer import ReplayBuffer, SampleSpec
from touchline_server.errors import DrainingError, InvalidRequestError, TooLargeError
from touchline_server.gathering import GatherPlan
from touchline_server.store import Selection
from touchline_server.waiting import ChangeSignal

CHUNK_BYTES = 1 << 20
"""Size of a chunk; 256 KiB and 4 MiB were both measured to be slower."""

GROUP_BYTES = 1 << 21
"""Batches go into one frame up to this size; a batch above half of it goes in chunks."""

MAX_GROUP = 4
"""Batches in a frame, where the learner does not say."""

CHUNK_HEADER_BYTES = 1 << 9
"""Room for what a chunk carries besides its data and the first one's header."""

MAX_CREDITS = 1 << 20
"""Credits that a learner may hold."""


class FrameSource:
    """Makes the frames of one stream. One thread at a time."""

    def __init__(self, buffer: ReplayBuffer, spec: SampleSpec, rng: np.random.Generator, *, max_batches: int) -> None:
        """``max_batches``: in a frame; 0 leaves it to the server.

        Raises:
            InvalidRequestError: it is negative.
        """
        if max_batches < 0:
            raise InvalidRequestError(f"max_batches_per_frame: {max_batches}, expected 0 or more")
        self._buffer = buffer
        self._spec = spec
        self._rng = rng
        self._max_batches = max_batches or MAX_GROUP
        self._known_actors: set[int] = set()

    def can_sample(self) -> bool:
        """Returns whether a frame can be made."""
        return self._buffer.store.can_sample(self._spec.horizon)

    def frames(self, credits: int) -> tuple[int, list[bytes]]:
        """Draws up to ``credits`` batches.

        Returns:
            How many batches, and the frames that carry them.

        Raises:
            NotReadyError: nothing can be sampled.
            TooLargeError: a single row of the batch is over the message limit.
        """
        with self._buffer.select(self._spec, self._rng, batches=self._group_size(credits)) as (selections, plan):
            actors = self._new_actors(selections)
            if plan.layout.body_bytes > GROUP_BYTES // 2:
                return 1, self._chunks(selections[0], plan, actors)
            message, views = plan.layout.group(len(selections), actors)
            for selection, arrays in zip(selections, views, strict=True):
                plan.fill(selection, arrays)
            return len(selections), [message]

    def _group_size(self, credits: int) -> int:
        columns = self._buffer.store.columns
        if columns is None:
            return 1
        body_bytes = self._buffer.plan(columns.schema, self._spec).layout.body_bytes
        return max(min(credits, self._max_batches, GROUP_BYTES // max(body_bytes, 1)), 1)

    def _chunks(self, selection: Selection, plan: GatherPlan, actors: dict[int, str]) -> list[bytes]:
        limit = self._buffer.config.server.max_message_bytes
        frames: list[bytes] = []
        for piece in plan.layout.chunk_plan(min(CHUNK_BYTES, limit // 2)):
            if piece.size_bytes > limit - CHUNK_HEADER_BYTES:
                raise TooLargeError(
                    f"a step of {piece.segments[0].name} has {piece.size_bytes} bytes, expected less than the message limit of {limit}"
                )
            frame, targets = plan.layout.chunk(piece, {} if frames else actors)
            plan.fill_piece(selection, piece, targets)
            frames.append(frame)
        return frames

    def _new_actors(self, selections: list[Selection]) -> dict[int, str]:
        """Returns the names that this learner has not been told before, and takes them for told."""
        new = {int(number) for selection in selections for number in np.unique(selection.draw.actor)} - self._known_actors
        self._known_actors |= new
        return {number: self._buffer.store.actor_name(number) for number in sorted(new)}


class SampleSession:
    """One learner's stream, from its first credits to its end. Lives in the event loop."""

    def __init__(self, source: FrameSource, changes: ChangeSignal, pool: ThreadPoolExecutor, *, draining: Callable[[], bool]) -> None:
        self._source = source
        self._changes = changes
        self._pool = pool
        self._draining = draining
        self._credits = 0
        self._closed = False
        self._fault: Exception | None = None

    async def run(
        self,
        credits: int,
        requests: AsyncIterator[pb.SampleStreamRequest],
        write: Callable[[bytes], Awaitable[None]],
    ) -> None:
        """Pushes frames until the learner closes its side and its credits are used up.

        Raises:
            DrainingError: the server stops.
            InvalidRequestError: the learner grants a number of credits that is out of range.
        """
        self._grant(credits)
        with self._changes.waiter() as wake:
            reader = asyncio.create_task(self._read(requests, wake))
            try:
                while await self._may_push(wake):
                    count, frames = await asyncio.get_running_loop().run_in_executor(self._pool, self._source.frames, self._credits)
                    self._credits -= count
                    for frame in frames:
                        await write(frame)
            finally:
                reader.cancel()

    async def _may_push(self, wake: asyncio.Event) -> bool:
        """Waits for a credit and for something to sample; returns False once the learner wants no more."""
        while True:
            wake.clear()
            if self._fault is not None:
                raise self._fault
            if self._draining():
                raise DrainingError("the server is stopping; open the stream again when it is back")
            if self._credits and self._source.can_sample():
                return True
            if self._closed and not self._credits:
                return False
            await wake.wait()

    async def _read(self, requests: AsyncIterator[pb.SampleStreamRequest], wake: asyncio.Event) -> None:
        try:
            async for request in requests:
                if request.WhichOneof("request") != "credit":
                    raise InvalidRequestError("a sampling stream was opened twice, expected only credits after its first message")
                self._grant(request.credit.batches)
                wake.set()
        except InvalidRequestError as error:
            self._fault = error
        finally:
            self._closed = True
            wake.set()

    def _grant(self, credits: int) -> None:
        if not 0 <= credits <= MAX_CREDITS - self._credits:
            raise InvalidRequestError(
                f"credits: {credits} more on top of {self._credits}, expected 0 or more and at most {MAX_CREDITS} in all"
            )
        self._credits += credits
