"""Mixed batches through the drop-in buffers of TD-MPC2 and TorchRL."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from touchline import InvalidArgumentError, ReplayClient, UnknownTableError
from touchline.tdmpc2 import Buffer
from touchline.torchrl import RemoteReplayBuffer
from touchline_server import Config
from touchline_server.service.app import ServerThread

MIX = {"online": 0.25, "demos": 0.75}


@pytest.fixture
def server() -> Iterator[ServerThread]:
    config = Config(
        config={"buffer_size": 2_000, "batch_size": 8, "min_history": 1, "horizon": 1},
        storage={"device": "cpu"},
        server={"port": 0},
        tables={"online": {}, "demos": {}, "outgoing": {"row_convention": "outgoing"}},
    )
    with ServerThread(config) as server:
        yield server


def make_cfg(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(buffer_size=2_000, steps=2_000, batch_size=16, horizon=3, device="cpu", **changes)


def make_episode(value: float) -> TensorDict:
    episode = TensorDict({"obs": torch.full((20, 2), value), "action": torch.ones(20, 1), "reward": torch.full((20,), value)}, [20])
    episode["action"][0] = episode["reward"][0] = torch.nan
    return episode


@pytest.mark.parametrize("served", [True, False], ids=["served", "in process"])
def test_tdmpc2s_buffer_samples_an_exact_mix_and_adds_to_its_own_table(server: ServerThread, served: bool) -> None:
    for table, value in (("online", 1.0), ("demos", 2.0)):
        server.buffer.tables[table].add({name: column.numpy() for name, column in make_episode(value).items()})
    with ReplayClient(server.address, table="online") as client:
        backend: Any = client if served else server.buffer.tables["online"]
        with Buffer(make_cfg(), backend=backend, mix=MIX) as buffer:
            for _ in range(10):
                obs, action, reward, terminated, task = buffer.sample()

                assert obs[:, :4].eq(1).all() and obs[:, 4:].eq(2).all()
                assert reward[:, :4].eq(1).all() and reward[:, 4:].eq(2).all()
                assert obs.shape == (4, 16, 2) and action.shape == (3, 16, 1) and terminated.shape == (3, 16, 1) and task is None
            buffer.add(make_episode(3.0))

    assert [server.buffer.tables[table].num_eps for table in ("", "online", "demos")] == [0, 2, 1]


@pytest.mark.parametrize(
    ("mix", "kind", "message"),
    [
        ({"online": -1}, InvalidArgumentError, "mix: share -1 of table 'online'"),
        ({"online": 1, "expert": 1}, UnknownTableError, "'expert' does not exist"),
        ({"outgoing": 1}, InvalidArgumentError, "row_convention of table 'outgoing': 'outgoing', expected 'incoming'"),
    ],
)
def test_bad_mix_is_refused_when_tdmpc2s_buffer_is_made(
    server: ServerThread, mix: dict[str, float], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        Buffer(make_cfg(replay_address=server.address), mix=mix)


def test_torchrls_buffer_samples_an_exact_mix_with_the_table_of_each_slice(server: ServerThread) -> None:
    for table, value in (("online", 1.0), ("demos", 2.0)):
        with ReplayClient(server.address, table=table) as client, RemoteReplayBuffer(client) as writer:
            steps = torch.arange(10)
            data = TensorDict({"observation": torch.full((10, 1), value), "action": torch.zeros(10, 1)}, [10])
            data["done"] = torch.zeros(10, 1, dtype=torch.bool)
            data["next"] = TensorDict(
                {"observation": torch.full((10, 1), value), "reward": steps[:, None].float(), "done": (steps == 9)[:, None]}, [10]
            )
            writer.extend(data)

    with RemoteReplayBuffer(server.address, batch_size=32, slice_len=2, mix=MIX) as buffer:
        for _ in range(5):
            sample, info = buffer.sample(return_info=True)

            assert info["table"].tolist() == [0] * 4 + [1] * 12
            assert np.array_equal(sample["observation"].flatten(), np.repeat([1.0, 2.0], [8, 24]))
    with pytest.raises(InvalidArgumentError, match="when_empty: 'never', expected 'wait' or 'others'"):
        RemoteReplayBuffer(server.address, mix=MIX, when_empty="never")
