"""The drop-in for TD-MPC2's buffer, on a server and in process, compared with TD-MPC2's own use of TorchRL's SliceSampler."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from tensordict import TensorDict
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss
from torchrl.data import LazyTensorStorage
from torchrl.data import ReplayBuffer as TorchRLReplayBuffer
from torchrl.data.replay_buffers.samplers import SliceSampler

from support.serving import Config, ReplayBuffer, ServerInvalidEpisodeError, ServerNotReadyError, ServerThread, needs_server
from touchline import ClosedError, InvalidArgumentError, InvalidEpisodeError, LoadError, ReplayClient
from touchline.tdmpc2 import Buffer

HORIZON = 3
BATCH = 32
LENGTHS = [5, 9, 30, 14, 60, 4]
SERVED, IN_PROCESS = "served", "in process"
BACKENDS = [SERVED, pytest.param(IN_PROCESS, marks=needs_server)]


def make_cfg(**changes: Any) -> SimpleNamespace:
    known = {"buffer_size": 4_000, "steps": 2_000, "batch_size": BATCH, "horizon": HORIZON, "multitask": False}
    return SimpleNamespace(**(known | changes))


def server_config(**sampling: Any) -> Config:
    """Configuration whose batch size, horizon and law differ from TD-MPC2's requests."""
    return Config(
        config={"buffer_size": 2_000, "batch_size": 8, "min_history": 1, "horizon": 1},
        sampling={"seed": 12, "law": "step", **sampling},
        storage={"device": "cpu"},
        server={"port": 0},
    )


@pytest.fixture
def server() -> Iterator[ServerThread]:
    with ServerThread(server_config()) as server:
        yield server


@pytest.fixture(params=BACKENDS)
def buffer(request: pytest.FixtureRequest, server: ServerThread) -> Iterator[Buffer]:
    served = request.param == SERVED
    with Buffer(make_cfg(replay_address=server.address)) if served else Buffer(make_cfg(), backend=server.buffer) as buffer:
        yield buffer


def make_episode(number: int, length: int, *, terminated: bool = True, task: bool = False, nested: bool = False) -> TensorDict:
    """Returns an episode as TD-MPC2's trainer builds it; a value encodes its episode and row: ``number * 100 + row``."""
    rows = number * 100.0 + torch.arange(length, dtype=torch.float32)
    obs: Any = torch.stack([rows, -rows], dim=1)
    if nested:
        rgb = rows.to(torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4).contiguous()
        obs = TensorDict({"rgb": rgb, "state": obs}, batch_size=[length])
    td = TensorDict({"obs": obs, "action": torch.stack([rows, rows / 2, rows / 4], dim=1), "reward": rows / 8}, batch_size=[length])
    td["action"][0] = torch.nan
    td["reward"][0] = torch.nan
    if terminated:
        td["terminated"] = (torch.arange(length) == length - 1).float() * (number % 2)
        td["terminated"][0] = torch.nan
    if task:
        td["task"] = torch.full((length,), number, dtype=torch.int64)
    return td


class Reference:
    """TD-MPC2's buffer for the same calls, as its paper and TorchRL describe it: slices of H + 1 rows by SliceSampler."""

    def __init__(self) -> None:
        self._episodes = 0
        sampler = SliceSampler(num_slices=BATCH, traj_key="episode", end_key=None, truncated_key=None, strict_length=True)
        self._buffer = TorchRLReplayBuffer(storage=LazyTensorStorage(2_000), sampler=sampler, batch_size=BATCH * (HORIZON + 1))

    def add(self, td: TensorDict) -> int:
        self._buffer.extend(td.clone().set("episode", torch.full((len(td),), self._episodes)))
        self._episodes += 1
        return self._episodes

    def sample(self) -> tuple[Any, ...]:
        slices = self._buffer.sample().view(BATCH, HORIZON + 1).permute(1, 0)
        reward = slices["reward"][1:].unsqueeze(-1).contiguous()
        terminated, task = slices.get("terminated", None), slices.get("task", None)
        terminated = torch.zeros_like(reward) if terminated is None else terminated[1:].unsqueeze(-1).contiguous()
        task = None if task is None else task[0].contiguous()
        return slices["obs"].contiguous(), slices["action"][1:].contiguous(), reward, terminated, task


def _describe(value: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype, value.device.type, value.is_contiguous()
    assert isinstance(value, TensorDict)
    return tuple(value.batch_size), {name: _describe(part) for name, part in sorted(value.items())}


def _check_values(obs: torch.Tensor, action: torch.Tensor, reward: torch.Tensor, terminated: torch.Tensor) -> None:
    """Asserts that every slice has consecutive rows of one episode, with the transitions of rows 1..H."""
    rows = obs[0, :, 0] + torch.arange(HORIZON + 1)[:, None]
    assert torch.equal(obs, torch.stack([rows, -rows], dim=2))
    assert torch.equal(action, torch.stack([rows, rows / 2, rows / 4], dim=2)[1:])
    assert torch.equal(reward, (rows / 8)[1:, :, None])
    number, row = (rows // 100).long(), (rows % 100).long()
    last = torch.tensor(LENGTHS)[number] - 1
    assert torch.equal(terminated, ((row == last) & (number % 2 == 1)).float()[1:, :, None])


@pytest.mark.parametrize(
    "columns", [{}, {"terminated": False}, {"task": True}, {"nested": True, "task": True}], ids=["plain", "endless", "tasks", "nested"]
)
def test_batches_have_the_form_of_tdmpc2s_own(buffer: Buffer, columns: dict[str, bool]) -> None:
    reference = Reference()
    for number, length in enumerate(LENGTHS):
        episode = make_episode(number, length, **columns)
        before = episode.clone()
        assert buffer.add(episode) == reference.add(episode) == number + 1
        assert set(episode.keys(True)) == set(before.keys(True))
        assert all(torch.equal(episode[key].nan_to_num(7), before[key].nan_to_num(7)) for key in before.keys(True, True))

    for _ in range(3):
        assert [_describe(part) for part in buffer.sample()] == [_describe(part) for part in reference.sample()]


def test_values_are_those_of_the_rows(buffer: Buffer) -> None:
    reference = Reference()
    for number, length in enumerate(LENGTHS):
        buffer.add(make_episode(number, length))
        reference.add(make_episode(number, length))

    for source in (buffer, reference):
        for _ in range(20):
            obs, action, reward, terminated, task = source.sample()
            _check_values(obs, action, reward, terminated)
            assert task is None


def test_nested_values_and_tasks_are_those_of_the_rows(buffer: Buffer) -> None:
    for number, length in enumerate(LENGTHS):
        buffer.add(make_episode(number, length, nested=True, task=True))

    obs, action, reward, terminated, task = buffer.sample()

    _check_values(obs["state"], action, reward, terminated)
    assert torch.equal(obs["rgb"][..., 0, 0, 0], obs["state"][..., 0].to(torch.uint8))
    assert torch.equal(task, (obs["state"][0, :, 0] // 100).long())


def _drawn(source: Any, batches: int) -> Counter[int]:
    """Counts how often each start was drawn, by its row's value."""
    return Counter(int(value) for _ in range(batches) for value in source.sample()[0][0, :, 0])


def _p_of_one_law(*drawn: Counter[int]) -> float:
    starts = sorted(set().union(*drawn))
    return float(scipy.stats.chi2_contingency([[counts[start] for start in starts] for counts in drawn]).pvalue)


def test_law_is_that_of_tdmpc2s_own(buffer: Buffer) -> None:
    torch.manual_seed(3)
    reference = Reference()
    for number, length in enumerate(LENGTHS):
        buffer.add(make_episode(number, length))
        reference.add(make_episode(number, length))

    ours, theirs = _drawn(buffer, 400), _drawn(reference, 400)

    weights = [len(LENGTHS) * (length - HORIZON) for length in LENGTHS]
    starts = {number * 100 + row: weights[number] for number, length in enumerate(LENGTHS) for row in range(length - HORIZON)}
    assert set(ours) == set(starts)
    expected = [400 * BATCH / weight for weight in starts.values()]
    assert scipy.stats.chisquare([ours[start] for start in starts], expected).pvalue > 1e-3
    assert _p_of_one_law(ours, theirs) > 1e-3
    # The same comparison distinguishes TD-MPC2's law from the other one, which this server is configured for.
    assert _p_of_one_law(Counter({start: 400 * BATCH // len(starts) for start in starts}), theirs) < 1e-12


class SmallWorldModel(nn.Module):
    """A small model shaped like TD-MPC2's: encoder, latent dynamics, reward, termination and value heads."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(2, 16), nn.Mish(), nn.Linear(16, 8))
        self.next = nn.Linear(8 + 3, 8)
        self.reward, self.termination, self.value = (nn.Linear(8 + 3, 1) for _ in range(3))


def update(model: SmallWorldModel, optimizer: torch.optim.Optimizer, buffer: Any) -> dict[str, float]:
    """One update in the order of TD-MPC2's agent: sample, unroll the latent state, weigh the losses over the horizon, step."""
    obs, action, reward, terminated, task = buffer.sample()
    assert task is None
    scale = 1 / 600
    with torch.no_grad():
        goals = model.encode(obs[1:] * scale)
    latent = model.encode(obs[0] * scale)
    losses = {name: torch.zeros(()) for name in ("consistency", "reward", "termination", "value")}
    for step in range(HORIZON):
        joint = torch.cat([latent, action[step] * scale], dim=-1)
        latent = model.next(joint)
        weight = 0.5**step
        losses["consistency"] = losses["consistency"] + weight * mse_loss(latent, goals[step])
        losses["reward"] = losses["reward"] + weight * mse_loss(model.reward(joint), reward[step] * scale)
        ended = binary_cross_entropy_with_logits(model.termination(joint), terminated[step])
        losses["termination"] = losses["termination"] + weight * ended
        losses["value"] = losses["value"] + weight * mse_loss(model.value(joint), reward[step:].sum(0) * scale)
    optimizer.zero_grad(set_to_none=True)
    torch.stack(list(losses.values())).sum().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 20)
    optimizer.step()
    return {name: float(loss.detach()) for name, loss in losses.items()}


def test_update_loop_of_tdmpc2s_shape_learns_as_with_its_own_buffer(buffer: Buffer) -> None:
    reference = Reference()
    for number, length in enumerate(LENGTHS):
        buffer.add(make_episode(number, length))
        reference.add(make_episode(number, length))
    reached = []
    for source in (buffer, reference):
        torch.manual_seed(5)
        model = SmallWorldModel()
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

        losses = [update(model, optimizer, source) for _ in range(150)]
        if source is buffer:
            buffer.add(make_episode(1, 30))  # the trainer keeps collecting
            losses += [update(model, optimizer, source) for _ in range(10)]

        first, last = ({name: np.mean([one[name] for one in part]) for name in losses[0]} for part in (losses[:10], losses[-30:]))
        assert all(last[name] < first[name] for name in ("reward", "termination", "value"))
        reached.append(last)
    ours, theirs = reached
    for name in ("reward", "termination", "value"):
        assert ours[name] == pytest.approx(theirs[name], rel=0.75)


def test_load_takes_the_multitask_layout(buffer: Buffer) -> None:
    episodes = torch.stack([make_episode(number, 11, terminated=False, task=True) for number in range(5)])
    episodes["episode"] = torch.zeros(5, 11, dtype=torch.int64)  # kept by the caller; TD-MPC2's own buffer overwrites it

    assert buffer.load(episodes) == 5
    assert buffer.load(episodes[:2]) == 7
    assert buffer.num_eps == 7

    obs, _, _, terminated, task = buffer.sample()
    assert torch.equal(task, (obs[0, :, 0] // 100).long())
    assert not terminated.any()


def test_num_eps_counts_episodes_ever_added(server: ServerThread, buffer: Buffer) -> None:
    assert buffer.num_eps == 0

    for number in range(60):
        added = buffer.add(make_episode(number, 50))

    assert added == buffer.num_eps == 60
    assert server.buffer.num_eps == 40  # 2,000 rows
    assert buffer.capacity == 2_000


def test_boolean_terminated_comes_back_as_float(buffer: Buffer) -> None:
    episode = make_episode(1, 9)
    buffer.add(episode.set("terminated", torch.arange(9) == 8))

    *_, terminated, _ = buffer.sample()

    assert terminated.dtype == torch.float32
    assert set(terminated.unique().tolist()) <= {0.0, 1.0}


def test_bad_episodes_are_refused(buffer: Buffer) -> None:
    buffer.add(make_episode(0, 9))

    with pytest.raises((InvalidEpisodeError, ServerInvalidEpisodeError), match="obs: "):
        buffer.add(make_episode(1, 9).set("obs", torch.zeros(9, 5)))
    with pytest.raises(InvalidEpisodeError, match="done: present together with terminated"):
        buffer.add(make_episode(1, 9).set("done", torch.zeros(9)))
    with pytest.raises((LoadError, ServerInvalidEpisodeError), match="obs: "):
        buffer.load(torch.stack([make_episode(1, 9).set("obs", torch.zeros(9, 5))]))
    assert buffer.num_eps == 1


def test_capacity_other_than_the_servers_is_logged_once(server: ServerThread, caplog: pytest.LogCaptureFixture) -> None:
    with Buffer(make_cfg(steps=500, replay_address=server.address)) as buffer:
        buffer.add(make_episode(0, 9))
        buffer.add(make_episode(1, 9))

    assert buffer.capacity == 500
    assert [record.getMessage() for record in caplog.records if record.name == "touchline._tdmpc2.single_run"] == [
        f"the server at {server.address} keeps 2,000 steps (config.buffer_size), 1,500 more than the 500 that cfg asks for, "
        "min(cfg.buffer_size, cfg.steps); to change it, start the server with TOUCHLINE_CONFIG__BUFFER_SIZE=500"
    ]


def test_address_comes_from_cfg_or_the_environment(server: ServerThread, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TOUCHLINE_ADDRESS", raising=False)
    with pytest.raises(InvalidArgumentError, match=r"no server: set cfg\.replay_address or TOUCHLINE_ADDRESS"):
        Buffer(make_cfg(replay_address=None))

    monkeypatch.setenv("TOUCHLINE_ADDRESS", server.address)
    with Buffer(make_cfg(device="cpu")) as buffer:
        assert buffer.add(make_episode(0, 9)) == 1


def test_client_that_is_already_there_stays_open(server: ServerThread) -> None:
    with ReplayClient(server.address, actor="trainer", as_numpy=True) as client:
        with Buffer(make_cfg(), backend=client) as buffer:
            buffer.add(make_episode(1, 60))
            obs, *_ = buffer.sample()

        assert isinstance(obs, torch.Tensor)
        with pytest.raises(ClosedError):
            buffer.sample()
        assert client.num_eps == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_server_of_the_other_row_convention_is_refused(backend: str) -> None:
    with ServerThread(server_config(row_convention="outgoing")) as server:
        given = None if backend == SERVED else server.buffer
        with pytest.raises(InvalidArgumentError, match=r"row_convention of the server: 'outgoing'"):
            Buffer(make_cfg(replay_address=server.address), given)


def test_learner_without_actors_waits_for_the_first_episode(server: ServerThread) -> None:
    sampled: list[Any] = []
    with Buffer(make_cfg(replay_address=server.address)) as buffer, ReplayClient(server.address) as actor:
        learner = threading.Thread(target=lambda: sampled.append(buffer.sample()))
        learner.start()
        actor.add({"done" if name == "terminated" else name: value for name, value in make_episode(2, 30).items()})
        learner.join()

    _check_values(*sampled[0][:4])


@needs_server
def test_sample_of_an_empty_buffer_in_process_raises_not_ready() -> None:
    with (
        Buffer(make_cfg(), backend=ReplayBuffer(server_config())) as buffer,
        pytest.raises(ServerNotReadyError, match="0 steps in 0 episodes"),
    ):
        buffer.sample()
