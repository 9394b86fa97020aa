"""The batch: what both the in-process buffer and the client return."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, SupportsIndex, overload

import numpy as np

Array = Any
"""A ``numpy.ndarray``, a ``torch.Tensor`` or a ``jax.Array``, as the caller asked for; for nested observations, a dict of these."""

PROVENANCE: tuple[tuple[str, np.dtype], ...] = (
    ("episode_id", np.dtype("<i8")),
    ("start", np.dtype("<i8")),
    ("actor", np.dtype("<i8")),
    ("policy_version", np.dtype("<i8")),
    ("probability", np.dtype("<f8")),
)
"""Names and dtypes of the provenance of every batch, [B] each, in wire order."""

OPTIONAL_PROVENANCE: tuple[tuple[str, np.dtype], ...] = (
    ("weight", np.dtype("<f4")),
    ("table", np.dtype("<i8")),
    ("valid", np.dtype("?")),
)
"""The fields that a batch has only if its request asks for what they describe, and their dtypes, in wire order after the others. They are
[B] each, except for ``valid``, [H, B, 1]."""


class BatchOrigin:
    """Where a batch came from, as its own source knows it. A copy or a pickle of a batch has none.

    Args:
        source: the source.
        number: what names the batch there.
    """

    __slots__ = ("_arrays", "number", "source")

    def __init__(self, source: Any, number: int) -> None:
        self.source = source
        self.number = number
        self._arrays: tuple[Any, Any] = (_no_origin, _no_origin)

    def of(self, episode_id: Array, start: Array) -> BatchOrigin:
        """Returns the origin of a batch whose slices are those of these arrays, to which it keeps weak references only."""
        origin = BatchOrigin(self.source, self.number)
        origin._arrays = weakref.ref(episode_id), weakref.ref(start)
        return origin

    def is_of(self, batch: Batch) -> bool:
        """Returns whether a batch still has the arrays of its slices: not others, by ``dataclasses.replace``."""
        episode_id, start = self._arrays
        return episode_id() is batch.episode_id and start() is batch.start

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return _no_origin, ()


def _no_origin() -> None:
    """Returns what a copied or unpickled batch has as its origin."""


@dataclass(frozen=True, slots=True)
class Batch:
    """B slices of H + 1 consecutive steps, time-major. Unpacks, is indexed and is sliced like the tuple ``obs, action, reward, done``.

    The arrays belong to the caller and, except for those of JAX, are writable: nothing overwrites them as long as they or any view of them
    are alive. Those of one batch may share one allocation, which is released, or reused for a later batch, when the last of them dies.
    """

    obs: Array
    """[H+1, B, *obs_shape], as stored; for nested observations a (nested) dict, its keys in the order of the first episode."""
    action: Array
    """[H, B, *action_shape], as stored."""
    reward: Array
    """[H, B, 1], as stored; [H, B, agents] if the episodes are matches in lockstep."""
    done: Array
    """[H, B, 1]: 1 if the transition terminated the episode; float32 zeros if the episodes have no such column. In lockstep
    [H, B, agents]: 1 if it terminated the agent, while the match may go on without it."""
    task: Array | None
    """[B]: task of each slice's first row; None if the episodes have no such column."""
    extra: dict[str, Array]
    """Every other column by its (dotted) name: [H+1, B, ...], as stored."""
    episode_id: Array
    """[B] int64: id of each slice's episode."""
    start: Array
    """[B] int64: position in the episode of each slice's row 0."""
    actor: Array
    """[B] int64: index of the actor that played the episode, a key of ``actor_names``."""
    policy_version: Array
    """[B] int64: version of the policy that acted."""
    probability: Array
    """[B] float64: probability with which each slice was drawn."""
    actor_names: Mapping[int, str] = field(default_factory=dict)
    """Names of the actors by index; contains at least those of this batch."""
    weight: Array | None = None
    """[B] float32: importance-sampling weight of each slice, at most 1; None unless the law is ``prioritized``."""
    table: Array | None = None
    """[B] int64: table of each slice, as its position in the mix; None unless the batch is mixed."""
    valid: Array | None = None
    """[H, B, 1] bool: whether a transition is real, not padding after the end of its episode; None unless slices are padded."""
    table_names: tuple[str, ...] = ()
    """Names of the tables of the mix, by their positions in ``table``; empty unless the batch is mixed."""
    store_generations: tuple[int, ...] = ()
    """Generation of the table's store, or of each table's of the mix: while it is the same, an id names the same episode. Empty if the
    server is older than 1.2."""
    origin: BatchOrigin | None = field(default=None, repr=False, compare=False)
    """How priorities go back to where the batch came from, for :meth:`touchline.ReplayClient.update_priorities`; None if by a call."""

    def __iter__(self) -> Iterator[Array]:
        return iter((self.obs, self.action, self.reward, self.done))

    def __len__(self) -> int:
        return 4

    @overload
    def __getitem__(self, index: SupportsIndex) -> Array: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Array, ...]: ...

    def __getitem__(self, index: SupportsIndex | slice) -> Any:
        return (self.obs, self.action, self.reward, self.done)[index]


def assemble_batch(
    arrays: Mapping[str, Array],
    actor_names: Mapping[int, str],
    *,
    table_names: tuple[str, ...] = (),
    store_generations: tuple[int, ...] = (),
    origin: BatchOrigin | None = None,
) -> Batch:
    """Returns a batch made of flat arrays.

    Args:
        arrays: columns by dotted name, and provenance as ``provenance.<field>``. Not copied.
        actor_names: actors' names by index. Not copied.
        table_names: names of the mix's tables, by position.
        store_generations: see :attr:`Batch.store_generations`.
        origin: see :attr:`Batch.origin`.
    """
    obs: Any = {}
    named: dict[str, Array] = {}
    extra: dict[str, Array] = {}
    for name, array in arrays.items():
        if name in ("obs", "action", "reward", "done", "task"):
            named[name] = array
        elif name.startswith("obs."):
            *parents, leaf = name.split(".")[1:]
            level = obs
            for parent in parents:
                level = level.setdefault(parent, {})
            level[leaf] = array
        elif name.startswith("provenance."):
            named[name.removeprefix("provenance.")] = array
        else:
            extra[name] = array
    if "obs" in named:
        obs = named.pop("obs")
    return Batch(
        obs=obs,
        task=named.pop("task", None),
        extra=extra,
        actor_names=actor_names,
        table_names=table_names,
        store_generations=store_generations,
        origin=None if origin is None else origin.of(named["episode_id"], named["start"]),
        **named,
    )


def batch_arrays(batch: Batch) -> dict[str, Array]:
    """Returns a batch's arrays by the names that :func:`assemble_batch` takes."""
    arrays = {"action": batch.action, "reward": batch.reward, "done": batch.done, **batch.extra}
    if batch.task is not None:
        arrays["task"] = batch.task
    levels = [("obs", batch.obs)]
    while levels:
        name, value = levels.pop()
        if isinstance(value, Mapping):
            levels += [(f"{name}.{key}", inner) for key, inner in value.items()]
        else:
            arrays[name] = value
    for name, _ in (*PROVENANCE, *OPTIONAL_PROVENANCE):
        field_value = getattr(batch, name)
        if field_value is not None:
            arrays[f"provenance.{name}"] = field_value
    return arrays
