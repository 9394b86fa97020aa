"""Learners by rank over the network: rings and streams, restarts, disagreements, and data-parallel training in four processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from touchline import IncompatibleVersionError, InvalidArgumentError, ReplayClient
from touchline_protos import Batch
from touchline_protos.v1 import replay_pb2 as pb
from touchline_server import Config
from touchline_server.service.app import ServerThread

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "train_ddp.py"
WORLD, BATCH = 3, 8
ALL = WORLD * BATCH


def _config(port: int = 0) -> Config:
    tables = {"online": {}, "demos": {}}
    config = {"buffer_size": 5_000, "batch_size": BATCH, "horizon": 3, "min_history": 0}
    return Config(config=config, storage={"device": "cpu", "share_columns": "on"}, server={"port": port}, tables=tables)


def _episode(number: int, steps: int = 40) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(number)
    nan = np.full(1, np.nan, np.float32)
    reward = np.concatenate([nan, rng.normal(size=steps - 1)]).astype(np.float32)
    action = np.concatenate([np.full((1, 2), np.nan), rng.normal(size=(steps - 1, 2))]).astype(np.float32)
    return {"obs": rng.normal(size=(steps, 3)).astype(np.float32), "action": action, "reward": reward}


def _fill(client: ReplayClient) -> None:
    for table in ("", "online", "demos"):
        client.load((_episode(number, 10 + number) for number in range(20)), table=table)


@pytest.fixture(scope="module")
def server() -> Iterator[ServerThread]:
    with ServerThread(_config()) as started, ReplayClient(started.address) as client:
        _fill(client)
        yield started


@pytest.fixture
def client(server: ServerThread) -> Iterator[ReplayClient]:
    with ReplayClient(server.address, as_numpy=True) as client:
        yield client


def _assert_parts(parts: list[Batch], whole: Batch) -> None:
    for name in ("obs", "action", "reward", "done"):
        assert np.concatenate([getattr(part, name) for part in parts], axis=1).tobytes() == getattr(whole, name).tobytes()
    for name in ("episode_id", "start", "actor", "policy_version", "probability"):
        assert np.array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(whole, name))


@pytest.mark.parametrize("rings", [(True, True, True), (False, False, False), (True, False, True)])
def test_ranks_together_get_the_batches_of_one_learner(client: ReplayClient, rings: tuple[bool, ...]) -> None:
    with ExitStack() as stack:
        streams = [
            stack.enter_context(client.batches(rank=rank, world_size=WORLD, seed=5, ring=ring, prefetch=1 + rank))
            for rank, ring in enumerate(rings)
        ]
        whole = stack.enter_context(client.batches(batch_size=ALL, seed=5))
        for _ in range(40):
            _assert_parts([next(stream) for stream in streams], next(whole))
        assert [stream.transport == "ring" for stream in streams] == list(rings)


def test_ranks_that_gather_by_themselves_get_the_batches_of_one_learner_too(client: ReplayClient) -> None:
    with ExitStack() as stack:
        ways = ("device", "ring", "stream")
        streams = [stack.enter_context(client.batches(rank=rank, world_size=WORLD, seed=5, transport=way)) for rank, way in enumerate(ways)]
        whole = stack.enter_context(client.batches(batch_size=ALL, seed=5))
        for _ in range(20):
            _assert_parts([next(stream) for stream in streams], next(whole))
        assert tuple(stream.transport for stream in streams) == ways


def test_ranks_without_a_seed_draw_distinct_parts_of_one_batch(client: ReplayClient) -> None:
    with ExitStack() as stack:
        streams = [stack.enter_context(client.batches(rank=rank, world_size=WORLD, law="fresh_first")) for rank in range(WORLD)]
        fresh = [(int(i), int(s)) for _ in range(10) for stream in streams for i, s in zip(*_origin(next(stream)), strict=True)]
    assert len(set(fresh)) == len(fresh) == 10 * ALL


def _origin(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    return batch.episode_id, batch.start


def test_mix_has_exact_halves_in_each_rank_and_the_global_batch_in_all(client: ReplayClient) -> None:
    mix = {"online": 0.5, "demos": 0.5}
    with ExitStack() as stack:
        streams = [stack.enter_context(client.batches(rank=rank, world_size=WORLD, seed=6, mix=mix)) for rank in range(WORLD)]
        whole = stack.enter_context(client.batches(batch_size=ALL, seed=6, mix=mix))
        for expected in (next(whole) for _ in range(5)):
            parts = [next(stream) for stream in streams]
            for part in parts:
                assert part.table is not None and part.table.tolist() == [0] * (BATCH // 2) + [1] * (BATCH // 2)
            for half in (slice(0, BATCH // 2), slice(BATCH // 2, BATCH)):
                union = np.concatenate([part.obs[:, half] for part in parts], axis=1)
                begin = half.start * WORLD
                assert np.array_equal(union, expected.obs[:, begin : begin + union.shape[1]])


@pytest.mark.parametrize("ring", [True, False])
def test_rank_whose_stream_breaks_goes_on_with_the_batch_after_its_last(client: ReplayClient, ring: bool) -> None:
    with ExitStack() as stack:
        streams = [stack.enter_context(client.batches(rank=rank, world_size=WORLD, seed=7, ring=ring)) for rank in range(WORLD)]
        whole = stack.enter_context(client.batches(batch_size=ALL, seed=7))
        for number in range(12):
            if number in (4, 9):
                streams[1]._source._drop_session()  # type: ignore[attr-defined]  # as if the network had cut it
            _assert_parts([next(stream) for stream in streams], next(whole))


def test_rank_that_restarts_goes_on_with_first_batch_and_without_it_is_refused(client: ReplayClient) -> None:
    with ExitStack() as stack:
        streams = [stack.enter_context(client.batches(rank=rank, world_size=WORLD, seed=8)) for rank in range(WORLD)]
        whole = stack.enter_context(client.batches(batch_size=ALL, seed=8))
        for _ in range(5):
            _assert_parts([next(stream) for stream in streams], next(whole))
        streams[2].close()

        with (
            pytest.raises(InvalidArgumentError, match=r"rank: 2 of the job .*expected each rank once, first_batch=N"),
            client.batches(rank=2, world_size=WORLD, seed=8) as refused,
        ):
            next(refused)
        streams[2] = stack.enter_context(client.batches(rank=2, world_size=WORLD, seed=8, first_batch=5))
        for _ in range(5):
            _assert_parts([next(stream) for stream in streams], next(whole))


def test_ranks_go_on_with_the_same_global_batches_after_a_restart_of_the_server() -> None:
    with ExitStack() as stack:
        with ServerThread(_config()) as first:
            client = stack.enter_context(ReplayClient(first.address, as_numpy=True))
            _fill(client)
            streams = [stack.enter_context(client.batches(rank=rank, world_size=WORLD, seed=9, timeout_s=60)) for rank in range(WORLD)]
            whole = client.batches(batch_size=ALL, seed=9)
            expected = [next(whole) for _ in range(10)]
            whole.close()
            for number in range(4):
                _assert_parts([next(stream) for stream in streams], expected[number])
            ahead = [next(streams[0]), next(streams[1])]  # rank 2 is one batch behind
        with ServerThread(_config(port=int(first.address.rpartition(":")[2]))):
            _fill(client)
            for number in range(4, 10):
                parts = [*ahead, next(streams[2])] if number == 4 else [next(stream) for stream in streams]
                if number == 4:
                    assert np.array_equal(parts[2].start, expected[4].start[2 * BATCH :])
                    assert np.array_equal(np.concatenate([part.start for part in parts]), expected[4].start)
                else:
                    _assert_parts_after_restart(parts, expected[number])


def _assert_parts_after_restart(parts: list[Batch], whole: Batch) -> None:
    """As ``_assert_parts``, with the same episodes stored again: their ids begin again too."""
    assert np.concatenate([part.obs for part in parts], axis=1).tobytes() == whole.obs.tobytes()
    assert np.array_equal(np.concatenate([part.episode_id for part in parts]), whole.episode_id)


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"world_size": 4}, "world_size: 4 of rank 1, expected 3 as other ranks of the job 'sweep' ask for"),
        ({"seed": 2}, "seed: 2 of rank 1, expected 1 as"),
        ({"seed": None}, "seed: none of rank 1, expected 1 as"),
        ({"batch_size": 9}, "batch_size: 9 of rank 1, expected none as"),
        ({"horizon": 2}, "horizon: 2 of rank 1, expected none as"),
        ({"law": "step"}, "law: 'step' of rank 1, expected none as"),
        ({"pad": "end"}, "pad: 'end' of rank 1, expected none as"),
    ],
)
def test_ranks_that_disagree_are_refused_by_name(client: ReplayClient, changed: dict[str, Any], fault: str) -> None:
    asked: dict[str, Any] = {"world_size": WORLD, "seed": 1, "job": "sweep"}
    with client.batches(rank=0, **asked) as first:
        next(first)
        with pytest.raises(InvalidArgumentError, match=fault), client.batches(rank=1, **{**asked, **changed}) as other:
            next(other)
        with client.batches(rank=1, **asked) as right, client.batches(rank=1, **{**asked, **changed, "job": "another"}) as another:
            next(right)
            next(another)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"rank": 3, "world_size": 3}, "rank: 3, expected 0 to 2"),
        ({"rank": -1, "world_size": 3}, "rank: -1"),
        ({"rank": 0, "world_size": 0}, "world_size: 0"),
        ({"rank": 0}, "rank: 0 with world_size=None, expected both or none"),
        ({"world_size": 2}, "rank: None with world_size=2, expected both or none"),
        ({"job": "x"}, "job: 'x' without rank and world_size"),
        ({"first_batch": 3}, "first_batch: 3 without rank and world_size"),
        ({"rank": 0, "world_size": 1, "first_batch": -1}, "first_batch: -1"),
        ({"rank": 0, "world_size": 1, "job": "x" * 200}, "job: "),
    ],
)
def test_client_refuses_a_rank_that_cannot_be(client: ReplayClient, options: dict[str, Any], fault: str) -> None:
    with pytest.raises(InvalidArgumentError, match=fault):
        client.batches(**options)


def test_server_refuses_a_rank_that_cannot_be(client: ReplayClient) -> None:
    def fault_of(**options: Any) -> str:
        with pytest.raises(InvalidArgumentError) as caught, client.batches(**options) as stream:
            next(stream)
        return str(caught.value)

    assert "world_size: 5000, expected 1 to 4096" in fault_of(rank=0, world_size=5000)
    assert "batch_size: 30000 for each of 3 ranks, expected up to 65536 for all" in fault_of(rank=0, world_size=3, batch_size=30_000)
    mixed = fault_of(rank=0, world_size=2, mix={"online": 1, "demos": 1}, when_empty="others")
    assert "when_empty: 'others' with a rank, expected 'wait'" in mixed
    with pytest.raises(InvalidArgumentError, match=r"rank: 1 for a single batch, expected it only for a stream: batches\(\)"):
        client.sample(rank=1, world_size=2)


def test_server_that_does_not_know_ranks_is_refused_instead_of_giving_all_the_same(client: ReplayClient) -> None:
    client._rpc._server_version = (1, 2)
    with pytest.raises(IncompatibleVersionError, match=r"rank= needs 1\.3"), client.batches(rank=0, world_size=2) as stream:
        next(stream)


def test_request_without_a_rank_is_the_bytes_that_it_was() -> None:
    assert not pb.SampleRequest(batch_size=3).HasField("learner_rank")
    assert pb.SampleRequest(batch_size=3).SerializeToString() == b"\x10\x03"


def _train(server: ServerThread, processes: int, batch_size: int) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-addr", "127.0.0.1"]
    command += ["--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]
    command += [str(EXAMPLE), "--address", server.address, "--updates", "60", "--batch-size", str(batch_size), "--seed", "3"]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=variables)
    assert finished.returncode == 0, finished.stderr
    return [json.loads(line) for line in finished.stdout.splitlines() if line.startswith("{")]


def test_data_parallel_training_in_four_processes_is_that_of_one_process(server: ServerThread) -> None:
    four, one = _train(server, 4, 16), _train(server, 1, 64)

    assert [report["update"] for report in four] == [20, 40, 60]
    for parallel, single in zip(four, one, strict=True):
        assert parallel["slices"] == single["slices"]  # a checksum over where all slices of all ranks are from
        assert parallel["loss"] == pytest.approx(single["loss"], rel=1e-3)
    assert four[-1]["loss"] < four[0]["loss"]
