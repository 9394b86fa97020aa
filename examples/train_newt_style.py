"""A multi-task trainer in the style of Newt: one world model and one policy for several tasks, half of each batch demonstrations.

    touchline-server serve &
    python examples/train_newt_style.py --address 127.0.0.1:50051 --rounds 8

Newt (by the author of TD-MPC2) trains a world model of TD-MPC2's kind on many tasks together: it begins with demonstrations of all of them
and keeps half of each batch demonstrations while it plays. Here the tasks are three goals of one point. The buffer is TD-MPC2's, with
`mix=`: its batches have the demonstrations first, so the policy is cloned from the first half, and the world model learns from all of it.
Each round plays every task once and makes 40 updates. Prints a line of JSON for each round.
"""

from __future__ import annotations

import argparse
import json
import os
from types import SimpleNamespace

import numpy as np
import torch
from tensordict import TensorDict
from torch.nn import functional as F

from touchline import ReplayClient
from touchline.tdmpc2 import Buffer
from world_model import WorldModel, mlp

GOALS = np.array([[0.8, 0.0], [-0.4, 0.7], [-0.4, -0.7]])
"""Goal of each task."""
STEPS = 30
BATCH = 64
UPDATES = 40
MIX = {"demos": 0.5, "online": 0.5}


class Agent:
    """A world model and a policy that both get the task, as a one-hot vector behind the observation. On the CPU."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = WorldModel(4 + len(GOALS), 2)
        self.policy = mlp(4 + len(GOALS), 2)
        weights = [weight for weight in (*self.model.parameters(), *self.policy.parameters()) if weight.requires_grad]
        self._optimizer = torch.optim.Adam(weights, lr=2e-3)

    def act(self, obs: np.ndarray, task: int) -> np.ndarray:
        """Returns the policy's action."""
        with torch.no_grad():
            action: np.ndarray = self.policy(_with_task(torch.as_tensor(obs).float(), torch.tensor(task))).tanh().numpy()
        return action

    def update(self, buffer: Buffer) -> tuple[float, float]:
        """Makes one update; returns the error of the rewards, and that of the policy on the demonstrations."""
        obs, action, reward, _terminated, task = buffer.sample()
        assert task is not None
        obs = _with_task(obs, task)  # type: ignore[arg-type]
        demos = slice(0, BATCH // 2)
        cloning = F.mse_loss(self.policy(obs[:-1, demos]).tanh(), action[:, demos])
        losses = self.model.loss(obs, action, reward)
        self._optimizer.zero_grad()
        (losses.total + cloning).backward()
        self._optimizer.step()
        self.model.follow()
        return losses.reward.item(), cloning.item()


def _with_task(obs: torch.Tensor, task: torch.Tensor) -> torch.Tensor:
    """Returns observations [..., B, 4] with the one-hot vectors of the tasks [B] behind them."""
    hot = F.one_hot(task.long(), len(GOALS)).float()
    return torch.cat([obs, hot.expand(*obs.shape[:-1], len(GOALS))], dim=-1)


def play(task: int, agent: Agent | None, rng: np.random.Generator) -> tuple[TensorDict, float]:
    """Plays an episode, by the policy or else by a controller, with noise; returns its rows and the sum of its rewards."""
    position, velocity = rng.uniform(-1, 1, 2), np.zeros(2)
    rows = [(np.concatenate([position, velocity]), np.full(2, np.nan), np.nan)]
    for _ in range(STEPS):
        obs = rows[-1][0]
        chosen = -3 * (position - GOALS[task]) - 6 * velocity if agent is None else agent.act(obs, task)
        action = np.clip(chosen + rng.normal(0, 0.1, 2), -1, 1)
        velocity = 0.8 * velocity + 0.1 * action
        position = position + velocity
        rows.append((np.concatenate([position, velocity]), action, -float(np.linalg.norm(position - GOALS[task]))))
    obs, action, reward = (torch.tensor(np.stack(column), dtype=torch.float32) for column in zip(*rows, strict=True))
    columns = {"obs": obs, "action": action, "reward": reward, "task": torch.full((STEPS + 1,), task)}
    return TensorDict(columns, batch_size=[STEPS + 1]), float(reward[1:].sum())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_address = os.environ.get("TOUCHLINE_ADDRESS", "127.0.0.1:50051")
    parser.add_argument("--address", default=default_address, help="server to use (default: $TOUCHLINE_ADDRESS, else 127.0.0.1:50051)")
    parser.add_argument("--rounds", type=int, default=8, help="number of rounds; each plays every task once")
    parser.add_argument("--seed", type=int, default=0, help="seed of the networks and the episodes")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    rng = np.random.default_rng(args.seed)
    torch.set_num_threads(1)  # more only slow such a small model down
    agent = Agent(args.seed)
    size = 100_000
    with ReplayClient(args.address) as client:
        for name in MIX.keys() - client.tables().keys():
            client.create_table(name, buffer_size=size)
    common = {"buffer_size": size, "steps": size, "batch_size": BATCH, "horizon": 3, "replay_address": args.address, "device": "cpu"}
    with Buffer(SimpleNamespace(**common, replay_table="demos")) as demos:
        demos.load(torch.stack([play(task, None, rng)[0] for task in range(len(GOALS)) for _ in range(10)]))
    with Buffer(SimpleNamespace(**common, replay_table="online"), mix=MIX) as buffer:
        for round_number in range(1, args.rounds + 1):
            returns = []
            for task in range(len(GOALS)):
                episode, value = play(task, agent, rng)
                buffer.add(episode)
                returns.append(round(value, 2))
            errors = np.mean([agent.update(buffer) for _ in range(UPDATES)], axis=0)
            report = {"round": round_number, "reward_error": errors[0], "policy_error": errors[1], "returns": returns}
            print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
