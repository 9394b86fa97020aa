"""What the durable store keeps of an episode, and in which form."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from touchline_protos.codec import EpisodeKey
from touchline_protos.types.dtypes import BFLOAT16, dtype_name
from touchline_server.store.inserts import PlannedInsert
from touchline_server.store.schema import ColumnSpec, Schema

Blob = bytes | memoryview


@dataclass(frozen=True, slots=True)
class EpisodeRow:
    """An episode's row in the table ``episodes``."""

    id: int
    key: EpisodeKey | None
    actor: str
    policy_version: int
    length: int
    """Number of rows."""
    return_: float | None
    """Sum of the defined rewards, of a match in lockstep over all agents; None if it is not finite."""
    time: float
    """When the episode was stored, in seconds since 1970."""
    digest: int
    """Checksum of its columns: :func:`touchline_server.store.dedup.payload_digest`."""

    @property
    def values(self) -> tuple[int | str | float | None, ...]:
        """The values in the table's order, without the checksum."""
        key = (self.key.client_id, self.key.incarnation, self.key.sequence) if self.key is not None else (None, None, None)
        return (self.id, *key, self.actor, self.policy_version, self.length, self.return_, self.time, self.digest)


@dataclass(frozen=True, slots=True)
class Payload:
    """One column of an episode as it is stored."""

    column: str
    dtype: str
    shape: tuple[int, ...]
    data: Blob
    """C order, little-endian."""


@dataclass(frozen=True, slots=True)
class Insert:
    """A new episode."""

    row: EpisodeRow
    payloads: Sequence[Payload]


@dataclass(frozen=True, slots=True)
class Change:
    """One step from one state of the store to the next: episodes evicted, then at most one inserted."""

    evicted: Sequence[int]
    """Ids of the episodes to delete."""
    insert: Insert | None = None
    schema: Schema | None = None
    """The schema, if the inserted episode fixes it."""

    @property
    def size_bytes(self) -> int:
        """Bytes of payload."""
        return sum(len(payload.data) for payload in self.insert.payloads) if self.insert is not None else 0


def make_change(planned: PlannedInsert, *, incoming: bool, copy: bool) -> Change:
    """Returns what a planned insert changes in the durable store.

    Args:
        planned: the insert.
        incoming: the row convention, which says which rewards are defined.
        copy: True copies the columns' bytes; False takes views, so the episode's arrays must not change until the change is written.
    """
    episode = planned.request.episode
    row = EpisodeRow(
        planned.episode_id,
        episode.key,
        episode.actor,
        episode.policy_version,
        planned.length,
        episode_return(episode.columns["reward"], incoming=incoming),
        time.time(),
        planned.request.digest,
    )
    return Change(planned.evicted, Insert(row, payloads_of(episode.columns, copy=copy)), planned.schema)


def episode_return(reward: np.ndarray, *, incoming: bool) -> float | None:
    """Returns the sum of the defined rewards, [rows], [rows, 1] or [rows, agents]; None if it is not finite."""
    defined = reward[1:] if incoming else reward[:-1]
    if defined.dtype == BFLOAT16:
        # bfloat16 is the upper half of a float32's bits.
        defined = (np.ascontiguousarray(defined).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    with np.errstate(all="ignore"):
        total = float(np.sum(defined, dtype=np.float64))
    return total if math.isfinite(total) else None


def payloads_of(columns: Mapping[str, np.ndarray], *, copy: bool) -> list[Payload]:
    """Returns an episode's columns as they are stored: copies of their bytes, or views of the arrays."""
    payloads = []
    for name, array in columns.items():
        view = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        payloads.append(Payload(name, dtype_name(array.dtype), array.shape, bytes(view) if copy else view))
    return payloads


def numpy_dtype(name: str) -> np.dtype:
    """Returns the dtype of a name in the table ``payloads``; raises TypeError if there is none."""
    return BFLOAT16 if name == "bfloat16" else np.dtype(name)


def schema_text(schema: Schema) -> str:
    """Returns a schema as the JSON kept in the table ``meta``."""
    return json.dumps([{"name": spec.name, "dtype": dtype_name(spec.dtype), "shape": spec.shape} for spec in schema.columns])


def schema_of(text: str) -> Schema:
    """Returns the schema of such a text; raises ValueError, TypeError or KeyError if it is malformed."""
    return Schema(tuple(ColumnSpec(item["name"], numpy_dtype(item["dtype"]), tuple(item["shape"])) for item in json.loads(text)))
