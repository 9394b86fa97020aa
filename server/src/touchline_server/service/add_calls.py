"""AddEpisode and LoadEpisodes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import nullcontext
from typing import Any, TypeVar

import grpc

from touchline_protos.codec import CodecError, CodecLimits, Episode, LoadDecoder, decode_add_episode
from touchline_protos.v1 import replay_pb2 as pb
from touchline_server.errors import InvalidEpisodeError, ReplayError, TooLargeError
from touchline_server.service import convert
from touchline_server.service.callers import caller_of
from touchline_server.service.ingest import IngestResult
from touchline_server.service.parts import ServiceParts
from touchline_server.service.receiver import UploadReservation
from touchline_server.service.traces import Traces
from touchline_server.tables.table import Table

LOAD_GRACE_S = 1.0
"""A stopping server ends a LoadEpisodes call that is not in the middle of an episode once nothing has arrived for this time."""

MAX_LOAD_RESULTS = 100_000
"""Most episodes of one LoadEpisodes call, since its answer has a result for each."""

MAX_ADD_HOLD_S = 10.0
"""Longest time for which the rate limit holds back an AddEpisode call before its answer says so."""

MAX_LOAD_HOLD_S = 60.0
"""The same for each message of a LoadEpisodes call, which costs more to send again."""

HOLD_SHARE = 0.8
"""Share of the time up to a call's deadline for which the rate limit may hold it back, so that its client learns why."""

Decoded = TypeVar("Decoded")
Context = grpc.aio.ServicerContext[Any, Any]


class AddCalls:
    """The calls that store episodes. Lives in the event loop."""

    def __init__(self, parts: ServiceParts) -> None:
        self._tables = parts.tables
        self._calls = parts.calls
        self._drain = parts.drain
        self._ingest = parts.ingest
        self._readers = parts.readers
        self._traces = Traces()
        limits = parts.limits
        self._codec_limits = CodecLimits(max_episode_bytes=limits.max_episode_bytes, max_columns=limits.max_columns)

    async def add_episode(self, message: bytes, context: Context) -> pb.AddEpisodeResponse:
        """Stores one episode."""

        def decode(message: bytes) -> tuple[Table, tuple[Episode]]:
            name, episode = self._decoded(decode_add_episode, message, limits=self._codec_limits)
            return self._tables.get(name, context), (episode,)

        with self._traces.store(context):
            (result,) = await self._ingest.ingest(message, decode, hold_s=_hold_s(context, MAX_ADD_HOLD_S), caller=caller_of(context))
            stored = await self._ingest.wait_durable(result)
        return pb.AddEpisodeResponse(episode_id=stored.episode_id, duplicate=stored.duplicate, counts=convert.counts(stored.counts))

    async def load_episodes(self, requests: AsyncIterator[bytes], context: Context) -> pb.LoadEpisodesResponse:
        """Stores the episodes of a stream of messages, and answers at its end."""
        decoder = LoadDecoder(self._codec_limits)
        with self._traces.store(context):
            with self._calls.streams.count(context.peer()):
                answers = await self._receive_all(requests, decoder, context)
            # The episodes of one call that wait for the disk share its fsync.
            results = [answer if isinstance(answer, pb.EpisodeResult) else await self._result(answer) for answer in answers]
        table = self._tables.get(decoder.table, context)
        if decoder.in_progress:
            error = InvalidEpisodeError("the stream ended within an episode's chunks; the episodes before it are stored")
            table.store.count_refused(str(error))
            raise error
        return pb.LoadEpisodesResponse(results=results, counts=convert.counts(table.counts()))

    async def _receive_all(
        self, requests: AsyncIterator[bytes], decoder: LoadDecoder, context: Context
    ) -> list[pb.EpisodeResult | IngestResult]:
        answers: list[pb.EpisodeResult | IngestResult] = []

        def decode(message: bytes) -> tuple[Table, Iterator[Episode | CodecError]]:
            episodes = self._decoded(decoder.feed, message)
            return self._tables.get(decoder.table, context), episodes

        async with UploadReservation(self._readers, decoder, context.peer()) as reservation:
            while True:
                # A peer in the middle of an episode is waited for. One that is not may never send anything again.
                async with nullcontext() if decoder.in_progress else self._drain.cancel_on_drain(grace_s=LOAD_GRACE_S):
                    message = await reservation.receive(requests)
                if message is None:
                    return answers
                if len(answers) >= MAX_LOAD_RESULTS:
                    raise TooLargeError(
                        f"more than {MAX_LOAD_RESULTS} episodes in one call; those are stored, send the others in a new call"
                    )
                hold_s = _hold_s(context, MAX_LOAD_HOLD_S)
                for result in await self._ingest.ingest(message, decode, hold_s=hold_s, caller=caller_of(context)):
                    is_refused = isinstance(result.outcome, CodecError | ReplayError)
                    answers.append(convert.refusal(result.key, result.outcome) if is_refused else result)  # type: ignore[arg-type]
                del message  # its bytes are released next
                await reservation.settle()

    def _decoded(self, decode: Callable[..., Decoded], *arguments: Any, **options: Any) -> Decoded:
        """Returns what ``decode`` returns. An error counts as an episode that the default table refused: its own table is unknown."""
        try:
            return decode(*arguments, **options)
        except CodecError as error:
            self._tables.registry.default.store.count_refused(str(error))
            raise

    async def _result(self, result: IngestResult) -> pb.EpisodeResult:
        try:
            stored = await self._ingest.wait_durable(result)
        except ReplayError as error:
            return convert.refusal(result.key, error)
        return convert.acceptance(result.key, stored)


def _hold_s(context: Context, most_s: float) -> float:
    """Returns the time in seconds for which the rate limit may hold a call back."""
    remaining_s = context.time_remaining()
    return most_s if remaining_s is None else min(most_s, HOLD_SHARE * max(remaining_s, 0.0))
