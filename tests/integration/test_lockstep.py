"""Matches in lockstep through every interface of a buffer. The paths of their batches are in the congruence suite."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from support.codec_cases import bits
from support.lockstep_cases import make_match
from support.serving import ServerThread, stored_episodes
from touchline import InvalidArgumentError, InvalidEpisodeError, ReplayClient, datasets
from touchline.datasets import DatasetError
from touchline.tdmpc2 import Buffer
from touchline.torchrl import RemoteReplayBuffer
from touchline_server import Config, ReplayBuffer

HORIZON = 3


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def make_config() -> Config:
    return Config(
        config={"buffer_size": 2_000, "batch_size": 16, "horizon": HORIZON, "min_history": 1},
        storage={"device": "cpu"},
        server={"port": 0},
    )


def test_torchrl_in_process_returns_the_rows_of_all_agents() -> None:
    buffer = ReplayBuffer(make_config())
    match = make_match(2, 40)
    face = buffer.as_torchrl()
    face.extend(TensorDict({name: torch.from_numpy(column) for name, column in match.items()}, [40]))

    sample = face.sample()

    rows = (sample["obs"][:, 0, 0] - 2_000).long().numpy()
    for name, column in match.items():
        assert np.array_equal(sample[name].numpy(), column[rows], equal_nan=column.dtype != np.bool_)


def test_learners_of_one_agent_refuse_matches_by_name(stack: ExitStack) -> None:
    server = stack.enter_context(ServerThread(make_config()))
    client = stack.enter_context(ReplayClient(server.address))
    client.add(make_match(0, 20))
    cfg = SimpleNamespace(buffer_size=2_000, steps=2_000, batch_size=8, horizon=HORIZON, device="cpu", replay_address=server.address)
    served = stack.enter_context(Buffer(cfg))
    in_process = ReplayBuffer(make_config())
    in_process.add(make_match(0, 20))
    buffers = [served, Buffer(cfg, backend=in_process)]
    remote = stack.enter_context(RemoteReplayBuffer(server.address, batch_size=12, slice_len=HORIZON))

    for buffer in buffers:
        with pytest.raises(
            InvalidArgumentError, match="reward: of 3 agents in lockstep, expected one value per step: TD-MPC2 trains one agent"
        ):
            buffer.sample()
        td = TensorDict({name: torch.from_numpy(column) for name, column in make_match(1, 20).items()}, [20])
        with pytest.raises(InvalidEpisodeError, match=r"reward: shape \(20, 3\), expected one value per step: \(20,\), because TD-MPC2"):
            buffer.add(td)
        with pytest.raises(
            InvalidEpisodeError, match=r"reward: shape \(2, 20, 3\), expected one value per step: \(2, 20\), because TD-MPC2"
        ):
            buffer.load(torch.stack([td, td]))
    with pytest.raises(InvalidArgumentError, match="reward: of 3 agents in lockstep, expected one value per step: RemoteReplayBuffer"):
        remote.sample()
    assert client.counts().episodes_added == in_process.counts().episodes_added == 1


@pytest.mark.parametrize(("name", "format"), [("all.h5", None), ("all.npz", None), ("all", "tdmpc2")])
def test_matches_survive_an_export_and_a_load(name: str, format: str | None, tmp_path: Path, stack: ExitStack) -> None:
    one, other = (stack.enter_context(ServerThread(make_config())) for _ in range(2))
    source, target = (stack.enter_context(ReplayClient(server.address)) for server in (one, other))
    matches = [make_match(number, 6 + number) for number in range(3)]
    for match in matches:
        source.add(match)

    datasets.export(source, str(tmp_path / name), format=format)
    datasets.load(target, str(tmp_path / name), format=format)

    loaded = [columns for _, columns in stored_episodes(other)]
    found = sorted(loaded, key=lambda columns: len(columns["reward"]))
    for columns, match in zip(found, matches, strict=True):
        assert {key: bits(value) for key, value in columns.items()} == {key: bits(value) for key, value in match.items()}


def test_minari_export_of_matches_is_refused_with_what_can_store_them(tmp_path: Path, stack: ExitStack) -> None:
    server = stack.enter_context(ServerThread(make_config()))
    client = stack.enter_context(ReplayClient(server.address))
    client.add(make_match(0, 20))

    with pytest.raises(DatasetError, match="reward: of 3 agents in lockstep; Minari stores one reward per step, use hdf5"):
        datasets.export(client, str(tmp_path / "matches-v0"), format="minari")
    assert list(tmp_path.iterdir()) == []
