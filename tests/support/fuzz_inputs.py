"""Inputs for the targets of :mod:`fuzzing`: good ones, and what a mutator makes of them."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from support.fuzzing import frame, parse
from touchline_protos.codec import BatchLayout, Episode, EpisodeKey, TensorSpec, encode_add_episode, encode_load
from touchline_protos.v1 import replay_pb2 as pb

_SMALL = (0, 1, -1, 2, 7, 15, 16, 17, 127, 128, 255, 256, 257)
_EDGES = (*_SMALL, 1 << 16, (1 << 31) - 1, -(1 << 31), 1 << 32, (1 << 62) + 1, (1 << 63) - 1, -(1 << 63))
_NAMES = ("", "obs", "obs.a", "action", "reward", "done", "task", "index", "episode", "a.b", "a..b", ".", "\n")
_TEXTS = (*_NAMES, "ü" * 128, "x" * 129, "y" * 257)
_INTEGERS = (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_INT64, FieldDescriptor.CPPTYPE_ENUM)


class Mutator:
    """Makes inputs out of good ones: by their bytes, by protobuf's reading of them, and by the order of a stream's messages."""

    def __init__(self, kind: type[Message], seeds: list[list[bytes]], *, stream: bool, seed: int) -> None:
        self._kind = kind
        self._seeds = seeds
        self._stream = stream
        self._rng = random.Random(seed)

    def input(self) -> bytes:
        """Returns the next input."""
        rng = self._rng
        messages = list(rng.choice(self._seeds))
        for _ in range(rng.choice((0, 1, 1, 1, 2, 3, 5))):
            if self._stream and rng.random() < 0.15:
                self._reorder(messages)
            if messages:
                at = rng.randrange(len(messages))
                messages[at] = self._by_fields(messages[at]) if rng.random() < 0.5 else self._by_bytes(messages[at])
        if rng.random() < 0.02:
            messages = [rng.randbytes(rng.randrange(60))]
        messages = [message[:0xFFFF] for message in messages]
        return frame(messages) if self._stream else (messages or [b""])[0]

    def _reorder(self, messages: list[bytes]) -> None:
        rng = self._rng
        choice = rng.randrange(4)
        if choice == 0 and messages:
            del messages[rng.randrange(len(messages))]
        elif choice == 1 and messages:
            messages.insert(rng.randrange(len(messages) + 1), rng.choice(messages))
        elif choice == 2:
            rng.shuffle(messages)
        else:
            messages += rng.choice(self._seeds)

    def _by_bytes(self, message: bytes) -> bytes:
        rng, data = self._rng, bytearray(message)
        at = rng.randrange(min(len(data), 60) if rng.random() < 0.5 else len(data)) if data else 0
        choice = rng.randrange(8)
        if choice == 0 and data:
            data[at] ^= 1 << rng.randrange(8)
        elif choice == 1 and data:
            data[at] = rng.choice((0, 1, 0x0A, 0x12, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif choice == 2:
            data[at:at] = rng.randbytes(rng.randrange(1, 5))
        elif choice == 3:
            del data[at : at + rng.randrange(1, 9)]
        elif choice == 4:
            del data[at:]
        elif choice == 5:
            data[at:at] = data[at : at + rng.randrange(1, 40)]
        elif choice == 6:
            data += rng.choice(rng.choice(self._seeds) or [b""])  # protobuf merges what follows into what was there
        elif data:
            data[at] |= 0x80  # a varint that is written longer than it has to be
            data[at + 1 : at + 1] = rng.choice((b"\x00", b"\x80\x00", b"\x80" * 8 + b"\x00", b"\xff" * 9 + b"\x01"))
        return bytes(data)

    def _by_fields(self, message: bytes) -> bytes:
        parsed = parse(self._kind, message)
        if parsed is None:
            return self._by_bytes(message)
        level: Any = parsed
        while True:
            fields = [field for field, _ in level.ListFields()]
            if not fields or self._rng.random() < 0.1:
                fields = list(level.DESCRIPTOR.fields)
            if not fields:  # ListTablesRequest has none
                return self._by_bytes(message)
            field = self._rng.choice(fields)
            if field.message_type is None or self._rng.random() < 0.1:
                break
            if not field.is_repeated:
                level = getattr(level, field.name)
            elif len(getattr(level, field.name)):
                level = self._rng.choice(getattr(level, field.name))
            else:
                break
        try:
            self._change(level, field)
        except (ValueError, TypeError):
            return self._by_bytes(message)
        return parsed.SerializeToString()

    def _change(self, level: Any, field: FieldDescriptor) -> None:
        rng, now = self._rng, getattr(level, field.name)
        if field.is_repeated:
            choice = rng.randrange(4)
            if choice == 0 and len(now):
                del now[rng.randrange(len(now))]
            elif choice == 1 and len(now):
                now.append(rng.choice(now))
            elif field.message_type is None and (choice == 2 or not len(now)):
                now.append(rng.choice(_EDGES))
            elif field.message_type is None:
                now[rng.randrange(len(now))] = rng.choice(_EDGES)
        elif field.message_type is not None or rng.random() < 0.1:
            level.ClearField(field.name)
        elif field.cpp_type in _INTEGERS:
            setattr(level, field.name, rng.choice((*_EDGES, now + 1, now - 1, rng.randrange(12))))
        elif field.cpp_type == FieldDescriptor.CPPTYPE_STRING and field.type == FieldDescriptor.TYPE_BYTES:
            setattr(level, field.name, rng.choice((now[:-1], now + b"\x00", now[1:], rng.randbytes(len(now)), b"")))
        elif field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
            setattr(level, field.name, rng.choice((*_TEXTS, now + "x", now[:-1])))
        else:
            setattr(level, field.name, rng.choice((0.0, -1.0, math.inf, math.nan, 1e308)))


GOLDEN = Path(__file__).parents[1] / "contract" / "golden"


def golden(name: str) -> bytes:
    return (GOLDEN / f"{name}.bin").read_bytes()


def small_layout() -> BatchLayout:
    """Batches with nested observations, an extra column and a task."""
    steps, transitions = (3, 2), (2, 2)
    specs = [
        TensorSpec("obs.state", np.dtype("<f4"), (*steps, 2)),
        TensorSpec("obs.image.left", np.dtype("u1"), (*steps, 2, 3)),
        TensorSpec("action", np.dtype("<f4"), (*transitions, 1)),
        TensorSpec("reward", np.dtype("<f4"), (*transitions, 1)),
        TensorSpec("done", np.dtype("<f4"), (*transitions, 1)),
        TensorSpec("phase", np.dtype("<i2"), steps),
        TensorSpec("task", np.dtype("<i8"), (2,)),
    ]
    return BatchLayout(specs, 2)


def chunks_of(layout: BatchLayout, chunk_bytes: int) -> list[bytes]:
    """A batch in chunks, counting up."""
    messages = []
    for piece in layout.chunk_plan(chunk_bytes):
        message, views = layout.chunk(piece, {} if piece.offset_bytes else {0: "arm"})
        for view in views:
            view[...] = np.arange(view.size).reshape(view.shape).astype(view.dtype)
        messages.append(message)
    return messages


def small_episodes() -> list[Episode]:
    """Episodes of usual and of odd columns."""
    rows = {"obs": np.arange(12, dtype="<f4").reshape(4, 3), "action": np.zeros((4, 2)), "reward": np.array([np.nan, 1, 2, 3], "<f4")}
    nested = {"obs.image": np.zeros((5, 2, 2), "u1"), "obs.state": np.ones((5, 3), "<f4"), "action": np.ones((5, 1), "<f4")}
    nested |= {"reward": np.ones((5, 1), "<f8"), "done": np.array([False, False, False, False, True]), "task": np.zeros(5, "<i8")}
    halves = {"obs": np.ones((3, 2), "<f2"), "action": np.zeros((3, 2), "<u2").view([("bfloat16", "<u2")]), "reward": np.zeros(3, "<f4")}
    return [
        Episode(rows, EpisodeKey("robot-7", 1_700_000_000, 42), "arm", 9),
        Episode(rows),
        Episode(nested, EpisodeKey("robot-8", 1, 0), "leg", 1),
        Episode(halves | {"empty": np.zeros((3, 0), "<i4")}, actor="Hände"),
    ]


def _reading_seeds() -> list[list[bytes]]:
    """Answers to GetEpisodes: whole episodes, pieces of one, one that is taken back."""
    first = pb.GetEpisodesResponse(selection=pb.EpisodeSelection(last_episode_id=9, episodes=2, steps=8, lineage=5)).SerializeToString()
    whole, pieces = [], []
    for number, episode in enumerate(small_episodes()):
        stored = pb.StoredEpisode(episode_id=number, episode=pb.AddEpisodeRequest.FromString(encode_add_episode(episode)).episode)
        whole.append(pb.GetEpisodesResponse(group=pb.EpisodeGroup(episodes=[stored])).SerializeToString())
        requests = [pb.LoadEpisodesRequest.FromString(message) for message in encode_load(episode, chunk_bytes=20)]
        header = pb.StoredEpisodeHeader(episode_id=number + 10, header=requests[0].header)
        answers = [pb.GetEpisodesResponse(header=header), *(pb.GetEpisodesResponse(chunk=request.chunk) for request in requests[1:])]
        pieces.append([answer.SerializeToString() for answer in answers])
    taken_back = pb.GetEpisodesResponse(evicted=pb.EpisodeEvicted(episode_id=10)).SerializeToString()
    return [[first, *whole], *([first, *piece] for piece in pieces), [first, *pieces[0][:2], taken_back, *pieces[1]]]


def seeds(name: str) -> tuple[type[Message], list[list[bytes]]]:
    """Returns a target's kind of message and good inputs for it."""
    if name == "adding":
        return pb.AddEpisodeRequest, [[golden("add_episode_request")], *([encode_add_episode(episode)] for episode in small_episodes())]
    if name == "loading":
        streams = [list(encode_load(episode, chunk_bytes=size)) for episode in small_episodes() for size in (9, 40, 1000)]
        return pb.LoadEpisodesRequest, [*streams, [golden("load_episodes_request_header"), golden("load_episodes_request_chunk")]]
    if name == "receiving":
        group, views = small_layout().group(2, {0: "arm", 3: "leg"})
        for batch in views:
            for array in batch.values():
                array[...] = 1
        chunked = [chunks_of(small_layout(), size) for size in (40, 200, 10_000)]
        goldens = [golden("sample_stream_response_group"), golden("sample_stream_response_first_chunk")]
        return pb.SampleStreamResponse, [*chunked, [group], [group, group], [group, *chunked[1], group], *([one] for one in goldens)]
    if name == "reading":
        return pb.GetEpisodesResponse, _reading_seeds()
    opening = pb.SampleStreamRequest(open=pb.SampleStreamOpen(credits=2, sample=pb.SampleRequest(batch_size=2, horizon=2, seed=7)))
    credit = pb.SampleStreamRequest(credit=pb.SampleStreamCredit(batches=1))
    ring = pb.SampleStreamRequest(ring=pb.RingAttachment(attached=True))
    rank = pb.LearnerRank(rank=1, world_size=3, job="job", first_batch=4)
    ranked = pb.SampleStreamRequest(open=pb.SampleStreamOpen(credits=1, sample=pb.SampleRequest(batch_size=2, seed=1, learner_rank=rank)))
    plain = pb.SampleStreamRequest(open=pb.SampleStreamOpen(sample=pb.SampleRequest(), max_batches_per_frame=2, shared_memory_id="x"))
    streams = [[opening], [opening, credit], [plain, credit, credit], [opening, ring], [ranked, credit]]
    return pb.SampleStreamRequest, [[message.SerializeToString() for message in stream] for stream in streams]


def mutator(name: str, *, seed: int) -> Mutator:
    """Returns what makes inputs for a target."""
    kind, good = seeds(name)
    return Mutator(kind, good, stream=name != "adding", seed=seed)
