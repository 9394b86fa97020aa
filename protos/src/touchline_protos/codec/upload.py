"""Streams of episodes to a server: ``LoadEpisodesRequest``.

Each message contains one of: a whole episode, several small ones, the header of a large one, or a chunk of it::

    field 1     table, a text; read from the first message only
    field 2     Episode
    field 3     EpisodeHeader    (see :mod:`touchline_protos.codec.chunks`)
    field 4     ColumnChunk
    field 5     Episode, repeated
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from touchline_protos.codec.chunks import PartialEpisode, chunk_message, encode_header, read_header
from touchline_protos.codec.episodes import column_spec, encode_add_episode, encode_episodes, read_episode
from touchline_protos.codec.tensors import DEFAULT_LIMITS
from touchline_protos.codec.wire import LEN, len_field, read_fields, read_text, tag, text_field
from touchline_protos.types.episode import CodecError, CodecLimits, Episode, EpisodeKey, OversizeError

_TABLE = tag(1, LEN)
_EPISODE = tag(2, LEN)
_HEADER = tag(3, LEN)
_CHUNK = tag(4, LEN)
_EPISODES = tag(5, LEN)
_CONTENTS = (_EPISODE, _HEADER, _CHUNK, _EPISODES)

MAX_GROUP_EPISODES = 1024
"""Maximum number of episodes in one message."""

GROUP_BYTES = 480 << 10
"""Default size up to which small episodes share a message."""


def encode_loads(
    episodes: Iterable[Episode], *, table: str = "", chunk_bytes: int = 1 << 20, group_bytes: int = GROUP_BYTES
) -> Iterator[bytes]:
    """Iterates over the ``LoadEpisodesRequest`` messages of many episodes.

    Small episodes share a message, which costs both sides far less than a message each.

    Args:
        episodes: episodes to encode, in order.
        table: name of the table; empty is the default one.
        chunk_bytes: size of the chunks of large episodes; see :func:`encode_load`.
        group_bytes: maximum size of a message that several episodes share; ``chunk_bytes`` limits it too.

    Raises:
        CodecError: an episode cannot be encoded; see :func:`encode_load`.
    """
    max_bytes = min(chunk_bytes, group_bytes)
    group: list[Episode] = []
    group_size_bytes = 0
    for episode in episodes:
        size_bytes = episode.size_bytes + _max_overhead_bytes(episode)
        small = size_bytes <= max_bytes
        if group and (not small or group_size_bytes + size_bytes > max_bytes or len(group) == MAX_GROUP_EPISODES):
            yield _encode_group(group, table)
            group, group_size_bytes = [], 0
        if small:
            group.append(episode)
            group_size_bytes += size_bytes
        else:
            yield from encode_load(episode, table=table, chunk_bytes=chunk_bytes)
    if group:
        yield _encode_group(group, table)


def _max_overhead_bytes(episode: Episode) -> int:
    """Returns an upper bound of an episode's size in a message, less its payload: computing the exact size would mean encoding it."""
    # A character takes up to 4 bytes, a dimension up to 10. Of a column, 64 bytes cover tags, lengths, dtype and padding; of an episode,
    # 96 cover tags, lengths and numbers.
    key_bytes = 4 * len(episode.key.client_id) if episode.key is not None else 0
    return 96 + key_bytes + 4 * len(episode.actor) + sum(64 + 4 * len(name) + 10 * column.ndim for name, column in episode.columns.items())


def _encode_group(episodes: list[Episode], table: str) -> bytes:
    return encode_episodes(episodes, table=table, field=5) if len(episodes) > 1 else encode_add_episode(episodes[0], table=table)


def encode_load(episode: Episode, *, table: str = "", chunk_bytes: int = 1 << 20) -> Iterator[bytes]:
    """Iterates over the ``LoadEpisodesRequest`` messages of one episode.

    Args:
        episode: episode to encode. Columns that are not contiguous or not little-endian are converted, one at a time.
        table: name of the table, sent in the first message; empty is the default one.
        chunk_bytes: maximum payload of an episode that is sent whole; a larger one is sent as a header and chunks of this size.

    Raises:
        CodecError: the episode cannot be encoded (see ``encode_add_episode``), or it is sent in chunks and its columns differ in rows.
    """
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes {chunk_bytes}, expected at least 1")
    if episode.size_bytes <= chunk_bytes:
        yield encode_add_episode(episode, table=table)
        return
    specs = [column_spec(name, column) for name, column in episode.columns.items()]
    yield text_field(1, table, "table") + len_field(3, encode_header(episode, specs, episode.length))
    for index, (spec, column) in enumerate(zip(specs, episode.columns.values(), strict=True)):
        flat = np.ascontiguousarray(column, dtype=spec.dtype).reshape(-1).view(np.uint8)
        for offset in range(0, flat.size, chunk_bytes):
            data = flat[offset : offset + chunk_bytes]
            message, target = chunk_message(index, offset, data.size)
            target[:] = data
            yield message


class LoadDecoder:
    """Decodes one stream of ``LoadEpisodesRequest`` messages. Not thread-safe.

    A refused episode does not end the stream: the rest of its chunks is skipped. After an error that is ``fatal``, no message of the stream
    can be understood any more.

    Args:
        limits: maximum sizes of an episode; a header beyond them is refused before anything is allocated.
    """

    def __init__(self, limits: CodecLimits = DEFAULT_LIMITS) -> None:
        self._limits = limits
        self._table: str | None = None
        self._partial: PartialEpisode | None = None
        self._skipping = False  # whether chunks belong to an episode that was refused

    @property
    def table(self) -> str:
        """Name of the table in the stream's first message; empty before it, and for the default table."""
        return self._table or ""

    @property
    def in_progress(self) -> bool:
        """Whether chunks of an announced episode are still to come."""
        return self._partial is not None

    @property
    def announced_bytes(self) -> int:
        """Payload that the header of the episode in progress announced, which is within the limit; 0 if none is in progress."""
        return self._partial.size_bytes if self._partial is not None else 0

    def feed(self, message: bytes) -> Iterator[Episode | CodecError]:
        """Decodes one message.

        Returns:
            An iterator over the episodes that this message completes and, in place of each refused one, its error. Exhaust it before the
            next call. The columns of a whole episode are read-only views into the message; those of an episode in chunks are writable
            arrays that own their memory. An error's ``key`` is the episode's, if it could be read.

        Raises:
            CodecError: the message as a whole is refused, and the error is ``fatal``: it is malformed, a chunk has no header or is not
                the next one, or another episode begins before the one in progress is complete.
        """
        content, positions = self._read_content(message)
        try:
            if content == _CHUNK:
                episode = self._feed_chunk(message, *positions[0])
            else:
                self._expect_new_episode()
                if content != _HEADER:
                    return self._read_whole(message, positions)
                episode = self._feed_header(message, *positions[0])
        except CodecError as error:
            if error.fatal:
                raise
            return iter((error,))
        return iter(() if episode is None else (episode,))

    def _read_content(self, message: bytes) -> tuple[int, list[tuple[int, int]]]:
        """Returns the tag of what a message contains, and its position; for several episodes, the position of each."""
        positions: list[tuple[int, int]] = []
        tags: list[int] = []
        table = ""
        try:
            for key, a, b in read_fields(message, 0, len(message)):
                if key in _CONTENTS:
                    tags.append(key)
                    positions.append((a, b))
                elif key == _TABLE:
                    table = read_text(message, a, b, "table", max_chars=self._limits.max_name_chars)
            if not tags or (len(tags) > 1 and set(tags) != {_EPISODES}):
                raise CodecError(f"{len(tags)} parts in a message, expected one of episode, header, chunk and episodes")
            if len(positions) > MAX_GROUP_EPISODES:
                raise OversizeError(f"{len(positions)} episodes in a message, expected at most {MAX_GROUP_EPISODES}")
        except CodecError as error:
            error.key, error.fatal = self._abandon(skip=False), True
            raise
        if self._table is None:
            self._table = table
        return tags[0], positions

    def _read_whole(self, message: bytes, positions: list[tuple[int, int]]) -> Iterator[Episode | CodecError]:
        for start, end in positions:
            try:
                episode: Episode | CodecError = read_episode(message, start, end, self._limits)
            except CodecError as error:
                episode = error
            yield episode

    def _expect_new_episode(self) -> None:
        """Raises a fatal CodecError if an episode is in progress; otherwise ends the skipping of a refused one."""
        if self._partial is not None:
            key = self._abandon(skip=False)
            raise CodecError("another episode begins before the last one is complete", key=key, fatal=True)
        self._skipping = False

    def _feed_header(self, message: bytes, start: int, end: int) -> Episode | None:
        self._skipping = True  # should the header be refused, its chunks are still to come
        self._partial = read_header(message, start, end, self._limits)
        self._skipping = False
        return self._take_if_complete()

    def _feed_chunk(self, message: bytes, start: int, end: int) -> Episode | None:
        if self._skipping:
            return None
        if self._partial is None:
            raise CodecError("a chunk without a header before it", fatal=True)
        try:
            self._partial.add_chunk(message, start, end)
        except CodecError as error:
            error.key = self._abandon(skip=not error.fatal)
            raise
        return self._take_if_complete()

    def _take_if_complete(self) -> Episode | None:
        if self._partial is None or not self._partial.complete:
            return None
        partial, self._partial = self._partial, None
        return partial.take()

    def _abandon(self, *, skip: bool) -> EpisodeKey | None:
        """Drops the episode in progress and returns its key. ``skip`` says whether its remaining chunks are to be ignored."""
        key = self._partial.key if self._partial else None
        self._partial, self._skipping = None, skip
        return key
