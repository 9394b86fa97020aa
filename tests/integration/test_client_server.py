"""The client on a real server: every method, in each form of an episode or a batch."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from support.client_faults import refuse_threads
from support.store_cases import read_episode
from touchline import (
    ColumnInfo,
    EpisodeKey,
    EpisodeWriter,
    InvalidArgumentError,
    InvalidEpisodeError,
    KeyConflictError,
    LoadError,
    NotReadyError,
    ReplayClient,
    TooLargeError,
    UnacknowledgedError,
)
from touchline_protos.codec import Episode
from touchline_protos.types.dtypes import BFLOAT16
from touchline_server import Config
from touchline_server.service.app import ServerThread


def _config(*, limits: dict[str, int] | None = None, **server: Any) -> Config:
    return Config(
        config={"buffer_size": 10_000, "batch_size": 8, "min_history": 20, "horizon": 3},
        sampling={"seed": 5},
        storage={"device": "cpu"},
        server={"port": 0, **server},
        limits=limits or {},
    )


@pytest.fixture
def server() -> Iterator[ServerThread]:
    with ServerThread(_config()) as server:
        yield server


@pytest.fixture
def client(server: ServerThread) -> Iterator[ReplayClient]:
    with ReplayClient(server.address, actor="keeper") as client:
        yield client


def _episode(number: int = 0, rows: int = 10) -> dict[str, Any]:
    """Returns an episode whose values encode their place: ``number * 1000 + row``."""
    values = np.arange(rows, dtype=np.float32) + 1000 * number
    return {"obs": np.stack([values, values], 1), "action": values[:, None].copy(), "reward": values}


def _check_rows(batch: Any) -> None:
    """Asserts that every slice has the consecutive rows that its provenance names."""
    obs, action, reward, done = (np.asarray(part) for part in batch)
    first = 1000 * np.asarray(batch.episode_id) + np.asarray(batch.start)
    rows = first + np.arange(len(obs))[:, None]
    assert np.array_equal(obs, np.stack([rows, rows], 2))
    assert np.array_equal(action[..., 0], rows[1:])
    assert np.array_equal(reward[..., 0], rows[1:])
    assert not done.any()


def test_added_episode_comes_back_in_slices(client: ReplayClient) -> None:
    assert not client.ready()
    assert client.add(_episode(0)) == 1
    assert client.add(_episode(1), actor="striker", policy_version=7) == 2
    assert client.ready()

    batch = client.sample(batch_size=64)

    _check_rows(batch)
    assert isinstance(batch.obs, torch.Tensor) and batch.obs.shape == (4, 64, 2)
    names = [batch.actor_names[index] for index in batch.actor.tolist()]
    assert set(names) == {"keeper", "striker"}
    assert all((name == "striker") == (version == 7) for name, version in zip(names, batch.policy_version.tolist(), strict=True))
    assert torch.allclose(batch.probability, torch.tensor(1 / 14, dtype=torch.float64))
    assert (client.num_eps, client.size, client.capacity) == (2, 20, 10_000)


@pytest.mark.parametrize("form", ["tensors", "tensordict", "big-endian", "strided"])
def test_every_form_of_an_episode_stores_the_same(client: ReplayClient, form: str) -> None:
    episode = _episode(0)
    tensors = {name: torch.from_numpy(value) for name, value in episode.items()}
    given = {
        "tensors": tensors,
        "tensordict": TensorDict(tensors, batch_size=[10]),
        "big-endian": {name: value.astype(">f4") for name, value in episode.items()},
        "strided": {name: np.repeat(value, 2, 0)[::2] for name, value in episode.items()},
    }[form]

    client.add(given)

    _check_rows(client.sample())


def test_nested_observations_extra_columns_task_and_dtypes_come_back(client: ReplayClient) -> None:
    episode = {
        "obs": {"rgb": torch.arange(60, dtype=torch.uint8).reshape(10, 2, 3), "half": torch.ones(10, 2).to(torch.bfloat16)},
        "action": torch.ones(10, 1, dtype=torch.float64),
        "reward": torch.ones(10),
        "done": torch.zeros(10, dtype=torch.bool),
        "task": torch.full((10,), 3),
        "aux": {"depth": torch.ones(10, 2, dtype=torch.float16)},
    }
    client.add(TensorDict(episode, batch_size=[10]))

    tensors, arrays = client.sample(seed=1), client.sample(seed=1, as_numpy=True)

    assert {name: value.dtype for name, value in tensors.obs.items()} == {"rgb": torch.uint8, "half": torch.bfloat16}
    assert tensors.obs["rgb"].shape == (4, 8, 2, 3)
    assert (tensors.obs["half"] == 1).all()
    assert arrays.obs["half"].dtype == BFLOAT16
    assert tensors.action.dtype == torch.float64
    assert tensors.done.dtype == torch.bool
    assert tensors.task.tolist() == [3] * 8
    assert tensors.extra["aux.depth"].shape == (4, 8, 2)
    assert np.array_equal(arrays.obs["rgb"], tensors.obs["rgb"].numpy())


def test_info_describes_the_server(client: ReplayClient) -> None:
    client.add(_episode(0))

    info = client.info()

    assert info.columns["obs"] == ColumnInfo("float32", (2,))
    assert info.columns["reward"] == ColumnInfo("float32", ())
    assert (info.device, info.capacity, info.protocol_version) == ("cpu", 10_000, "1.3")
    assert "buffer_size = 10000" in info.config_toml
    assert info.counts == client.counts()
    assert info.counts.episodes_stored == 1


def test_load_takes_a_stack_of_episodes_or_an_iterable(client: ReplayClient) -> None:
    stacked = {name: np.stack([_episode(number)[name] for number in range(4)]) for name in _episode()}

    assert client.load(stacked) == 4
    assert client.load(_episode(number, rows=5 + number) for number in range(4, 7)) == 7
    assert client.load(TensorDict({name: torch.from_numpy(value[:1] + 7000) for name, value in stacked.items()}, [1, 10])) == 8
    assert client.load([]) == 8

    _check_rows(client.sample(batch_size=256))


def test_load_with_refused_episodes_stores_the_others(client: ReplayClient) -> None:
    wide = _episode(1) | {"obs": np.zeros((10, 3), np.float32)}
    with pytest.raises(LoadError, match=r"2 of 4 episodes were refused.*episode 1: obs: .*episode 2: reward: ") as caught:
        client.load([_episode(0), wide, _episode(1) | {"reward": np.zeros(3, np.float32)}, _episode(1)])

    assert [type(result.error) for result in caught.value.results] == [type(None), InvalidEpisodeError, InvalidEpisodeError, type(None)]
    assert client.num_eps == 2


@pytest.mark.parametrize("rows", [8, 40_000], ids=["small", "in chunks"])
def test_deliver_all_answers_for_each_episode_in_order_and_may_be_repeated(rows: int) -> None:
    sizes = [8, rows, 8, 9]
    config = Config(config={"buffer_size": 100_000}, storage={"device": "cpu"}, server={"port": 0})
    with ServerThread(config) as server, ReplayClient(server.address) as client:
        episodes = [Episode(_episode(number, size), key=client.next_key()) for number, size in enumerate(sizes)]
        episodes[2].columns["reward"] = episodes[2].columns["reward"][:-1]

        (results,), (again,) = (list(client.deliver_all((episode.key, episode) for episode in episodes)) for _ in range(2))

        assert [result.key for result in results] == [episode.key for episode in episodes]
        assert [result.episode_id for result in results if result.error is None] == [0, 1, 2]
        assert isinstance(results[2].error, InvalidEpisodeError)
        assert [result.duplicate for result in again] == [True, True, False, True]
        assert client.counts().episodes_added == 3
        for entry, number in zip(server.buffer.store.entries(), (0, 1, 3), strict=True):
            stored = read_episode(server.buffer.store, entry)
            assert all(np.array_equal(stored[name], column) for name, column in episodes[number].columns.items())


def test_key_makes_adding_idempotent_and_conflicts_are_seen(client: ReplayClient) -> None:
    key = EpisodeKey("robot", 1, 1)

    assert client.add(_episode(0), key=key) == 1
    assert client.add(_episode(0), key=key) == 1
    with pytest.raises(KeyConflictError):
        client.add(_episode(1), key=key)

    assert client.counts().episodes_duplicate == 1


@pytest.mark.parametrize(
    ("change", "column"),
    [
        ({"obs": np.zeros((10, 3), np.float32)}, "obs"),
        ({"obs": np.zeros((10, 2), np.float64)}, "obs"),
        ({"surplus": np.zeros(10)}, "surplus"),
    ],
)
def test_episode_not_of_the_schema_is_refused(client: ReplayClient, change: dict[str, Any], column: str) -> None:
    client.add(_episode(0))

    with pytest.raises(InvalidEpisodeError, match=column):
        client.add(_episode(1) | change)

    assert client.num_eps == 1
    assert client.counts().episodes_refused == 1


def test_sample_before_anything_is_eligible_is_not_ready_with_counts(client: ReplayClient) -> None:
    client.add(_episode(0, rows=3))

    with pytest.raises(NotReadyError) as caught:
        client.sample()

    assert caught.value.counts is not None
    assert caught.value.counts.steps_stored == 3


def test_sample_waits_for_the_first_episode(server: ServerThread, client: ReplayClient) -> None:
    timer = threading.Timer(0.2, client.add, (_episode(0),))
    timer.start()

    batch = client.sample(wait_s=60)

    timer.join()
    _check_rows(batch)


@pytest.mark.parametrize("arguments", [{"batch_size": 1 << 20}, {"horizon": 5000}])
def test_request_out_of_the_servers_range_is_refused_by_both_ways(client: ReplayClient, arguments: dict[str, Any]) -> None:
    client.add(_episode(0))

    with pytest.raises(InvalidArgumentError, match=next(iter(arguments))):
        client.sample(**arguments)
    with client.batches(**arguments) as stream, pytest.raises(InvalidArgumentError, match=next(iter(arguments))):
        next(stream)


def test_unknown_table_is_refused(server: ServerThread) -> None:
    with ReplayClient(server.address, table="elsewhere") as client, pytest.raises(InvalidArgumentError, match="elsewhere"):
        client.counts()


def test_same_seed_gives_the_same_batches_by_both_ways(client: ReplayClient) -> None:
    client.load(_episode(number) for number in range(5))

    one, other = client.sample(seed=3), client.sample(seed=3)
    with client.batches(seed=3) as first, client.batches(seed=3) as second:
        streamed = [(next(first), next(second)) for _ in range(20)]

    assert torch.equal(one.obs, other.obs)
    assert all(torch.equal(left.obs, right.obs) for left, right in streamed)
    assert torch.equal(one.obs, streamed[0][0].obs)


@pytest.mark.parametrize("ring", [True, False])
def test_streamed_batches_are_right_and_are_never_overwritten(client: ReplayClient, ring: bool) -> None:
    client.load(_episode(number) for number in range(9))
    with client.batches(prefetch=8, batch_size=16, horizon=5, law="step", ring=ring) as stream:
        held = [(batch, batch.obs.clone()) for batch in (next(stream) for _ in range(50))]
        row = next(stream).obs[0, 0]
        value = row.clone()
        for _ in range(2000):
            _check_rows(next(stream))

    assert all(torch.equal(batch.obs, copy) for batch, copy in held)
    assert torch.equal(row, value)


def test_stream_waits_until_something_can_be_sampled(client: ReplayClient) -> None:
    timer = threading.Timer(0.2, client.add, (_episode(0),))
    timer.start()

    with client.batches() as stream:
        batch = next(stream)

    timer.join()
    _check_rows(batch)


def test_stream_with_a_time_limit_is_not_ready_in_time(client: ReplayClient) -> None:
    with client.batches(timeout_s=0.3) as stream, pytest.raises(NotReadyError, match="0 steps in 0 episodes"):
        next(stream)


def test_clear_empties_and_lets_another_schema_in(client: ReplayClient) -> None:
    client.add(_episode(0))

    counts = client.clear()

    assert (counts.episodes_stored, counts.episodes_added, counts.episodes_evicted) == (0, 1, 1)
    assert client.add(_episode(0) | {"obs": np.zeros((10, 5), np.float32)}) == 1


def test_wait_until_ready_returns_when_enough_is_stored(client: ReplayClient) -> None:
    client.add(_episode(0))
    with pytest.raises(NotReadyError, match=r"10 steps in 1 episodes, .*; expected 20 steps"):
        client.wait_until_ready(timeout_s=0.2)
    assert client.wait_until_ready(10, timeout_s=60).can_sample
    timer = threading.Timer(0.2, client.add, (_episode(1),))
    timer.start()

    state = client.wait_until_ready(timeout_s=60)

    timer.join()
    assert state.min_steps_reached
    assert (state.min_history, state.counts.steps_stored) == (20, 20)


@pytest.mark.parametrize(("rows", "min_steps"), [(101, 1_000), (101, 950), (400, 999), (1_000, 1_000), (2, 1_000)])
def test_wait_until_ready_ends_although_whole_episodes_never_fill_the_buffer(rows: int, min_steps: int) -> None:
    config = Config(config={"buffer_size": 1_000, "min_history": min_steps, "horizon": 1}, server={"port": 0})
    episode = {name: np.zeros((rows, 2), np.float32) for name in ("obs", "action")} | {"reward": np.zeros(rows, np.float32)}
    with ServerThread(config) as server, ReplayClient(server.address) as client:
        before = [client.ready_state().min_steps_reached]
        for _ in range(1_000 // rows):
            client.add(episode)

        state = client.wait_until_ready(timeout_s=60)

        assert before == [False]
        assert state.counts.steps_stored == 1_000 // rows * rows
        assert client.wait_until_ready(1_000, timeout_s=60).min_steps_reached


def test_wait_until_ready_waits_for_the_horizon_that_is_asked_for(client: ReplayClient) -> None:
    client.add(_episode(0))
    client.add(_episode(1))

    assert client.wait_until_ready(1, timeout_s=60).can_sample
    assert client.ready(horizon=9) and not client.ready(horizon=10)
    with pytest.raises(
        NotReadyError, match=r"0 of them with the 11 steps that horizon 10 needs, the longest has 10; .*expected 1 steps and an"
    ):
        client.wait_until_ready(1, timeout_s=0.2, horizon=10)


def test_ring_without_a_thread_to_listen_gives_way_to_messages(client: ReplayClient, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        client.add(_episode(number))
    refuse_threads(monkeypatch, "touchline-ring")

    with client.batches(prefetch=2, batch_size=8, horizon=3) as stream:
        for _ in range(20):
            _check_rows(next(stream))

        assert stream.transport == "stream"


@pytest.mark.parametrize("ring", [True, False])
def test_episode_over_the_message_limit_goes_in_chunks_and_big_batches_come_back(ring: bool) -> None:
    limit = 1 << 20
    pixels = np.random.default_rng(0).integers(0, 256, (300, 3, 64, 64), np.uint8)
    episode = {"obs": pixels, "action": np.zeros((300, 2), np.float32), "reward": np.zeros(300, np.float32)}
    with (
        ServerThread(_config(limits={"max_message_bytes": limit})) as server,
        ReplayClient(server.address, max_message_bytes=limit) as client,
    ):
        assert client.add(episode) == 1

        unary = client.sample(batch_size=64, seed=1)
        with client.batches(batch_size=64, seed=1, ring=ring) as stream:
            streamed = next(stream)

    assert unary.obs.nbytes > limit
    rows = unary.start.numpy() + np.arange(4)[:, None]
    assert np.array_equal(unary.obs.numpy(), pixels[rows])
    assert torch.equal(unary.obs, streamed.obs)


def test_client_with_a_higher_limit_than_the_server_falls_back_to_chunks() -> None:
    with ServerThread(_config(limits={"max_message_bytes": 1 << 20})) as server, ReplayClient(server.address) as client:
        episode = _episode(0, rows=600) | {"aux": np.zeros((600, 1024), np.float32)}

        assert client.add(episode) == 1
        assert client.add(episode | {"reward": episode["action"][:, 0] + 1}) == 2


def test_load_by_a_client_with_a_higher_limit_than_the_server_falls_back_to_smaller_chunks() -> None:
    with ServerThread(_config(limits={"max_message_bytes": 1 << 20})) as server, ReplayClient(server.address) as client:
        episode = _episode(0, rows=600) | {"aux": np.zeros((600, 1024), np.float32)}

        assert client.load([episode]) == 1


def test_episode_over_the_servers_limit_of_episodes_is_too_large() -> None:
    with ServerThread(_config(limits={"max_episode_bytes": 1000})) as server, ReplayClient(server.address) as client:
        with pytest.raises(TooLargeError, match=r"expected at most 1000 \(max_episode_bytes\)$"):
            client.add(_episode(0, rows=100))
        refused = client.counts().episodes_refused
        with pytest.raises(LoadError) as caught:
            client.load([_episode(0, rows=100), _episode(0)])

    assert refused == 1
    assert [type(result.error) for result in caught.value.results] == [TooLargeError, type(None)]


def test_unix_socket_works(tmp_path: Path) -> None:
    with ServerThread(_config(unix_socket=str(tmp_path / "replay.sock"))) as server, ReplayClient(server.address) as client:
        assert server.address.startswith("unix:")
        client.add(_episode(0))

        _check_rows(client.sample())


def test_many_threads_share_a_client(client: ReplayClient) -> None:
    client.add(_episode(0))
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for step in range(20):
                client.add(_episode(number * 20 + step + 1))
                _check_shape(client.sample())
        except BaseException as error:
            failures.append(error)

    def _check_shape(batch: Any) -> None:
        assert batch.obs.shape == (4, 8, 2)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert failures == []
    assert client.num_eps == 161


@pytest.mark.parametrize("ring", [True, False])
def test_learner_and_actor_survive_a_restart_of_the_server(caplog: pytest.LogCaptureFixture, ring: bool) -> None:
    caplog.set_level(logging.INFO, "touchline")
    with ServerThread(_config()) as first:
        address = first.address
        client = ReplayClient(address, timeout_s=0.5)
        writer = EpisodeWriter(client)
        with ReplayClient(address) as patient:
            patient.add(_episode(0))
        stream = client.batches(prefetch=2, ring=ring)
        _check_rows(next(stream))
    for number in range(3):  # while the server is away
        for row in zip(*_episode(number).values(), strict=True):
            writer.append(dict(zip(("obs", "action", "reward"), row, strict=True)))
        writer.end_episode()

    port = int(address.rpartition(":")[2])
    with ServerThread(_config(port=port)) as second:
        assert second.address == address
        writer.close(60)
        assert client.wait_until_ready(timeout_s=60).counts.episodes_stored == 3
        batches = [next(stream) for _ in range(20)]
        stream.close()
        client.close()

    _check_rows(batches[-1])
    assert writer.counters.acknowledged == 3
    assert "is back: sampling goes on" in caplog.text


def test_writer_end_to_end_counts_agree(client: ReplayClient) -> None:
    with EpisodeWriter(client, max_steps=25) as writer:
        for number in range(10):
            writer.append({"obs": np.zeros(2, np.float32)})
            for _ in range(40):
                writer.append({"obs": np.zeros(2, np.float32), "action": np.zeros(1, np.float32), "reward": 0.5, "done": False})
            writer.policy_version = number
            writer.end_episode()

    counts, counters = client.counts(), writer.counters
    assert counters.appended == counters.acknowledged == counts.episodes_added == counts.episodes_stored + counts.episodes_evicted == 20
    assert counters.steps_acknowledged == counts.steps_added == 10 * 42
    batch = client.sample(batch_size=64)
    assert (batch.reward == 0.5).all()
    assert set(batch.actor_names.values()) == {"keeper"}


def test_writer_reports_what_the_server_refused(client: ReplayClient) -> None:
    client.add(_episode(0))
    writer = EpisodeWriter(client)
    for _ in range(5):
        writer.append({"obs": np.zeros(3, np.float32), "action": np.zeros(1, np.float32), "reward": 0.0})

    with pytest.raises(UnacknowledgedError, match="obs: ") as caught:
        writer.close(60)

    assert [type(result.error) for result in caught.value.results] == [InvalidEpisodeError]
    assert writer.counters.refused == 1
