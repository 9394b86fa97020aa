"""Golden bytes of the messages that carry tensors: every message that was once on the wire has to stay readable.

``python tests/contract/test_golden.py`` regenerates the files; do that only together with a change of the protocol's version.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from touchline._learner.priorities import update_request
from touchline._rpc.convert import server_info_of, table_infos_of
from touchline._rpc.table_verbs import TableVerbs
from touchline.types import HeldCaller, RateInfo, ServingState, TableInfo, Transport, Verdict
from touchline_protos import Counts
from touchline_protos.codec import (
    BatchDecoder,
    BatchLayout,
    BodyLayout,
    Episode,
    EpisodeDecoder,
    EpisodeKey,
    EpisodeSelection,
    LoadDecoder,
    TensorSpec,
    decode_add_episode,
    encode_add_episode,
    encode_load,
    encode_loads,
)
from touchline_protos.codec.chunks import chunk_message
from touchline_protos.codec.download import EpisodeOutline, encode_evicted, encode_selection, encode_stored_header, group_message
from touchline_protos.codec.status import rate_to_message, status_of_message, status_to_message
from touchline_protos.codec.wire import int_field, len_field
from touchline_protos.types.dtypes import DType, to_numpy
from touchline_protos.types.priorities import PriorityUpdate
from touchline_protos.v1 import replay_pb2 as pb

GOLDEN = Path(__file__).parent / "golden"
HORIZON, BATCH_SIZE = 2, 3
ACTORS = {0: "arm", 5: "Hände"}
CHUNK_BYTES = 96


def ramp(shape: tuple[int, ...], dtype: np.dtype, start: int = 0) -> np.ndarray:
    """Returns ascending values of any dtype; bfloat16 as its bits."""
    values = np.arange(start, start + int(np.prod(shape, dtype=int))).reshape(shape)
    if dtype.kind == "b":
        return values % 2 == 1
    return values.astype("<u2").view(dtype) if dtype.kind == "V" else values.astype(dtype)


def make_episode() -> Episode:
    """An episode with every dtype of the wire and several ranks."""
    columns = {f"extra.{wire.name.lower()}": ramp((3, 2), to_numpy(wire), int(wire)) for wire in DType}
    columns |= {
        "obs": ramp((3, 2, 2), np.dtype("<f4"), 100),
        "action": ramp((3, 1), np.dtype("<f4"), 200),
        "reward": np.array([np.nan, 0.5, -np.inf], "<f4"),
        "nothing": np.empty((3, 0), "<i8"),
    }
    return Episode(columns, EpisodeKey("robot", -1, 1 << 40), "arm", 12)


GENERATIONS = (5, (1 << 62) + 1)


def make_layout(optional: tuple[str, ...] = (), *, store_generations: tuple[int, ...] = ()) -> BatchLayout:
    steps, transitions = (HORIZON + 1, BATCH_SIZE), (HORIZON, BATCH_SIZE)
    float32 = np.dtype("<f4")
    columns = [
        TensorSpec("obs.state", float32, (*steps, 2)),
        TensorSpec("obs.rgb", np.dtype("u1"), (*steps, 2, 2)),
        TensorSpec("action", float32, (*transitions, 1)),
        TensorSpec("reward", float32, (*transitions, 1)),
        TensorSpec("done", float32, (*transitions, 1)),
        TensorSpec("task", np.dtype("<i8"), (BATCH_SIZE,)),
    ]
    return BatchLayout(columns, BATCH_SIZE, optional, store_generations=store_generations)


def make_arrays(seed: int, optional: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    return {s.name: ramp(s.shape, s.dtype, seed + 10 * i) for i, s in enumerate(make_layout(optional).specs)}


def write_response(optional: tuple[str, ...] = ()) -> bytes:
    message, views = make_layout(optional).sample_response(ACTORS)
    for name, array in make_arrays(1, optional).items():
        views[name][...] = array
    return message


def make_lockstep() -> BatchLayout:
    """A batch of matches of two agents."""
    float32 = np.dtype("<f4")
    columns = [
        TensorSpec("obs", float32, (HORIZON + 1, BATCH_SIZE, 2, 2)),
        TensorSpec("action", np.dtype("<i8"), (HORIZON, BATCH_SIZE, 2)),
        TensorSpec("reward", float32, (HORIZON, BATCH_SIZE, 2)),
        TensorSpec("done", float32, (HORIZON, BATCH_SIZE, 2)),
        TensorSpec("alive", np.dtype("?"), (HORIZON + 1, BATCH_SIZE, 2)),
    ]
    return BatchLayout(columns, BATCH_SIZE)


def write_lockstep() -> bytes:
    made = make_lockstep()
    message, views = made.sample_response(ACTORS)
    for number, spec in enumerate(made.specs):
        views[spec.name][...] = ramp(spec.shape, spec.dtype, 10 * number)
    return message


def write_mix() -> bytes:
    mix = [pb.MixShare(table="online", share=0.5), pb.MixShare(share=2)]
    return pb.SampleRequest(batch_size=3, horizon=2, seed=7, mix=mix, when_empty=pb.WHEN_EMPTY_OTHERS).SerializeToString()


def write_law() -> bytes:
    options = pb.LawOptions(recent_steps=1 << 40, recent_half_life=0.5, beta=0.25)
    return pb.SampleRequest(law=pb.LAW_TASK, law_options=options, pad=pb.PAD_END).SerializeToString()


def write_priorities(store_generation: int = 0) -> bytes:
    priorities = np.array([[0.5, 0, 2], [1, 3e38, 0.25]], np.float32)
    return update_request("main", PriorityUpdate(np.array([3, 1 << 40, 3]), np.array([0, 17, 1]), priorities, store_generation))


def write_group(store_generations: tuple[int, ...] = ()) -> bytes:
    message, batches = make_layout(store_generations=store_generations).group(2, ACTORS)
    for seed, views in enumerate(batches):
        for name, array in make_arrays(seed).items():
            views[name][...] = array
    return message


def write_chunks() -> list[bytes]:
    made, arrays = make_layout(), make_arrays(3)
    messages = []
    for piece in made.chunk_plan(CHUNK_BYTES):
        message, views = made.chunk(piece, {} if piece.offset_bytes else ACTORS)
        for (name, first, end, _), view in zip(piece.segments, views, strict=True):
            inner = arrays[name].shape[2:]
            view[...] = arrays[name].reshape(-1, *inner)[first:end]
        messages.append(message)
    return messages


def write_load() -> list[bytes]:
    return list(encode_load(make_episode(), table="main", chunk_bytes=40))


def write_reading() -> dict[str, bytes]:
    """Two episodes in a group, and a third one in chunks, of which only the first is here."""
    episode = make_episode()
    specs = [TensorSpec(name, column.dtype, column.shape) for name, column in episode.columns.items()]
    outlines = [
        EpisodeOutline(number, Episode({}, episode.key, episode.actor, episode.policy_version), specs) for number in (0, 1 << 40, 1 << 41)
    ]
    group, outs = group_message(outlines[:2])
    for out, column in zip((out for outs_of_one in outs for out in outs_of_one), [*episode.columns.values()] * 2, strict=True):
        out[:] = np.ascontiguousarray(column).reshape(-1).view(np.uint8)
    chunk, out = chunk_message(0, 2, 4)
    out[:] = 1
    return {
        "selection": encode_selection(EpisodeSelection(0, 1 << 41, 3, 9, 1 << 60)),
        "group": group,
        "header": encode_stored_header(outlines[2], 3),
        "chunk": chunk,
        "evicted": encode_evicted(1 << 41),
    }


def write_grouped() -> bytes:
    (message,) = encode_loads([make_episode(), Episode(make_episode().columns)], table="main")
    return message


class RecordedVerbs(TableVerbs):
    """The client's verbs for tables; keeps the request instead of sending it."""

    def __init__(self) -> None:
        self.request = b""
        self._rpc: Any = self

    def unary(self, name: str, request: bytes) -> bytes:
        self.request = request
        return b""


def write_table_request(call: Callable[[TableVerbs], None]) -> bytes:
    verbs = RecordedVerbs()
    call(verbs)
    return verbs.request


def make_rate() -> RateInfo:
    return RateInfo(
        samples_per_insert=8.5,
        tolerance=1e6,
        min_steps=1 << 40,
        steps_added=1 << 41,
        slices_delivered=1 << 42,
        recent_steps_added=3,
        recent_slices_delivered=5,
        owed_slices=-0.25,
        adds_held=2,
        batches_held=1,
        adds=(HeldCaller("arm", 0.5), HeldCaller("Hände", 0.25)),
        batches=(HeldCaller("ipv4:10.0.0.7:1", 60.0),),
        adds_wait_for="learners",
        batches_wait_for="actors",
    )


def make_tables() -> list[pb.TableInfo]:
    counts = pb.Counts(**{field.name: field.number << 33 for field in pb.Counts.DESCRIPTOR.fields})
    demos = pb.TableInfo(
        table="demos",
        config_toml="a = 1\n",
        counts=counts,
        capacity=1 << 40,
        device="disk",
        size_bytes=1 << 41,
        storage_state=pb.STORAGE_STATE_FULL,
        storage_reason="the disk is full",
        created=True,
        law="step",
        episodes_not_sampled=7,
        rate=rate_to_message(make_rate()),
    )
    return [pb.TableInfo(), demos]


def write_info() -> bytes:
    return pb.InfoResponse(version="2", rate=rate_to_message(make_rate()), tables=make_tables()).SerializeToString()


STATUS_FIELDS = {
    "ActorStatus": 17,
    "Counts": 9,
    "DeliveredStatus": 5,
    "DurabilityStatus": 13,
    "EpisodeSummary": 7,
    "FlowStatus": 8,
    "LatencyStatus": 6,
    "LearnerStatus": 16,
    "MethodStatus": 3,
    "PoolStatus": 5,
    "RateInfo": 14,
    "RateWaiter": 2,
    "RefusalStatus": 6,
    "ServerState": 18,
    "StatusResponse": 6,
    "TableStatus": 23,
    "WaitStatus": 5,
}
"""Highest field number of each message of a status when its golden message was written. What came later is left out of that message."""


def fill(message: Message, number: int = 1) -> int:
    """Sets every field of a message, and of those in it, to a value of its own; returns the last number used."""
    for field in message.DESCRIPTOR.fields:
        if field.number > STATUS_FIELDS[message.DESCRIPTOR.name]:
            continue
        number += 1
        repeated = field.default_value == []
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            number = fill(getattr(message, field.name).add() if repeated else getattr(message, field.name), number)
            continue
        values = {
            FieldDescriptor.TYPE_STRING: f"Text {number} ä",
            FieldDescriptor.TYPE_BOOL: True,
            FieldDescriptor.TYPE_DOUBLE: number + 0.25,
            FieldDescriptor.TYPE_ENUM: 1,
        }
        value = values.get(field.type, number << 33 if field.type == FieldDescriptor.TYPE_INT64 else number)
        if repeated:
            getattr(message, field.name).extend([value, value])
        else:
            setattr(message, field.name, value)
    return number


def write_status() -> bytes:
    message = pb.StatusResponse()
    fill(message)
    return status_to_message(status_of_message(message)).SerializeToString(deterministic=True)


def write_rows_request() -> bytes:
    rows = pb.RowsRequest(host_columns=True, cuda_devices=["GPU-01234567-89ab-cdef-0123-456789abcdef"])
    opening = pb.SampleStreamOpen(sample=pb.SampleRequest(table="main"), credits=7, shared_memory_id="host:1", rows=rows)
    return pb.SampleStreamRequest(open=opening).SerializeToString()


def write_rows_offer() -> bytes:
    host = pb.SharedTable(memory=pb.COLUMN_MEMORY_HOST, size_bytes=1 << 40, rows=1 << 33, offset_bytes=[0, 1 << 36, -1])
    device = pb.SharedTable(
        memory=pb.COLUMN_MEMORY_CUDA, size_bytes=9, cuda_device="GPU-1", cuda_handle=bytes(range(64)), rows=3, offset_bytes=[8, 0, 4]
    )
    tensors = [pb.GatheredTensor(first_step=first, steps=steps) for first, steps in ((0, 3), (1, 2), (1, 2))]
    setup = pb.RingSetup(
        path="/dev/shm/touchline-0123456789abcdef0123456789abcdef",
        size_bytes=1 << 21,
        slots=4,
        slot_size_bytes=1 << 14,
        layout=pb.Batch.FromString(make_layout().header()),
        token=bytes(range(16)),
        rows=pb.RowsSetup(tables=[host, device], tensors=tensors, steps=HORIZON + 1),
    )
    return pb.SampleStreamResponse(ring=setup).SerializeToString()


MESSAGES: dict[str, tuple[Callable[[], bytes], type[Message]]] = {
    "add_episode_request": (lambda: encode_add_episode(make_episode(), table="main"), pb.AddEpisodeRequest),
    "load_episodes_request_header": (lambda: write_load()[0], pb.LoadEpisodesRequest),
    "load_episodes_request_chunk": (lambda: write_load()[-1], pb.LoadEpisodesRequest),
    **{
        f"get_episodes_response_{part}": (lambda part=part: write_reading()[part], pb.GetEpisodesResponse)
        for part in ("selection", "group", "header", "chunk", "evicted")
    },
    "load_episodes_request_episodes": (write_grouped, pb.LoadEpisodesRequest),
    "create_table_request": (
        lambda: write_table_request(lambda verbs: verbs.create_table("demos", law="step", rate={"min_steps": 9})),
        pb.CreateTableRequest,
    ),
    "set_table_request": (lambda: write_table_request(lambda verbs: verbs.set_rate("demos", samples_per_insert=0.5)), pb.SetTableRequest),
    "list_tables_response": (lambda: pb.ListTablesResponse(tables=make_tables()).SerializeToString(), pb.ListTablesResponse),
    "info_response": (write_info, pb.InfoResponse),
    "status_response": (write_status, pb.StatusResponse),
    "sample_request_mix": (write_mix, pb.SampleRequest),
    "sample_request_law": (write_law, pb.SampleRequest),
    "update_priorities": (write_priorities, pb.UpdatePrioritiesRequest),
    "update_priorities_generation": (lambda: write_priorities(GENERATIONS[1]), pb.UpdatePrioritiesRequest),
    "sample_response": (write_response, pb.SampleResponse),
    "sample_response_lockstep": (write_lockstep, pb.SampleResponse),
    "sample_response_mix": (lambda: write_response(("table",)), pb.SampleResponse),
    "sample_response_weight": (lambda: write_response(("weight",)), pb.SampleResponse),
    "sample_response_valid": (lambda: write_response(("valid",)), pb.SampleResponse),
    "sample_stream_response_group": (write_group, pb.SampleStreamResponse),
    "sample_stream_response_group_generations": (lambda: write_group(GENERATIONS), pb.SampleStreamResponse),
    "sample_stream_request_rows": (write_rows_request, pb.SampleStreamRequest),
    "sample_stream_response_rows": (write_rows_offer, pb.SampleStreamResponse),
    "sample_stream_response_rows_refused": (
        lambda: pb.SampleStreamResponse(ring=pb.RingSetup(slots=4, rows_refused="Hände weg")).SerializeToString(),
        pb.SampleStreamResponse,
    ),
    "sample_stream_response_forgotten": (
        lambda: pb.SampleStreamResponse(
            actors=pb.ActorNames(actors=[pb.ActorName(index=1 << 40, name="Hände")], forgotten=[0, 1 << 41])
        ).SerializeToString(),
        pb.SampleStreamResponse,
    ),
    "sample_stream_response_first_chunk": (lambda: write_chunks()[0], pb.SampleStreamResponse),
    "sample_stream_response_last_chunk": (lambda: write_chunks()[-1], pb.SampleStreamResponse),
}


def golden(name: str) -> bytes:
    return (GOLDEN / f"{name}.bin").read_bytes()


def same(found: np.ndarray, expected: np.ndarray) -> bool:
    return (found.dtype, found.shape, found.tobytes()) == (expected.dtype, expected.shape, expected.tobytes())


def assert_batch(batch: object, seed: int) -> None:
    arrays = make_arrays(seed)
    assert same(batch.obs["state"], arrays["obs.state"])
    assert same(batch.obs["rgb"], arrays["obs.rgb"])
    for name in ("action", "reward", "done", "task"):
        assert same(getattr(batch, name), arrays[name])
    for name in ("episode_id", "start", "actor", "policy_version", "probability"):
        assert same(getattr(batch, name), arrays[f"provenance.{name}"])
    assert batch.actor_names == ACTORS


@pytest.mark.parametrize("name", MESSAGES)
def test_messages_written_today_are_the_golden_ones(name: str) -> None:
    assert MESSAGES[name][0]() == golden(name)


def test_every_golden_file_has_its_message() -> None:
    assert sorted(path.stem for path in GOLDEN.iterdir()) == sorted(MESSAGES)


@pytest.mark.parametrize("name", MESSAGES)
def test_golden_messages_are_known_to_the_generated_class_to_the_last_field(name: str) -> None:
    message = MESSAGES[name][1].FromString(golden(name))

    size = message.ByteSize()
    message.DiscardUnknownFields()

    assert size == message.ByteSize()
    # Protobuf does not write padding without content again, two bytes each.
    assert 0 <= len(golden(name)) - size <= 2 * golden(name).count(b"\x1a\x00")


def test_golden_episode_is_read_by_hand_and_by_the_generated_class() -> None:
    expected = make_episode()

    table, episode = decode_add_episode(golden("add_episode_request"))
    by_class = pb.AddEpisodeRequest.FromString(golden("add_episode_request"))

    assert table == by_class.table == "main"
    assert (episode.key, episode.actor, episode.policy_version) == (expected.key, "arm", 12)
    assert list(episode.columns) == [column.name for column in by_class.episode.columns] == list(expected.columns)
    assert all(same(episode.columns[name], array) for name, array in expected.columns.items())
    for column in by_class.episode.columns:
        assert column.tensor.data == expected.columns[column.name].tobytes()
        assert tuple(column.tensor.shape) == expected.columns[column.name].shape
        assert to_numpy(column.tensor.dtype) == expected.columns[column.name].dtype


@pytest.mark.parametrize("form", ["group", "chunks", "ring", "not packed"])
def test_store_generations_are_read_in_every_form_of_a_batch(form: str) -> None:
    layout = make_layout(store_generations=GENERATIONS)
    decoder = BatchDecoder()
    if form == "group":
        batches = decoder.feed(golden("sample_stream_response_group_generations"))
    elif form == "chunks":
        batches = [batch for piece in layout.chunk_plan(CHUNK_BYTES) for batch in decoder.feed(layout.chunk(piece)[0])]
    elif form == "ring":
        batches = [BodyLayout(layout.header()).batch(np.zeros(layout.body_bytes, np.uint8), {})]
    else:  # another sender's way: one field for each number
        batch = pb.SampleResponse.FromString(golden("sample_response")).batch.SerializeToString()
        fields = b"".join(int_field(4, generation) for generation in GENERATIONS)
        batches = [decoder.sample_response(len_field(1, batch + fields))]

    assert batches
    assert all(batch.store_generations == GENERATIONS for batch in batches)
    assert pb.SampleStreamResponse.FromString(write_group(GENERATIONS)).group.batches[1].store_generations == list(GENERATIONS)
    assert decoder.sample_response(golden("sample_response")).store_generations == ()


def test_golden_load_is_read_by_hand() -> None:
    messages = [golden("load_episodes_request_header"), *write_load()[1:-1], golden("load_episodes_request_chunk")]
    decoder = LoadDecoder()

    *before, episode = [next(decoder.feed(message), None) for message in messages]

    expected = make_episode()
    assert not any(before) and episode is not None and episode.key == expected.key and decoder.table == "main"
    assert all(same(episode.columns[name], array) for name, array in expected.columns.items())


def test_golden_episodes_are_read_by_hand() -> None:
    decoder, expected = EpisodeDecoder(), make_episode()

    found = [
        episode
        for part in ("selection", "group", "header", "chunk", "evicted")
        if part != "chunk"
        for episode in decoder.feed(golden(f"get_episodes_response_{part}"))
    ]

    assert decoder.selection == EpisodeSelection(0, 1 << 41, 3, 9, 1 << 60)
    assert [episode.id for episode in found] == [0, 1 << 40] and decoder.seen_id == 1 << 41
    for episode in found:
        assert (episode.key, episode.actor, episode.policy_version, episode.length) == (expected.key, "arm", 12, 3)
        assert all(same(episode.columns[name], array) for name, array in expected.columns.items())
    by_class = pb.GetEpisodesResponse.FromString(golden("get_episodes_response_chunk")).chunk
    assert (by_class.column, by_class.offset_bytes, by_class.data) == (0, 2, b"\1" * 4)


def test_golden_episodes_of_one_message_are_read_by_hand_and_by_the_generated_class() -> None:
    decoder = LoadDecoder()

    found = list(decoder.feed(golden("load_episodes_request_episodes")))
    by_class = pb.LoadEpisodesRequest.FromString(golden("load_episodes_request_episodes"))

    expected = make_episode()
    assert decoder.table == by_class.table == "main"
    assert [isinstance(episode, Episode) and episode.key for episode in found] == [expected.key, None]
    for episode, message in zip(found, by_class.episodes, strict=True):
        assert isinstance(episode, Episode)
        assert all(same(episode.columns[name], array) for name, array in expected.columns.items())
        assert [column.tensor.data for column in message.columns] == [array.tobytes() for array in expected.columns.values()]


def test_golden_descriptions_of_tables_are_read_to_the_last_field() -> None:
    info = server_info_of(golden("info_response"))
    listed = table_infos_of(pb.ListTablesResponse.FromString(golden("list_tables_response")).tables)

    counts = Counts(**{field.name: field.number << 33 for field in pb.Counts.DESCRIPTOR.fields})
    adds, batches = (HeldCaller("arm", 0.5), HeldCaller("Hände", 0.25)), (HeldCaller("ipv4:10.0.0.7:1", 60.0),)
    rate = RateInfo(8.5, 1e6, 1 << 40, 1 << 41, 1 << 42, 3, 5, -0.25, 2, 1, adds, batches, "learners", "actors")
    disk = ("disk", 1 << 41, "full", "the disk is full")
    assert listed["demos"] == TableInfo("demos", "a = 1\n", counts, 1 << 40, *disk, True, "step", 7, rate)
    assert (info.tables, info.rate) == (listed, rate)
    assert list(listed) == ["", "demos"] and listed[""].rate is None


def test_golden_status_is_read_to_the_last_field() -> None:
    message = pb.StatusResponse.FromString(golden("status_response"))
    status = status_of_message(message)
    (table,), (actor,), (learner,), (refusal,) = status.tables, status.actors, status.learners, status.refusals

    assert status_to_message(status) == message
    assert (status.server.state, status.server.version, status.server.uptime_s) == (ServingState.RESTORING, "Text 3 ä", 6.25)
    assert (table.verdict, table.rate is not None, table.durability is not None) == (Verdict.IDLE, True, True)
    assert (actor.name, actor.mean_reward_sum, actor.spool_bytes, actor.others) == ("Text 138 ä", 146.25, 152 << 33, 153 << 33)
    assert (learner.transport, learner.wait.buckets, learner.waits_share) == (Transport.RING, (174 << 33,) * 2, 175.25)
    assert (refusal.table, refusal.last_unix_s, status.time_unix_s) == ("Text 179 ä", 183.25, 184.25)


def test_golden_batches_are_read_by_hand() -> None:
    assert_batch(BatchDecoder().sample_response(golden("sample_response")), 1)
    for seed, batch in enumerate(BatchDecoder().feed(golden("sample_stream_response_group"))):
        assert_batch(batch, seed)
    first, *rest, last = write_chunks()
    decoder = BatchDecoder()
    assert (first, last) == (
        golden("sample_stream_response_first_chunk"),
        golden("sample_stream_response_last_chunk"),
    )
    (batch,) = [batch for message in (first, *rest, last) for batch in decoder.feed(message)]
    assert_batch(batch, 3)


def test_golden_batch_of_matches_is_read_by_hand_with_the_values_of_each_agent() -> None:
    batch = BatchDecoder().sample_response(golden("sample_response_lockstep"))

    found = {"obs": batch.obs, "action": batch.action, "reward": batch.reward, "done": batch.done, "alive": batch.extra["alive"]}
    for number, spec in enumerate(make_lockstep().specs[: len(found)]):
        assert same(found[spec.name], ramp(spec.shape, spec.dtype, 10 * number))


def test_golden_mixed_batch_is_read_by_hand_with_the_table_of_each_slice() -> None:
    batch = BatchDecoder().sample_response(golden("sample_response_mix"))

    assert_batch(batch, 1)
    assert same(batch.table, make_arrays(1, ("table",))["provenance.table"])
    assert batch.weight is None and batch.valid is None


def test_golden_padded_batch_is_read_by_hand_with_what_is_real() -> None:
    batch = BatchDecoder().sample_response(golden("sample_response_valid"))

    assert_batch(batch, 1)
    assert same(batch.valid, make_arrays(1, ("valid",))["provenance.valid"])
    assert batch.weight is None and batch.table is None


def test_golden_batches_are_read_by_the_generated_class() -> None:
    batches = [
        (pb.SampleResponse.FromString(golden("sample_response")).batch, 1),
        *zip(pb.SampleStreamResponse.FromString(golden("sample_stream_response_group")).group.batches, (0, 1), strict=True),
    ]

    for batch, seed in batches:
        arrays = make_arrays(seed)
        tensors = {column.name: column.tensor for column in batch.columns}
        tensors |= {f"provenance.{field.name}": value for field, value in batch.provenance.ListFields()}
        assert {name: tensor.data for name, tensor in tensors.items()} == {n: a.tobytes() for n, a in arrays.items()}


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for file_name, (write, _) in MESSAGES.items():
        (GOLDEN / f"{file_name}.bin").write_bytes(write())
    sys.stdout.write(f"wrote {len(MESSAGES)} files to {GOLDEN}\n")
