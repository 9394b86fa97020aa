"""Nested observation keys, and columns beside them, keep the order of the first episode on every path by which values come back.

An actor and a learner that join the values of a dict (``torch.cat(list(obs.values()))``) must join them in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from support.serving import ServerThread
from touchline import EpisodeWriter, ReplayClient, datasets
from touchline.tdmpc2 import Buffer
from touchline.torchrl import RemoteReplayBuffer
from touchline_server import Config, ReplayBuffer

NESTED = {"z": 0, "proprio": {"qvel": 1, "arm": {"y": 2, "b": 3}, "a": 4}, "camera": 5}
"""Observations with their values, not in alphabetical order."""
ORDER = [0, 1, 2, 3, 4, 5]
NAMES = ["obs.z", "obs.proprio.qvel", "obs.proprio.arm.y", "obs.proprio.arm.b", "obs.proprio.a", "obs.camera"]
EXTRA = ["zeta", "alpha.b", "alpha.a"]


def filled(level: Any, *shape: int) -> Any:
    return {name: filled(part, *shape) for name, part in level.items()} if isinstance(level, dict) else np.full(shape, level, np.float32)


def episode(rows: int = 5) -> dict[str, Any]:
    extra = {name: np.zeros(rows, np.float32) for name in EXTRA}
    columns = {"reward": np.zeros(rows, np.float32), "obs": filled(NESTED, rows, 1), **extra, "action": np.zeros((rows, 1), np.float32)}
    columns["action"][0] = np.nan
    return columns


def joined(level: Any) -> list[float]:
    """Returns the values in the order of the dicts of each level."""
    if isinstance(level, Mapping) or hasattr(level, "batch_size"):
        return [value for name in level.keys() for value in joined(level[name])]  # noqa: SIM118  a TensorDict
    return [float(np.ravel(level)[0])]


@pytest.fixture
def buffer() -> ReplayBuffer:
    return ReplayBuffer(Config(config={"buffer_size": 10_000, "batch_size": 4, "horizon": 2, "min_history": 0}, server={"port": 0}))


@pytest.fixture
def client(buffer: ReplayBuffer) -> Iterator[ReplayClient]:
    with ExitStack() as stack:
        server = stack.enter_context(ServerThread(buffer.config, buffer))
        yield stack.enter_context(ReplayClient(server.address))


@pytest.mark.parametrize("by", ["add", "load", "chunks", "writer", "tensordict", "in process"])
def test_nested_observations_come_back_in_the_order_of_the_first_episode(buffer: ReplayBuffer, client: ReplayClient, by: str) -> None:
    if by == "add":
        client.add(episode())
    elif by == "load":
        client.load([episode()])
    elif by == "chunks":
        with ReplayClient(client.address, max_message_bytes=1 << 16) as small:
            small.add(episode(4_000))
    elif by == "writer":
        with EpisodeWriter(client) as writer:
            whole = episode()
            writer.append({"obs": filled(NESTED, 1)} | {name: np.float32(0) for name in EXTRA})
            for row in range(1, 5):
                writer.append({"action": whole["action"][row], "obs": filled(NESTED, 1), "reward": 0.0, **dict.fromkeys(EXTRA, 0.0)})
    elif by == "tensordict":
        client.add(TensorDict({tuple(name.split(".")): value for name, value in episode().items()}, [5]))
    else:
        buffer.add(episode())
    # Another order in a later episode changes nothing.
    client.add(dict(reversed(episode().items())) | {"obs": dict(reversed(filled(NESTED, 5, 1).items()))})

    got = {
        "in process": joined(buffer.sample().obs),
        "unary": joined(client.sample(as_numpy=True).obs),
        "unary, torch": joined(client.sample(as_numpy=False).obs),
        "torchrl": [float(buffer.as_torchrl().sample()[tuple(name.split("."))].reshape(-1)[0]) for name in _names(buffer)],
        "schema": [float(NAMES.index(name)) for name in client.info().columns if name.startswith("obs")],
    }
    for name in ("stream", "ring", "device"):
        with client.batches(transport=name, as_numpy=True) as batches:
            batch = next(batches)
        got[name] = joined(batch.obs)
        assert list(batch.extra) == EXTRA
    for stored in [*client.episodes(), *buffer.episodes()]:
        assert [name for name in stored.columns if name.startswith("obs.")] == NAMES
        assert [name for name in stored.columns if name in EXTRA] == EXTRA

    assert got == dict.fromkeys(got, ORDER)


def _names(buffer: ReplayBuffer) -> list[str]:
    sample = buffer.as_torchrl().sample()
    keys = sample["obs"].keys(True, True)
    return ["obs." + (key if isinstance(key, str) else ".".join(key)) for key in keys]


def test_drop_in_gives_observations_in_the_order_of_the_first_episode(client: ReplayClient) -> None:
    class Cfg:
        buffer_size = steps = 200
        batch_size, horizon, device = 4, 2, "cpu"

    buffer = Buffer(Cfg(), client)
    columns = episode()
    buffer.add(TensorDict({name: columns[name] for name in ("obs", "action", "reward")}, [5]))

    with buffer:
        assert joined(buffer.sample()[0]) == ORDER


def test_remote_torchrl_buffer_gives_observations_in_the_order_that_they_were_given(client: ReplayClient) -> None:
    keys = ["zz", "b", "aa"]
    observed = {key: torch.full((4, 1), float(number)) for number, key in enumerate(keys)}
    done = torch.tensor([[False], [False], [False], [True]])
    data = TensorDict({**observed, "action": torch.zeros(4, 1), "next": {**observed, "reward": torch.zeros(4, 1), "done": done}}, [4])

    with RemoteReplayBuffer(client, batch_size=2, slice_len=1, observation_keys=keys) as buffer:
        buffer.extend(data)
        sample = buffer.sample()

    assert [key for key in sample.keys() if key in keys] == keys  # noqa: SIM118  a TensorDict
    assert [key for key in sample["next"].keys() if key in keys] == keys  # noqa: SIM118


@pytest.mark.parametrize("target", ["all.h5", "all.npz", "all.pt", "order-v0"])
def test_data_set_keeps_the_order(client: ReplayClient, tmp_path: Path, target: str) -> None:
    client.add(episode())
    before = next(iter(client.episodes())).columns
    datasets.export(client, str(tmp_path / target), format="minari" if target == "order-v0" else None)
    client.clear()

    report = datasets.load(client, str(tmp_path / target))

    assert (report.stored, report.duplicates) in ((1, 0), (0, 1)), report
    if report.duplicates:
        datasets.load(client, str(tmp_path / target), reload_label="once more")
    found = next(iter(client.episodes())).columns
    groups = ("obs", "alpha")
    for group in groups:
        names = [name for name in before if name.startswith(group)]
        assert [name for name in found if name.startswith(group)] == names
    assert joined(client.sample(as_numpy=True).obs) == ORDER
