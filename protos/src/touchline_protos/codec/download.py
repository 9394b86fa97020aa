"""Stored episodes on their way back: ``GetEpisodesResponse``. The pieces of a big one are those of a load."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from touchline_protos.codec.episodes import encode_origin, read_episode
from touchline_protos.codec.tensors import TensorSpec, tensor_field
from touchline_protos.codec.upload import PartialEpisode, encode_header, read_header
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
"""What a reader takes of one episode: the server's limits are the server's to choose, and memory is only taken as bytes arrive."""


class EpisodeSelection(NamedTuple):
    """What there was to read when a call began."""

    first_episode_id: int = 0
    """Of the first episode; 0 where there is none."""
    last_episode_id: int = -1
    """Of the last one; -1 where there is none."""
    episodes: int = 0
    """How many."""
    steps: int = 0
    """Their rows."""
    lineage: int = 0
    """The same for as long as an id names the same episode."""


class EpisodeOutline(NamedTuple):
    """A stored episode without its values."""

    id: int
    origin: Episode
    """Key, actor and policy version; no columns."""
    specs: Sequence[TensorSpec]
    """Of the columns, their shapes with the rows."""


def encode_selection(selection: EpisodeSelection) -> bytes:
    """Returns the first message of an answer."""
    return len_field(1, b"".join(int_field(number, value) for number, value in enumerate(selection, start=1)))


def encode_evicted(episode_id: int) -> bytes:
    """Returns the message that takes an announced episode back."""
    return len_field(5, int_field(1, episode_id))


def encode_stored_header(outline: EpisodeOutline, rows: int) -> bytes:
    """Returns the message that announces an episode in chunks, which :func:`~touchline_protos.codec.upload.chunk_message` makes.

    Raises:
        CodecError: a name or key is out of range.
    """
    header = encode_header(outline.origin, outline.specs, rows)
    return len_field(3, int_field(1, outline.id) + len_field(2, header))


def group_message(outlines: Sequence[EpisodeOutline]) -> tuple[bytes, list[list[np.ndarray]]]:
    """Returns a message of whole episodes, to be filled before anyone else sees it.

    Returns:
        The message, and for each episode and each of its columns where the values are to be put: [size] uint8, writable, valid for as
        long as the message is.

    Raises:
        CodecError: a name or key is out of range.
        OversizeError: over protobuf's limit of 2 GiB.
    """
    parts: list[bytes | int] = []
    for outline in outlines:
        content: list[bytes | int] = [encode_origin(outline.origin)]
        for spec in outline.specs:
            # Readers copy what they keep, so that nothing is gained by payloads aligned to the message.
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
    return sum(part if isinstance(part, int) else len(part) for part in parts)


class EpisodeDecoder:
    """Reads one answer to GetEpisodes. Not thread-safe.

    Args:
        limits: an episode over them is refused before anything is allocated.
    """

    def __init__(self, limits: CodecLimits = READ_LIMITS) -> None:
        self._limits = limits
        self._partial: PartialEpisode | None = None
        self._partial_id = 0
        self.selection: EpisodeSelection | None = None
        """What there is to read; None before the first message."""
        self.seen_id = -1
        """The highest id that was dealt with: episodes up to it are complete or left out."""

    @property
    def in_progress(self) -> bool:
        """Whether chunks of an announced episode are still to come."""
        return self._partial is not None

    def feed(self, message: bytes) -> list[StoredEpisode]:
        """Takes one message.

        Returns:
            The episodes that are complete with it, their arrays fresh.

        Raises:
            CodecError: malformed, or not what may come next; nothing after it can be understood.
        """
        part, start, end = self._read_part(message)
        if part == _SELECTION:
            self.selection = _read_selection(message, start, end)
            return []
        if part == _CHUNK:
            if self._partial is None:
                raise CodecError("a chunk without a header before it", fatal=True)
            self._partial.add_chunk(message, start, end)
            return self._finish()
        if part == _EVICTED:
            self._take_back(message, start, end)
            return []
        if self._partial is not None:
            raise CodecError("another episode begins before the last one is complete", fatal=True)
        if part == _GROUP:
            places = [(a, b) for key, a, b in read_fields(message, start, end) if key == _GROUP_EPISODES]
            return [self._read_whole(message, a, b) for a, b in places]
        self._partial_id, (first, last) = self._read_numbered(message, start, end)
        self._partial = read_header(message, first, last, self._limits)
        return self._finish()

    def _read_part(self, message: bytes) -> tuple[int, int, int]:
        parts = [(key, a, b) for key, a, b in read_fields(message, 0, len(message)) if key in _PARTS]
        if len(parts) != 1:
            raise CodecError(f"{len(parts)} parts in a message, expected one of selection, group, header, chunk and evicted", fatal=True)
        if (parts[0][0] == _SELECTION) != (self.selection is None):
            raise CodecError("the selection comes first, and once", fatal=True)
        return parts[0]

    def _read_numbered(self, message: bytes, start: int, end: int) -> tuple[int, tuple[int, int]]:
        """Returns the id, and where the content is."""
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

    def _take_back(self, message: bytes, start: int, end: int) -> None:
        episode_id = 0
        for key, a, _ in read_fields(message, start, end):
            if key == _EPISODE_ID:
                episode_id = to_int64(a)
        if self._partial is None or episode_id != self._partial_id:
            raise CodecError(f"episode {episode_id} is taken back, expected the one announced last", fatal=True)
        self._partial = None
        self.seen_id = episode_id

    def _finish(self) -> list[StoredEpisode]:
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
    values = [0] * len(EpisodeSelection._fields)
    for key, a, _ in read_fields(message, start, end):
        if key & 7 == VARINT and 1 <= key >> 3 <= len(values):
            values[(key >> 3) - 1] = to_int64(a)
    return EpisodeSelection(*values)
