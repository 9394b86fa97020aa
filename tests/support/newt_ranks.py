"""A rank of a training in Newt's shape: it plays its own tasks, adds its episodes, and samples its part of the batches. No model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tensordict import TensorDict

STEPS, TASKS = 12, 4


def episode(task: int, number: int, *, played: bool) -> TensorDict:
    """Returns an episode [rows]; its observations say which task and episode it is, and whether it was played or is a demonstration."""
    steps = torch.arange(STEPS + 1, dtype=torch.float32)
    obs = torch.stack([torch.full_like(steps, task), torch.full_like(steps, number), torch.full_like(steps, played), steps], dim=1)
    action = torch.full((STEPS + 1, 2), 0.5)
    reward = steps.clone()
    action[0], reward[0] = torch.nan, torch.nan
    columns = {"obs": obs, "action": action, "reward": reward, "task": torch.full((STEPS + 1,), task, dtype=torch.int32)}
    return TensorDict(columns, batch_size=[STEPS + 1])


def demonstrations(per_task: int) -> TensorDict:
    """Returns demonstrations of all tasks as rows [N], as Newt's data sets are."""
    episodes = []
    for task in range(TASKS):
        for number in range(per_task):
            steps = episode(task, number, played=False)
            steps["episode"] = torch.full((STEPS + 1,), len(episodes))
            episodes.append(steps)
    return torch.cat(episodes)


def train(rank: int, world_size: int, rendezvous: str, buffer: Any, out: str) -> None:
    """Runs a rank, and writes what it saw as JSON."""
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    seen: dict[str, Any] = {"ids": [], "batches": []}
    for number in range(6):
        for task in range(rank, TASKS, world_size):
            seen["ids"].append(buffer.next_episode_id(world_size, rank))
            buffer.add(episode(task, number, played=True).unsqueeze(0), world_size, rank)
    seen["num_eps"] = buffer.num_eps
    dist.barrier()
    for _ in range(10):
        obs, action, reward, task = buffer.sample(torch.device("cpu"))
        assert task is not None and (task == obs[:-1, :, 0]).all()  # each slice has its episode's task
        assert tuple(action.shape) == (*task.shape, 2) and tuple(reward.shape) == (*task.shape, 1)
        assert (obs[1:, :, 3] == reward[:, :, 0]).all()
        seen["batches"].append(obs[0].tolist())
    buffer.close()
    Path(out.format(rank=rank)).write_text(json.dumps(seen))
    dist.barrier()
    dist.destroy_process_group()
