"""Stored episodes that a client reads back: ``GetEpisodesResponse``.

The first message of an answer is the selection. Each of the others contains one or several whole episodes, or announces a large one, or
carries a chunk of it (the same as of an upload, see :mod:`touchline_protos.codec.chunks`), or withdraws it::

    selection, group, group, header, chunk, chunk, chunk, group, header, chunk, evicted, group
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from touchline_protos.codec.chunks import PartialEpisode, encode_header, read_header
from touchline_protos.codec.episodes import encode_origin, read_episode
from touchline_protos.codec.tensors import TensorSpec, tensor_field
from touchline_protos.codec.wire import LEN, VARINT, encode_varint, fresh_message, int_field, len_field, read_fields, tag, to_int64
from touchline_protos.types.episode import CodecError, CodecLimits, Episode, StoredEpisode

_SELECTION = tag(1, LEN)
_GROUP = tag(2, LEN)
_HEADER = tag(3, LEN)
_CHUNK = tag(4, LEN)
_EVICTED = tag(5, LEN)
_PARTS = (_SELECTION, _GROUP, _HEADER, _CHUNK, _EVICTED)
_GROUP_EPISODES = tag(1, LEN)
_EPISODE_ID = tag(1, VARINT)
_CONTENT = tag(2, LEN)

READ_LIMITS = CodecLimits(max_episode_bytes=1 << 40, max_columns=1 << 11)
"""Default limits of one episode, far beyond a server's, which decides itself. Memory is allocated only as bytes arrive."""


class EpisodeSelection(NamedTuple):
    """The episodes that matched when a call began. The fields are those of the message, in its order."""

    first_episode_id: int = 0
    """Lowest id; 0 if no episode matched."""
    last_episode_id: int = -1
    """Highest id; -1 if no episode matched."""
    episodes: int = 0
    """Number of episodes."""
    steps: int = 0
    """Number of their rows."""
    store_generation: int = 0
    """Number that changes when the store starts its ids anew; until then an id means the same episode. ``lineage`` on the wire."""


class EpisodeOutline(NamedTuple):
    """A stored episode without its values."""

    id: int
    """Id that the store gave it."""
    origin: Episode
    """Key, actor and policy version; without columns."""
    specs: Sequence[TensorSpec]
    """Specs of the columns; their shapes begin with the rows."""


def encode_selection(selection: EpisodeSelection) -> bytes:
    """Returns the first message of an answer."""
    return len_field(1, b"".join(int_field(number, value) for number, value in enumerate(selection, start=1)))


def encode_evicted(episode_id: int) -> bytes:
    """Returns the message that withdraws an announced episode, because it was evicted before all of it was sent."""
    return len_field(5, int_field(1, episode_id))


def encode_stored_header(outline: EpisodeOutline, rows: int) -> bytes:
    """Returns the message that announces an episode in chunks; :func:`~touchline_protos.codec.chunks.chunk_message` makes those.

    Args:
        outline: the episode.
        rows: number of its rows.

    Raises:
        CodecError: a name or key is out of range.
    """
    header = encode_header(outline.origin, outline.specs, rows)
    return len_field(3, int_field(1, outline.id) + len_field(2, header))


def group_message(outlines: Sequence[EpisodeOutline]) -> tuple[bytes, list[list[np.ndarray]]]:
    """Returns a message of whole episodes with unset values, which the caller fills in before sharing it.

    Returns:
        The message, and for each episode and each of its columns the array [size_bytes] uint8 to copy the values to: writable, valid as
        long as the message is.

    Raises:
        CodecError: a name or key is out of range.
        OversizeError: the message would exceed protobuf's limit of 2 GiB.
    """
    # A list of literal bytes, and of integers that stand for payloads of that many bytes.
    parts: list[bytes | int] = []
    for outline in outlines:
        content: list[bytes | int] = [encode_origin(outline.origin)]
        for spec in outline.specs:
            # Phase 0: aligned within the column only. Readers copy what they keep, so aligning to the message would gain nothing.
            content += [tensor_field(4, spec, 0, True, True), spec.size_bytes]
        head = int_field(1, outline.id) + encode_varint(_CONTENT) + encode_varint(_size(content))
        parts += [encode_varint(_GROUP_EPISODES) + encode_varint(len(head) + _size(content)) + head, *content]
    parts.insert(0, encode_varint(_GROUP) + encode_varint(_size(parts)))
    message, view, _ = fresh_message(_size(parts))
    targets, at = [], 0
    for part in parts:
        if isinstance(part, int):
            targets.append(np.ndarray((part,), np.uint8, view, at))
            at += part
        else:
            view[at : at + len(part)] = part
            at += len(part)
    ends = np.cumsum([len(outline.specs) for outline in outlines]).tolist()
    return message, [targets[end - len(outline.specs) : end] for outline, end in zip(outlines, ends, strict=True)]


def _size(parts: Sequence[bytes | int]) -> int:
    """Returns the number of bytes of literals and payloads."""
    return sum(part if isinstance(part, int) else len(part) for part in parts)


class EpisodeDecoder:
    """Decodes one answer to GetEpisodes. Not thread-safe.

    Args:
        limits: maximum sizes of an episode; one beyond them is refused before anything is allocated.
    """

    def __init__(self, limits: CodecLimits = READ_LIMITS) -> None:
        self._limits = limits
        self._partial: PartialEpisode | None = None
        self._partial_id = 0
        self.selection: EpisodeSelection | None = None
        """The episodes that matched; None before the first message."""
        self.seen_id = -1
        """Highest id of an episode that is complete or was withdrawn; -1 before the first. A new call continues after it."""

    @property
    def in_progress(self) -> bool:
        """Whether chunks of an announced episode are still to come."""
        return self._partial is not None

    def feed(self, message: bytes) -> list[StoredEpisode]:
        """Decodes one message.

        Returns:
            The episodes that this message completes. Their arrays are writable and own their memory.

        Raises:
            CodecError: the message is malformed, or not one that may come next; no later message can be understood.
        """
        part, start, end = self._read_part(message)
        if part == _SELECTION:
            self.selection = _read_selection(message, start, end)
            return []
        if part == _CHUNK:
            if self._partial is None:
                raise CodecError("a chunk without a header before it", fatal=True)
            self._partial.add_chunk(message, start, end)
            return self._take_if_complete()
        if part == _EVICTED:
            self._withdraw(message, start, end)
            return []
        if self._partial is not None:
            raise CodecError("another episode begins before the last one is complete", fatal=True)
        if part == _GROUP:
            positions = [(a, b) for key, a, b in read_fields(message, start, end) if key == _GROUP_EPISODES]
            return [self._read_whole(message, a, b) for a, b in positions]
        self._partial_id, (first, last) = self._read_numbered(message, start, end)
        self._partial = read_header(message, first, last, self._limits)
        return self._take_if_complete()

    def _read_part(self, message: bytes) -> tuple[int, int, int]:
        parts = [(key, a, b) for key, a, b in read_fields(message, 0, len(message)) if key in _PARTS]
        if len(parts) != 1:
            raise CodecError(f"{len(parts)} parts in a message, expected one of selection, group, header, chunk and evicted", fatal=True)
        if (parts[0][0] == _SELECTION) != (self.selection is None):
            raise CodecError("the selection comes first, and once", fatal=True)
        return parts[0]

    def _read_numbered(self, message: bytes, start: int, end: int) -> tuple[int, tuple[int, int]]:
        """Returns the id of a ``StoredEpisode`` or ``StoredEpisodeHeader``, and the position of its content."""
        episode_id, content = 0, None
        for key, a, b in read_fields(message, start, end):
            if key == _EPISODE_ID:
                episode_id = to_int64(a)
            elif key == _CONTENT:
                if content is not None:
                    raise CodecError("more than one content in an episode, expected one", fatal=True)
                content = a, b
        if content is None:
            raise CodecError(f"episode {episode_id} without content", fatal=True)
        if episode_id <= self.seen_id:
            raise CodecError(f"episode {episode_id} after {self.seen_id}, expected ascending ids", fatal=True)
        return episode_id, content

    def _read_whole(self, message: bytes, start: int, end: int) -> StoredEpisode:
        episode_id, (first, last) = self._read_numbered(message, start, end)
        episode = read_episode(message, first, last, self._limits)
        columns = {name: column.copy() for name, column in episode.columns.items()}
        return self._stored(episode_id, Episode(columns, episode.key, episode.actor, episode.policy_version))

    def _withdraw(self, message: bytes, start: int, end: int) -> None:
        episode_id = 0
        for key, a, _ in read_fields(message, start, end):
            if key == _EPISODE_ID:
                episode_id = to_int64(a)
        if self._partial is None or episode_id != self._partial_id:
            raise CodecError(f"episode {episode_id} is withdrawn, expected the one announced last", fatal=True)
        self._partial = None
        self.seen_id = episode_id

    def _take_if_complete(self) -> list[StoredEpisode]:
        if self._partial is None or not self._partial.complete:
            return []
        partial, self._partial = self._partial, None
        return [self._stored(self._partial_id, partial.take())]

    def _stored(self, episode_id: int, episode: Episode) -> StoredEpisode:
        length = episode.length
        for name, column in episode.columns.items():
            if column.shape[:1] != (length,):
                raise CodecError(f"{name}: shape {column.shape}, expected {length} rows to match the other columns", fatal=True)
        self.seen_id = episode_id
        return StoredEpisode(episode_id, episode.columns, episode.key, episode.actor, episode.policy_version, length)


def _read_selection(message: bytes, start: int, end: int) -> EpisodeSelection:
    # Field n of the message is item n - 1 of the tuple.
    values = [0] * len(EpisodeSelection._fields)
    for key, a, _ in read_fields(message, start, end):
        if key & 7 == VARINT and 1 <= key >> 3 <= len(values):
            values[(key >> 3) - 1] = to_int64(a)
    return EpisodeSelection(*values)
