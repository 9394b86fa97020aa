"""Priorities that go back through the ring that their batch came through: what is set, in which order, what is counted, who may do it."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from integration.test_priorities import B, H, connect, filled, shares
from support.service_calls import eventually
from support.store_cases import make_config, traced
from touchline import ReplayClient
from touchline._learner import ring_returns as returning
from touchline._learner.ring_returns import ReturnQueue
from touchline_protos import Batch
from touchline_protos.shm.ring import shared_memory_id
from touchline_protos.v1 import replay_pb2 as pb
from touchline_server import ReplayBuffer
from touchline_server.service import ring_pool
from touchline_server.service.app import ServerThread

pytestmark = pytest.mark.skipif(not shared_memory_id(), reason="rings need Linux on x86-64")


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


class Calls:
    """Counts a client's calls of UpdatePriorities."""

    def __init__(self, client: ReplayClient, monkeypatch: pytest.MonkeyPatch) -> None:
        self.slices: list[int] = []
        unary = client.priorities._rpc.unary

        def counted(name: str, request: bytes, **options: Any) -> bytes:
            if name == "UpdatePriorities":
                self.slices.append(pb.UpdatePrioritiesRequest.FromString(request).start.shape[0])
            return unary(name, request, **options)

        monkeypatch.setattr(client.priorities._rpc, "unary", counted)


def ones(value: float = 1.0) -> np.ndarray:
    return np.full((H, B), value, np.float32)


def queue_of(batch: Batch) -> ReturnQueue:
    assert batch.origin is not None
    source = batch.origin.source
    assert isinstance(source, ReturnQueue)
    return source


SHARED = {"share_columns": "on"}


@pytest.mark.parametrize("transport", ["ring", "device"])
@pytest.mark.parametrize("as_numpy", [True, False], ids=["arrays", "tensors"])
def test_update_through_the_ring_gives_the_same_draws_as_in_process(
    as_numpy: bool, transport: str, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = filled(storage=SHARED), filled(storage=SHARED)
    client = connect(stack, there)
    calls = Calls(client, monkeypatch)
    batches = stack.enter_context(client.batches(as_numpy=as_numpy, transport=transport))
    rng = np.random.default_rng(0)
    for _ in range(40):  # more than the slots of the ring
        batch = next(batches)
        priorities: Any = rng.gamma(0.5, 4.0, (H, B)).astype(np.float32)
        here.update_priorities((batch.episode_id, batch.start), priorities)
        client.update_priorities(batch, priorities if as_numpy else torch.tensor(priorities, requires_grad=True))
    counters = client.priorities.flush()

    assert (counters.updated, counters.evicted, counters.dropped, counters.pending) == (40 * B, 0, 0, 0)
    assert calls.slices == []
    assert batches.transport == transport
    for seed in range(5):
        one, other = here.sample(seed=seed), there.sample(seed=seed)
        assert torch.equal(one.start, other.start)
        assert torch.equal(one.probability, other.probability)


def test_update_is_applied_without_a_flush_while_the_batch_is_held(stack: ExitStack) -> None:
    buffer = filled()
    client = connect(stack, buffer)
    batches = stack.enter_context(client.batches())
    batch = next(batches)

    client.update_priorities(batch, ones(50.0))

    eventually(lambda: client.priorities.counters().updated == B, "the update is applied")
    raised = set(zip(batch.episode_id.tolist(), batch.start.tolist(), strict=True))
    chance = shares(buffer)
    assert min(chance[cell] for cell in raised) > 3 * min(chance.values())


def test_last_of_several_updates_of_a_batch_counts_even_if_the_queue_is_full(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer, expected = filled(), filled()
    client = connect(stack, buffer)
    calls = Calls(client, monkeypatch)
    batch = next(stack.enter_context(client.batches()))
    updates = 3 * len(queue_of(batch)._entries)

    for number in range(updates):
        client.update_priorities(batch, ones(number + 1.0))
    counters = client.priorities.flush()

    assert (counters.updated, counters.dropped) == (updates * B, 0)
    assert sum(calls.slices) < updates * B  # some went through the ring
    expected.update_priorities((batch.episode_id, batch.start), ones(updates))
    assert shares(buffer) == shares(expected)


def test_update_that_waits_for_a_call_is_not_overtaken_by_one_through_the_ring(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer, expected = filled(), filled()
    client = connect(stack, buffer)
    calls = Calls(client, monkeypatch)
    batches = stack.enter_context(client.batches())
    for number in range(30):
        batch = next(batches)
        pair = batch.episode_id, batch.start
        order = ((batch, 2.0), (pair, 3.0), (batch, 5.0)) if number % 2 else ((pair, 5.0), (batch, 3.0))
        for slices, value in order:
            client.update_priorities(slices, ones(value))
            expected.update_priorities(pair, ones(value))

    client.priorities.flush()

    assert calls.slices
    assert shares(buffer) == shares(expected)


@pytest.mark.parametrize("transport", ["ring", "device"])
def test_update_of_evicted_episodes_is_counted_and_changes_no_other(
    transport: str, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = filled(capacity=200, storage=SHARED)
    client = connect(stack, buffer)
    calls = Calls(client, monkeypatch)
    batch = next(stack.enter_context(client.batches(transport=transport)))
    for number in range(10, 16):
        buffer.add_episode(traced(number, 20))
    before = shares(buffer)

    client.update_priorities(batch, ones())
    counters = client.priorities.flush()

    left = int((batch.episode_id >= 6).sum())
    assert 0 < left < B, "the seed gives a batch of both"
    assert (counters.updated, counters.evicted) == (left, B - left)
    assert shares(buffer) == before
    assert calls.slices == []


def test_update_of_a_batch_from_before_a_clear_hits_no_episode_added_later(stack: ExitStack) -> None:
    buffer = filled()
    client = connect(stack, buffer)
    batches = stack.enter_context(client.batches())
    batch = next(batches)
    buffer.clear()
    for number in range(10):
        buffer.add_episode(traced(number, 20))

    client.update_priorities(batch, ones(50.0))

    counters = client.priorities.flush()
    assert (counters.updated, counters.evicted) == (0, B)
    assert len(set(shares(buffer).values())) == 1


@pytest.mark.parametrize("transport", ["ring", "device"])
def test_update_of_a_mixed_batch_goes_to_the_table_of_each_slice(transport: str, stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    law: Any = {"law": "prioritized", "priority_alpha": 1.0}
    buffer = ReplayBuffer(make_config(500, horizon=H, batch_size=B, server={"port": 0}, seed=1, storage=SHARED, **law))
    demos = buffer.create_table("demos")
    for number in range(5):
        buffer.add_episode(traced(number, 20))
        demos.add_episode(traced(number, 20))
    client = connect(stack, buffer)
    calls = Calls(client, monkeypatch)
    batch = next(stack.enter_context(client.batches(mix={"": 0.25, "demos": 0.75}, transport=transport)))

    client.update_priorities(batch, np.where(batch.table == 0, 30.0, 60.0) * np.ones((H, 1)))

    assert client.priorities.flush().updated == B
    assert calls.slices == []
    for position, side in enumerate((buffer, demos)):
        mine = batch.table == position
        raised = set(zip(batch.episode_id[mine].tolist(), batch.start[mine].tolist(), strict=True))
        chance = shares(side)
        assert min(chance[cell] for cell in raised) > 5 * min(chance.values())


def test_update_of_a_padded_batch_sets_only_real_transitions(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = filled(pad="end"), filled(pad="end")
    client = connect(stack, there)
    calls = Calls(client, monkeypatch)
    batches = stack.enter_context(client.batches())
    padded = 0
    for _ in range(20):
        batch = next(batches)
        padded += int((~batch.valid).sum())
        here.update_priorities((batch.episode_id, batch.start), ones(7.0))
        client.update_priorities(batch, ones(7.0))
    client.priorities.flush()

    assert padded and calls.slices == []
    assert shares(here) == shares(there)


@pytest.mark.parametrize(
    "change",
    [
        lambda batch: replace(batch, start=batch.start.copy(), episode_id=batch.episode_id.copy()),
        lambda batch: replace(batch, episode_id=batch.episode_id[::-1], start=batch.start[::-1]),
        lambda batch: pickle.loads(pickle.dumps(batch)),
        copy.deepcopy,
    ],
    ids=["copies", "reversed", "pickled", "deep copy"],
)
def test_batch_with_other_arrays_goes_by_a_call(change: Any, stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer, expected = filled(), filled()
    client = connect(stack, buffer)
    calls = Calls(client, monkeypatch)
    batch = change(next(stack.enter_context(client.batches())))
    priorities = np.arange(1.0, H * B + 1).reshape(H, B)

    client.update_priorities(batch, priorities)

    assert client.priorities.flush().updated == B
    assert calls.slices == [B]
    expected.update_priorities((batch.episode_id, batch.start), priorities)
    assert shares(buffer) == shares(expected)


def test_batch_that_was_copied_out_of_its_slot_still_goes_through_the_ring(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    client = connect(stack, filled())
    calls = Calls(client, monkeypatch)
    batches = stack.enter_context(client.batches())
    held = [next(batches) for _ in range(20)]  # all slots but one are held, so the last ones are copies

    for batch in held[-3:]:
        client.update_priorities(batch, ones())

    assert client.priorities.flush().updated == 3 * B
    assert calls.slices == []


def test_batch_far_behind_the_servers_goes_by_a_call(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    client = connect(stack, filled())
    calls = Calls(client, monkeypatch)
    batches = stack.enter_context(client.batches())
    old = next(batches)
    for _ in range(3 * queue_of(old)._reach):
        next(batches)

    client.update_priorities(old, ones())

    assert client.priorities.flush().updated == B
    assert calls.slices == [B]


def test_another_client_sends_the_batch_by_a_call(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = filled()
    client = connect(stack, buffer)
    other = stack.enter_context(ReplayClient(client.address))
    calls = Calls(other, monkeypatch)
    batch = next(stack.enter_context(client.batches()))

    other.update_priorities(batch, ones())

    assert other.priorities.flush().updated == B
    assert calls.slices == [B]
    assert client.priorities.counters().updated == 0


@pytest.mark.parametrize("value", [-1.0, np.nan, np.inf, 1e39], ids=str)
def test_bad_value_is_refused_and_nothing_is_sent(value: float, stack: ExitStack) -> None:
    from touchline import InvalidArgumentError

    client = connect(stack, filled())
    batch = next(stack.enter_context(client.batches()))
    priorities = np.ones((H, B))
    priorities[1, 2] = value

    with pytest.raises(InvalidArgumentError, match="in row 1 of slice 2, expected finite numbers of at least 0"):
        client.update_priorities(batch, priorities)

    assert queue_of(batch)._sent == 0
    client.update_priorities(batch, np.float16(0.0) * np.ones((H, B), np.float16))
    assert client.priorities.flush().updated == B


def test_stream_closed_after_an_update_has_it_applied(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = filled(priority_alpha=1.0)
    client = connect(stack, buffer)
    calls = Calls(client, monkeypatch)
    batches = client.batches()
    batch = next(batches)

    client.update_priorities(batch, ones(50.0))
    batches.close()
    counters = client.priorities.flush()

    assert (counters.updated, counters.dropped, counters.pending) == (B, 0, 0)
    assert len(set(shares(buffer).values())) > 1
    eventually(lambda: queue_of(batch)._control.returns_ended, "the server has had its last look")
    client.update_priorities(batch, ones(60.0))  # its ring is gone
    assert client.priorities.flush().updated == 2 * B
    assert calls.slices == [B]


def test_client_closed_after_an_update_has_it_applied(stack: ExitStack) -> None:
    buffer = filled(priority_alpha=1.0)
    client = connect(stack, buffer)
    batches = client.batches()
    client.update_priorities(next(batches), ones(50.0))

    client.close()

    assert client.priorities.counters().updated == B
    assert len(set(shares(buffer).values())) > 1


LEARNER = """
    import os, sys
    import numpy as np
    from touchline import ReplayClient
    client = ReplayClient(sys.argv[1], as_numpy=True)
    batches = client.batches()
    batch = next(batches)
    queue = batch.origin.source
    for value in (50.0, 60.0):
        client.update_priorities(batch, np.full(batch.action.shape[:2], value, np.float32))
    # Half of a third one: written, but not handed over.
    queue._entries.priorities[queue._sent][...] = np.nan
    print(batches.transport, client.priorities.counters().pending, flush=True)
    os.kill(os.getpid(), 9)
"""


def test_learner_killed_with_updates_in_its_ring_has_the_whole_ones_applied(stack: ExitStack) -> None:
    buffer = filled(priority_alpha=1.0)
    server = stack.enter_context(ServerThread(buffer.config, buffer))
    command = [sys.executable, "-c", textwrap.dedent(LEARNER), server.address]

    learner = subprocess.run(command, capture_output=True, text=True, timeout=60)

    assert learner.returncode == -signal.SIGKILL, learner.stderr
    assert learner.stdout.startswith("ring")
    eventually(lambda: max(shares(buffer).values()) > 20 * min(shares(buffer).values()), "the updates are applied")
    assert all(np.isfinite(value) for value in shares(buffer).values())


SERVER = """
    import sys
    from touchline_server import Config, ReplayBuffer
    from touchline_server.service.app import ServerThread
    buffer = ReplayBuffer(Config.model_validate_json(sys.argv[1]))
    with ServerThread(buffer.config, buffer) as server:
        print(server.address, flush=True)
        sys.stdin.read()
"""


def thread_states(pid: int) -> list[str]:
    return [(task / "stat").read_text().rpartition(")")[2].split()[0] for task in Path(f"/proc/{pid}/task").iterdir()]


def test_updates_that_a_killed_server_did_not_take_are_counted_as_dropped_and_logged(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(returning, "END_S", 0.05)
    config = make_config(500, horizon=H, batch_size=B, server={"port": 0}, seed=1, law="prioritized")
    command = [sys.executable, "-c", textwrap.dedent(SERVER), config.model_dump_json()]
    server = stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    stack.callback(server.kill)
    assert server.stdout is not None
    client = stack.enter_context(ReplayClient(server.stdout.readline().strip(), as_numpy=True))
    for number in range(5):
        client.add(dict(traced(number, 20).columns.items()))
    batches = client.batches()
    batch = next(batches)
    os.kill(server.pid, signal.SIGSTOP)  # takes nothing any more, once all of its threads have stopped
    eventually(lambda: set(thread_states(server.pid)) == {"T"}, "the server has stopped")
    client.update_priorities(batch, ones())
    assert client.priorities.counters().pending == B
    server.kill()
    eventually(lambda: client.priorities.counters().pending == 0, "the update is given up")

    assert client.priorities.flush().dropped == B
    assert "priorities of 8 slices were dropped so far: the stream of their batches ended before the server took them" in caplog.text


def test_learner_of_an_older_version_gets_the_ring_and_sends_calls(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    """An older one knows no field ``returns``, and slots of any size."""
    has = pb.RingSetup.HasField
    monkeypatch.setattr(pb.RingSetup, "HasField", lambda self, name: name != "returns" and has(self, name))
    client = connect(stack, filled())
    calls = Calls(client, monkeypatch)
    batches = stack.enter_context(client.batches())
    for _ in range(30):
        batch = next(batches)
        assert batch.origin is None
        client.update_priorities(batch, ones())

    assert batches.transport == "ring"
    assert client.priorities.flush().updated == 30 * B
    assert sum(calls.slices) == 30 * B


def test_server_of_an_older_version_offers_no_way_back_and_gets_calls(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    make = ring_pool.RingPool._make
    monkeypatch.setattr(ring_pool.RingPool, "_make", lambda self, layout, batches, transitions: make(self, layout, batches, 0))
    client = connect(stack, filled())
    calls = Calls(client, monkeypatch)
    batches = stack.enter_context(client.batches())
    batch = next(batches)

    client.update_priorities(batch, ones())

    assert batches.transport == "ring"
    assert batch.origin is None
    assert client.priorities.flush().updated == B
    assert calls.slices == [B]


def test_ring_of_another_law_has_no_way_back(stack: ExitStack) -> None:
    client = connect(stack, filled())

    batch = next(stack.enter_context(client.batches(law="step")))

    assert batch.origin is None


def test_ranks_part_of_a_job_has_no_way_back_and_is_updated_by_a_call(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    client = connect(stack, filled())
    calls = Calls(client, monkeypatch)
    batch = next(stack.enter_context(client.batches(rank=1, world_size=2, job="both")))

    client.update_priorities(batch, ones())

    assert batch.origin is None
    assert client.priorities.flush().updated == B
    assert calls.slices == [B]
