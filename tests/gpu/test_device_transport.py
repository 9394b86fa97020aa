"""A learner whose CUDA device gathers from the columns of a server in another process: on the same device, and in host memory."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from support.store_cases import as_bits, check_traced, many_dtypes, traced_columns
from touchline import Batch, BatchStream, ReplayClient, UnavailableError
from touchline._learner.torch_batch import map_batch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SLICES = {"batch_size": 64, "horizon": 3}


@contextmanager
def serving(stored: str, port: int = 0) -> Iterator[SimpleNamespace]:
    """Runs a server in a process of its own: a process cannot open its own memory by CUDA IPC."""
    environment = os.environ | {
        "TOUCHLINE_STORAGE__DEVICE": stored,
        "TOUCHLINE_STORAGE__SHARE_COLUMNS": "writable",  # most devices register no other memory
        "TOUCHLINE_STORAGE__ALLOW_NON_FINITE": "true",
        "TOUCHLINE_CONFIG__BUFFER_SIZE": "500",
        "TOUCHLINE_CONFIG__MIN_HISTORY": "0",
        "TOUCHLINE_RING__MAX_HOLD_S": "0.1",
        **{f"TOUCHLINE_TABLES__{table}__BUFFER_SIZE": "1000" for table in ("DTYPES", "MORE", "PLAIN")},
    }
    command = [sys.executable, "-m", "touchline_server", "serve", "--port", str(port), "--log-level", "warning"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
    assert process.stdout is not None
    try:
        address = next(line for line in process.stdout if line.startswith("listening on ")).split()[-1]
        yield SimpleNamespace(address=address, process=process)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="module", params=["cuda", "cpu"])
def server(request: pytest.FixtureRequest) -> Iterator[SimpleNamespace]:
    """A server with columns on the device, or in host memory: traced episodes, and in other tables every dtype."""
    with serving(request.param) as server:
        with ReplayClient(server.address) as client:
            add_traced(client, 8)
        for table, first in (("dtypes", 0), ("more", 100)):
            with ReplayClient(server.address, table=table) as client:
                for number in range(8):
                    client.add(many_dtypes(30, seed=first + number), policy_version=number)
        yield server


@pytest.fixture
def client(server: SimpleNamespace) -> Iterator[ReplayClient]:
    with ReplayClient(server.address, timeout_s=20.0) as client:
        yield client


def gathered(batches: BatchStream, wait_s: float = 60.0) -> Batch:
    """Returns a batch that the device gathered: until all host memory is registered the processor gathers."""
    ends = time.monotonic() + wait_s
    while True:
        next(batches)
        assert batches.transport == "device", batches.transport_reason
        if gatherer_of(batches)._columns.ready.is_set():
            return next(batches)
        assert time.monotonic() < ends


def gatherer_of(batches: BatchStream) -> Any:
    return ring_of(batches)._gatherer


def ring_of(batches: BatchStream) -> Any:
    source: Any = batches._source
    return source._source._session.ring


def bits_of(batch: Batch) -> list[Any]:
    found: list[Any] = []
    map_batch(batch, lambda value: found.append(as_bits(value)))
    return found


def on_host(batch: Batch) -> Batch:
    return map_batch(batch, lambda value: value.cpu())


numbers = itertools.count()


def add_traced(client: ReplayClient, count: int) -> None:
    for number in itertools.islice(numbers, count):
        client.add(traced_columns(number, 50), policy_version=number)


REQUESTS = {
    "slices": SLICES,
    "padded": {"batch_size": 64, "horizon": 40, "pad": "end"},
    "mix": {**SLICES, "mix": {"dtypes": 0.5, "more": 0.5}},
}


@pytest.mark.parametrize("request_of", REQUESTS.values(), ids=REQUESTS)
def test_cuda_gathered_batches_are_those_of_a_ring(server: SimpleNamespace, request_of: dict[str, Any]) -> None:
    with ReplayClient(server.address, table="dtypes") as client:
        with client.batches(device="cuda", seed=7, transport="ring", **request_of) as ring:
            expected = [bits_of(next(ring)) for _ in range(20)]
            assert ring.transport == "ring"

        with client.batches(device="cuda", seed=7, **request_of) as batches:
            found = [next(batches) for _ in range(20)]
            assert batches.transport == "device", batches.transport_reason

    assert all(batch.reward.is_cuda and batch.episode_id.is_cuda for batch in found)
    assert [bits_of(batch) for batch in found] == expected


def test_cuda_gathered_batches_under_adds_are_whole(server: SimpleNamespace, client: ReplayClient) -> None:
    stop = threading.Event()

    def add() -> None:
        with ReplayClient(server.address) as actor:
            while not stop.is_set():
                add_traced(actor, 1)

    adding = threading.Thread(target=add)
    with client.batches(device="cuda", **SLICES) as batches:
        gathered(batches)
        adding.start()
        try:
            work = torch.zeros(1024, 1024, device="cuda")
            for _ in range(300):
                batch = next(batches)
                work = work @ work
                check_traced(on_host(batch), horizon=3)
        finally:
            stop.set()
            adding.join()


def test_cuda_gathered_batches_that_are_held_stay_what_they_were(client: ReplayClient) -> None:
    with client.batches(device="cuda", **SLICES) as batches:
        gathered(batches)
        held = [next(batches) for _ in range(30)]
        before = [bits_of(batch) for batch in held]
        for _ in range(30):
            next(batches)

    assert [bits_of(batch) for batch in held] == before


def test_cuda_gathered_batches_whose_rows_were_taken_back_are_discarded(client: ReplayClient) -> None:
    with client.batches(device="cuda", **SLICES) as batches:
        gathered(batches)
        add_traced(client, 40)  # nothing is taken meanwhile, so rows are taken back
        for _ in range(50):
            check_traced(on_host(next(batches)), horizon=3)

        assert ring_of(batches).discarded > 0 and batches.transport == "device"


@pytest.mark.parametrize("stored", ["cuda", "cpu"])
def test_cuda_server_that_is_killed_leaves_the_learner_whole_and_a_new_one_is_gathered_from(stored: str) -> None:
    with serving(stored) as server, ReplayClient(server.address) as client:
        add_traced(client, 8)
        with client.batches(device="cuda", timeout_s=2.0, **SLICES) as batches:
            held = gathered(batches)
            before = bits_of(held)
            server.process.kill()
            server.process.wait()
            with pytest.raises(UnavailableError):
                for _ in range(300):
                    next(batches)
            torch.ones(10, device="cuda").sum().item()  # the device is as it was
            port = int(server.address.rpartition(":")[2])
            with serving(stored, port=port):
                add_traced(client, 8)
                check_traced(on_host(gathered(batches)), horizon=3)

        assert bits_of(held) == before


LEARNER = """
    import sys
    from touchline import ReplayClient

    batches = ReplayClient(sys.argv[1]).batches(device="cuda", batch_size=64, horizon=3)
    for _ in range(50):
        batch = next(batches)
    print(batches.transport, flush=True)
    sys.stdin.read()
"""


def test_cuda_learner_that_is_killed_delays_no_add_for_long(server: SimpleNamespace, client: ReplayClient) -> None:
    command = [sys.executable, "-c", textwrap.dedent(LEARNER), server.address]
    learner = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert learner.stdout is not None and learner.stdout.readline().strip() == "device"
    learner.kill()
    learner.communicate()

    add_traced(client, 40)  # each within the client's 20 s
    with client.batches(device="cuda", **SLICES) as batches:
        check_traced(on_host(gathered(batches)), horizon=3)


def test_cuda_streams_opened_again_and_again_give_back_what_they_registered_and_opened(client: ReplayClient) -> None:
    free = []
    for _ in range(4):
        with client.batches(device="cuda", **SLICES) as batches:
            gathered(batches)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free.append(torch.cuda.mem_get_info()[0])

    # Another process may take memory of the device meanwhile, but hardly each time.
    assert min(before - after for before, after in itertools.pairwise(free)) < 16 << 20


def test_cuda_gathered_batches_feed_a_graph(client: ReplayClient) -> None:
    with client.batches(device="cuda", **SLICES) as batches:
        inputs = gathered(batches).reward.clone()
        result = torch.zeros((), device="cuda")
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            result.copy_(inputs.sum())
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Of batches that were gathered on the host a thread may still release what it staged.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result.copy_(inputs.sum())
        for _ in range(50):
            batch = next(batches)
            inputs.copy_(batch.reward)
            graph.replay()

            assert float(result) == pytest.approx(float(batch.reward.sum()))


def test_cuda_gathered_batches_on_a_stream_of_the_learners_own_are_not_overwritten_while_it_reads(client: ReplayClient) -> None:
    own = torch.cuda.Stream()
    with client.batches(device="cuda", **SLICES) as batches, torch.cuda.stream(own):
        gathered(batches)
        for _ in range(200):
            batch = next(batches)
            torch.cuda._sleep(100_000)
            copy = map_batch(batch, lambda value: value.clone())
            del batch  # its memory may be used again, but not before it was copied
            check_traced(on_host(copy), horizon=3)


def test_cuda_tdmpc2_buffer_is_gathered_on_its_device(server: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("tensordict")
    from touchline.tdmpc2 import Buffer

    with ReplayClient(server.address, table="plain") as client:
        for number in range(8):
            obs = np.full((50, 4), number, np.float32)
            client.add({"obs": obs, "action": np.zeros((50, 2), np.float32), "reward": np.zeros(50, np.float32)})
    cfg = SimpleNamespace(buffer_size=1_000, steps=1_000, replay_address=server.address, replay_table="plain", **SLICES)
    with caplog.at_level("INFO", "touchline"), Buffer(cfg) as buffer:
        for _ in range(20):
            obs, *_ = buffer.sample()
            assert obs.is_cuda and bool((obs == obs[0]).all())

    assert "batches are gathered by cuda:0" in caplog.text


@pytest.mark.parametrize("transport", ["auto", "ring", "stream"])
def test_cuda_reused_bodies_feed_a_graph_each(client: ReplayClient, transport: str) -> None:
    with client.batches(device="cuda", seed=7, transport="ring", **SLICES) as ring:
        expected = [float(next(ring).reward.sum()) for _ in range(60)]
    results = torch.zeros(60, device="cuda")
    result = torch.zeros((), device="cuda")
    graphs: dict[int, torch.cuda.CUDAGraph] = {}
    with client.batches(device="cuda", seed=7, transport=transport, reuse=True, **SLICES) as batches:
        for number in range(60):
            batch = next(batches)
            torch.cuda._sleep(200_000)  # the learner's stream is behind the calls
            if batch.reward.data_ptr() not in graphs:
                torch.cuda.synchronize()
                graph = graphs[batch.reward.data_ptr()] = torch.cuda.CUDAGraph()
                batch.reward.sum()  # what is done first is not recorded
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                    result.copy_(batch.reward.sum())
            graphs[batch.reward.data_ptr()].replay()
            results[number] = result

    assert len(graphs) == 2
    assert results.tolist() == pytest.approx(expected)


def test_cuda_reused_bodies_are_read_in_place_by_compiled_code(client: ReplayClient) -> None:
    @torch.compile(mode="reduce-overhead")
    def total(reward: torch.Tensor) -> torch.Tensor:
        return (reward * 2.0).sum()

    with (
        client.batches(device="cuda", seed=7, transport="ring", **SLICES) as ring,
        client.batches(device="cuda", seed=7, reuse=True, **SLICES) as batches,
    ):
        for _ in range(30):
            batch, expected = next(batches), next(ring)
            torch._dynamo.mark_static_address(batch.reward, guard=False)
            torch.compiler.cudagraph_mark_step_begin()

            assert float(total(batch.reward)) == pytest.approx(float((expected.reward * 2.0).sum()))
