"""Streams of episodes of any size: ``LoadEpisodesRequest``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from touchline_protos.codec.episodes import (
    check_bool,
    column_spec,
    encode_add_episode,
    encode_episodes,
    encode_origin,
    read_episode,
    read_origin,
)
from touchline_protos.codec.tensors import DEFAULT_LIMITS, TensorSpec, check_shape, encode_column_spec, read_column_spec
from touchline_protos.codec.wire import (
    LEN,
    VARINT,
    encode_varint,
    fresh_message,
    int_field,
    len_field,
    read_fields,
    read_text,
    tag,
    text_field,
    to_int32,
    to_int64,
    varint_size,
)
from touchline_protos.types.dtypes import dtype_name
from touchline_protos.types.episode import CodecError, CodecLimits, Episode, EpisodeKey, OversizeError

_TABLE = tag(1, LEN)
_EPISODE = tag(2, LEN)
_HEADER = tag(3, LEN)
_CHUNK = tag(4, LEN)
_EPISODES = tag(5, LEN)
_PARTS = (_EPISODE, _HEADER, _CHUNK, _EPISODES)
_HEADER_LENGTH = tag(4, VARINT)
_HEADER_COLUMNS = tag(5, LEN)
_CHUNK_COLUMN = tag(1, VARINT)
_CHUNK_OFFSET = tag(2, VARINT)
_CHUNK_DATA = tag(3, LEN)


MAX_GROUP_EPISODES = 1024
"""Most episodes of one message."""

GROUP_BYTES = 480 << 10
"""Size up to which small episodes share a message."""


def encode_loads(
    episodes: Iterable[Episode], *, table: str = "", chunk_bytes: int = 1 << 20, group_bytes: int = GROUP_BYTES
) -> Iterator[bytes]:
    """Iterates over the ``LoadEpisodesRequest`` messages of many episodes: small ones share a message, which costs both sides far
    less than one for each.

    Args:
        episodes: in the order in which they go.
        table: put into every episode's first message.
        chunk_bytes: as for :func:`encode_load`.
        group_bytes: largest message that several share; not more than ``chunk_bytes`` either.

    Raises:
        CodecError: as :func:`encode_load`.
    """
    room_bytes = min(chunk_bytes, group_bytes)
    group: list[Episode] = []
    group_size_bytes = 0
    for episode in episodes:
        size_bytes = episode.size_bytes + _most_bytes_around(episode)
        small = size_bytes <= room_bytes
        if group and (not small or group_size_bytes + size_bytes > room_bytes or len(group) == MAX_GROUP_EPISODES):
            yield _encode_group(group, table)
            group, group_size_bytes = [], 0
        if small:
            group.append(episode)
            group_size_bytes += size_bytes
        else:
            yield from encode_load(episode, table=table, chunk_bytes=chunk_bytes)
    if group:
        yield _encode_group(group, table)


def _most_bytes_around(episode: Episode) -> int:
    """Returns an upper bound of what a message takes for an episode beside its payload."""
    key_bytes = 4 * len(episode.key.client_id) if episode.key is not None else 0
    return 96 + key_bytes + 4 * len(episode.actor) + sum(64 + 4 * len(name) + 10 * column.ndim for name, column in episode.columns.items())


def _encode_group(episodes: list[Episode], table: str) -> bytes:
    return encode_episodes(episodes, table=table, field=5) if len(episodes) > 1 else encode_add_episode(episodes[0], table=table)


def encode_load(episode: Episode, *, table: str = "", chunk_bytes: int = 1 << 20) -> Iterator[bytes]:
    """Iterates over the ``LoadEpisodesRequest`` messages of one episode.

    Args:
        episode: any dtype that the wire has; arrays that are not contiguous or not little-endian are converted (copied)
            one by one.
        table: put into the episode's first message.
        chunk_bytes: an episode with a payload of up to this many bytes goes whole; a larger one as a header and chunks
            of this size.

    Raises:
        CodecError: as for ``encode_add_episode``; also where the columns of an episode that goes in chunks differ in
            rows.
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


def encode_header(origin: Episode, specs: Sequence[TensorSpec], rows: int) -> bytes:
    """Returns an ``EpisodeHeader``.

    Args:
        origin: key, actor and policy version; its columns are not looked at.
        specs: of the columns, their shapes with the rows.
        rows: of the episode.

    Raises:
        CodecError: a column has other rows, or a name or key is out of range.
    """
    columns = b""
    for spec in specs:
        if spec.shape[:1] != (rows,):
            raise CodecError(f"{spec.name}: shape {spec.shape}, expected {rows} rows to match the other columns")
        columns += encode_column_spec(5, TensorSpec(spec.name, spec.dtype, spec.shape[1:]))
    return encode_origin(origin) + int_field(4, rows) + columns


def chunk_message(column: int, offset: int, size_bytes: int) -> tuple[bytes, np.ndarray]:
    """Returns a message whose field 4 is a ``ColumnChunk``, as ``LoadEpisodesRequest`` and ``GetEpisodesResponse`` have it.

    Returns:
        The message, and where its data is to be put: [size_bytes] uint8, writable, valid for as long as the message is.
    """
    head = int_field(1, column) + int_field(2, offset) + encode_varint(tag(3, LEN)) + encode_varint(size_bytes)
    size = len(head) + size_bytes
    head = encode_varint(_CHUNK) + encode_varint(size) + head
    message, view, _ = fresh_message(1 + varint_size(size) + size)
    view[: len(head)] = head
    return message, np.ndarray((size_bytes,), np.uint8, view, len(head))


class LoadDecoder:
    """Reads one stream of ``LoadEpisodesRequest`` messages. Not thread-safe.

    Args:
        limits: a header over them is refused before anything is allocated.
    """

    def __init__(self, limits: CodecLimits = DEFAULT_LIMITS) -> None:
        self._limits = limits
        self._table: str | None = None
        self._partial: PartialEpisode | None = None
        self._skipping = False

    @property
    def table(self) -> str:
        """The table that the stream's first message named; empty before it."""
        return self._table or ""

    @property
    def in_progress(self) -> bool:
        """Whether a header was taken and chunks of its episode are still to come."""
        return self._partial is not None

    @property
    def announced_bytes(self) -> int:
        """Payload of the episode in progress, as its header announced it (no more than the limit); 0 where none is."""
        return self._partial.size_bytes if self._partial is not None else 0

    def feed_all(self, message: bytes) -> Iterator[Episode | CodecError]:
        """Takes one message, which may bring several episodes.

        Returns:
            Iterates over the episodes that are complete with it, as :meth:`feed` gives them, and the errors of those that are refused. To
            be used up before the next message.

        Raises:
            CodecError: the message as a whole is refused: the error is ``fatal``.
        """
        part, places = self._read_parts(message)
        if part == _EPISODES:
            self._end_partial()
            return self._read_group(message, places)
        try:
            episode = self._feed(message, part, *places[0])
        except CodecError as error:
            if error.fatal:
                raise
            return iter((error,))
        return iter(() if episode is None else (episode,))

    def feed(self, message: bytes) -> Episode | None:
        """Takes one message of one part.

        Returns:
            The episode that is complete with it, if one is. A whole episode's columns are read-only views of the
            message; those of a chunked one are writable arrays of its own.

        Raises:
            CodecError: the episode is refused; ``error.key`` is its key where it could be read. What is left of its
                chunks is skipped and the stream goes on, unless ``error.fatal``: a chunk without a header, a gap, an
                overlap, an unfinished episode.
            OversizeError: the same, where it is over a limit.
        """
        part, places = self._read_parts(message)
        if part == _EPISODES:
            raise CodecError(f"{len(places)} episodes in a message, expected one part", key=self._abandon(skip=False), fatal=True)
        return self._feed(message, part, *places[0])

    def _read_group(self, message: bytes, places: list[tuple[int, int]]) -> Iterator[Episode | CodecError]:
        for start, end in places:
            try:
                episode: Episode | CodecError = read_episode(message, start, end, self._limits)
            except CodecError as error:
                episode = error
            yield episode

    def _end_partial(self) -> None:
        if self._partial is not None:
            key = self._abandon(skip=False)
            raise CodecError("another episode begins before the last one is complete", key=key, fatal=True)
        self._skipping = False

    def _feed(self, message: bytes, part: int, start: int, end: int) -> Episode | None:
        if part == _CHUNK:
            return self._feed_chunk(message, start, end)
        self._end_partial()
        if part == _EPISODE:
            return read_episode(message, start, end, self._limits)
        self._skipping = True
        self._partial = read_header(message, start, end, self._limits)
        self._skipping = False
        return self._finish()

    def _read_parts(self, message: bytes) -> tuple[int, list[tuple[int, int]]]:
        """Returns which part a message has, and where it is; several places for episodes that share it."""
        places: list[tuple[int, int]] = []
        kinds: list[int] = []
        table = ""
        try:
            for key, a, b in read_fields(message, 0, len(message)):
                if key in _PARTS:
                    kinds.append(key)
                    places.append((a, b))
                elif key == _TABLE:
                    table = read_text(message, a, b, "table", max_chars=self._limits.max_name_chars)
            if not kinds or (len(kinds) > 1 and set(kinds) != {_EPISODES}):
                raise CodecError(f"{len(kinds)} parts in a message, expected one of episode, header, chunk and episodes")
            if len(places) > MAX_GROUP_EPISODES:
                raise OversizeError(f"{len(places)} episodes in a message, expected at most {MAX_GROUP_EPISODES}")
        except CodecError as error:
            error.key, error.fatal = self._abandon(skip=False), True
            raise
        if self._table is None:
            self._table = table
        return kinds[0], places

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
        return self._finish()

    def _finish(self) -> Episode | None:
        if self._partial is None or not self._partial.complete:
            return None
        partial, self._partial = self._partial, None
        return partial.take()

    def _abandon(self, *, skip: bool) -> EpisodeKey | None:
        """Gives up the episode in progress, returns its key."""
        key = self._partial.key if self._partial else None
        self._partial, self._skipping = None, skip
        return key


class PartialEpisode:
    """An episode whose header was taken; each column is allocated when its first chunk arrives. Made by :func:`read_header`."""

    def __init__(self, key: EpisodeKey | None, actor: str, policy_version: int, specs: list[TensorSpec]) -> None:
        self.key = key
        self._actor = actor
        self._policy_version = policy_version
        self._specs = specs
        self.size_bytes = sum(spec.size_bytes for spec in specs)
        self._columns: dict[str, np.ndarray] = {}
        self._filled = 0
        self._skip_empty()

    @property
    def complete(self) -> bool:
        """Whether the last byte of its last column is there."""
        return len(self._columns) == len(self._specs) and not self._filled

    def take(self) -> Episode:
        """Returns the complete episode; its columns are writable arrays of its own.

        Raises:
            CodecError: a value that its dtype does not have.
        """
        try:
            for name, column in self._columns.items():
                check_bool(name, column)
        except CodecError as error:
            error.key = self.key
            raise
        return Episode(self._columns, self.key, self._actor, self._policy_version)

    def add_chunk(self, message: bytes, start: int, end: int) -> None:
        """Copies a chunk into place.

        Raises:
            CodecError: malformed; fatal where it is not the piece that is next.
        """
        column = offset = 0
        first = last = end
        for key, a, b in read_fields(message, start, end):
            if key == _CHUNK_COLUMN:
                column = to_int32(a)
            elif key == _CHUNK_OFFSET:
                offset = to_int64(a)
            elif key == _CHUNK_DATA:
                first, last = a, b
        self._place(column, offset, memoryview(message)[first:last])

    def _place(self, column: int, offset: int, data: memoryview) -> None:
        current = len(self._columns) - 1 if self._filled else len(self._columns)
        spec = self._specs[current]
        if (column, offset) != (current, self._filled):
            raise CodecError(
                f"{spec.name}: chunk of column {column} at byte {offset}, expected column {current} at byte {self._filled}",
                fatal=True,
            )
        if self._filled + len(data) > spec.size_bytes:
            raise CodecError(
                f"{spec.name}: chunks of {self._filled + len(data)} bytes, expected {spec.size_bytes} for "
                f"{dtype_name(spec.dtype)} of shape {spec.shape}",
                fatal=True,
            )
        if not len(data):
            return
        if not self._filled:
            self._columns[spec.name] = np.empty(spec.shape, spec.dtype)
        flat = self._columns[spec.name].reshape(-1).view(np.uint8)
        flat.data[self._filled : self._filled + len(data)] = data
        self._filled += len(data)
        if self._filled == spec.size_bytes:
            self._filled = 0
            self._skip_empty()

    def _skip_empty(self) -> None:
        """Columns without a byte have no chunks."""
        for spec in self._specs[len(self._columns) :]:
            if spec.size_bytes:
                break
            self._columns[spec.name] = np.empty(spec.shape, spec.dtype)


def read_header(message: bytes, start: int, end: int, limits: CodecLimits) -> PartialEpisode:
    """Reads an ``EpisodeHeader`` and checks it against the limits; allocates nothing of the announced size.

    Raises:
        CodecError: malformed or over a limit; with the episode's key where that could be read.
    """
    key, actor, policy_version = read_origin(message, start, end)
    try:
        length = 0
        rows_of: dict[str, TensorSpec] = {}
        for field, a, b in read_fields(message, start, end):
            if field == _HEADER_LENGTH:
                length = to_int64(a)
            elif field == _HEADER_COLUMNS:
                if len(rows_of) == limits.max_columns:
                    raise OversizeError(f"more than {limits.max_columns} columns, expected at most so many (max_columns)")
                spec = read_column_spec(message, a, b, limits)
                if spec.name in rows_of:
                    raise CodecError(f"{spec.name}: column appears twice, expected once")
                rows_of[spec.name] = spec
        if length < 0:
            raise CodecError(f"length {length}, expected a number of rows")
        specs = [TensorSpec(spec.name, spec.dtype, (length, *spec.shape)) for spec in rows_of.values()]
        for spec in specs:
            check_shape(spec, limits.max_dims)
        total = sum(spec.size_bytes for spec in specs)
        if total > limits.max_episode_bytes:
            raise OversizeError(f"episode of {total} bytes announced, expected at most {limits.max_episode_bytes} (max_episode_bytes)")
        return PartialEpisode(key, actor, policy_version, specs)
    except CodecError as error:
        error.key = key
        raise
