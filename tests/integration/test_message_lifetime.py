"""A server keeps the messages of a call no longer than the call, independent of the garbage collector."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable

import pytest

from support.service_calls import DEADLINE_S, SERVICE, Caller, Stream, eventually, key, make_config, make_episode
from touchline_protos.codec import Episode, encode_load
from touchline_protos.v1 import replay_pb2 as pb
from touchline_server.service.app import ServerThread

CALLS = 24
MESSAGE_BYTES = 1 << 20
ROWS = 64
HORIZON = 3


def large_episode(number: int) -> Episode:
    return make_episode(ROWS, obs=MESSAGE_BYTES // ROWS // 4, key=key(number))


def add(caller: Caller, number: int) -> None:
    assert not caller.add(large_episode(number)).duplicate


def load(caller: Caller, number: int) -> None:
    (result,) = caller.load(encode_load(large_episode(number), chunk_bytes=MESSAGE_BYTES // 2)).results
    assert result.outcome == pb.EpisodeResult.OUTCOME_ACCEPTED


def sample(caller: Caller, number: int) -> None:
    batch = caller.sample(batch_size=ROWS // (HORIZON + 1), horizon=HORIZON)
    assert batch.obs.nbytes == MESSAGE_BYTES


def stream(caller: Caller, number: int) -> None:
    stream = Stream(caller.channel).open(credits=2, batch_size=ROWS // (HORIZON + 1), horizon=HORIZON)
    assert stream.read(1)[0].obs.nbytes == MESSAGE_BYTES
    stream.close()
    stream.rest()


def read(caller: Caller, number: int) -> None:
    request = pb.GetEpisodesRequest(max_frame_bytes=MESSAGE_BYTES // 2).SerializeToString()
    messages = caller.channel.unary_stream(SERVICE + "GetEpisodes")(request, timeout=DEADLINE_S)
    assert sum(map(len, messages)) > MESSAGE_BYTES


@pytest.mark.parametrize("call", [add, load, sample, stream, read])
def test_messages_are_gone_once_their_call_has_ended(call: Callable[[Caller, int], None]) -> None:
    config = make_config(config={"buffer_size": 2 * ROWS, "batch_size": 8, "min_history": 0, "horizon": HORIZON})
    with ServerThread(config) as server, Caller(server.address) as caller:
        add(caller, 1000)
        for number in range(4):
            call(caller, number)
        gc.collect()
        gc.disable()
        tracemalloc.start()
        try:
            for number in range(4, 4 + CALLS):
                call(caller, number)
            eventually(lambda: tracemalloc.get_traced_memory()[0] < CALLS * MESSAGE_BYTES // 3, "the messages are freed", every_s=0.02)
        finally:
            tracemalloc.stop()
            gc.enable()
