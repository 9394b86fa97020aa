"""Upload of episodes to the server: one episode as a single message, many or large ones as a stream of chunks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

from touchline._actor.first_row import FirstRowCheck
from touchline._rpc.calls import RpcClient, reason_of
from touchline._rpc.convert import counts_of, load_results_of
from touchline._rpc.encoding import encode_episode, to_client_error
from touchline.errors import EpisodeResult, InvalidEpisodeError, LoadError, TooLargeError, TouchlineError
from touchline_protos import Counts
from touchline_protos.codec import (
    CodecError,
    CodecLimits,
    Episode,
    EpisodeKey,
    encode_load,
    encode_loads,
)
from touchline_protos.log_lines import get_logger
from touchline_protos.types.limits import SLOWEST_UPLOAD_BYTES_PER_S
from touchline_protos.v1 import replay_pb2 as pb

logger = get_logger(__name__)

MAX_LOAD_EPISODES = 1000
"""Maximum number of episodes in one call of a load."""
MAX_LOAD_BYTES = 256 << 20
"""Maximum payload of one call of a load, unless a single episode is larger."""
CHUNK_BYTES = 1 << 20
"""Payload of one message of a load; measured to be faster than 256 KiB and 4 MiB."""


class EpisodeUploader:
    """Sends episodes. Thread-safe.

    Args:
        rpc: client for the calls.
        max_message_bytes: maximum size of a message; a larger episode is sent in chunks.
    """

    def __init__(self, rpc: RpcClient, *, max_message_bytes: int) -> None:
        self._rpc = rpc
        self._max_message_bytes = max_message_bytes
        self._chunk_bytes = min(CHUNK_BYTES, max_message_bytes // 2)
        self._first_row = FirstRowCheck(rpc)

    def add(self, episode: Episode, *, table: str, timeout_s: float | None = None) -> tuple[EpisodeResult, Counts]:
        """Sends one episode to a table, as a single message if neither side's limit forbids it, otherwise in chunks.

        Raises:
            TouchlineError: the episode was refused or is not acknowledged.
        """
        message = self._encode(episode, table)
        if message is not None:
            try:
                answer = pb.AddEpisodeResponse.FromString(self._rpc.unary("AddEpisode", message, timeout_s=timeout_s))
            except TooLargeError as error:
                if reason_of(error):
                    raise  # the server read the message: the episode is too large, in chunks as well
                self._learn_limit(table)
            else:
                assert episode.key is not None
                self._first_row.check([episode], table=table)
                return EpisodeResult(episode.key, answer.episode_id, answer.duplicate), counts_of(answer.counts)
        results, counts = self._upload([episode], table, timeout_s=timeout_s)
        if results[0].error is not None:
            raise results[0].error
        return results[0], counts

    def load(
        self,
        episodes: Iterable[tuple[EpisodeKey, Episode | TouchlineError]],
        *,
        table: str,
        timeout_s: float | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Counts | None:
        """Sends episodes to a table in calls of a bounded size.

        Args:
            episodes: pairs of key and episode, or of key and the error of a malformed episode.
            table: table of the episodes.
            timeout_s: deadline of each call, in addition to the time for its bytes.
            progress: callback with the number of episodes answered so far, after each call.

        Returns:
            Counts after the last call; None if no call was needed.

        Raises:
            LoadError: some episodes were refused; the others are stored.
            TouchlineError: a call failed; a note says how many episodes were answered before.
        """
        results: list[EpisodeResult] = []
        counts: Counts | None = None
        try:
            for group, latest in self.send(episodes, table=table, timeout_s=timeout_s, max_bytes=MAX_LOAD_BYTES):
                results += group
                counts = latest or counts
                if progress is not None:
                    progress(len(results))
        except TouchlineError as error:
            note = f"load: {len(results)} episodes were answered before"
            if sys.version_info >= (3, 11):
                error.add_note(note)
            else:
                error.args = (f"{error} ({note})", *error.args[1:])
            raise
        refused = [(position, result.error) for position, result in enumerate(results) if result.error is not None]
        if refused:
            shown = "; ".join(f"episode {position}: {error}" for position, error in refused[:5])
            more = f"; and {len(refused) - 5} more" if len(refused) > 5 else ""
            raise LoadError(f"{len(refused)} of {len(results)} episodes were refused, the others are stored: {shown}{more}", results)
        return counts

    def send(
        self,
        episodes: Iterable[tuple[EpisodeKey, Episode | TouchlineError]],
        *,
        table: str,
        timeout_s: float | None = None,
        max_bytes: int = MAX_LOAD_BYTES,
    ) -> Iterator[tuple[list[EpisodeResult], Counts | None]]:
        """Sends episodes to a table in calls of a bounded size. Yields the results of each call before it takes the next episodes.

        Args:
            episodes: pairs of key and episode, or of key and the error of a malformed episode.
            table: table of the episodes.
            timeout_s: deadline of each call, in addition to the time for its bytes.
            max_bytes: maximum payload of a call, unless a single episode is larger.

        Yields:
            Results in the order of the episodes, and the counts after the call; None if no call was needed.

        Raises:
            TouchlineError: a call failed.
        """
        for group in _groups(episodes, max_bytes):
            try:
                answered = self._send_group(group, table, timeout_s)
            except (InvalidEpisodeError, TooLargeError):
                checked = [_checked(item) for item in group]
                if all(before[1] is after[1] for before, after in zip(group, checked, strict=True)):
                    raise
                answered = self._send_group(checked, table, timeout_s)
            yield answered

    def _send_group(self, group: list[_Item], table: str, timeout_s: float | None) -> tuple[list[EpisodeResult], Counts | None]:
        sendable = [episode for _, episode in group if isinstance(episode, Episode)]
        answers, counts = self._upload(sendable, table, timeout_s=timeout_s) if sendable else ([], None)
        answer = iter(answers)
        return [next(answer) if isinstance(episode, Episode) else EpisodeResult(key, error=episode) for key, episode in group], counts

    def _encode(self, episode: Episode, table: str) -> bytes | None:
        if episode.size_bytes > self._max_message_bytes:
            return None
        message = encode_episode(episode, table=table)
        return message if len(message) <= self._max_message_bytes else None

    def _upload(self, episodes: Sequence[Episode], table: str, *, timeout_s: float | None) -> tuple[list[EpisodeResult], Counts]:
        def requests() -> Iterator[bytes]:
            return encode_loads(episodes, table=table, chunk_bytes=self._chunk_bytes)

        base_s = self._rpc.timeout_s if timeout_s is None else timeout_s
        bytes_s = sum(episode.size_bytes for episode in episodes) / SLOWEST_UPLOAD_BYTES_PER_S
        try:
            try:
                message = self._rpc.upload("LoadEpisodes", requests, timeout_s=base_s + bytes_s)
            except TooLargeError:
                if not self._learn_limit(table):
                    raise
                message = self._rpc.upload("LoadEpisodes", requests, timeout_s=base_s + bytes_s)
        except CodecError as error:
            raise to_client_error(error) from None
        self._first_row.check(episodes, table=table)
        return load_results_of(message, [episode.key for episode in episodes if episode.key is not None])

    def _learn_limit(self, table: str) -> bool:
        """Adopts the server's limit on messages if it is lower; returns whether it is. Asks about a table that this client may use."""
        answer = pb.InfoResponse.FromString(self._rpc.unary("Info", pb.InfoRequest(table=table).SerializeToString()))
        if not 0 < answer.max_message_bytes < self._max_message_bytes:
            return False
        logger.info("messages to %s: at most %d bytes, the server's limit", self._rpc.channel.address, answer.max_message_bytes)
        self._max_message_bytes = answer.max_message_bytes
        self._chunk_bytes = min(CHUNK_BYTES, answer.max_message_bytes // 2)
        return True


_Item = tuple[EpisodeKey, Episode | TouchlineError]


def _checked(item: _Item) -> _Item:
    """Returns an item, with an episode that no message can hold replaced by its error, so that the others of its call are stored."""
    key, episode = item
    if isinstance(episode, Episode):
        most = CodecLimits().max_columns
        if len(episode.columns) > most:
            return key, TooLargeError(f"{len(episode.columns)} columns, expected at most {most}")
        try:
            next(encode_load(episode, chunk_bytes=1))  # encodes only its header
        except CodecError as error:
            return key, to_client_error(error)
    return item


def _groups(episodes: Iterable[_Item], max_bytes: int) -> Iterator[list[_Item]]:
    group: list[_Item] = []
    size_bytes = 0
    for item in episodes:
        episode_bytes = item[1].size_bytes if isinstance(item[1], Episode) else 0
        if group and (len(group) == MAX_LOAD_EPISODES or size_bytes + episode_bytes > max_bytes):
            yield group
            group, size_bytes = [], 0
        group.append(item)
        size_bytes += episode_bytes
    if group:
        yield group
