"""Episodes of (s, a, r) rows, added to a server that expects TD-MPC2's rows: the actor and the operator are warned, once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from tensordict import TensorDict

from support.dataset_cases import write_npz
from support.service_calls import make_config
from support.serving import ServerThread
from touchline import EpisodeWriter, ReplayClient, datasets
from touchline.recorders import GymnasiumRecorder
from touchline.torchrl import RemoteReplayBuffer
from touchline_protos.types.dtypes import BFLOAT16
from touchline_server import ReplayBuffer

CLIENT, SERVER = "touchline._actor.first_row", "touchline_server.store.schema"


def rows(action: Any) -> dict[str, np.ndarray]:
    return {"obs": np.zeros((len(action), 1), np.float32), "action": np.asarray(action), "reward": np.zeros(len(action), np.float32)}


def warnings_of(caplog: pytest.LogCaptureFixture, name: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == name and record.levelno == logging.WARNING]


def serve(convention: str = "incoming", **storage: Any) -> ServerThread:
    return ServerThread(make_config(config={"min_history": 1, "horizon": 1}, sampling={"row_convention": convention}, storage=storage))


def by_writer(client: ReplayClient, episode: dict[str, np.ndarray], folder: Path) -> None:
    with EpisodeWriter(client) as writer:
        for row in range(len(episode["obs"])):
            writer.append({name: column[row] for name, column in episode.items()})


def by_file(client: ReplayClient, episode: dict[str, np.ndarray], folder: Path) -> None:
    write_npz(folder / "sar.npz", [episode])
    datasets.load(client, str(folder / "sar.npz"))


WAYS: dict[str, Callable[[ReplayClient, dict[str, np.ndarray], Path], Any]] = {
    "add": lambda client, episode, folder: client.add(episode),
    "load": lambda client, episode, folder: client.load([episode]),
    "writer": by_writer,
    "file": by_file,
}


@pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))
@pytest.mark.parametrize("durable", [False, True], ids=["in memory", "durable"])
def test_action_in_row_0_is_warned_about_once_on_both_sides(
    way: Callable[..., Any], durable: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    storage = {"data_dir": str(tmp_path / "data")} if durable else {}
    with caplog.at_level(logging.WARNING), serve(**storage) as server, ReplayClient(server.address, actor="arm") as client:
        way(client, rows(np.full((4, 2), 0.5, np.float32)), tmp_path)
        client.add(rows(np.full((5, 2), 0.25, np.float32)))

    for name in (CLIENT, SERVER):
        (told,) = warnings_of(caplog, name)
        assert "actor 'arm'" in told and "row 0 has an action, which is never drawn" in told
        assert "sampling.row_convention = 'outgoing'" in told


@pytest.mark.parametrize(
    "action",
    [
        np.full(4, 0.5),
        np.zeros(4, np.float32),
        np.array([3, 1, 2, 0]),
        np.array([True, False]),
        np.full(4, 0x3F80, np.uint16).view(BFLOAT16),
    ],
    ids=["float64", "zeros", "int", "bool", "bfloat16"],
)
def test_every_dtype_of_an_action_in_row_0_is_warned_about(action: np.ndarray, caplog: pytest.LogCaptureFixture) -> None:
    buffer = ReplayBuffer(make_config())
    with caplog.at_level(logging.WARNING):
        buffer.add(rows(action))
        buffer.add(rows(action))
        assert len(warnings_of(caplog, SERVER)) == 1
        buffer.clear()
        buffer.add(rows(action))

    assert len(warnings_of(caplog, SERVER)) == 2


@pytest.mark.parametrize(
    ("convention", "action"),
    [
        ("outgoing", np.full((4, 2), 0.5, np.float32)),
        ("incoming", np.array([[np.nan, np.nan], [0, 0]], np.float32)),
        ("incoming", np.array([[np.nan, 0.5], [0, 0]], np.float32)),
        ("incoming", np.array([0, 3, 2])),
        ("incoming", np.array([False, True])),
        ("incoming", np.array([[0.5]], np.float32)),
    ],
    ids=["outgoing", "NaN", "some NaN", "int that has no NaN", "bool that has no NaN", "a single row"],
)
def test_rows_in_the_servers_convention_cause_no_warning(convention: str, action: np.ndarray, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), serve(convention) as server, ReplayClient(server.address) as client:
        client.add(rows(action))
        client.load([rows(action)])

    assert warnings_of(caplog, CLIENT) == warnings_of(caplog, SERVER) == []


def test_rows_of_writer_recorders_and_adapters_cause_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), serve() as server, ReplayClient(server.address) as client:
        for space in ("CartPole-v1", "Pendulum-v1"):
            client.clear()
            with GymnasiumRecorder(gymnasium.make(space), client) as env:
                env.reset(seed=0)
                env.action_space.seed(0)
                for _ in range(5):
                    env.step(env.action_space.sample())
        client.clear()
        with EpisodeWriter(client) as writer:
            writer.append({"obs": 0.0})
            writer.append({"obs": 0.0, "action": 1, "reward": 0.5})
        client.clear()
        step = {"observation": torch.zeros(4, 1)}
        after = {**step, "reward": torch.ones(4, 1), "done": torch.tensor([[False], [False], [False], [True]])}
        with RemoteReplayBuffer(client) as buffer:
            buffer.extend(TensorDict({**step, "action": torch.ones(4, 1), "next": after}, [4]))

    assert warnings_of(caplog, CLIENT) == warnings_of(caplog, SERVER) == []
