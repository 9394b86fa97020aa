"""Arrays, episodes and batches for the tests of the codec: strategies, fillers and bit-for-bit comparisons."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import numpy as np
from hypothesis import strategies as st

from touchline_protos.codec import BatchLayout, CodecError, Episode, EpisodeKey, LoadDecoder, TensorSpec
from touchline_protos.types.batch import OPTIONAL_PROVENANCE
from touchline_protos.types.dtypes import DType, to_numpy
from touchline_protos.v1 import replay_pb2 as pb

DTYPES = [to_numpy(wire) for wire in DType]
INT64 = st.integers(-(1 << 63), (1 << 63) - 1)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
IDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=128)


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    """Arrays of any bits (including NaN payloads), dtype and shape (including 0-d and empty) in any memory layout."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=5)))
    size = int(np.prod(shape, dtype=int)) * dtype.itemsize
    data = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), np.uint8)
    if dtype == np.bool_:
        data = data & 1
    array = np.ndarray(shape, dtype, data.tobytes())
    layout = draw(st.sampled_from(["C", "transposed", "strided", "big-endian"]))
    if layout == "transposed":
        return np.array(array.T, order="C").T
    if layout == "strided" and array.ndim:
        return np.repeat(array, 2, axis=0)[::2]
    if layout == "big-endian":
        return array.astype(dtype.newbyteorder(">"))
    return array


def feed_one(decoder: LoadDecoder, message: bytes) -> Episode | None:
    """Decodes a message of at most one episode; raises the error of one that is refused."""
    results = list(decoder.feed(message))
    assert len(results) <= 1
    if results and isinstance(results[0], CodecError):
        raise results[0]
    return results[0] if results else None  # type: ignore[return-value]


def feed_all(decoder: LoadDecoder, messages: Iterable[bytes]) -> list[Episode]:
    """Decodes a stream; raises the first error."""
    return [episode for message in messages if (episode := feed_one(decoder, message)) is not None]


@st.composite
def episodes(draw: st.DrawFn) -> Episode:
    key = draw(st.none() | st.builds(EpisodeKey, IDS, INT64, INT64))
    columns = draw(st.dictionaries(NAMES, arrays(), max_size=5))
    return Episode(columns, key, draw(st.just("") | IDS), draw(INT64))


def bits(array: np.ndarray) -> tuple[np.dtype, tuple[int, ...], bytes]:
    """Returns a value that is equal for two arrays if they are the same bit for bit, whatever their memory layout."""
    little = array.dtype.newbyteorder("<")
    return little, array.shape, np.array(array, dtype=little, order="C").tobytes()


def same_episode(one: Episode, other: Episode) -> bool:
    return (
        (one.key, one.actor, one.policy_version) == (other.key, other.actor, other.policy_version)
        and list(one.columns) == list(other.columns)
        and all(bits(one.columns[name]) == bits(other.columns[name]) for name in one.columns)
    )


def to_proto(episode: Episode) -> pb.Episode:
    """Returns the episode as a message of the generated classes."""
    message = pb.Episode(actor=episode.actor, policy_version=episode.policy_version)
    if episode.key is not None:
        message.key.client_id = episode.key.client_id
        message.key.incarnation = episode.key.incarnation
        message.key.sequence = episode.key.sequence
    for name, array in episode.columns.items():
        dtype, shape, data = bits(array)
        tensor = pb.Tensor(dtype=next(wire for wire in DType if to_numpy(wire) == dtype), shape=shape, data=data)
        message.columns.append(pb.Column(name=name, tensor=tensor))
    return message


def from_proto(message: pb.Episode) -> Episode:
    """Returns the episode in a message of the generated classes."""
    columns = {
        column.name: np.ndarray(tuple(column.tensor.shape), to_numpy(column.tensor.dtype), column.tensor.data)
        if column.tensor.data
        else np.empty(tuple(column.tensor.shape), to_numpy(column.tensor.dtype))
        for column in message.columns
    }
    key = None
    if message.HasField("key"):
        key = EpisodeKey(message.key.client_id, message.key.incarnation, message.key.sequence)
    return Episode(columns, key, message.actor, message.policy_version)


def small_episode() -> Episode:
    """Returns an episode of four rows with the usual columns."""
    return Episode(
        {
            "obs": np.arange(12, dtype=np.float32).reshape(4, 3),
            "action": np.arange(8, dtype=np.float64).reshape(4, 2),
            "reward": np.array([np.nan, 1, 2, 3], np.float32),
            "done": np.array([False, False, False, True]),
        },
        EpisodeKey("robot-7", 1_700_000_000, 42),
        "arm",
        9,
    )


def layout(
    horizon: int = 3, batch_size: int = 4, *, obs: tuple[int, ...] = (5,), task: bool = True, optional: Collection[str] = ()
) -> BatchLayout:
    """Returns a batch layout with nested observations, an extra column and a task."""
    steps, transitions = (horizon + 1, batch_size), (horizon, batch_size)
    float32 = np.dtype("<f4")
    columns = [
        TensorSpec("obs.state", float32, (*steps, *obs)),
        TensorSpec("obs.image.left", np.dtype("u1"), (*steps, 2, 3)),
        TensorSpec("action", to_numpy(DType.BFLOAT16), (*transitions, 2)),
        TensorSpec("reward", float32, (*transitions, 1)),
        TensorSpec("done", float32, (*transitions, 1)),
        TensorSpec("phase", np.dtype("<i2"), steps),
    ]
    return BatchLayout(columns + [TensorSpec("task", np.dtype("<i8"), (batch_size,))] * task, batch_size, optional)


def fill(views: Mapping[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """Fills a batch's views with random bits; returns copies of what it wrote."""
    generator = np.random.default_rng(seed)
    for view in views.values():
        random = np.frombuffer(generator.bytes(view.nbytes), np.uint8)
        random = random & 1 if view.dtype == np.bool_ else random
        view[...] = random.view(view.dtype).reshape(view.shape)
    return {name: view.copy() for name, view in views.items()}


def batch_arrays(batch: object) -> dict[str, np.ndarray]:
    """Returns the arrays of a decoded batch of :func:`layout` by their wire names."""
    found = {
        "obs.state": batch.obs["state"],
        "obs.image.left": batch.obs["image"]["left"],
        "phase": batch.extra["phase"],
        **{name: getattr(batch, name) for name in ("action", "reward", "done")},
    }
    if batch.task is not None:
        found["task"] = batch.task
    for name in ("episode_id", "start", "actor", "policy_version", "probability"):
        found[f"provenance.{name}"] = getattr(batch, name)
    for name, _ in OPTIONAL_PROVENANCE:
        if getattr(batch, name) is not None:
            found[f"provenance.{name}"] = getattr(batch, name)
    return found


def same_arrays(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> bool:
    return set(one) == set(other) and all(bits(one[name]) == bits(other[name]) for name in one)
