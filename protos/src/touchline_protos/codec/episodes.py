"""Episodes on the wire: ``AddEpisodeRequest``, and the ``Episode`` within it, which other messages contain too.

A message that carries one or several episodes::

    field 1          table, a text; absent if it is the default table
    field N          an Episode; repeated
      field 1          key: client_id, incarnation, sequence
      field 2          actor, a text
      field 3          policy_version
      field 4          a Column; repeated. Its payload begins at a multiple of 16 bytes (see :mod:`touchline_protos.codec.tensors`)

Encoding copies each column once, into its place in the message. Decoding copies nothing: columns are views into the message.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from touchline_protos.codec.tensors import (
    DEFAULT_LIMITS,
    MessageSkeleton,
    TensorSlice,
    TensorSpec,
    check_name,
    check_shape,
    lay_out_tensors,
    little_endian,
    read_column,
    submessage,
)
from touchline_protos.codec.wire import (
    LEN,
    VARINT,
    Buffer,
    fresh_message,
    int_field,
    len_field,
    read_fields,
    read_text,
    tag,
    text_field,
    to_int64,
)
from touchline_protos.types.episode import CodecError, CodecLimits, Episode, EpisodeKey, OversizeError
from touchline_protos.types.names import MAX_NAME_CHARS

_TABLE = tag(1, LEN)
_EPISODE = tag(2, LEN)
_KEY = tag(1, LEN)
_ACTOR = tag(2, LEN)
_POLICY_VERSION = tag(3, VARINT)
_COLUMNS = tag(4, LEN)
_CLIENT_ID = tag(1, LEN)
_INCARNATION = tag(2, VARINT)
_SEQUENCE = tag(3, VARINT)


def encode_add_episode(episode: Episode, *, table: str = "") -> bytes:
    """Returns an ``AddEpisodeRequest``. A ``LoadEpisodesRequest`` with one whole episode has the same bytes.

    Args:
        episode: episode to encode. Columns that are not contiguous or not little-endian are converted while they are copied.
        table: name of the table; empty is the default one.

    Raises:
        CodecError: a dtype that the wire does not have, or a name or key out of range; the message names the column.
        OversizeError: the message would exceed protobuf's limit of 2 GiB.
    """
    return encode_episodes([episode], table=table, field=2)


def encode_episodes(episodes: Sequence[Episode], *, table: str = "", field: int) -> bytes:
    """Returns a message that contains a table's name, field 1, and whole episodes, each a field of number ``field``.

    Raises:
        CodecError, OversizeError: the same as for :func:`encode_add_episode`.
    """
    # First all positions, then one allocation of the exact size, then one copy of each payload.
    start = text_field(1, table, "table")
    laid_out: list[tuple[MessageSkeleton, list[TensorSpec]]] = []
    end = len(start)
    for episode in episodes:
        skeleton, specs = _lay_out_episode(episode, field, end)
        laid_out.append((skeleton, specs))
        end = skeleton.end
    message, view, _ = fresh_message(end)
    view[: len(start)] = start
    for episode, (skeleton, specs) in zip(episodes, laid_out, strict=True):
        for at, literal in skeleton.literals:
            view[at : at + len(literal)] = literal
        for spec, at, column in zip(specs, skeleton.payloads, episode.columns.values(), strict=True):
            if spec.size_bytes:
                # "equiv" permits a change of the byte order only, so the copy cannot change a value.
                np.copyto(np.ndarray(spec.shape, spec.dtype, view, at), column, casting="equiv")
    return message


def _lay_out_episode(episode: Episode, field: int, at: int) -> tuple[MessageSkeleton, list[TensorSpec]]:
    """Returns the skeleton of an episode that is a field at position ``at`` of a message, and the specs of its columns."""
    specs = [column_spec(name, column) for name, column in episode.columns.items()]
    if len(specs) > DEFAULT_LIMITS.max_columns:
        raise OversizeError(f"{len(specs)} columns, expected at most {DEFAULT_LIMITS.max_columns}")
    head = encode_origin(episode)
    payload_bytes = sum(spec.size_bytes for spec in specs)

    def content(start: int) -> MessageSkeleton:
        columns = lay_out_tensors(itertools.repeat(4), specs, start + len(head), column=True, with_data=True)
        return MessageSkeleton([(start, head), *columns.literals], columns.payloads, columns.end)

    return submessage(field, at, content, at_least=payload_bytes), specs


def decode_add_episode(message: bytes, *, limits: CodecLimits = DEFAULT_LIMITS) -> tuple[str, Episode]:
    """Reads an ``AddEpisodeRequest``.

    Returns:
        The name of the table, and the episode. Its columns are read-only views into the message, which they keep alive. A column is
        unaligned if the sender did not align its payload.

    Raises:
        CodecError: the message is malformed; the error names the column, the value found and the one expected. Its ``key`` is the
            episode's, if it could be read.
        OversizeError: the episode exceeds one of the limits.
    """
    table, episode = "", None
    for key, a, b in read_fields(message, 0, len(message)):
        if key == _TABLE:
            table = read_text(message, a, b, "table", max_chars=limits.max_name_chars)
        elif key == _EPISODE:
            if episode is not None:
                raise CodecError("more than one episode in a message, expected one")
            episode = a, b
    if episode is None:
        raise CodecError("no episode in the message, expected one")
    return table, read_episode(message, *episode, limits)


TABLE_BYTES = 4 * MAX_NAME_CHARS + 8
"""Bytes at the start of a message of :func:`encode_add_episode` that hold the name of its table, whatever its characters."""


def read_table(start: bytes) -> str:
    """Returns the name of the table in the first :data:`TABLE_BYTES` of a message of :func:`encode_add_episode`; empty for the default one.

    Raises:
        CodecError: the name is malformed.
    """
    if not start or start[0] != _TABLE:
        return ""
    _, a, b = next(read_fields(start, 0, len(start)))
    return read_text(start, a, b, "table", max_chars=MAX_NAME_CHARS)


def read_episode(data: Buffer, start: int, end: int, limits: CodecLimits) -> Episode:
    """Reads the ``Episode`` in ``data[start:end]``; its columns are read-only views into ``data``, which they keep alive.

    Raises:
        CodecError, OversizeError: the same as for :func:`decode_add_episode`.
    """
    positions: list[tuple[int, int]] = []
    # The key comes first, whatever the order of the fields, so that an error in a column can say whose it is.
    key, actor, policy_version = read_origin(data, start, end, columns=positions)
    try:
        columns: dict[str, np.ndarray] = {}
        left_bytes = limits.max_episode_bytes
        for a, b in positions:
            if len(columns) == limits.max_columns:
                raise OversizeError(f"more than {limits.max_columns} columns, expected at most {limits.max_columns} (max_columns)")
            column = read_column(data, a, b, limits)
            if column.spec.name in columns:
                raise CodecError(f"{column.spec.name}: column appears twice, expected once")
            # The payload's size must match before a view is made of it: numpy would read past the payload otherwise.
            column.check_size()
            left_bytes -= column.spec.size_bytes
            if left_bytes < 0:
                raise OversizeError(
                    f"{column.spec.name}: with this column the episode has {limits.max_episode_bytes - left_bytes} bytes, "
                    f"expected at most {limits.max_episode_bytes} (max_episode_bytes)"
                )
            columns[column.spec.name] = _view(data, column)
        return Episode(columns, key, actor, policy_version)
    except CodecError as error:
        error.key = key
        raise


def column_spec(name: str, column: np.ndarray) -> TensorSpec:
    """Returns a column's spec on the wire.

    Raises:
        CodecError: the wire cannot represent the dtype, the name or the shape.
    """
    check_name(name)
    spec = TensorSpec(name, little_endian(name, column.dtype), column.shape)
    check_shape(spec, DEFAULT_LIMITS.max_dims)
    return spec


def check_bool(name: str, column: np.ndarray) -> None:
    """Raises CodecError if a bool column contains bytes other than 0 and 1, which numpy and torch leave undefined."""
    if column.dtype == np.bool_ and column.size and int(column.view(np.uint8).max()) > 1:
        raise CodecError(f"{name}: byte {int(column.view(np.uint8).max())} in a bool column, expected 0 or 1")


def encode_origin(episode: Episode) -> bytes:
    """Returns the fields key, actor and policy version, which ``Episode`` and ``EpisodeHeader`` have in common.

    Raises:
        CodecError: one of them is out of range.
    """
    key = b""
    if episode.key is not None:
        if not 1 <= len(episode.key.client_id) <= MAX_NAME_CHARS:
            raise CodecError(f"client_id of {len(episode.key.client_id)} characters, expected 1 to {MAX_NAME_CHARS}")
        key = len_field(
            1,
            text_field(1, episode.key.client_id, "client_id") + int_field(2, episode.key.incarnation) + int_field(3, episode.key.sequence),
        )
    if len(episode.actor) > MAX_NAME_CHARS:
        raise CodecError(f"actor of {len(episode.actor)} characters, expected at most {MAX_NAME_CHARS}")
    return key + text_field(2, episode.actor, "actor") + int_field(3, episode.policy_version)


def read_origin(data: Buffer, start: int, end: int, *, columns: list[tuple[int, int]] | None = None) -> tuple[EpisodeKey | None, str, int]:
    """Reads key, actor and policy version of the ``Episode`` or ``EpisodeHeader`` in ``data[start:end]``.

    Args:
        data: the message.
        start: position of the first byte of the episode or header.
        end: position after its last byte.
        columns: list that receives the start and end of each column of an ``Episode``; None for a header.

    Returns:
        Key, actor and policy version; the key is None if there is none.

    Raises:
        CodecError: a field is malformed. Its ``key`` is set if the key could be read.
    """
    key, actor, policy_version = None, "", 0
    actor_error: CodecError | None = None
    try:
        for field, a, b in read_fields(data, start, end):
            if field == _KEY:
                if key is not None:
                    raise CodecError("more than one key in an episode, expected at most one")
                key = _read_key(data, a, b)
            elif field == _COLUMNS and columns is not None:
                columns.append((a, b))
            elif field == _ACTOR:
                try:
                    actor = read_text(data, a, b, "actor", max_chars=MAX_NAME_CHARS)
                except CodecError as error:
                    actor_error = actor_error or error  # raised below, as the key may come after the actor
            elif field == _POLICY_VERSION:
                policy_version = to_int64(a)
        if actor_error is not None:
            raise actor_error
    except CodecError as error:
        error.key = key
        raise
    return key, actor, policy_version


def _read_key(data: Buffer, start: int, end: int) -> EpisodeKey:
    client_id, incarnation, sequence = "", 0, 0
    for field, a, b in read_fields(data, start, end):
        if field == _CLIENT_ID:
            client_id = read_text(data, a, b, "client_id", max_chars=MAX_NAME_CHARS)
        elif field == _INCARNATION:
            incarnation = to_int64(a)
        elif field == _SEQUENCE:
            sequence = to_int64(a)
    if not client_id:
        raise CodecError(f"key without a client_id, expected 1 to {MAX_NAME_CHARS} characters")
    return EpisodeKey(client_id, incarnation, sequence)


def _view(data: Buffer, column: TensorSlice) -> np.ndarray:
    """Returns a column's values as a read-only view of the message, which it keeps alive."""
    if not column.spec.size_bytes:
        # Its position may be the message's end, where numpy does not make even an empty view.
        array = np.empty(column.spec.shape, column.spec.dtype)
    else:
        array = np.ndarray(column.spec.shape, column.spec.dtype, data, column.start)
    if not isinstance(data, bytes):  # numpy makes views of bytes read-only itself
        array.flags.writeable = False
    check_bool(column.spec.name, array)
    return array
