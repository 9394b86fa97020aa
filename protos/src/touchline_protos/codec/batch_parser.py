"""Parse a ``Batch`` message and check that it has the fields, names and shapes that the .proto gives a batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from touchline_protos.codec.batch_encoder import MAX_BATCH_DIMS, PROVENANCE_PREFIX
from touchline_protos.codec.tensors import TensorSlice, TensorSpec, read_column, read_tensor
from touchline_protos.codec.wire import LEN, VARINT, read_fields, read_text, read_varint, tag, to_int64
from touchline_protos.types.batch import OPTIONAL_PROVENANCE, PROVENANCE
from touchline_protos.types.dtypes import dtype_name
from touchline_protos.types.episode import CodecError, CodecLimits, OversizeError
from touchline_protos.types.names import MAX_NAME_CHARS

MAX_BATCH_FIELDS = 1 << 17
"""Maximum number of fields of a batch: each slice may bring the name of an actor."""

_LIMITS = CodecLimits(max_dims=MAX_BATCH_DIMS)
_COLUMNS = tag(1, LEN)
_PROVENANCE = tag(2, LEN)
_ACTORS = tag(3, LEN)
_GENERATIONS = tag(4, LEN)
_GENERATION = tag(4, VARINT)
_FIELDS = (*PROVENANCE, *OPTIONAL_PROVENANCE)
_VALID = f"{PROVENANCE_PREFIX}valid"
_ACTOR_INDEX = tag(1, VARINT)
_ACTOR_NAME = tag(2, LEN)
_NAMES = tag(1, LEN)
_FORGOTTEN = tag(2, LEN)
_FORGOTTEN_ONE = tag(2, VARINT)


@dataclass(frozen=True, slots=True)
class ParsedBatch:
    """A ``Batch`` message that was parsed."""

    tensors: list[TensorSlice]
    """Tensors of the batch in body order: columns, then provenance."""
    actors: dict[int, str]
    """Actors' names by index."""
    store_generations: tuple[int, ...]
    """See :attr:`Batch.store_generations`."""


def parse_batch(message: bytes, start: int, end: int) -> ParsedBatch:
    """Parses the ``Batch`` in ``message[start:end]``, except for the sizes of its payloads.

    Raises:
        CodecError: it is malformed, or its columns are not those of a batch.
        OversizeError: it exceeds a limit.
    """
    columns: list[TensorSlice] = []
    provenance: list[TensorSlice] | None = None
    actors: dict[int, str] = {}
    store_generations: tuple[int, ...] = ()
    for key, a, b in read_fields(message, start, end, max_fields=MAX_BATCH_FIELDS):
        if key == _COLUMNS:
            if len(columns) == _LIMITS.max_columns:
                raise OversizeError(f"more than {_LIMITS.max_columns} columns in a batch")
            columns.append(read_column(message, a, b, _LIMITS))
        elif key == _PROVENANCE:
            if provenance is not None:
                raise CodecError("more than one provenance in a batch, expected one")
            provenance = _read_provenance(message, a, b)
        elif key == _ACTORS:
            index, name = parse_actor(message, a, b)
            actors[index] = name
        elif key == _GENERATIONS:
            store_generations += tuple(_read_packed(message, a, b))
        elif key == _GENERATION:
            store_generations += (to_int64(a),)  # not packed, which a sender may do as well
    if provenance is None:
        raise CodecError("no provenance in a batch, expected one")
    _check_batch([column.spec for column in columns], {tensor.spec.name: tensor.spec.shape for tensor in provenance})
    return ParsedBatch(columns + provenance, actors, store_generations)


def _read_provenance(message: bytes, start: int, end: int) -> list[TensorSlice]:
    """Returns the tensors of a ``Provenance`` in order: each required one once, each optional one at most once."""
    found: dict[int, TensorSlice] = {}
    for key, a, b in read_fields(message, start, end):
        number = key >> 3
        if number > len(_FIELDS) or key != tag(number, LEN):
            continue  # an unknown field, which a later version may send
        name, dtype = _FIELDS[number - 1]
        if number in found:
            raise CodecError(f"{PROVENANCE_PREFIX}{name}: appears twice, expected once")
        tensor = read_tensor(message, a, b, PROVENANCE_PREFIX + name, max_dims=3)
        if tensor.spec.dtype != dtype:
            raise CodecError(f"{tensor.spec.name}: {dtype_name(tensor.spec.dtype)}, expected {dtype_name(dtype)}")
        found[number] = tensor
    required = sum(number <= len(PROVENANCE) for number in found)
    if required != len(PROVENANCE):
        raise CodecError(f"provenance has {required} of its {len(PROVENANCE)} required fields")
    tensors = [tensor for _, tensor in sorted(found.items())]
    for tensor in tensors:
        name, shape = tensor.spec.name, tensor.spec.shape
        if name == _VALID:
            continue  # [H, B, 1], for which the columns have to be read first
        if len(shape) != 1 or not shape[0] or shape != tensors[0].spec.shape:
            raise CodecError(f"{name}: shape {shape}, expected (B,), the same for all of the provenance")
    return tensors


def parse_actor(message: bytes, start: int, end: int) -> tuple[int, str]:
    """Parses the ``ActorName`` in ``message[start:end]``, and returns index and name.

    Raises:
        CodecError: it is malformed.
    """
    index, name = 0, ""
    for key, a, b in read_fields(message, start, end):
        if key == _ACTOR_INDEX:
            index = to_int64(a)
        elif key == _ACTOR_NAME:
            name = read_text(message, a, b, "actor", max_chars=MAX_NAME_CHARS)
    return index, name


def parse_names(message: bytes, start: int, end: int) -> tuple[dict[int, str], set[int]]:
    """Parses the ``ActorNames`` in ``message[start:end]``.

    Returns:
        The names by index, and the indexes of the names that may be forgotten.

    Raises:
        CodecError: it is malformed.
        OversizeError: it has more than :data:`MAX_BATCH_FIELDS` fields.
    """
    names: dict[int, str] = {}
    forgotten: set[int] = set()
    for key, a, b in read_fields(message, start, end, max_fields=MAX_BATCH_FIELDS):
        if key == _NAMES:
            index, name = parse_actor(message, a, b)
            names[index] = name
        elif key == _FORGOTTEN:
            forgotten.update(_read_packed(message, a, b))
        elif key == _FORGOTTEN_ONE:
            forgotten.add(to_int64(a))
    return names, forgotten


def _read_packed(message: bytes, start: int, end: int) -> Iterator[int]:
    """Yields the numbers of a packed field of int64."""
    while start < end:
        value, start = read_varint(message, start, end)
        yield to_int64(value)


def _check_batch(columns: list[TensorSpec], provenance: dict[str, tuple[int, ...]]) -> None:
    """Raises CodecError unless the columns have the names and shapes of a batch.

    Args:
        columns: specs of the columns, without provenance.
        provenance: shapes of the provenance's tensors, (B,) except for ``valid``.
    """
    shape_of = {spec.name: spec.shape for spec in columns}
    if len(shape_of) != len(columns):
        raise CodecError(f"columns {[spec.name for spec in columns]} in a batch, expected each name once")
    for name in ("action", "reward", "done"):
        if name not in shape_of:
            raise CodecError(f"{name}: not in the batch, which has {list(shape_of)}")
    if not any(name == "obs" or name.startswith("obs.") for name in shape_of):
        raise CodecError(f"obs: not in the batch, which has {list(shape_of)}")
    for name in shape_of:
        if name.startswith(PROVENANCE_PREFIX):
            raise CodecError(f"{name}: names that begin with {PROVENANCE_PREFIX!r} are reserved for provenance")
        parts = name.split(".")
        if parts[0] == "obs":
            for depth in range(1, len(parts)):
                if ".".join(parts[:depth]) in shape_of:
                    raise CodecError(f"{name}: {'.'.join(parts[:depth])} is a column as well, expected one of them")
    batch_size = provenance[f"{PROVENANCE_PREFIX}start"][0]
    horizon = shape_of["reward"][0] if shape_of["reward"] else -1
    # One agent or more: (H, B, agents). A `done` for the whole match has one value whatever the number of agents.
    agents = max(shape_of["reward"][2], 1) if len(shape_of["reward"]) == 3 else 1
    # The reward first: its length is H, to which the others must fit. Without a dimension it fits no horizon, so -1 makes it fail.
    for name in ("reward", *shape_of):
        shape = shape_of[name]
        if name == "task":
            good, expected = shape == (batch_size,), f"({batch_size},)"
        elif name in ("reward", "done"):
            expected = f"({horizon}, {batch_size}, 1)"
            good = shape == (horizon, batch_size, 1) or shape == (horizon, batch_size, agents)
            if agents > 1:
                expected += f" or ({horizon}, {batch_size}, {agents})"
        else:
            rows = horizon if name == "action" else horizon + 1
            good, expected = shape[:2] == (rows, batch_size), f"({rows}, {batch_size}, ...)"
        if not good:
            raise CodecError(f"{name}: shape {shape}, expected {expected}")
    if provenance.get(_VALID, (horizon, batch_size, 1)) != (horizon, batch_size, 1):
        raise CodecError(f"{_VALID}: shape {provenance[_VALID]}, expected ({horizon}, {batch_size}, 1)")
