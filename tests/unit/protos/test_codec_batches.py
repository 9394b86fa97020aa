"""SampleResponse and SampleStreamResponse by hand: groups, chunks, hostile messages."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.codec_cases import batch_arrays, bits, fill, layout, same_arrays
from touchline_protos.codec import BatchDecoder, BatchLayout, CodecError, OversizeError, TensorSpec, wire
from touchline_protos.types.batch import OPTIONAL_PROVENANCE, Batch
from touchline_protos.types.dtypes import to_numpy
from touchline_protos.v1 import replay_pb2 as pb

FIELDS = ("episode_id", "start", "actor", "policy_version", "probability")
OPTIONAL = tuple(name for name, _ in OPTIONAL_PROVENANCE)
ACTORS = {3: "arm", 0: "hand", 1 << 40: "x" * 128}


def tensor_array(tensor: pb.Tensor) -> np.ndarray:
    shape, dtype = tuple(tensor.shape), to_numpy(tensor.dtype)
    return np.ndarray(shape, dtype, tensor.data) if tensor.data else np.empty(shape, dtype)


def proto_arrays(batch: pb.Batch) -> dict[str, np.ndarray]:
    arrays = {column.name: tensor_array(column.tensor) for column in batch.columns}
    fields = [*FIELDS, *(name for name in OPTIONAL if batch.provenance.HasField(name))]
    return arrays | {f"provenance.{name}": tensor_array(getattr(batch.provenance, name)) for name in fields}


def chunked(made: BatchLayout, chunk_bytes: int, seed: int = 0) -> tuple[list[bytes], dict[str, np.ndarray]]:
    """A batch in chunks, and the arrays it carries."""
    whole = fill({s.name: np.empty(s.shape, s.dtype) for s in made.specs}, seed)
    shape_of = {s.name: s.shape for s in made.specs}
    messages = []
    for piece in made.chunk_plan(chunk_bytes):
        message, views = made.chunk(piece, ACTORS if not piece.offset_bytes else {})
        for (name, first, end, _), view in zip(piece.segments, views, strict=True):
            flat = whole[name].reshape(-1, *shape_of[name][2:])
            view[...] = flat[first:end]
        messages.append(message)
    return messages, whole


SHAPES = {"batch_size": st.integers(1, 6), "obs": st.lists(st.integers(0, 3), max_size=3).map(tuple), "task": st.booleans()}
LAYOUTS = st.builds(layout, st.integers(0, 4), **SHAPES) | st.builds(
    layout, st.integers(1, 4), **SHAPES, optional=st.sets(st.sampled_from(OPTIONAL), min_size=1)
)


@given(LAYOUTS, st.integers(1, 5), st.booleans())
def test_group_is_read_by_hand_and_by_the_generated_class(made: BatchLayout, n: int, named: bool) -> None:
    actors = ACTORS if named else {}
    message, views = made.group(n, actors)
    written = [fill(batch, seed) for seed, batch in enumerate(views)]

    batches = BatchDecoder().feed(message)
    by_class = pb.SampleStreamResponse.FromString(message).group.batches

    assert len(batches) == len(by_class) == n
    for expected, batch, other in zip(written, batches, by_class, strict=True):
        assert same_arrays(batch_arrays(batch), expected)
        assert same_arrays(proto_arrays(other), expected)
        assert batch.actor_names == actors
    assert {actor.index: actor.name for batch in by_class for actor in batch.actors} == actors
    assert made.message_bytes(n, actors) == len(message)


@given(LAYOUTS, st.booleans())
def test_sample_response_is_read_by_hand_and_by_the_generated_class(made: BatchLayout, named: bool) -> None:
    actors = ACTORS if named else {}
    message, views = made.sample_response(actors)
    written = fill(views, 7)

    batch = BatchDecoder().sample_response(message)

    assert same_arrays(batch_arrays(batch), written)
    assert batch.actor_names == actors
    assert same_arrays(proto_arrays(pb.SampleResponse.FromString(message).batch), written)
    assert made.message_bytes(1, actors, unary=True) == len(message)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 7, 8, 31, 64, 100, 255, 256])
def test_payloads_are_aligned_on_both_sides(batch_size: int) -> None:
    made = layout(3, batch_size)
    message, views = made.group(3, {1: "arm"})
    for seed, batch in enumerate(views):
        fill(batch, seed)

    received = BatchDecoder().feed(message)

    assert all(view.ctypes.data % 16 == 0 for batch in views for view in batch.values())
    assert all(a.ctypes.data % 16 == 0 for batch in received for a in batch_arrays(batch).values())


def test_views_keep_the_message_alive_and_write_into_it() -> None:
    message, views = layout().sample_response()
    fill(views, 1)
    at = message.index(views["reward"].tobytes())

    views["reward"][0, 0, 0] = 1234.5

    assert np.frombuffer(message, "<f4", 1, at)[0] == 1234.5
    reward = views["reward"]
    address = reward.ctypes.data
    del message, views
    assert reward.ctypes.data == address and reward[0, 0, 0] == 1234.5


@given(LAYOUTS, st.integers(1, 3))
def test_batches_by_the_generated_class_are_read_by_hand(made: BatchLayout, n: int) -> None:
    message, views = made.group(n, ACTORS)
    written = [fill(batch, seed) for seed, batch in enumerate(views)]
    # The generated class drops nothing and pads nothing anew; cleared padding moves all payloads.
    response = pb.SampleStreamResponse.FromString(message)
    for batch in response.group.batches:
        for column in batch.columns:
            column.tensor.ClearField("padding")

    batches = BatchDecoder().feed(response.SerializeToString())

    assert all(same_arrays(batch_arrays(b), w) for b, w in zip(batches, written, strict=True))


@given(LAYOUTS, st.integers(1, 400))
def test_chunked_batch_arrives_the_same(made: BatchLayout, chunk_bytes: int) -> None:
    messages, written = chunked(made, chunk_bytes)
    decoder = BatchDecoder()

    found = [batch for message in messages for batch in decoder.feed(message)]

    assert len(found) == 1
    assert same_arrays(batch_arrays(found[0]), written)
    assert found[0].actor_names == ACTORS


@given(LAYOUTS, st.integers(1, 400))
def test_chunk_plan_covers_the_body_once_and_cuts_between_rows(made: BatchLayout, chunk_bytes: int) -> None:
    plan = made.chunk_plan(chunk_bytes)

    assert [piece.offset_bytes for piece in plan] == [sum(p.size_bytes for p in plan[:i]) for i in range(len(plan))]
    assert sum(piece.size_bytes for piece in plan) == made.body_bytes
    rows_of: dict[str, list[tuple[int, int]]] = {}
    for piece in plan:
        assert piece.size_bytes <= chunk_bytes or len(piece.segments) == 1
        for name, first, end, _ in piece.segments:
            rows_of.setdefault(name, []).append((first, end))
    for spec in made.specs:
        rows = spec.shape[0] if len(spec.shape) == 1 else spec.shape[0] * spec.shape[1]
        spans = rows_of.get(spec.name, [])
        if spec.size_bytes:
            assert spans[0][0] == 0 and spans[-1][1] == rows
            assert all(before[1] == after[0] for before, after in pairwise(spans))
        else:
            assert not spans


@given(LAYOUTS, st.integers(1, 400))
def test_chunks_read_by_the_generated_class_make_the_body_of_the_proto(made: BatchLayout, chunk_bytes: int) -> None:
    messages, written = chunked(made, chunk_bytes)

    chunks = [pb.SampleStreamResponse.FromString(message).chunk for message in messages]

    assert [chunk.HasField("header") for chunk in chunks] == [True] + [False] * (len(chunks) - 1)
    assert [chunk.size_bytes for chunk in chunks] == [made.body_bytes] + [0] * (len(chunks) - 1)
    assert {actor.index: actor.name for actor in chunks[0].header.actors} == ACTORS
    body = bytearray()
    for spec in made.specs:
        body += bytes(-len(body) % 64)
        body += bits(written[spec.name])[2]
    assert b"".join(chunk.data for chunk in chunks) == bytes(body)
    shapes = {name: (array.dtype, array.shape) for name, array in written.items()}
    header = chunks[0].header
    tensors = {column.name: column.tensor for column in header.columns}
    tensors |= {f"provenance.{name}": getattr(header.provenance, name) for name in FIELDS + made.optional}
    assert {name: (to_numpy(t.dtype), tuple(t.shape)) for name, t in tensors.items()} == shapes
    assert not any(tensor.data for tensor in tensors.values())


def test_stream_mixes_groups_and_chunked_batches_and_adds_up_names() -> None:
    small, big = layout(1, 2), layout(3, 4)
    decoder = BatchDecoder()
    found: list[Batch] = []
    written = []
    for seed in range(3):
        message, views = small.group(2, {seed: f"actor {seed}"})
        written += [fill(batch, 10 * seed + index) for index, batch in enumerate(views)]
        messages, whole = chunked(big, 100, seed)
        written.append(whole)
        for each in [message, *messages]:
            found += decoder.feed(each)

    assert all(same_arrays(batch_arrays(b), w) for b, w in zip(found, written, strict=True))
    assert found[0].actor_names == {0: "actor 0"}
    assert found[-1].actor_names == {1: "actor 1", 2: "actor 2"} | ACTORS


def test_messages_of_equal_length_and_different_layout_are_distinguished() -> None:
    decoder = BatchDecoder()
    for dtype in ("<f4", "<i4"):
        made = BatchLayout(
            [
                TensorSpec("obs", np.dtype(dtype), (2, 3, 4)),
                TensorSpec("action", np.dtype(dtype), (1, 3, 2)),
                TensorSpec("reward", np.dtype("<f4"), (1, 3, 1)),
                TensorSpec("done", np.dtype("<f4"), (1, 3, 1)),
            ],
            3,
        )
        message, views = made.group(1)
        fill(views[0], 0)

        for _ in range(2):
            assert decoder.feed(message)[0].obs.dtype == np.dtype(dtype)


@pytest.mark.parametrize("done", [1, 5])
def test_lockstep_batch_has_a_reward_per_agent(done: int) -> None:
    made = BatchLayout(
        [
            TensorSpec("obs", np.dtype("<f4"), (3, 4, 5, 2)),
            TensorSpec("action", np.dtype("<i8"), (2, 4, 5)),
            TensorSpec("reward", np.dtype("<f4"), (2, 4, 5)),
            TensorSpec("done", np.dtype("<f4"), (2, 4, done)),
        ],
        4,
        ("valid",),
    )
    message, views = made.group(1)
    written = fill(views[0], 3)

    batch = BatchDecoder().feed(message)[0]

    for name in ("reward", "done", "action"):
        assert bits(getattr(batch, name)) == bits(written[name])
    assert batch.reward.shape == (2, 4, 5) and batch.done.shape == (2, 4, done)
    assert batch.valid is not None and batch.valid.shape == (2, 4, 1)


def test_known_layout_is_not_parsed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made, decoder = layout(), BatchDecoder()
    message, views = made.group(2)
    for batch in views:
        fill(batch, 0)
    decoder.feed(message)
    monkeypatch.setattr("touchline_protos.codec.batch_decoder.read_fields", None)
    other, views = made.group(2)
    written = [fill(batch, 5) for batch in views]

    found = decoder.feed(other)

    assert all(same_arrays(batch_arrays(b), w) for b, w in zip(found, written, strict=True))


def test_every_slice_may_bring_an_actors_name() -> None:
    actors = {index: f"actor {index}" for index in range(70_000)}
    message, views = layout().sample_response(actors)
    fill(views, 0)

    assert BatchDecoder().sample_response(message).actor_names == actors


def test_empty_or_unknown_frame_has_no_batches() -> None:
    assert BatchDecoder().feed(b"") == []
    assert BatchDecoder().feed(pb.SampleStreamResponse(group=pb.BatchGroup()).SerializeToString()) == []
    assert BatchDecoder().feed(wire.len_field(77, b"frame of a later version")) == []


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ([TensorSpec("obs", np.dtype("u2"), (2, 3))], "obs: dtype uint16"),
        ([TensorSpec("obs", np.dtype("f4"), (2, 4))], r"obs: shape \(2, 4\), expected \(rows, 3, \.\.\.\)"),
        ([TensorSpec("task", np.dtype("f4"), (4,))], r"task: shape \(4,\)"),
        ([TensorSpec("obs", np.dtype("f4"), ())], r"obs: shape \(\)"),
        ([TensorSpec("", np.dtype("f4"), (3,))], "without a name"),
        ([TensorSpec("provenance.start", np.dtype("<i8"), (3,))], "reserved for provenance"),
        ([TensorSpec("obs", np.dtype("f4"), (3,))] * 2, "each name once"),
    ],
)
def test_layout_refuses_columns_that_make_no_batch(columns: list[TensorSpec], reason: str) -> None:
    with pytest.raises(CodecError, match=reason):
        BatchLayout(columns, 3)


def test_layout_refuses_senseless_arguments() -> None:
    made = layout()

    with pytest.raises(ValueError, match="n 0"):
        made.group(0)
    with pytest.raises(ValueError, match="chunk_bytes 0"):
        made.chunk_plan(0)
    with pytest.raises(ValueError, match="actors with a later piece"):
        made.chunk(made.chunk_plan(64)[1], ACTORS)


def proto_batch() -> pb.Batch:
    message, views = layout(2, 3, optional=OPTIONAL).sample_response(ACTORS)
    fill(views, 0)
    return pb.SampleResponse.FromString(message).batch


def drop(batch: pb.Batch, name: str) -> None:
    kept = [column for column in batch.columns if column.name != name]
    del batch.columns[:]
    batch.columns.extend(kept)


def column(batch: pb.Batch, name: str) -> pb.Column:
    return next(column for column in batch.columns if column.name == name)


def rename(batch: pb.Batch, name: str, new: str) -> None:
    column(batch, name).name = new


def reshape(tensor: pb.Tensor, *shape: int) -> None:
    tensor.shape[:] = shape


MISTAKES = {
    "reward missing": (lambda b: drop(b, "reward"), "reward: not in the batch"),
    "action missing": (lambda b: drop(b, "action"), "action: not in the batch"),
    "done missing": (lambda b: drop(b, "done"), "done: not in the batch"),
    "obs missing": (lambda b: (drop(b, "obs.state"), drop(b, "obs.image.left")), "obs: not in the batch"),
    "obs twice": (lambda b: rename(b, "phase", "obs.state"), "each name once"),
    "obs beside obs.x": (lambda b: rename(b, "phase", "obs"), "obs is a column as well"),
    "leaf and branch": (lambda b: rename(b, "phase", "obs.image"), "obs.image is a column as well"),
    "provenance as column": (lambda b: rename(b, "phase", "provenance.start"), "reserved for provenance"),
    "no provenance": (lambda b: b.ClearField("provenance"), "no provenance"),
    "part of provenance": (lambda b: b.provenance.ClearField("start"), "4 of its 5 required fields"),
    "start of float64": (
        lambda b: setattr(b.provenance.start, "dtype", pb.DTYPE_FLOAT64),
        "provenance.start: float64, expected int64",
    ),
    "start of 2": (lambda b: reshape(b.provenance.start, 2), r"provenance.start: shape \(2,\)"),
    "weight of float64": (
        lambda b: setattr(b.provenance.weight, "dtype", pb.DTYPE_FLOAT64),
        "provenance.weight: float64, expected float32",
    ),
    "table of 2": (lambda b: reshape(b.provenance.table, 2), r"provenance.table: shape \(2,\)"),
    "valid of [B]": (lambda b: reshape(b.provenance.valid, 3), r"provenance.valid: shape \(3,\), expected \(2, 3, 1\)"),
    "valid of another horizon": (
        lambda b: reshape(b.provenance.valid, 3, 3, 1),
        r"provenance.valid: shape \(3, 3, 1\), expected \(2, 3, 1\)",
    ),
    "no slices": (lambda b: [reshape(getattr(b.provenance, n), 0) for n in FIELDS], r"shape \(0,\)"),
    "long data": (
        lambda b: setattr(column(b, "reward").tensor, "data", bytes(25)),
        "reward: 25 bytes of data, expected 24",
    ),
    "short data": (
        lambda b: setattr(column(b, "reward").tensor, "data", b"abc"),
        "reward: 3 bytes of data, expected 24",
    ),
    "reward of another shape": (lambda b: reshape(column(b, "reward").tensor, 3, 2, 1), r"reward: shape \(3, 2, 1\)"),
    "done of more agents than the reward": (
        lambda b: reshape(column(b, "done").tensor, 2, 3, 2),
        r"done: shape \(2, 3, 2\), expected \(2, 3, 1\)",
    ),
    "done of fewer agents than the reward": (
        lambda b: (reshape(column(b, "reward").tensor, 2, 3, 4), reshape(column(b, "done").tensor, 2, 3, 2)),
        r"done: shape \(2, 3, 2\), expected \(2, 3, 1\) or \(2, 3, 4\)",
    ),
    "reward of no agents": (lambda b: reshape(column(b, "reward").tensor, 2, 3, 0), r"reward: shape \(2, 3, 0\), expected \(2, 3, 1\)"),
    "reward of agents of teams": (lambda b: reshape(column(b, "reward").tensor, 2, 3, 2, 2), r"reward: shape \(2, 3, 2, 2\)"),
    "scalar reward": (lambda b: reshape(column(b, "reward").tensor), r"reward: shape \(\)"),
    "obs of another length": (
        lambda b: reshape(column(b, "phase").tensor, 2, 3),
        r"phase: shape \(2, 3\), expected \(3, 3",
    ),
    "huge": (lambda b: reshape(column(b, "phase").tensor, 3, 3, 1 << 50), "phase: 18 bytes of data, expected"),
    "task of another shape": (
        lambda b: reshape(column(b, "task").tensor, 3, 1),
        r"task: shape \(3, 1\), expected \(3,\)",
    ),
    "actor too long": (lambda b: b.actors.add(index=9, name="a" * 129), "actor: 129 characters"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_malformed_batch_is_refused(mistake: str) -> None:
    make, reason = MISTAKES[mistake]
    batch = proto_batch()
    make(batch)

    with pytest.raises(CodecError, match=reason):
        BatchDecoder().sample_response(pb.SampleResponse(batch=batch).SerializeToString())
    with pytest.raises(CodecError, match=reason):
        BatchDecoder().feed(pb.SampleStreamResponse(group=pb.BatchGroup(batches=[batch])).SerializeToString())


@pytest.mark.parametrize("message", [b"", pb.SampleResponse(batch=proto_batch()).SerializeToString() * 2])
def test_sample_response_has_one_batch(message: bytes) -> None:
    with pytest.raises(CodecError, match=r"[02] batches in a response, expected one"):
        BatchDecoder().sample_response(message)


def edited(message: bytes, **fields: object) -> bytes:
    response = pb.SampleStreamResponse.FromString(message)
    for name, value in fields.items():
        if value is None:
            response.chunk.ClearField(name)
        elif name == "header":
            response.chunk.header.CopyFrom(value)
        else:
            setattr(response.chunk, name, value)
    return response.SerializeToString()


def test_chunks_out_of_place_are_refused() -> None:
    messages, _ = chunked(layout(), 100)
    first, second, third = messages[:3]
    group, views = layout().group(1)
    fill(views[0], 0)
    cases = [
        ([second], "without a header"),
        ([first, third], "of the body, expected byte"),
        ([first, first], "with a header before the last chunk"),
        ([first, group], "before the last chunk"),
        ([first, second, second], "of the body, expected byte"),
        ([edited(first, header=None)], "without a header"),
        ([edited(first, size_bytes=10)], "body of 10 bytes announced, expected"),
        ([edited(first, offset_bytes=8)], "chunk at byte 8 of the body, expected byte 0"),
        ([edited(first, data=bytes(1 << 16))], "chunks of 65536 bytes, expected"),
        ([edited(first, header=proto_batch())], "data in the header"),
        ([pb.SampleStreamResponse(ring=pb.RingSetup(slots=1)).SerializeToString()], "ring setup"),
        ([first + group], "more than one frame"),
    ]
    for sequence, reason in cases:
        decoder = BatchDecoder()
        with pytest.raises(CodecError, match=reason):
            for message in sequence:
                decoder.feed(message)


def test_announced_batch_over_the_limit_is_refused_before_its_memory_is_allocated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = layout(3, 4, obs=(1 << 30,))
    header = pb.SampleStreamResponse.FromString(chunked(layout(3, 4), 64)[0][0]).chunk.header
    reshape(column(header, "obs.state").tensor, 4, 4, 1 << 30)
    chunk = pb.BatchChunk(header=header, size_bytes=made.body_bytes, data=b"data")
    decoder = BatchDecoder()
    leased: list[int] = []
    monkeypatch.setattr(decoder._pool, "lease", leased.append)

    with pytest.raises(OversizeError, match=f"batch of {made.body_bytes} bytes announced, expected at most {4 << 30}"):
        decoder.feed(pb.SampleStreamResponse(chunk=chunk).SerializeToString())

    assert not leased


@given(st.randoms(use_true_random=False), st.integers(1, 8), st.sampled_from(["group", "unary", "chunks"]))
def test_mutated_messages_are_refused_or_valid_batches(rng: random.Random, changes: int, kind: str) -> None:
    made = layout(2, 3)
    decoder = BatchDecoder(max_batch_bytes=1 << 20)
    if kind == "chunks":
        messages = chunked(made, 200)[0]
    else:
        message, views = made.group(2, ACTORS) if kind == "group" else made.sample_response(ACTORS)
        for batch in views if isinstance(views, list) else [views]:
            fill(batch, 0)
        messages = [message]
    read = decoder.sample_response if kind == "unary" else decoder.feed
    if kind != "chunks":
        read(messages[0])  # so that the mutated one meets a remembered layout
    mutated = [bytearray(message) for message in messages]
    for _ in range(changes):
        message = rng.choice(mutated)
        if message:
            message[rng.randrange(len(message))] = rng.randrange(256)
        if rng.random() < 0.1:
            del message[rng.randrange(len(message) + 1) :]

    for message in mutated:
        try:
            read(bytes(message))
        except CodecError as error:
            assert str(error)


def test_forgotten_names_are_dropped_for_later_batches_only() -> None:
    decoder = BatchDecoder()
    new = [pb.ActorName(index=7, name="new")]
    frame = pb.SampleStreamResponse(actors=pb.ActorNames(forgotten=[0, 5, 1 << 62], actors=new)).SerializeToString()
    group, _ = layout(3, 2).group(1, {})

    (before,) = decoder.feed(layout(3, 2).group(1, ACTORS)[0])
    assert decoder.feed(frame) == []
    (between,) = decoder.feed(group)
    assert decoder.feed(wire.len_field(4, wire.int_field(2, 3))) == []  # not packed, as another sender may do
    (after,) = decoder.feed(group)

    assert before.actor_names == ACTORS
    assert between.actor_names == {3: "arm", 1 << 40: "x" * 128, 7: "new"}
    assert after.actor_names == {1 << 40: "x" * 128, 7: "new"}
