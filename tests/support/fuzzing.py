"""Targets for fuzzing: everything that takes bytes from the network, each compared with protobuf's own parser and with the rules of the
.proto, implemented here a second time. A target takes an input, and raises if the product reads it wrongly.

An input is bytes. If a target reads a stream, the input is several messages, each preceded by its length in two bytes (:func:`frame`).
"""

from __future__ import annotations

import asyncio
import math
import struct
from collections.abc import AsyncIterator, Callable, Iterable
from types import SimpleNamespace
from typing import Any, NoReturn

import grpc
import numpy as np
from google.protobuf.message import DecodeError, Message

from support.store_cases import read_episode
from touchline_protos import Batch
from touchline_protos.codec import (
    BatchDecoder,
    CodecError,
    CodecLimits,
    Episode,
    LoadDecoder,
    decode_add_episode,
)
from touchline_protos.codec.download import EpisodeDecoder
from touchline_protos.v1 import replay_pb2 as pb
from touchline_server import Config, ReplayBuffer, ReplayError
from touchline_server.service.app import build_parts
from touchline_server.service.parts import ServiceParts
from touchline_server.service.service import SERVICE_NAME, ReplayService
from touchline_server.store.inserts import Stored

Target = Callable[[bytes], bool]
"""Function that returns whether any part of its input was accepted."""

CAPACITY = 64
LIMITS = CodecLimits(max_episode_bytes=1 << 16)
MAX_BATCH_BYTES = 1 << 16
ITEM_BYTES = {1: 1, 2: 1, 3: 1, 4: 2, 5: 4, 6: 8, 7: 2, 8: 2, 9: 4, 10: 8}
FORMATS = {1: "?", 2: "B", 3: "b", 4: "h", 5: "i", 6: "q", 7: "e", 9: "f", 10: "d"}
_NAMES_IN_ORDER = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64")
NUMPY_NAMES = dict(enumerate(_NAMES_IN_ORDER, 1))


def frame(messages: Iterable[bytes]) -> bytes:
    """Returns a stream's messages as one input."""
    return b"".join(struct.pack("<H", len(message)) + message for message in messages)


def unframe(data: bytes) -> list[bytes]:
    """Returns the messages of an input; any bytes are a valid input."""
    messages, at = [], 0
    while at + 2 <= len(data):
        (size,) = struct.unpack_from("<H", data, at)
        messages.append(data[at + 2 : at + 2 + size])
        at += 2 + size
    return messages


def parse(kind: type[Message], data: bytes) -> Any:
    """Returns what protobuf reads; None if it refuses."""
    try:
        return kind.FromString(data)
    except DecodeError:
        return None


# The rules, a second time.


def dtype_number(array: np.ndarray) -> int:
    name = "bfloat16" if array.dtype.kind == "V" else array.dtype.name
    return next(number for number, known in NUMPY_NAMES.items() if known == name)


def assert_tensor(array: np.ndarray, tensor: Any) -> None:
    """Asserts that an array is what protobuf read: element type, shape and bytes."""
    assert dtype_number(array) == tensor.dtype
    assert array.dtype.isnative and list(array.shape) == list(tensor.shape)
    assert array.tobytes() == tensor.data


def assert_well_formed(name: str, dtype: int, shape: list[int], data: bytes) -> None:
    assert 1 <= len(name) <= 256
    assert dtype in ITEM_BYTES
    assert len(shape) <= 16 and all(size >= 0 for size in shape)
    assert len(data) == math.prod(shape) * ITEM_BYTES[dtype]


def assert_origin(episode: Episode, message: Any) -> None:
    key = message.key if message.HasField("key") else None
    assert (key is None) == (episode.key is None)
    if key is not None and episode.key is not None:
        assert (episode.key.client_id, episode.key.incarnation, episode.key.sequence) == (key.client_id, key.incarnation, key.sequence)
        assert 1 <= len(key.client_id) <= 128
    assert (episode.actor, episode.policy_version) == (message.actor, message.policy_version)
    assert len(message.actor) <= 128


def assert_episode(episode: Episode, message: pb.Episode) -> None:
    """Asserts that an accepted episode is what protobuf read, and is valid by the .proto."""
    assert_origin(episode, message)
    assert list(episode.columns) == [column.name for column in message.columns]
    assert len(episode.columns) == len(message.columns) <= 256
    assert sum(len(column.tensor.data) for column in message.columns) <= LIMITS.max_episode_bytes
    for column in message.columns:
        assert_well_formed(column.name, column.tensor.dtype, list(column.tensor.shape), column.tensor.data)
        assert_tensor(episode.columns[column.name], column.tensor)
        if column.tensor.dtype == pb.DTYPE_BOOL:
            assert set(column.tensor.data) <= {0, 1}


def finite(dtype: int, data: bytes) -> bool:
    if dtype == pb.DTYPE_BFLOAT16:
        return all(bits & 0x7F80 != 0x7F80 for (bits,) in struct.iter_unpack("<H", data))
    if dtype in (pb.DTYPE_FLOAT16, pb.DTYPE_FLOAT32, pb.DTYPE_FLOAT64):
        return all(math.isfinite(value) for (value,) in struct.iter_unpack("<" + FORMATS[dtype], data))
    return True


def assert_storable(message: pb.Episode, schema: dict[str, tuple[int, list[int]]] | None) -> None:
    """Asserts that a stored episode obeys the rules of a table with the row convention ``incoming``."""
    columns = {column.name: column.tensor for column in message.columns}
    assert all(name.isprintable() and "" not in name.split(".") for name in columns)
    assert not any(name in ("episode", "index") or name.startswith("provenance.") for name in columns)
    assert not any(other.startswith(f"{name}.") for name in columns for other in columns)
    assert "action" in columns and "reward" in columns
    assert any(name == "obs" or name.startswith("obs.") for name in columns)
    (rows,) = {tensor.shape[0] for tensor in columns.values()}
    assert 1 <= rows <= CAPACITY
    # One value a row, or one for each agent if observations and actions have the same second axis.
    shared = [list(tensor.shape[1:2]) for name, tensor in columns.items() if name == "action" or name.partition(".")[0] == "obs"]
    agents = shared[0] if shared[0] not in ([], [1]) and all(axis == shared[0] for axis in shared) else []
    reward = list(columns["reward"].shape[1:])
    assert reward in ([], [1], agents)
    assert "done" not in columns or list(columns["done"].shape[1:]) in ([], [1], reward)
    assert "task" not in columns or list(columns["task"].shape[1:]) in ([], [1])
    for name, tensor in columns.items():
        row_bytes = len(tensor.data) // rows
        if name == "obs" or name.startswith("obs."):
            assert finite(tensor.dtype, tensor.data)
        elif name in ("action", "reward", "done"):
            assert finite(tensor.dtype, tensor.data[row_bytes:])
    if schema is not None:
        assert {name: (tensor.dtype, list(tensor.shape[1:])) for name, tensor in columns.items()} == schema


class FuzzedStore:
    """A small buffer that stores everything that the decoders accept.

    Args:
        clear_every: number of episodes after which it is emptied, so that the next one fixes another schema.
    """

    def __init__(self, *, clear_every: int = 50) -> None:
        self._clear_every = clear_every
        self.buffer = ReplayBuffer(
            Config(config={"buffer_size": CAPACITY, "batch_size": 4, "min_history": 0, "horizon": 3}, storage={"device": "cpu"})
        )
        self.accepted = 0
        self._schema: dict[str, tuple[int, list[int]]] | None = None

    def take(self, episode: Episode, message: pb.Episode) -> None:
        """Adds an episode, which may be refused; asserts that a stored one obeys the rules and is unchanged."""
        before = self.buffer.counts()
        try:
            stored = self.buffer.table.submit(episode)
        except ReplayError as error:
            assert str(error)
            after = self.buffer.counts()
            assert (after.episodes_added, after.steps_stored) == (before.episodes_added, before.steps_stored)
            return
        assert isinstance(stored, Stored)
        if stored.duplicate:
            assert self.buffer.counts().episodes_added == before.episodes_added
            return
        assert_storable(message, self._schema)
        entry = self.buffer.store.entries()[-1]
        assert int(entry[0]) == stored.episode_id and self.buffer.counts().steps_stored <= CAPACITY
        assert self.buffer.store.actor_name(int(entry[3])) == message.actor
        found = read_episode(self.buffer.store, entry)
        assert found.keys() == {column.name for column in message.columns}
        for column in message.columns:
            assert_tensor(found[column.name], column.tensor)
        self.accepted += 1
        self._schema = {column.name: (column.tensor.dtype, list(column.tensor.shape[1:])) for column in message.columns}
        if self.accepted % self._clear_every == 0:
            self.buffer.clear()
            self._schema = None


# The targets.


def adding(store: FuzzedStore) -> Target:
    """AddEpisodeRequest: decoder and store."""

    def target(data: bytes) -> bool:
        reference = parse(pb.AddEpisodeRequest, data)
        try:
            table, episode = decode_add_episode(data, limits=LIMITS)
        except CodecError as error:
            assert str(error)
            return False
        assert reference is not None, "protobuf refuses it"
        assert table == reference.table and len(table) <= 256
        assert_episode(episode, reference.episode)
        store.take(episode, reference.episode)
        return True

    return target


class _Assembler:
    """Assembles an episode from chunks, with protobuf's parser and by the rules of the .proto."""

    def __init__(self) -> None:
        self._header: Any = None
        self._data: list[bytes] = []

    @property
    def in_progress(self) -> bool:
        return self._header is not None

    def rollback(self) -> None:
        self._header = None

    def feed(self, request: Any) -> pb.Episode | None:
        part = request.WhichOneof("part")
        if part == "episode":
            assert self._header is None, "a whole episode within another's chunks"
            return request.episode
        return self.begin(request.header) if part == "header" else self.add(request.chunk)

    def begin(self, header: Any) -> pb.Episode | None:
        assert self._header is None, "a header within another's chunks"
        self._header, self._data = header, [b""] * len(header.columns)
        return self._finish()

    def add(self, chunk: Any) -> pb.Episode | None:
        if self._header is not None and chunk.data:
            assert chunk.offset_bytes == len(self._data[chunk.column])
            self._data[chunk.column] += chunk.data
        return self._finish()

    def _finish(self) -> pb.Episode | None:
        header = self._header
        if header is None:
            return None
        sizes = [math.prod([header.length, *spec.shape]) * ITEM_BYTES[spec.dtype] for spec in header.columns]
        if [len(data) for data in self._data] != sizes:
            return None
        self._header = None
        tensors = [
            pb.Tensor(dtype=spec.dtype, shape=[header.length, *spec.shape], data=data)
            for spec, data in zip(header.columns, self._data, strict=True)
        ]
        columns = [pb.Column(name=spec.name, tensor=tensor) for spec, tensor in zip(header.columns, tensors, strict=True)]
        episode = pb.Episode(actor=header.actor, policy_version=header.policy_version, columns=columns)
        if header.HasField("key"):
            episode.key.CopyFrom(header.key)
        return episode


def loading(store: FuzzedStore) -> Target:
    """A stream of LoadEpisodesRequest: decoder and store."""

    def target(data: bytes) -> bool:
        decoder, assembler, accepted = LoadDecoder(LIMITS), _Assembler(), False
        for message in unframe(data):
            reference = parse(pb.LoadEpisodesRequest, message)
            try:
                results = list(decoder.feed(message))
            except CodecError as error:
                assert str(error) and error.fatal
                return accepted
            errors = [result for result in results if isinstance(result, CodecError)]
            assert all(map(str, errors))
            if reference is not None and reference.episodes:
                # Several whole episodes: each is refused or read by itself.
                for result, whole in zip(results, reference.episodes, strict=True):
                    if isinstance(result, Episode):
                        accepted = True
                        assert_episode(result, whole)
                        store.take(result, whole)
                continue
            if errors:
                assembler.rollback()
                continue
            episode = next((result for result in results if isinstance(result, Episode)), None)
            if reference is None:
                # The remaining chunks of a refused episode are skipped unread.
                assert episode is None and not assembler.in_progress, "protobuf refuses it"
                continue
            expected = assembler.feed(reference)
            assert (episode is None) == (expected is None)
            if episode is not None and expected is not None:
                accepted = True
                assert_episode(episode, expected)
                store.take(episode, expected)
        return accepted

    return target


def assert_batch(batch: Batch, message: pb.Batch, names: dict[int, str]) -> None:
    """Asserts that an accepted batch is what protobuf read, with the names and shapes of the .proto."""
    columns = {column.name: column.tensor for column in message.columns}
    assert len(columns) == len(message.columns)
    for name, tensor in columns.items():
        assert_well_formed(name, tensor.dtype, list(tensor.shape), tensor.data)
    size = math.prod(message.provenance.episode_id.shape)
    horizon = columns["reward"].shape[0]
    for name, tensor in columns.items():
        shape = list(tensor.shape)
        if name == "task":
            assert shape == [size]
        elif name in ("reward", "done"):
            assert shape == [horizon, size, 1]
        else:
            assert shape[:2] == [horizon + (name != "action"), size]
        assert_tensor(_column(batch, name), tensor)
    assert {"action", "reward", "done"} <= columns.keys()
    for field, _ in message.provenance.ListFields():
        tensor = getattr(message.provenance, field.name)
        assert tensor.dtype == (pb.DTYPE_FLOAT64 if field.name == "probability" else pb.DTYPE_INT64)
        assert list(tensor.shape) == [size] and size > 0
        assert_tensor(getattr(batch, field.name), tensor)
    assert len(message.provenance.ListFields()) == 5
    assert dict(batch.actor_names) == names


def _column(batch: Batch, name: str) -> np.ndarray:
    if name == "obs" or name in ("action", "reward", "done", "task"):
        return getattr(batch, name)
    if not name.startswith("obs."):
        return batch.extra[name]
    level: Any = batch.obs
    for part in name.split(".")[1:]:
        level = level[part]
    return level


class _BodyAssembler:
    """Assembles batches from chunks, with protobuf's parser and by the rules of the .proto."""

    def __init__(self) -> None:
        self._header: Any = None
        self._body = b""
        self._size = 0

    def feed(self, chunk: Any) -> pb.Batch | None:
        if chunk.HasField("header"):
            assert self._header is None, "a header within another batch"
            self._header, self._body, self._size = chunk.header, b"", chunk.size_bytes
        assert self._header is not None and chunk.offset_bytes == len(self._body)
        self._body += chunk.data
        if len(self._body) < self._size:
            return None
        batch, self._header, at = self._header, None, 0
        fields = ("episode_id", "start", "actor", "policy_version", "probability")
        for tensor in [column.tensor for column in batch.columns] + [getattr(batch.provenance, name) for name in fields]:
            at = -(-at // 64) * 64
            size = math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype]
            tensor.data = self._body[at : at + size]
            at += size
        assert at == self._size == len(self._body)
        return batch


def receiving(data: bytes) -> bool:
    """Reads a stream of SampleStreamResponse as the learner does."""
    decoder, bodies, names, accepted = BatchDecoder(max_batch_bytes=MAX_BATCH_BYTES), _BodyAssembler(), dict[int, str](), False
    for message in unframe(data):
        reference = parse(pb.SampleStreamResponse, message)
        try:
            batches = decoder.feed(message)
        except CodecError as error:
            assert str(error)
            return accepted
        assert reference is not None, "protobuf refuses it"
        names = names | {actor.index: actor.name for actor in reference.actors.actors}
        expected = list(reference.group.batches)
        if reference.WhichOneof("frame") == "chunk":
            done = bodies.feed(reference.chunk)
            expected = [] if done is None else [done]
        assert len(batches) == len(expected)
        for batch, wanted in zip(batches, expected, strict=True):
            names = names | {actor.index: actor.name for actor in wanted.actors}
            assert_batch(batch, wanted, names)
            accepted = True
    return accepted


def reading(data: bytes) -> bool:
    """Reads a stream of GetEpisodesResponse as a client does that reads episodes back."""
    decoder, assembler, number, last, accepted = EpisodeDecoder(LIMITS), _Assembler(), 0, -1, False
    for message in unframe(data):
        reference = parse(pb.GetEpisodesResponse, message)
        try:
            episodes = decoder.feed(message)
        except CodecError as error:
            assert str(error)
            return accepted
        assert reference is not None, "protobuf refuses it"
        expected: list[tuple[int, Any]] = []
        part = reference.WhichOneof("part")
        if part == "selection":
            selection, found = reference.selection, decoder.selection
            assert found is not None
            assert found.first_episode_id == selection.first_episode_id and found.last_episode_id == selection.last_episode_id
            assert (found.episodes, found.steps, found.store_generation) == (selection.episodes, selection.steps, selection.lineage)
        elif part == "group":
            assert not assembler.in_progress
            expected = [(stored.episode_id, stored.episode) for stored in reference.group.episodes]
        elif part == "evicted":
            assert assembler.in_progress and reference.evicted.episode_id == number
            assembler.rollback()
        else:
            if part == "header":
                number = reference.header.episode_id
            made = assembler.begin(reference.header.header) if part == "header" else assembler.add(reference.chunk)
            expected = [] if made is None else [(number, made)]
        assert [episode.id for episode in episodes] == [number for number, _ in expected]
        for episode, (number, wanted) in zip(episodes, expected, strict=True):
            assert number > last, "ids ascend"
            last, accepted = number, True
            assert_episode(Episode(episode.columns, episode.key, episode.actor, episode.policy_version), wanted)
            assert {column.tensor.shape[0] for column in wanted.columns} <= {episode.length}
    return accepted


class _Ended(grpc.aio.AbortError):
    """Raised when the service ends a call with a status."""


class _Learner:
    """The learner's side of a sampling stream, without gRPC: feeds the service the requests and checks its answers against them."""

    MOST_BATCHES = 40

    def __init__(self, messages: list[bytes]) -> None:
        self._messages = messages
        self._decoder = BatchDecoder()
        self.granted = self.batches = 0

    async def requests(self) -> AsyncIterator[bytes]:
        for message in self._messages:
            request = parse(pb.SampleStreamRequest, message)
            if request is not None:
                self.granted += request.open.credits + request.credit.batches
            yield message

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    def invocation_metadata(self) -> tuple[()]:
        return ()

    def done(self) -> bool:
        return False

    async def send_initial_metadata(self, metadata: tuple[()]) -> None:
        """Nothing to send it to."""

    async def write(self, message: bytes) -> None:
        self.batches += len(self._decoder.feed(message))
        assert self.batches <= self.granted, "more batches than credits"
        if self.batches > self.MOST_BATCHES:
            raise asyncio.CancelledError  # it has seen enough and disconnects

    async def abort(self, code: grpc.StatusCode, details: str, trailing_metadata: Any) -> NoReturn:
        assert details
        raise _Ended(code, details)


class FuzzedSessions:
    """The service's sampling streams on a real buffer, driven by arbitrary bytes. A context manager."""

    def __init__(self) -> None:
        config = Config(
            config={"buffer_size": CAPACITY, "batch_size": 4, "min_history": 0, "horizon": 3},
            storage={"device": "cpu"},
            limits={"max_batch_size": 64, "max_horizon": 8},
        )
        buffer = ReplayBuffer(config)
        rows = {"obs": np.zeros((20, 2), np.float32), "action": np.zeros((20, 1), np.float32), "reward": np.zeros(20, np.float32)}
        buffer.add(rows, actor="arm")
        self._loop = asyncio.new_event_loop()
        self._parts = self._loop.run_until_complete(self._build(config, buffer))
        details = SimpleNamespace(method=f"/{SERVICE_NAME}/SampleStream", invocation_metadata=())
        self._method: Any = ReplayService(self._parts).handlers().service(details)

    def __enter__(self) -> FuzzedSessions:
        return self

    def __exit__(self, *_: object) -> None:
        self._parts.close()
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    def target(self, data: bytes) -> bool:
        """SampleStreamRequest: the opening and the credits of a session."""
        return self._loop.run_until_complete(self._run(unframe(data)))

    @staticmethod
    async def _build(config: Config, buffer: ReplayBuffer) -> ServiceParts:
        return build_parts(config, buffer.registry)

    async def _run(self, messages: list[bytes]) -> bool:
        learner = _Learner(messages)
        try:
            async with asyncio.timeout(120):
                await self._method.stream_stream(learner.requests(), learner)
        except _Ended as ended:
            assert ended.args[0] in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND), ended
            return learner.batches > 0
        except asyncio.CancelledError:
            return True
        assert learner.batches == learner.granted
        return learner.batches > 0


def targets() -> dict[str, Target]:
    """Returns the targets that need not be closed, each with a store of its own."""
    return {"adding": adding(FuzzedStore()), "loading": loading(FuzzedStore()), "receiving": receiving, "reading": reading}
