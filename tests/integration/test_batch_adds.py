"""Episodes of a vector simulator, added by a client together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from support.store_cases import as_bits, make_config, traced_columns
from touchline import InvalidArgumentError, InvalidEpisodeError, LoadError, ReplayClient
from touchline_protos.types.episode_batch import flatten_batch, split_batch, to_host
from touchline_server import ReplayBuffer
from touchline_server.service.app import ServerThread
from touchline_server.store.tensors import as_tensor


@pytest.fixture
def client() -> Iterator[ReplayClient]:
    with ServerThread(make_config(200, server={"port": 0})) as server, ReplayClient(server.address, actor="sim") as client:
        yield client


def batch_of(envs: int, rows: int) -> dict[str, Any]:
    episodes = [traced_columns(number, rows) for number in range(envs)]
    return {name: np.stack([episode[name] for episode in episodes]) for name in episodes[0]}


def contents(of: ReplayClient | ReplayBuffer) -> list[tuple[Any, ...]]:
    return [
        (stored.actor, stored.policy_version, {name: as_bits(column) for name, column in stored.columns.items()})
        for stored in of.episodes()
    ]


@pytest.mark.parametrize("kind", ["arrays", "tensors", "nested"])
def test_client_and_buffer_store_the_same_batch(client: ReplayClient, kind: str) -> None:
    buffer = ReplayBuffer(make_config(200))
    batch, lengths = batch_of(4, 6), [6, 1, 4, 6]
    if kind == "tensors":
        batch = {name: as_tensor(column) for name, column in batch.items()}
    elif kind == "nested":
        batch["obs"] = {name.removeprefix("obs."): batch.pop(name) for name in list(batch) if name.startswith("obs.")}
    names = [f"env-{number}" for number in range(4)]

    counts = [of.add_batch(batch, lengths=lengths, actor=names, policy_version=5) for of in (client, buffer)]

    assert counts == [4, 4]
    assert contents(client) == contents(buffer)
    assert [name for name, *_ in contents(client)] == names


def test_client_gives_a_batch_its_own_name_dtype_and_table(client: ReplayClient) -> None:
    client.create_table("sim", buffer_size=100)
    wide = ReplayClient(client.address, actor="sim", dtype="float32", table="sim")

    wide.add_batch({"obs": np.ones((2, 3, 4)), "action": torch.zeros(2, 3, 1, dtype=torch.float64), "reward": np.zeros((2, 3))})

    assert [(stored.actor, stored.columns["obs"].dtype) for stored in wide.episodes()] == [("sim", np.float32)] * 2
    assert client.num_eps == 0
    wide.close()


def test_client_refuses_what_does_not_fit_without_a_call(client: ReplayClient) -> None:
    nowhere = ReplayClient("127.0.0.1:1", timeout_s=0.1)
    with pytest.raises(InvalidEpisodeError, match=r"reward: shape \(2, 5\), expected \(4, 6\) to match"):
        nowhere.add_batch(batch_of(4, 6) | {"reward": np.zeros((2, 5))})
    with pytest.raises(InvalidEpisodeError, match=r"lengths\[3\]: 7, expected 1 to 6"):
        nowhere.add_batch(batch_of(4, 6), lengths=[6, 6, 6, 7])
    with pytest.raises(InvalidArgumentError, match="actor: 1 names, expected 4"):
        nowhere.add_batch(batch_of(4, 6), actor=["one"])
    nowhere.close()

    bad = batch_of(4, 6)
    bad["reward"][2, 1] = np.nan
    with pytest.raises(LoadError, match="episode 2: reward") as refused:
        client.add_batch(bad)
    assert [result.error is None for result in refused.value.results] == [True, True, False, True]


def test_batch_on_the_host_shares_the_memory_of_arrays_and_tensors() -> None:
    batch = {"obs": np.zeros((2, 3, 4)), "action": torch.zeros(2, 3, 1), "reward": np.zeros((2, 3))}
    columns, lengths = flatten_batch(batch)
    host = to_host(columns)

    assert lengths == [3, 3]
    assert np.shares_memory(host["obs"], batch["obs"]) and np.shares_memory(host["action"], batch["action"].numpy())
    assert all(np.shares_memory(episode["obs"], batch["obs"]) for episode in split_batch(host, lengths))
