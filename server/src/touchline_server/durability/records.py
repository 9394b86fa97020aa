"""What the durable store keeps of an episode, and in which form."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from touchline_protos.codec import EpisodeKey
from touchline_protos.types.dtypes import BFLOAT16, dtype_name
from touchline_server.store.schema import ColumnSpec, Schema

Blob = bytes | memoryview


@dataclass(frozen=True, slots=True)
class EpisodeRow:
    """An episode's row in ``episodes``."""

    id: int
    key: EpisodeKey | None
    actor: str
    policy_version: int
    length: int
    return_: float | None
    """Sum of the defined rewards; None where it is not a number."""
    time: float
    """When it was stored, seconds since 1970."""
    digest: int
    """Of its columns: :func:`touchline_server.store.dedup.payload_digest`."""

    @property
    def values(self) -> tuple[int | str | float | None, ...]:
        """In the table's order, without the checksum."""
        key = (self.key.client_id, self.key.incarnation, self.key.sequence) if self.key is not None else (None, None, None)
        return (self.id, *key, self.actor, self.policy_version, self.length, self.return_, self.time, self.digest)


@dataclass(frozen=True, slots=True)
class Payload:
    """One column of an episode as it is kept."""

    column: str
    dtype: str
    shape: tuple[int, ...]
    data: Blob
    """C order, little-endian."""


@dataclass(frozen=True, slots=True)
class Change:
    """One episode that is added, and those that make room for it."""

    row: EpisodeRow
    payloads: Sequence[Payload]
    evicted: Sequence[int]
    schema: Schema | None = None
    """Where this episode fixes it."""


def payloads_of(columns: Mapping[str, np.ndarray], *, copy: bool) -> list[Payload]:
    """Returns an episode's columns as they are kept: views of the arrays, or copies of their bytes."""
    payloads = []
    for name, array in columns.items():
        view = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        payloads.append(Payload(name, dtype_name(array.dtype), array.shape, bytes(view) if copy else view))
    return payloads


def numpy_dtype(name: str) -> np.dtype:
    """Returns the dtype of a name in ``payloads``; raises TypeError where there is none."""
    return BFLOAT16 if name == "bfloat16" else np.dtype(name)


def schema_text(schema: Schema) -> str:
    """Returns a schema as the JSON of ``meta``."""
    return json.dumps([{"name": spec.name, "dtype": dtype_name(spec.dtype), "shape": spec.shape} for spec in schema.columns])


def schema_of(text: str) -> Schema:
    """Returns the schema of such a text; raises ValueError, TypeError or KeyError where it is none."""
    return Schema(tuple(ColumnSpec(item["name"], numpy_dtype(item["dtype"]), tuple(item["shape"])) for item in json.loads(text)))
