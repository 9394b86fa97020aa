"""Episodes too large for one message: a header that announces the columns, then the columns' bytes in chunks.

Uploads (:mod:`~touchline_protos.codec.upload`) and downloads (:mod:`~touchline_protos.codec.download`) use the same header and chunks::

    header    key, actor, policy version, number of rows, and per column its name, dtype and the shape of one row
    chunk     column 0, offset 0, bytes              each column from its first byte to its last, one column after another
    chunk     column 0, offset 1 MiB, bytes
    chunk     column 1, offset 0, bytes              a column without bytes has no chunk
    ...                                              the episode is complete with the last byte of the last column
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from touchline_protos.codec.episodes import check_bool, encode_origin, read_origin
from touchline_protos.codec.tensors import TensorSpec, check_shape, encode_column_spec, read_column_spec
from touchline_protos.codec.wire import (
    LEN,
    VARINT,
    encode_varint,
    fresh_message,
    int_field,
    read_fields,
    tag,
    to_int32,
    to_int64,
    varint_size,
)
from touchline_protos.types.dtypes import dtype_name
from touchline_protos.types.episode import CodecError, CodecLimits, Episode, EpisodeKey, OversizeError

_CHUNK = tag(4, LEN)
_HEADER_LENGTH = tag(4, VARINT)
_HEADER_COLUMNS = tag(5, LEN)
_CHUNK_COLUMN = tag(1, VARINT)
_CHUNK_OFFSET = tag(2, VARINT)
_CHUNK_DATA = tag(3, LEN)


def encode_header(origin: Episode, specs: Sequence[TensorSpec], rows: int) -> bytes:
    """Returns an ``EpisodeHeader``.

    Args:
        origin: episode whose key, actor and policy version are sent; its columns are ignored.
        specs: specs of the columns; their shapes begin with the rows.
        rows: number of rows of the episode.

    Raises:
        CodecError: a column has another number of rows, or a name or key is out of range.
    """
    columns = b""
    for spec in specs:
        if spec.shape[:1] != (rows,):
            raise CodecError(f"{spec.name}: shape {spec.shape}, expected {rows} rows to match the other columns")
        columns += encode_column_spec(5, TensorSpec(spec.name, spec.dtype, spec.shape[1:]))
    return encode_origin(origin) + int_field(4, rows) + columns


def chunk_message(column: int, offset: int, size_bytes: int) -> tuple[bytes, np.ndarray]:
    """Returns a message whose only field, number 4, is a ``ColumnChunk``, with unset data.

    Args:
        column: position of the column in the header.
        offset: offset of the chunk in the column, in bytes.
        size_bytes: size of the data.

    Returns:
        The message, and the array [size_bytes] uint8 to copy the data to: writable, valid as long as the message is.
    """
    head = int_field(1, column) + int_field(2, offset) + encode_varint(_CHUNK_DATA) + encode_varint(size_bytes)
    size = len(head) + size_bytes
    head = encode_varint(_CHUNK) + encode_varint(size) + head
    message, view, _ = fresh_message(1 + varint_size(size) + size)
    view[: len(head)] = head
    return message, np.ndarray((size_bytes,), np.uint8, view, len(head))


class PartialEpisode:
    """An episode whose header was read and whose chunks are arriving. Made by :func:`read_header`. Not thread-safe.

    Each column is allocated when its first chunk arrives, so the header by itself takes no memory.

    Args:
        key: the episode's key, or None.
        actor: name of its actor.
        policy_version: version of the policy that acted.
        specs: specs of the columns in order; their shapes begin with the rows.
    """

    def __init__(self, key: EpisodeKey | None, actor: str, policy_version: int, specs: list[TensorSpec]) -> None:
        self.key = key
        self._actor = actor
        self._policy_version = policy_version
        self._specs = specs
        self.size_bytes = sum(spec.size_bytes for spec in specs)
        """Payload of all columns, as announced."""
        self._columns: dict[str, np.ndarray] = {}  # those that have begun; only the last of them may be incomplete
        self._filled = 0  # bytes of the incomplete column; 0 if there is none
        self._add_empty_columns()

    @property
    def complete(self) -> bool:
        """Whether the last byte of the last column has arrived."""
        return len(self._columns) == len(self._specs) and not self._filled

    def take(self) -> Episode:
        """Returns the complete episode. Its columns are writable arrays that own their memory.

        Raises:
            CodecError: a column contains a byte that is not a value of its dtype.
        """
        try:
            for name, column in self._columns.items():
                check_bool(name, column)
        except CodecError as error:
            error.key = self.key
            raise
        return Episode(self._columns, self.key, self._actor, self._policy_version)

    def add_chunk(self, message: bytes, start: int, end: int) -> None:
        """Copies the ``ColumnChunk`` in ``message[start:end]`` into place.

        Raises:
            CodecError: the chunk is malformed; the error is fatal if it is not the next one.
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
        self._copy(column, offset, memoryview(message)[first:last])

    def _copy(self, column: int, offset: int, data: memoryview) -> None:
        # Column and offset are compared with the only ones possible, so neither is ever used as an index. Then the size is compared with
        # the announced one, and only then is memory allocated.
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
            self._add_empty_columns()

    def _add_empty_columns(self) -> None:
        """Adds the next columns as long as they have no bytes, because no chunk will arrive for them."""
        for spec in self._specs[len(self._columns) :]:
            if spec.size_bytes:
                break
            self._columns[spec.name] = np.empty(spec.shape, spec.dtype)


def read_header(message: bytes, start: int, end: int, limits: CodecLimits) -> PartialEpisode:
    """Reads the ``EpisodeHeader`` in ``message[start:end]`` and checks it against the limits. Allocates nothing of the announced size.

    Raises:
        CodecError: the header is malformed; the error has the episode's key if that could be read.
        OversizeError: it exceeds a limit.
    """
    key, actor, policy_version = read_origin(message, start, end)
    try:
        length = 0
        row_specs: dict[str, TensorSpec] = {}
        for field, a, b in read_fields(message, start, end):
            if field == _HEADER_LENGTH:
                length = to_int64(a)
            elif field == _HEADER_COLUMNS:
                if len(row_specs) == limits.max_columns:
                    raise OversizeError(f"more than {limits.max_columns} columns, expected at most {limits.max_columns} (max_columns)")
                spec = read_column_spec(message, a, b, limits)
                if spec.name in row_specs:
                    raise CodecError(f"{spec.name}: column appears twice, expected once")
                row_specs[spec.name] = spec
        if length < 0:
            raise CodecError(f"length {length}, expected a number of rows")
        # A row of each column may be possible and all rows of it not, so the whole shape is checked before its size is computed.
        specs = [TensorSpec(spec.name, spec.dtype, (length, *spec.shape)) for spec in row_specs.values()]
        for spec in specs:
            check_shape(spec, limits.max_dims)
        total = sum(spec.size_bytes for spec in specs)
        if total > limits.max_episode_bytes:
            raise OversizeError(f"episode of {total} bytes announced, expected at most {limits.max_episode_bytes} (max_episode_bytes)")
        return PartialEpisode(key, actor, policy_version, specs)
    except CodecError as error:
        error.key = key
        raise
