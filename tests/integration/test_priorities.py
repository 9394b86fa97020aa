"""Priorities that a learner sends back: over the wire, pipelined, for episodes that are gone, and everything that is refused."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import grpc
import numpy as np
import pytest
import torch

from support.service_calls import refused, serving
from support.store_cases import make_config, traced
from touchline import ClosedError, DeadlineError, InvalidArgumentError, ReplayClient
from touchline._learner import priorities as sending
from touchline_protos import Batch
from touchline_protos.v1 import replay_pb2 as pb
from touchline_server import InvalidArgumentError as ServerInvalidArgumentError
from touchline_server import ReplayBuffer
from touchline_server.service.app import ServerThread

INVALID = (grpc.StatusCode.INVALID_ARGUMENT, "invalid-argument")
H, B = 3, 8


def filled(*, capacity: int = 500, episodes: int = 10, **sampling: Any) -> ReplayBuffer:
    buffer = ReplayBuffer(make_config(capacity, horizon=H, batch_size=B, server={"port": 0}, seed=1, law="prioritized", **sampling))
    for number in range(episodes):
        buffer.add_episode(traced(number, 20))
    return buffer


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def connect(stack: ExitStack, buffer: ReplayBuffer, **options: Any) -> ReplayClient:
    server = stack.enter_context(ServerThread(buffer.config, buffer))
    return stack.enter_context(ReplayClient(server.address, as_numpy=True, **options))


def shares(buffer: ReplayBuffer) -> dict[tuple[int, int], float]:
    """Returns the probability of each start that is drawn at all often."""
    batch = buffer.sample(batch_size=4_000, seed=0)
    return dict(zip(zip(batch.episode_id.tolist(), batch.start.tolist(), strict=True), batch.probability.tolist(), strict=True))


def test_update_of_a_batch_changes_the_draws_that_follow(stack: ExitStack) -> None:
    buffer = filled(priority_alpha=1.0)
    client = connect(stack, buffer)
    batch = client.sample()

    client.update_priorities(batch, np.full((H, B), 50.0, np.float32))
    counters = client.priorities.flush()

    assert (counters.updated, counters.evicted, counters.dropped, counters.pending) == (B, 0, 0, 0)
    raised = set(zip(batch.episode_id.tolist(), batch.start.tolist(), strict=True))
    chance = shares(buffer)
    assert min(chance[cell] for cell in raised) > 20 * min(chance.values())


@pytest.mark.parametrize(
    "convert",
    [
        np.float64,
        np.float16,
        lambda values: torch.tensor(values),
        lambda values: torch.tensor(values, dtype=torch.bfloat16, requires_grad=True),
    ],
)
def test_update_by_ids_and_starts_takes_arrays_and_tensors_of_any_float_dtype(convert: Callable[[Any], Any], stack: ExitStack) -> None:
    client = connect(stack, filled())

    client.update_priorities((torch.tensor([1, 2]), [3, 4]), convert(np.full((5, 2), 2.0)))

    assert client.priorities.flush().updated == 2


def test_update_in_process_and_over_the_wire_give_the_same_draws(stack: ExitStack) -> None:
    here, there = filled(), filled()
    client = connect(stack, there)
    rng = np.random.default_rng(0)
    for _ in range(10):
        one, other = here.sample(seed=int(rng.integers(1000))), None
        priorities = rng.random((H, B))
        here.update_priorities(one, priorities)
        client.update_priorities((one.episode_id, one.start), priorities)
        client.priorities.flush()

        one, other = here.sample(seed=5), there.sample(seed=5)

        assert torch.equal(one.start, other.start)
        assert torch.equal(one.probability, other.probability)
        assert torch.equal(one.weight, other.weight)


def test_update_of_evicted_episodes_is_counted_and_changes_no_other(stack: ExitStack) -> None:
    buffer = filled(capacity=200)
    client = connect(stack, buffer)
    batch = client.sample()
    for number in range(10, 19):
        buffer.add_episode(traced(number, 20))  # all but episode 9 and those are gone
    before = shares(buffer)

    client.update_priorities((np.full(4, 3), np.arange(4)), np.full((H, 4), 9.0, np.float32))
    client.update_priorities(batch, np.full((H, B), 1.0, np.float32))
    counters = client.priorities.flush()

    left = int((batch.episode_id >= 9).sum())
    assert (counters.updated, counters.evicted) == (left, 4 + B - left)
    assert shares(buffer) == before


def test_update_after_a_clear_never_hits_an_episode_added_later(stack: ExitStack) -> None:
    buffer = filled()
    client = connect(stack, buffer)
    batch = client.sample()
    buffer.clear()
    for number in range(10):
        buffer.add_episode(traced(number, 20))

    client.update_priorities(batch, np.full((H, B), 50.0, np.float32))

    assert client.priorities.flush().evicted == B
    assert len(set(shares(buffer).values())) == 1


@pytest.mark.parametrize("path", ["unary", "stream", "ring", "tensors"])
def test_update_of_a_batch_from_before_a_restart_hits_no_episode_of_the_new_server(path: str, stack: ExitStack) -> None:
    before = filled()
    with ServerThread(before.config, before) as server:
        client = stack.enter_context(ReplayClient(server.address, as_numpy=path != "tensors"))
        batch = client.sample() if path == "unary" else next(client.batches(ring=path == "ring"))
        client.update_priorities(batch, np.full((H, B), 2.0, np.float32))
        assert client.priorities.flush().updated == B
    after = filled()  # ids begin at 0 again, for other episodes
    port = int(server.address.rpartition(":")[2])
    config = after.config.model_copy(update={"server": after.config.server.model_copy(update={"port": port})})
    stack.enter_context(ServerThread(config, after))

    client.update_priorities(batch, np.full((H, B), 50.0, np.float32))
    counters = client.priorities.flush()

    assert (counters.updated, counters.evicted) == (B, B)
    assert len(set(shares(after).values())) == 1


def test_update_of_a_batch_from_a_table_that_was_dropped_hits_no_table_of_its_name(stack: ExitStack) -> None:
    config = make_config(500, horizon=H, batch_size=B, server={"port": 0}, law="prioritized", seed=1)
    buffer = ReplayBuffer(config)
    client = connect(stack, buffer)
    mixed: list[Batch] = []
    for _ in range(2):
        demos = buffer.create_table("demos")
        for number in range(10):
            buffer.add_episode(traced(number, 20))
            demos.add_episode(traced(number, 20))
        mixed.append(client.sample(mix={"": 0.5, "demos": 0.5}))
        if len(mixed) == 1:
            buffer.drop_table("demos")

    client.update_priorities(mixed[0], np.full((H, B), 50.0, np.float32))
    stale = client.priorities.flush()

    assert (stale.updated, stale.evicted) == (B // 2, B // 2)
    assert len(set(shares(demos).values())) == 1
    assert buffer.update_priorities(mixed[0], np.full((H, B), 50.0)) == B // 2  # in process as well
    client.update_priorities(mixed[1], np.full((H, B), 50.0, np.float32))
    assert client.priorities.flush().updated == B // 2 + B
    assert len(set(shares(demos).values())) > 1


def test_update_without_a_generation_is_applied_as_that_of_an_older_client(stack: ExitStack) -> None:
    buffer = filled()
    client = connect(stack, buffer)
    batch = client.sample()
    assert batch.store_generations == (buffer.table.store.store_generation,)

    client.update_priorities((batch.episode_id, batch.start), np.full((H, B), 50.0, np.float32))

    assert client.priorities.flush().updated == B


@pytest.mark.parametrize("remote", [False, True], ids=["in process", "over the wire"])
def test_update_by_ids_of_another_generation_is_evicted_and_of_this_one_applied(remote: bool, stack: ExitStack) -> None:
    before, buffer = filled(), filled()  # the same ids, of other episodes
    verbs = connect(stack, buffer) if remote else buffer
    stale, batch = before.sample(), buffer.sample()
    chance = shares(buffer)

    done = []
    for of in (stale, batch):
        pair = of.episode_id, of.start
        answer = verbs.update_priorities((*pair, of.store_generations[0]), np.full((H, B), 50.0, np.float32))  # type: ignore[attr-defined]
        done.append(verbs.priorities.flush().updated if remote else answer)  # type: ignore[attr-defined]
        if of is stale:
            assert shares(buffer) == chance

    assert done == [0, B]
    assert shares(buffer) != chance
    if remote:
        assert verbs.priorities.counters().evicted == B  # type: ignore[attr-defined]


def test_beta_of_a_request_overrides_the_tables(stack: ExitStack) -> None:
    buffer = filled(priority_alpha=1.0, priority_beta=0.5)
    client = connect(stack, buffer)
    client.update_priorities((np.arange(10), np.zeros(10, np.int64)), np.random.default_rng(0).random((H, 10)))
    client.priorities.flush()
    starts = 10 * (20 - H)

    for beta, request in ((0.5, {}), (1.0, {"beta": 1.0}), (0.0, {"beta": 0})):
        batch = client.sample(batch_size=500, **request)
        expected = (starts * batch.probability) ** -beta
        np.testing.assert_allclose(batch.weight, expected / expected.max(), rtol=1e-5)
        assert batch.weight.dtype == np.float32


def test_batch_of_another_law_has_no_weight_and_takes_no_priorities(stack: ExitStack) -> None:
    buffer = filled()
    client = connect(stack, buffer)
    batches = client.sample(law="step"), buffer.sample(law="episode")

    for batch, side in zip(batches, (client, buffer), strict=True):
        assert batch.weight is None
        with pytest.raises((InvalidArgumentError, ServerInvalidArgumentError), match="a law without priorities, expected one drawn by"):
            side.update_priorities(batch, np.ones((H, B)))  # type: ignore[attr-defined]


def test_law_of_a_request_has_weights_on_a_table_of_another_law(stack: ExitStack) -> None:
    buffer = ReplayBuffer(make_config(500, horizon=H, batch_size=B, server={"port": 0}))
    for number in range(5):
        buffer.add_episode(traced(number, 20))
    client = connect(stack, buffer)

    with client.batches(law="prioritized") as batches:
        batch = next(batches)

    assert np.array_equal(batch.weight, np.ones(B, np.float32))
    client.update_priorities(batch, np.ones((H, B)))
    assert client.priorities.flush().updated == B


GOOD = (np.arange(2), np.arange(2)), np.ones((H, 2), np.float32)
BAD = [
    (GOOD[0], -np.ones((H, 2)), r"priorities: -1.0 in row 0 of slice 0, expected finite numbers of at least 0"),
    (GOOD[0], np.array([[1, 1], [1, np.nan], [1, 1]]), r"priorities: nan in row 1 of slice 1, expected finite"),
    (GOOD[0], np.full((H, 2), np.inf), r"priorities: inf in row 0"),
    (GOOD[0], np.full((H, 2), 1e39), r"priorities: 1e\+39 in row 0"),
    (GOOD[0], np.ones((H, 3)), r"priorities: shape \(3, 3\), expected \(H, 2\)"),
    (GOOD[0], np.ones(2), r"priorities: shape \(2,\), expected \(H, 2\)"),
    (GOOD[0], np.ones((H, 2, 1)), r"priorities: shape \(3, 2, 1\), expected \(H, 2\)"),
    (GOOD[0], np.ones((0, 2)), r"priorities: shape \(0, 2\), expected \(H, 2\)"),
    (GOOD[0], np.ones((H, 2), np.int64), r"priorities: int64, expected floats"),
    (GOOD[0], "high", r"priorities: text"),
    ((np.arange(2.0), np.arange(2)), GOOD[1], r"episode_id: float64 of shape \(2,\), expected integers of shape \(B,\)"),
    ((np.arange(2), np.arange(3)), GOOD[1], r"start: shape \(3,\), expected \(2,\) to match episode_id"),
    ((np.arange(2), -np.arange(2)), GOOD[1], r"start: -1, expected 0 or more"),
    (3, GOOD[1], r"slices: int, expected a batch or the pair \(episode_id, start\)"),
    ((*GOOD[0], 1, 2), GOOD[1], r"slices: tuple, expected a batch or the pair \(episode_id, start\), maybe with a store generation"),
    ((*GOOD[0], -1), GOOD[1], r"store_generation: -1, expected 0 to 2\*\*63 - 1"),
    ((*GOOD[0], "new"), GOOD[1], r"store_generation: str, expected an integer, of batch.store_generations"),
]


@pytest.mark.parametrize(("slices", "priorities", "words"), BAD, ids=[words[:40] for *_, words in BAD])
def test_update_with_bad_values_is_refused_by_name_on_both_sides(slices: Any, priorities: Any, words: str, stack: ExitStack) -> None:
    buffer = filled()
    client = connect(stack, buffer)
    before = shares(buffer)

    with pytest.raises(InvalidArgumentError, match=words):
        client.update_priorities(slices, priorities)
    with pytest.raises(ServerInvalidArgumentError, match=words):
        buffer.update_priorities(slices, priorities)

    assert client.priorities.flush().updated == 0
    assert shares(buffer) == before


def test_update_of_a_batch_with_another_horizon_is_refused(stack: ExitStack) -> None:
    client = connect(stack, filled())

    with pytest.raises(InvalidArgumentError, match=r"priorities: shape \(4, 8\), expected \(3, 8\)"):
        client.update_priorities(client.sample(), np.ones((H + 1, B)))


def test_error_of_the_server_surfaces_at_the_next_call_and_once(stack: ExitStack) -> None:
    buffer = filled()
    client = connect(stack, buffer)
    before = shares(buffer)

    client.update_priorities((np.array([1, 1]), np.array([0, 19])), np.full((H, 2), 9.0))
    words = "start: 19 of 3 transitions in episode 1, which has 20 steps, expected 0 to 18"
    with pytest.raises(InvalidArgumentError, match=words):
        client.priorities.flush()

    assert shares(buffer) == before
    client.update_priorities(*GOOD)
    assert client.priorities.flush().updated == 2
    assert client.priorities.counters().dropped == 2


def tensor(array: Any, dtype: int) -> pb.Tensor:
    return pb.Tensor(dtype=dtype, shape=array.shape, data=array.tobytes())  # type: ignore[arg-type]


IDS, STARTS, VALUES = np.arange(2), np.zeros(2, np.int64), np.ones((H, 2), np.float32)
MALFORMED = [
    ({"episode_id": pb.Tensor()}, "episode_id: dtype number 0, expected DTYPE_INT64"),
    ({"priorities": tensor(VALUES.astype(np.float64), pb.DTYPE_FLOAT64)}, "priorities: dtype number 10, expected DTYPE_FLOAT32"),
    ({"start": pb.Tensor(dtype=pb.DTYPE_INT64, shape=[3], data=STARTS.tobytes())}, "start: 16 bytes of data for int64 of shape (3,)"),
    ({"start": pb.Tensor(dtype=pb.DTYPE_INT64, shape=[-2], data=b"")}, "start: 0 bytes of data for int64 of shape (-2,)"),
    ({"priorities": tensor(-VALUES, pb.DTYPE_FLOAT32)}, "priorities: -1.0 in row 0 of slice 0"),
    (
        {"priorities": tensor(np.ones((2000, 2), np.float32), pb.DTYPE_FLOAT32)},
        "priorities: shape (2000, 2), expected at most (1024, 65536)",
    ),
]


@pytest.mark.parametrize(("fields", "words"), MALFORMED, ids=[words[:40] for _, words in MALFORMED])
def test_update_malformed_on_the_wire_is_refused(fields: dict[str, pb.Tensor], words: str) -> None:
    good = {
        "episode_id": tensor(IDS, pb.DTYPE_INT64),
        "start": tensor(STARTS, pb.DTYPE_INT64),
        "priorities": tensor(VALUES, pb.DTYPE_FLOAT32),
    }
    with serving() as (_, caller):
        refusal = refused(caller.raw, "UpdatePriorities", pb.UpdatePrioritiesRequest(**good | fields).SerializeToString())

        assert (refusal.code, refusal.reason) == INVALID
        assert words in refusal.details
        answer = pb.UpdatePrioritiesResponse.FromString(
            caller.raw("UpdatePriorities", pb.UpdatePrioritiesRequest(**good).SerializeToString())
        )
        assert (answer.updated, answer.evicted) == (0, 2)


class Gate:
    """Holds the calls of a client's sender until it is opened."""

    def __init__(self, client: ReplayClient, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.calls: list[int] = []
        self.begun = threading.Event()
        unary = client.priorities._rpc.unary

        def held(name: str, request: bytes, **options: Any) -> bytes:
            if name == "UpdatePriorities":
                self.calls.append(pb.UpdatePrioritiesRequest.FromString(request).start.shape[0])
                self.begun.set()
                assert self.open.wait(30)
            return unary(name, request, **options)

        monkeypatch.setattr(client.priorities._rpc, "unary", held)


def test_update_does_not_wait_for_the_server_and_what_waits_goes_together(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    client = connect(stack, filled())
    gate = Gate(client, monkeypatch)
    batch = client.sample()

    client.update_priorities(batch, np.ones((H, B)))
    assert gate.begun.wait(30)
    for _ in range(10):
        client.update_priorities(batch, np.ones((H, B)))
    client.update_priorities(GOOD[0], np.ones((H + 1, 2)))
    assert client.priorities.counters().pending == 10 * B + 2
    with pytest.raises(DeadlineError, match=r"11 updates wait after 0\.01 s, expected none"):
        client.priorities.flush(timeout_s=0.01)
    gate.open.set()

    assert client.priorities.flush().updated == 11 * B + 2
    assert gate.calls == [B, 10 * B, 2]


def test_updates_beyond_the_bound_drop_the_oldest_and_are_counted(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    client = connect(stack, filled())
    gate = Gate(client, monkeypatch)
    batch = client.sample()
    client.update_priorities(batch, np.ones((H, B)))
    assert gate.begun.wait(30)

    for _ in range(sending.MAX_PENDING + 3):
        client.update_priorities(batch, np.ones((H, B)))
    gate.open.set()
    counters = client.priorities.flush()

    assert (counters.updated, counters.dropped) == ((sending.MAX_PENDING + 1) * B, 3 * B)
    assert sum("priorities of 8 slices were dropped so far" in record.getMessage() for record in caplog.records) == 1


def test_update_larger_than_a_call_is_sent_in_parts(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = filled()
    client = connect(stack, buffer)
    gate = Gate(client, monkeypatch)
    gate.open.set()
    slices = 2 * sending.MAX_CALL_SLICES + 5

    client.update_priorities((np.arange(slices) % 10, np.arange(slices) % 17), np.ones((H, slices)))

    assert client.priorities.flush().updated == slices
    assert gate.calls == [sending.MAX_CALL_SLICES, sending.MAX_CALL_SLICES, 5]


def test_closed_client_takes_no_update_and_sends_what_waited(stack: ExitStack) -> None:
    buffer = filled(priority_alpha=1.0)
    client = connect(stack, buffer)
    batch = client.sample()
    client.update_priorities(batch, np.full((H, B), 50.0))

    client.close()

    assert len(set(shares(buffer).values())) > 1
    with pytest.raises(ClosedError):
        client.update_priorities(batch, np.ones((H, B)))
    client.close()


def test_server_of_protocol_1_0_is_told_apart_before_anything_is_sent(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    from touchline import IncompatibleVersionError
    from touchline_server.service import convert

    monkeypatch.setattr(convert, "PROTOCOL_VERSION", "1.0")
    buffer = filled()
    client = connect(stack, buffer)

    for act in (
        lambda: client.sample(law="prioritized"),
        lambda: client.sample(beta=0.5),
        lambda: next(client.batches(law="prioritized")),
        lambda: (client.update_priorities(*GOOD), client.priorities.flush()),
    ):
        with pytest.raises(IncompatibleVersionError, match=r"the server speaks 1\.0, .* needs 1\.1: update it"):
            act()
    assert isinstance(client.sample(law="step"), Batch)


@pytest.mark.parametrize("remote", [False, True], ids=["in process", "over the wire"])
def test_update_of_a_mixed_batch_goes_to_the_table_of_each_slice(remote: bool, stack: ExitStack) -> None:
    config = make_config(500, horizon=H, batch_size=B, server={"port": 0}, law="prioritized", priority_alpha=1.0, seed=1)
    buffer = ReplayBuffer(config)
    demos = buffer.create_table("demos")
    for number in range(5):
        buffer.add_episode(traced(number, 20))
        demos.add_episode(traced(number, 20))
    verbs = connect(stack, buffer) if remote else buffer
    batch = verbs.sample(mix={"": 0.5, "demos": 0.5})  # type: ignore[attr-defined]
    table = np.asarray(batch.table)

    verbs.update_priorities(batch, np.where(table == 0, 30.0, 60.0) * np.ones((H, 1)))  # type: ignore[attr-defined]
    if remote:
        assert verbs.priorities.flush().updated == B  # type: ignore[attr-defined]

    for position, side in enumerate((buffer, demos)):
        chance = shares(side)
        drawn = {
            cell
            for cell, of in zip(zip(batch.episode_id.tolist(), batch.start.tolist(), strict=True), table, strict=True)
            if of == position
        }
        assert len(drawn) >= 3
        assert all(chance[cell] > 5 * min(chance.values()) for cell in drawn)
        others = [value for (number, start), value in chance.items() if all(number != of or abs(start - at) >= H for of, at in drawn)]
        assert max(others) == pytest.approx(min(chance.values()))
