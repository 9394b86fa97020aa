"""A learner on demonstrations and online data, half and half: RLPD (Ball et al. 2023) on a point that has to come to rest at a goal.

    touchline-server serve &
    python examples/train_mixed.py --address 127.0.0.1:50051 --updates 1000

It creates the tables `demos` and `online`, fills the first with episodes of a controller, and adds an episode of the policy that it trains
to the second after every 25 updates. Each batch has as many slices from one table as from the other ("symmetric sampling"); the program
counts them by the batch's provenance and stops if it is ever otherwise. The agent is a deterministic actor and two critics with layer
normalisation, which RLPD found to matter most beside the sampling. Prints lines of JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import nn

from touchline import Batch, ReplayClient

STEPS = 40
BATCH = 128
DISCOUNT = 0.95
ONLINE_EVERY = 25
REPORT_EVERY = 100
MIX = {"online": 0.5, "demos": 0.5}

Policy = Callable[[np.ndarray], np.ndarray]


def play(policy: Policy, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Returns one episode: obs [T+1, 4] is position and velocity; row t has the action that led to it and its reward; row 0 has none."""
    position, velocity = rng.uniform(-1, 1, 2), np.zeros(2)
    obs, actions, rewards = [np.concatenate([position, velocity])], [np.full(2, np.nan)], [np.nan]
    for _ in range(STEPS):
        action = np.clip(policy(obs[-1]), -1, 1)
        velocity = 0.8 * velocity + 0.1 * action
        position = position + velocity
        obs.append(np.concatenate([position, velocity]))
        actions.append(action)
        rewards.append(-float(np.linalg.norm(position)))
    return {"obs": np.float32(obs), "action": np.float32(actions), "reward": np.float32(rewards)}


def demonstrator(rng: np.random.Generator) -> Policy:
    """Returns a controller that reaches the goal, with noise."""
    return lambda obs: -3 * obs[:2] - 6 * obs[2:] + rng.normal(0, 0.2, 2)


class Agent:
    """A deterministic actor and two critics, trained by the smaller one's target (Fujimoto et al. 2018) on CPU tensors."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.actor = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 2), nn.Tanh())
        self.critics = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 1))
            for _ in range(2)
        )
        self.targets = copy.deepcopy(self.critics).requires_grad_(False)
        self._actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=1e-3)
        self._critic_optimizer = torch.optim.Adam(self.critics.parameters(), lr=1e-3)

    def act(self, obs: np.ndarray) -> np.ndarray:
        """Returns the policy's action."""
        with torch.no_grad():
            action: np.ndarray = self.actor(torch.as_tensor(obs, dtype=torch.float32)).numpy()
        return action

    def train(self, batch: Batch) -> float:
        """Makes one update and returns the critics' loss before it."""
        before, after, action, reward = batch.obs[0], batch.obs[1], batch.action[0], batch.reward[0]
        with torch.no_grad():
            target = reward + DISCOUNT * self._values(self.targets, after, self.actor(after)).amin(0)
        loss = (self._values(self.critics, before, action) - target).square().mean()
        self._critic_optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._critic_optimizer.step()
        self._actor_optimizer.zero_grad()
        (-self._values(self.critics, before, self.actor(before)).mean()).backward()
        self._actor_optimizer.step()
        with torch.no_grad():
            for target_weight, weight in zip(self.targets.parameters(), self.critics.parameters(), strict=True):
                target_weight.lerp_(weight, 0.02)
        return float(loss.detach())

    @staticmethod
    def _values(critics: nn.ModuleList, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        return torch.stack([critic(torch.cat([obs, action], dim=1)) for critic in critics])


def count_slices(batch: Batch) -> dict[str, int]:
    """Returns how many slices of a batch each table provided, by its provenance."""
    counts = np.bincount(np.asarray(batch.table), minlength=len(batch.table_names))
    return dict(zip(batch.table_names, counts.tolist(), strict=True))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_address = os.environ.get("TOUCHLINE_ADDRESS", "127.0.0.1:50051")
    parser.add_argument("--address", default=default_address, help="server to use (default: $TOUCHLINE_ADDRESS, else 127.0.0.1:50051)")
    parser.add_argument("--updates", type=int, default=1_000, help="number of updates")
    parser.add_argument("--seed", type=int, default=0, help="seed of the networks, the episodes and the draws")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    rng = np.random.default_rng(args.seed)
    agent = Agent(args.seed)
    losses: list[float] = []
    slices: dict[str, int] = dict.fromkeys(MIX, 0)
    with ReplayClient(args.address) as client:
        for name in MIX.keys() - client.tables().keys():
            client.create_table(name)
        client.load((play(demonstrator(rng), rng) for _ in range(20)), table="demos", actor="controller")
        client.add(play(agent.act, rng), table="online", actor="agent")
        batches = client.batches(mix=MIX, batch_size=BATCH, horizon=1, law="step", as_numpy=False)
        for update, batch in enumerate(islice(batches, args.updates), start=1):
            counts = count_slices(batch)
            if counts != {"online": BATCH // 2, "demos": BATCH // 2}:
                raise AssertionError(f"update {update}: a batch of {counts}, expected half of {BATCH} from each table")
            slices = {name: slices[name] + counts[name] for name in slices}
            losses.append(agent.train(batch))
            if update % ONLINE_EVERY == 0:
                client.add(play(lambda obs: agent.act(obs) + rng.normal(0, 0.1, 2), rng), table="online", actor="agent")
            if update % REPORT_EVERY == 0:
                report: dict[str, Any] = {"update": update, "loss": float(np.mean(losses[-REPORT_EVERY:])), "slices": slices}
                report["return"] = float(
                    np.mean([np.nansum(play(agent.act, np.random.default_rng(number))["reward"]) for number in range(10)])
                )
                print(json.dumps(report), flush=True)
        batches.close()


if __name__ == "__main__":
    main()
