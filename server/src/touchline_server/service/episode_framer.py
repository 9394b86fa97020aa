"""Stored episodes as the messages of one answer to GetEpisodes: small ones share a frame, large ones are sent in chunks."""

from __future__ import annotations

from collections.abc import Iterator

from touchline_protos.codec.chunks import chunk_message
from touchline_protos.codec.download import EpisodeOutline, encode_evicted, encode_selection, encode_stored_header, group_message
from touchline_server.errors import InvalidArgumentError, TooLargeError
from touchline_server.store.index import IndexEntry
from touchline_server.store.reader import PIECE_BYTES, EpisodeReader, pieces

MIN_FRAME_BYTES = 4096
"""Smallest frame size that may be requested."""

FRAME_SHARE = 2
"""Payload gets 1 / FRAME_SHARE of a frame's limit; the rest is for the names and numbers around it."""


class EpisodeFramer:
    """Makes the messages of one call, one at a time, and keeps none. Used by one thread at a time.

    Args:
        reader: reads the episodes.
        max_message_bytes: the server's own limit to a message.
        max_frame_bytes: the caller's limit to a message; 0 if it has none.

    Raises:
        InvalidArgumentError: the caller's limit is out of range.
    """

    def __init__(self, reader: EpisodeReader, *, max_message_bytes: int, max_frame_bytes: int) -> None:
        if max_frame_bytes and max_frame_bytes < MIN_FRAME_BYTES:
            raise InvalidArgumentError(f"max_frame_bytes: {max_frame_bytes}, expected 0 or at least {MIN_FRAME_BYTES}")
        self._reader = reader
        self._limit = min(max_message_bytes, max_frame_bytes or max_message_bytes)
        self._payload_bytes = min(PIECE_BYTES, self._limit // FRAME_SHARE)
        self.frame_bytes = self._payload_bytes
        """Size of a frame, without the names and numbers in it."""
        self._frames = self._all()

    def next(self) -> bytes | None:
        """Returns the next message; None at the end.

        Raises:
            TooLargeError: the names of one episode's columns already exceed the limit.
        """
        return next(self._frames, None)

    def _all(self) -> Iterator[bytes]:
        yield encode_selection(self._reader.selection)
        while entries := self._reader.take(self._payload_bytes):
            if entries[0].length * self._reader.row_bytes > self._payload_bytes:
                yield from self._chunks(entries[0])
            else:
                yield from self._groups(entries)

    def _groups(self, entries: list[IndexEntry]) -> Iterator[bytes]:
        while entries:
            message, outs = group_message([self._outline(entry) for entry in entries])
            if len(message) > self._limit and len(entries) > 1:
                # The names take more than the payload: send fewer episodes at a time.
                half = len(entries) // 2
                yield from self._groups(entries[:half])
                entries = entries[half:]
            elif self._reader.copy_whole(entries, outs):
                yield self._checked(message)
                return
            else:
                entries = self._reader.still_stored(entries)

    def _chunks(self, entry: IndexEntry) -> Iterator[bytes]:
        yield self._checked(encode_stored_header(self._outline(entry), entry.length))
        for column, spec in enumerate(self._reader.specs(entry)):
            for offset, size in pieces(spec.size_bytes, self._payload_bytes):
                message, out = chunk_message(column, offset, size)
                if not self._reader.copy(entry, column, offset, out):
                    yield encode_evicted(entry.episode_id)
                    return
                yield message

    def _outline(self, entry: IndexEntry) -> EpisodeOutline:
        return EpisodeOutline(entry.episode_id, entry.origin, self._reader.specs(entry))

    def _checked(self, message: bytes) -> bytes:
        if len(message) > self._limit:
            raise TooLargeError(
                f"a frame of {len(message)} bytes for the names of an episode's columns, expected at most {self._limit} "
                "(max_frame_bytes, limits.max_message_bytes); choose fewer columns"
            )
        return message
