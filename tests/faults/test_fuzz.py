"""Mutated, random and generated messages: only refusals, no growth, and accepted input is what protobuf reads."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.fault_tally import MESSAGES, long, note
from support.fuzz_inputs import Mutator, mutator
from support.fuzzing import (
    CAPACITY,
    ITEM_BYTES,
    FuzzedSessions,
    FuzzedStore,
    adding,
    frame,
    loading,
    targets,
    unframe,
)
from support.service_calls import DEADLINE_S, SERVICE, Caller, ServerProcess, private_bytes
from touchline_protos.v1 import replay_pb2 as pb

ROOT = Path(__file__).parents[2]
RECORDED = Path(__file__).parent / "fuzzed"
"""Inputs that were once read wrongly: TARGET-WHAT.bin."""
GROWTH_BYTES = 24 << 20
"""Maximum growth of memory in the second half of the inputs. A leak of one small message each would exceed it in `make test-faults`."""


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Each refusal is a line of the log."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def advise(name: str, data: bytes) -> str:
    return f"record it as tests/faults/fuzzed/{name}-WHAT.bin: bytes.fromhex({data.hex()!r})"


@pytest.mark.parametrize("file", sorted(RECORDED.glob("*.bin")), ids=lambda file: file.stem)
def test_input_that_was_once_read_wrongly_is_not(file: Path) -> None:
    target = targets()[file.stem.partition("-")[0]]

    assert not target(file.read_bytes())


@pytest.mark.timeout(600 + MESSAGES // 100)
@pytest.mark.parametrize(("name", "share"), [("adding", 0.25), ("loading", 0.15), ("receiving", 0.1), ("reading", 0.1), ("session", 0.05)])
def test_mutated_inputs_are_refused_or_read_as_protobuf_reads_them(name: str, share: float) -> None:
    store, count, accepted = FuzzedStore(), int(MESSAGES * share), 0
    with FuzzedSessions() as sessions:
        target = {**targets(), "adding": adding(store), "loading": loading(store), "session": sessions.target}[name]
        inputs = mutator(name, seed=7)

        for number in range(count):
            if number == count // 2:
                before = private_bytes(os.getpid())
            data = inputs.input()
            try:
                accepted += target(data)
            except Exception as error:
                error.add_note(advise(name, data))
                raise

        assert count // 10 < accepted < count
        assert private_bytes(os.getpid()) - before < GROWTH_BYTES
        assert store.buffer.counts().steps_stored <= CAPACITY
        note(messages_fuzzed=count)


SELDOM = st.sampled_from((False,) * 19 + (True,))
EXTRA_NAMES = st.sampled_from(("done", "task", "x", "y.z", "obs.b", "obs.b.c", "index", "ü", "", "a..b"))


@st.composite
def odd_columns(draw: st.DrawFn, name: str, rows: int) -> pb.Column:
    """A column that is valid except for rare faults."""
    dtype = draw(st.integers(-1, 12)) if draw(SELDOM) else draw(st.sampled_from(sorted(ITEM_BYTES)))
    inner = [[], [1]] if name in ("reward", "done", "task") and not draw(SELDOM) else [[], [1], [3], [2, 2], [0], [-1]]
    shape = [draw(st.integers(-1, 6)) if draw(SELDOM) else rows, *draw(st.sampled_from(inner))]
    size = math.prod(max(extent, 0) for extent in shape) * ITEM_BYTES.get(dtype, 1) + draw(SELDOM)
    pattern = draw(st.sampled_from((b"\x00", b"\x01", b"\x00\x01\x01", b"\xff" if draw(SELDOM) else b"\x00")))
    return pb.Column(name=name, tensor=pb.Tensor(dtype=dtype, shape=shape, data=(pattern * (size + 1))[:size]))


@st.composite
def odd_requests(draw: st.DrawFn) -> pb.AddEpisodeRequest:
    """Draws episodes that are nearly valid."""
    rows = draw(st.integers(0, 3)) if draw(SELDOM) else draw(st.integers(1, 6))
    names = [name for name in (draw(st.sampled_from(("obs", "obs.a"))), "action", "reward") if not draw(SELDOM)]
    names += draw(st.lists(EXTRA_NAMES, max_size=2))
    columns = [draw(odd_columns(name, rows)) for name in draw(st.permutations(names))]
    key = draw(st.none() | st.builds(pb.EpisodeKey, client_id=st.sampled_from(("a", "b", "")), sequence=st.integers(-2, 10_000)))
    return pb.AddEpisodeRequest(episode=pb.Episode(key=key, actor=draw(st.sampled_from(("", "arm"))), columns=columns))


def test_generated_episodes_are_refused_or_read_as_protobuf_reads_them() -> None:
    store, found = FuzzedStore(clear_every=1), Counter[bool]()
    target, examples = adding(store), max(200, MESSAGES // 20)

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck), database=None)
    @given(odd_requests())
    def run(request: pb.AddEpisodeRequest) -> None:
        data = request.SerializeToString()
        try:
            found[target(data)] += 1
        except Exception as error:
            error.add_note(advise("adding", data))
            raise

    run()

    assert store.accepted > examples // 20 and found[False] > examples // 20
    note(messages_fuzzed=found.total())


@long
@pytest.mark.parametrize("name", sorted(targets()))
def test_inputs_guided_by_coverage_are_refused_or_read_as_protobuf_reads_them(name: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("no atheris here: pip install -r tests/faults/requirements.txt")
    corpus, runs = tmp_path / "corpus", int(MESSAGES * 0.2)
    corpus.mkdir()
    options = [f"-runs={runs}", "-seed=7", "-max_len=4096", "-rss_limit_mb=2048", "-malloc_limit_mb=256", "-timeout=10", "-len_control=20"]

    ended = subprocess.run(
        [sys.executable, "-m", "support.coverage_fuzzing", name, str(corpus), *options],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        check=False,
    )

    crashes = [file.read_bytes() for file in tmp_path.iterdir() if file.is_file()]
    assert ended.returncode == 0, "\n".join([ended.stderr[-3000:], *(advise(name, data) for data in crashes)])
    assert f"Done {runs} runs" in ended.stderr, ended.stderr[-3000:]
    note(messages_fuzzed=runs)


EXPECTED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}
WAITS = {grpc.StatusCode.DEADLINE_EXCEEDED}
"""Status of a call that asked to wait and timed out waiting."""


class Stranger:
    """Calls a server's methods with mutated messages."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        self._rng = random.Random(7)
        small = {
            "Sample": (pb.SampleRequest, pb.SampleRequest(batch_size=2, horizon=2, seed=1, law=pb.LAW_STEP)),
            "Ready": (pb.ReadyRequest, pb.ReadyRequest(min_steps=1, table="x")),
            "Info": (pb.InfoRequest, pb.InfoRequest(table="x")),
            "GetEpisodes": (
                pb.GetEpisodesRequest,
                pb.GetEpisodesRequest(first_episode_id=1, newest=2, columns=["obs"], max_frame_bytes=4096),
            ),
            "UpdatePriorities": (
                pb.UpdatePrioritiesRequest,
                pb.UpdatePrioritiesRequest(
                    episode_id=pb.Tensor(dtype=pb.DTYPE_INT64, shape=[1], data=bytes(8)),
                    start=pb.Tensor(dtype=pb.DTYPE_INT64, shape=[1], data=bytes(8)),
                    priorities=pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=[2, 1], data=bytes(8)),
                ),
            ),
            "Clear": (pb.ClearRequest, pb.ClearRequest(table="x")),
            "CreateTable": (pb.CreateTableRequest, pb.CreateTableRequest(table="x1", config_toml='law = "step"\nbuffer_size = 100')),
            "SetTable": (pb.SetTableRequest, pb.SetTableRequest(table="x1", config_toml="rate.samples_per_insert = 4.5")),
            "Status": (pb.StatusRequest, pb.StatusRequest(tables=["x"], newest_episodes=3)),
            "DropTable": (pb.DropTableRequest, pb.DropTableRequest(table="x1")),
        }
        of = {"AddEpisode": "adding", "LoadEpisodes": "loading", "SampleStream": "session"}
        self._inputs = {method: mutator(name, seed=8) for method, name in of.items()}
        self._inputs |= {
            name: Mutator(kind, [[good.SerializeToString()], [b""]], stream=False, seed=8) for name, (kind, good) in small.items()
        }

    def call(self) -> tuple[str, grpc.StatusCode, bytes]:
        """Makes a call; returns the method, how it ended and what was sent."""
        name = self._rng.choices(list(self._inputs), weights=[6, 3, 3, 2, 1, 1, 2, 2, 0.2, 1, 1, 1, 1])[0]
        data = self._inputs[name].input()
        try:
            if name == "LoadEpisodes":
                self._caller.load(unframe(data))
            elif name == "SampleStream":
                self._stream(unframe(data))
            elif name == "GetEpisodes":
                list(self._caller.channel.unary_stream(SERVICE + name)(data, timeout=DEADLINE_S))
            elif name == "Status":
                call = self._caller.channel.unary_stream(SERVICE + name)(data, timeout=0.5)
                next(call, None)  # with an interval it has no end
                call.cancel()
            else:
                self._caller.channel.unary_unary(SERVICE + name)(data, timeout=0.5)
        except grpc.RpcError as error:
            return name, error.code(), data
        return name, grpc.StatusCode.OK, data

    def _stream(self, messages: list[bytes]) -> None:
        call: Any = self._caller.channel.stream_stream(SERVICE + "SampleStream")(iter(messages), timeout=0.5)
        for number, _ in enumerate(call):
            if number == 10:
                call.cancel()
                return


@pytest.mark.timeout(600 + MESSAGES // 100)
def test_server_answers_mutated_requests_and_neither_fails_nor_grows(tmp_path: Path) -> None:
    limits = {"MAX_EPISODE_BYTES": str(1 << 16), "MAX_MESSAGE_BYTES": str(1 << 20), "MAX_BATCH_SIZE": "64", "MAX_HORIZON": "8"}
    environment = {f"TOUCHLINE_LIMITS__{name}": value for name, value in limits.items()}
    count = max(300, MESSAGES // 40)
    with ServerProcess(tmp_path, TOUCHLINE_CONFIG__BUFFER_SIZE="100", **environment) as process, Caller(process.address) as caller:
        stranger, ends = Stranger(caller), Counter[grpc.StatusCode]()
        for number in range(count):
            if number == count // 2:
                before = process.private_bytes
            name, code, data = stranger.call()
            ends[code] += 1
            allowed = EXPECTED | WAITS if name in ("Ready", "Sample", "SampleStream") else EXPECTED
            assert code in allowed, (name, code, data.hex(), process.log[-2000:])
        counts = caller.counts()

        assert process.process.poll() is None
        assert "Traceback" not in process.log
        assert counts.steps_stored <= 100
        assert process.private_bytes - before < GROWTH_BYTES
    assert min(ends[grpc.StatusCode.OK], ends[grpc.StatusCode.INVALID_ARGUMENT]) > count // 20, ends
    note(messages_fuzzed=count)


def test_framing_of_inputs_is_lossless() -> None:
    messages = [b"", b"one", bytes(300)]

    assert unframe(frame(messages)) == messages
