"""The batches of one sampling stream, as frames.

Small batches are bound by the number of messages and not by their bytes, so several go into one frame. Large ones are bound by page
faults and copies, so they go in chunks of about 1 MiB, each gathered straight into its message.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from touchline_protos.codec import BatchLayout
from touchline_protos.v1 import replay_pb2 as pb
from touchline_server.errors import InvalidArgumentError, NotReadyError, TooLargeError
from touchline_server.store.batch_draw import BatchDraw
from touchline_server.tables.sampler import Reserved, Sampler

CHUNK_BYTES = 1 << 20
"""Size of a chunk; 256 KiB and 4 MiB were both measured to be slower."""

GROUP_BYTES = 1 << 21
"""Largest frame of several batches."""

CHUNKED_ABOVE_BYTES = 1 << 20
"""Largest batch that is sent whole."""

MAX_BATCH_BYTES = 4 << 30
"""Largest batch. All of it is in memory until the learner has taken it; clients refuse more than this too."""

DEFAULT_GROUP = 4
"""Batches in a frame, unless the learner asks for another number."""

CHUNK_HEADER_BYTES = 1 << 9
"""Bytes reserved for what a chunk carries besides its data and the first one's header."""

MAX_STALE_ACTORS = 1024
"""Actors whose names a stream has sent and the table may have forgotten, before the stream forgets them too."""


MAX_FORGOTTEN = 8192
"""Most actors in a message that says which names may be forgotten."""


class NextFrames(NamedTuple):
    """What the next frames of a stream carry."""

    layout: BatchLayout
    reserved: Reserved
    size_bytes: int
    """Bytes to reserve for them."""


class BatchFramer:
    """Draws the batches of one stream, and makes frames of them. One thread at a time.

    Args:
        sampler: the source of the stream's batches.
        max_message_bytes: size limit of a frame.
        max_batches: most batches in a frame; 0 leaves it to the server.

    Raises:
        InvalidArgumentError: ``max_batches`` is negative.
    """

    def __init__(self, sampler: Sampler, *, max_message_bytes: int, max_batches: int) -> None:
        if max_batches < 0:
            raise InvalidArgumentError(f"max_batches_per_frame: {max_batches}, expected 0 or more")
        self.sampler = sampler
        self._max_batches = max_batches or DEFAULT_GROUP
        self._sent_actors: set[int] = set()
        self._max_message_bytes = max_message_bytes
        self._group_bytes = min(GROUP_BYTES, self._max_message_bytes // 2)
        self._chunked_above = min(CHUNKED_ABOVE_BYTES, self._group_bytes // 2)

    def try_reserve(self, credits: int, *, waits: bool) -> NextFrames | None:
        """Returns the next frames for this many credits, their batches reserved with the rate limit; None if that allows none now.

        Args:
            credits: batches that the learner wants.
            waits: whether it has none, see :meth:`Sampler.reserve`.

        Raises:
            TooLargeError: the batch is over the limit.
        """
        layout = self.sampler.layout()
        if layout is None:
            return None
        reserved = self.sampler.reserve(self._group_size(layout, credits), waits=waits)
        if reserved is None:
            return None
        batch_bytes = layout.body_bytes if layout.body_bytes > self._chunked_above else layout.message_bytes()
        return NextFrames(layout, reserved, reserved.batches * batch_bytes)

    def frames(self, ahead: NextFrames) -> list[bytes]:
        """Draws batches and returns the frames that carry them.

        Raises:
            NotReadyError: nothing can be sampled, or the table was cleared and has another schema now.
            TooLargeError: a single row of the batch is over the limit.
        """
        with self.sampler.draw(ahead.reserved) as drawn:
            if drawn.layout.specs != ahead.layout.specs:
                raise NotReadyError("the table was cleared and has another schema now")
            forgotten, actors = self.new_actors(drawn)
            if drawn.layout.body_bytes > self._chunked_above:
                return forgotten + self._chunks(drawn, actors)
            message, bodies = drawn.layout.group(ahead.reserved.batches, actors)
            drawn.gather_into(bodies)
            return [*forgotten, self._checked(message)]

    def try_frames(self, ahead: NextFrames) -> list[bytes] | None:
        """Does what :meth:`frames` does, from a thread that must not wait: an event loop's.

        Returns:
            None, and nothing was done, if it would take long: see :meth:`GatherPlan.fits_inline`.
        """
        return self.frames(ahead) if self.sampler.fits_inline(batches=ahead.reserved.batches) else None

    def new_actors(self, drawn: BatchDraw) -> tuple[list[bytes], dict[int, str]]:
        """Returns frames that say which names the learner may forget, and the names that this stream has not sent yet, now taken as sent.

        The frames come before those of the batches.
        """
        sampler, needed = self.sampler, drawn.actors()
        new = needed - self._sent_actors
        frames = []
        if new and len(self._sent_actors) > 2 * sampler.actor_count() + MAX_STALE_ACTORS:
            # Numbers are never reused, so an actor whose name a table has forgotten does not come back. An episode of this draw may have
            # been evicted since.
            forgotten = sorted(number for number in self._sent_actors - needed if not sampler.has_actor(number))
            self._sent_actors.difference_update(forgotten)
            frames = [_forgetting(forgotten[at : at + MAX_FORGOTTEN]) for at in range(0, len(forgotten), MAX_FORGOTTEN)]
        self._sent_actors |= new
        return frames, sampler.actor_names(new)

    def _group_size(self, layout: BatchLayout, credits: int) -> int:
        size = layout.body_bytes
        if size > MAX_BATCH_BYTES:
            raise TooLargeError(f"a batch of {size} bytes, expected at most {MAX_BATCH_BYTES}; ask for a smaller batch size or horizon")
        if size > self._chunked_above:
            return 1
        return max(min(credits, self._max_batches, self._group_bytes // layout.message_bytes()), 1)

    def _chunks(self, drawn: BatchDraw, actors: dict[int, str]) -> list[bytes]:
        frames: list[bytes] = []
        jobs: list[Callable[[], None]] = []
        gather = drawn.piece_gatherer()
        for piece in drawn.layout.chunk_plan(min(CHUNK_BYTES, self._max_message_bytes // 2)):
            if piece.size_bytes > self._max_message_bytes - CHUNK_HEADER_BYTES:
                raise TooLargeError(
                    f"a step of {piece.segments[0].name} has {piece.size_bytes} bytes, "
                    f"expected less than the message limit of {self._max_message_bytes}"
                )
            frame, targets = drawn.layout.chunk(piece, {} if frames else actors)
            frames.append(self._checked(frame))
            jobs.append(partial(gather, piece, targets))
        drawn.run_all(jobs)
        return frames

    def _checked(self, frame: bytes) -> bytes:
        if len(frame) > self._max_message_bytes:
            raise TooLargeError(
                f"a frame of {len(frame)} bytes with its columns' and actors' names, expected at most {self._max_message_bytes}"
            )
        return frame


def _forgetting(numbers: list[int]) -> bytes:
    """Returns the message that these actors' names may be forgotten."""
    return pb.SampleStreamResponse(actors=pb.ActorNames(forgotten=numbers)).SerializeToString()
