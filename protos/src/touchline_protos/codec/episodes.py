"""Episodes on the wire: ``AddEpisodeRequest``, and the ``Episode`` that loads carry as well."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from touchline_protos.codec.tensors import (
    DEFAULT_LIMITS,
    Frame,
    TensorSlice,
    TensorSpec,
    check_name,
    check_shape,
    frame_tensors,
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

MAX_ID_CHARS = 128
"""Characters of a client id or an actor's name."""

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
    """Returns an ``AddEpisodeRequest``.

    Each column is copied once, straight into the message; arrays that are not contiguous or not little-endian are
    converted on the way. ``LoadEpisodesRequest`` with a whole episode has the same bytes.

    Raises:
        CodecError: a dtype that the wire does not have, a name or key out of range; the message names the column.
        OversizeError: over protobuf's limit of 2 GiB.
    """
    return encode_episodes([episode], table=table, field=2)


def encode_episodes(episodes: Sequence[Episode], *, table: str = "", field: int) -> bytes:
    """Returns a message of a table, field 1, and of whole episodes, each a field of the number ``field``; else as
    :func:`encode_add_episode`."""
    start = text_field(1, table, "table")
    frames: list[tuple[Frame, list[TensorSpec]]] = []
    end = len(start)
    for episode in episodes:
        frame, specs = _frame_episode(episode, field, end)
        frames.append((frame, specs))
        end = frame.end
    message, view, _ = fresh_message(end)
    view[: len(start)] = start
    for episode, (frame, specs) in zip(episodes, frames, strict=True):
        for at, literal in frame.literals:
            view[at : at + len(literal)] = literal
        for spec, at, column in zip(specs, frame.payloads, episode.columns.values(), strict=True):
            if spec.size_bytes:
                # Copies the bits: a cast between byte orders of one dtype changes no value.
                np.copyto(np.ndarray(spec.shape, spec.dtype, view, at), column, casting="equiv")
    return message


def _frame_episode(episode: Episode, field: int, at: int) -> tuple[Frame, list[TensorSpec]]:
    """Returns the frame of an episode that is a field at position ``at`` of a message, and the specs of its columns."""
    specs = [column_spec(name, column) for name, column in episode.columns.items()]
    if len(specs) > DEFAULT_LIMITS.max_columns:
        raise OversizeError(f"{len(specs)} columns, expected at most {DEFAULT_LIMITS.max_columns}")
    head = encode_origin(episode)
    payload = sum(spec.size_bytes for spec in specs)

    def content(start: int) -> Frame:
        frame = frame_tensors(4, specs, start + len(head), column=True, with_data=True)
        return Frame([(start, head), *frame.literals], frame.payloads, frame.end)

    return submessage(field, at, content, at_least=payload), specs


def decode_add_episode(message: bytes, *, limits: CodecLimits = DEFAULT_LIMITS) -> tuple[str, Episode]:
    """Reads an ``AddEpisodeRequest``.

    Returns:
        The table, and the episode; its columns are read-only views into the message, which they keep alive. A column
        whose payload the sender did not align may be unaligned.

    Raises:
        CodecError: malformed; names the column, what was found and what was expected. Its ``key`` is that of the
            episode, where it could be read.
        OversizeError: over one of the limits.
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


def read_episode(data: Buffer, start: int, end: int, limits: CodecLimits) -> Episode:
    """Reads an ``Episode``; its columns are read-only views into ``data``.

    Raises:
        CodecError: see :func:`decode_add_episode`.
    """
    places: list[tuple[int, int]] = []
    key, actor, policy_version = read_origin(data, start, end, columns=places)
    try:
        columns: dict[str, np.ndarray] = {}
        room = limits.max_episode_bytes
        for a, b in places:
            if len(columns) == limits.max_columns:
                raise OversizeError(f"more than {limits.max_columns} columns, expected at most so many (max_columns)")
            column = read_column(data, a, b, limits)
            if column.spec.name in columns:
                raise CodecError(f"{column.spec.name}: column appears twice, expected once")
            column.check_size()
            room -= column.spec.size_bytes
            if room < 0:
                raise OversizeError(
                    f"{column.spec.name}: with this column the episode has {limits.max_episode_bytes - room} bytes, "
                    f"expected at most {limits.max_episode_bytes} (max_episode_bytes)"
                )
            columns[column.spec.name] = _view(data, column)
        return Episode(columns, key, actor, policy_version)
    except CodecError as error:
        error.key = key
        raise


def column_spec(name: str, column: np.ndarray) -> TensorSpec:
    """Returns a column's spec as it will be on the wire.

    Raises:
        CodecError: the wire has no such dtype, name or shape.
    """
    check_name(name)
    spec = TensorSpec(name, little_endian(name, column.dtype), column.shape)
    check_shape(spec, DEFAULT_LIMITS.max_dims)
    return spec


def check_bool(name: str, column: np.ndarray) -> None:
    """Raises CodecError where a bool column has bytes other than 0 and 1, which numpy and torch leave undefined."""
    if column.dtype == np.bool_ and column.size and int(column.view(np.uint8).max()) > 1:
        raise CodecError(f"{name}: byte {int(column.view(np.uint8).max())} in a bool column, expected 0 or 1")


def encode_origin(episode: Episode) -> bytes:
    """Returns the fields key, actor and policy version; ``Episode`` and ``EpisodeHeader`` have them alike.

    Raises:
        CodecError: one of them is out of range.
    """
    key = b""
    if episode.key is not None:
        if not 1 <= len(episode.key.client_id) <= MAX_ID_CHARS:
            raise CodecError(f"client_id of {len(episode.key.client_id)} characters, expected 1 to {MAX_ID_CHARS}")
        key = len_field(
            1,
            text_field(1, episode.key.client_id, "client_id") + int_field(2, episode.key.incarnation) + int_field(3, episode.key.sequence),
        )
    if len(episode.actor) > MAX_ID_CHARS:
        raise CodecError(f"actor of {len(episode.actor)} characters, expected at most {MAX_ID_CHARS}")
    return key + text_field(2, episode.actor, "actor") + int_field(3, episode.policy_version)


def read_origin(data: Buffer, start: int, end: int, *, columns: list[tuple[int, int]] | None = None) -> tuple[EpisodeKey | None, str, int]:
    """Reads key, actor and policy version of an ``Episode`` or ``EpisodeHeader``.

    Args:
        data: the message.
        start: where the episode or header begins in it.
        end: where it ends.
        columns: of an ``Episode``: is given the places of its columns, from ``data[first]`` to before ``data[last]`` each.

    Raises:
        CodecError: malformed. Its ``key`` is set where the key could be read before.
    """
    key, actor, policy_version = None, "", 0
    fault: CodecError | None = None
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
                    actor = read_text(data, a, b, "actor", max_chars=MAX_ID_CHARS)
                except CodecError as error:
                    fault = fault or error  # told once the key is known
            elif field == _POLICY_VERSION:
                policy_version = to_int64(a)
        if fault is not None:
            raise fault
    except CodecError as error:
        error.key = key
        raise
    return key, actor, policy_version


def _read_key(data: Buffer, start: int, end: int) -> EpisodeKey:
    client_id, incarnation, sequence = "", 0, 0
    for field, a, b in read_fields(data, start, end):
        if field == _CLIENT_ID:
            client_id = read_text(data, a, b, "client_id", max_chars=MAX_ID_CHARS)
        elif field == _INCARNATION:
            incarnation = to_int64(a)
        elif field == _SEQUENCE:
            sequence = to_int64(a)
    if not client_id:
        raise CodecError(f"key without a client_id, expected 1 to {MAX_ID_CHARS} characters")
    return EpisodeKey(client_id, incarnation, sequence)


def _view(data: Buffer, column: TensorSlice) -> np.ndarray:
    """Returns a column's values as a read-only view of the message."""
    if not column.spec.size_bytes:
        array = np.empty(column.spec.shape, column.spec.dtype)
    else:
        array = np.ndarray(column.spec.shape, column.spec.dtype, data, column.start)
    if not isinstance(data, bytes):
        array.flags.writeable = False
    check_bool(column.spec.name, array)
    return array
