"""The batches of one sampling stream, as frames.

Small batches are bound by the messages and not by their bytes, so several go into one frame; big ones are bound by page faults and
copies, so they go in chunks of about 1 MiB, each gathered straight into its message.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import numpy as np

from touchline_server.buffer import ReplayBuffer, SampleSpec
from touchline_server.errors import InvalidArgumentError, NotReadyError, TooLargeError
from touchline_server.store.episode_store import Selection
from touchline_server.store.gather import GatherPlan

CHUNK_BYTES = 1 << 20
"""Size of a chunk; 256 KiB and 4 MiB were both measured to be slower."""

GROUP_BYTES = 1 << 21
"""Batches go into one frame up to this size."""

CHUNKED_ABOVE_BYTES = 1 << 20
"""A batch above this size goes in chunks."""

MAX_BATCH_BYTES = 4 << 30
"""Largest batch. All of it is in memory until the learner has taken it; clients refuse more than this too."""

MAX_GROUP = 4
"""Batches in a frame, where the learner does not say."""

CHUNK_HEADER_BYTES = 1 << 9
"""Room for what a chunk carries besides its data and the first one's header."""


MAX_FORGOTTEN_ACTORS = 1024
"""Actors that a stream was told of and that may be forgotten before it forgets them too."""


class BatchSource:
    """Draws the batches of one stream, and makes frames of them. One thread at a time."""

    def __init__(self, buffer: ReplayBuffer, spec: SampleSpec, rng: np.random.Generator, *, max_batches: int) -> None:
        """``max_batches``: in a frame; 0 leaves it to the server.

        Raises:
            InvalidArgumentError: it is negative.
        """
        if max_batches < 0:
            raise InvalidArgumentError(f"max_batches_per_frame: {max_batches}, expected 0 or more")
        self._buffer = buffer
        self.spec = spec
        self._rng = rng
        self._max_batches = max_batches or MAX_GROUP
        self._known_actors: set[int] = set()
        self._limit = buffer.config.limits.max_message_bytes
        self._group_bytes = min(GROUP_BYTES, self._limit // 2)
        self._chunked_above = min(CHUNKED_ABOVE_BYTES, self._group_bytes // 2)

    def can_sample(self) -> bool:
        """Returns whether a frame can be made."""
        return self._buffer.store.can_sample(self.spec.horizon)

    def select(self, batches: int) -> AbstractContextManager[tuple[list[Selection], GatherPlan]]:
        """Draws batches from the stream's own random numbers; see :meth:`ReplayBuffer.select`."""
        return self._buffer.select(self.spec, self._rng, batches=batches)

    def plan(self) -> GatherPlan | None:
        """Returns how batches are gathered now; None while there is no schema."""
        schema = self._buffer.store.schema
        return None if schema is None else self._buffer.plan(schema, self.spec)

    def size_bytes(self, credits: int) -> int:
        """Returns the room that the next frames for so many credits take.

        Raises:
            TooLargeError: the batch is over the limit.
        """
        plan = self.plan()
        if plan is None:
            return 0
        batches = self._group_size(plan, credits)
        return batches * (plan.layout.body_bytes if plan.layout.body_bytes > self._chunked_above else plan.layout.message_bytes())

    def frames(self, credits: int) -> tuple[int, list[bytes]]:
        """Draws up to ``credits`` batches.

        Returns:
            How many batches, and the frames that carry them.

        Raises:
            NotReadyError: nothing can be sampled.
            TooLargeError: the batch, or a single row of it, is over the limit.
        """
        expected = self.plan()
        batches = self._group_size(expected, credits) if expected is not None else 1
        with self.select(batches) as (selections, plan):
            if expected is None or plan.layout.specs != expected.layout.specs:
                raise NotReadyError("the table was cleared and has another schema now")
            actors = self.new_actors(selections)
            if plan.layout.body_bytes > self._chunked_above:
                return 1, self._chunks(selections[0], plan, actors)
            message, views = plan.layout.group(len(selections), actors)
            plan.fill_all(selections, views)
            return len(selections), [self._checked(message)]

    def frames_at_once(self, credits: int) -> tuple[int, list[bytes]] | None:
        """Does what :meth:`frames` does, from a thread that must not wait: an event loop's.

        Returns:
            None, and nothing was done, where it would take long: see :meth:`GatherPlan.fits_inline`.
        """
        plan, columns = self.plan(), self._buffer.store.columns
        if plan is None or columns is None or not plan.fits_inline(columns, batches=self._group_size(plan, credits)):
            return None
        return self.frames(credits)

    def _group_size(self, plan: GatherPlan, credits: int) -> int:
        size = plan.layout.body_bytes
        if size > MAX_BATCH_BYTES:
            raise TooLargeError(f"a batch of {size} bytes, expected at most {MAX_BATCH_BYTES}; ask for a smaller batch size or horizon")
        return max(min(credits, self._max_batches, self._group_bytes // plan.layout.message_bytes()), 1)

    def _chunks(self, selection: Selection, plan: GatherPlan, actors: dict[int, str]) -> list[bytes]:
        frames: list[bytes] = []
        fill = plan.piece_filler(selection)
        for piece in plan.layout.chunk_plan(min(CHUNK_BYTES, self._limit // 2)):
            if piece.size_bytes > self._limit - CHUNK_HEADER_BYTES:
                raise TooLargeError(
                    f"a step of {piece.segments[0].name} has {piece.size_bytes} bytes, "
                    f"expected less than the message limit of {self._limit}"
                )
            frame, targets = plan.layout.chunk(piece, {} if frames else actors)
            fill(piece, targets)
            frames.append(self._checked(frame))
        return frames

    def _checked(self, frame: bytes) -> bytes:
        if len(frame) > self._limit:
            raise TooLargeError(f"a frame of {len(frame)} bytes with its columns' and actors' names, expected at most {self._limit}")
        return frame

    def new_actors(self, selections: list[Selection]) -> dict[int, str]:
        """Returns the names that this learner has not been told before, and takes them for told."""
        numbers = set(np.unique(np.concatenate([selection.draw.actor for selection in selections])).tolist())
        new = numbers - self._known_actors
        if new and len(self._known_actors) > 2 * len(self._buffer.store.actors) + MAX_FORGOTTEN_ACTORS:
            # Numbers are not given out again, so those whose names are forgotten never come back.
            self._known_actors = {number for number in self._known_actors if number in self._buffer.store.actors}
        self._known_actors |= new
        return {number: self._buffer.store.actor_name(number) for number in sorted(new)}
