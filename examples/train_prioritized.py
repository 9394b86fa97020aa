"""A world model that is trained most on what it predicts worst: priorities by model error (Schaul et al. 2016).

    touchline-server serve &
    python examples/train_prioritized.py --address 127.0.0.1:50051 --updates 1000

A point drifts in a box and bounces off its walls. Most steps are straight lines, which a small network learns immediately; bounces are
what it gets wrong. The learner draws by the law `prioritized`, weights each slice's loss by `batch.weight`, and sends the errors of the
batch's transitions back with `update_priorities`. Each line of JSON has the share of bounces in the batches since the last one, beside
their share in what is stored, which is what uniform draws would have: that is what the law changed. The actor adds an episode after every
25 updates.
"""

from __future__ import annotations

import argparse
import json
import os
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import nn

from touchline import Batch, ReplayClient

STEPS = 200
BATCH = 64
HORIZON = 4
EPISODE_EVERY = 25
REPORT_EVERY = 100


def play(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Returns one episode: obs [T+1, 4] is position and velocity; `bounce` [T+1] says whether the step that led to a row hit a wall."""
    position, velocity = rng.uniform(-1, 1, 2), rng.normal(0, 0.03, 2)
    obs, actions, bounces = [np.concatenate([position, velocity])], [np.full(2, np.nan)], [False]
    for _ in range(STEPS):
        action = rng.normal(0, 1, 2)
        velocity = np.clip(velocity + 0.005 * action, -0.05, 0.05)
        position = position + velocity
        outside = np.abs(position) > 1
        position = np.where(outside, 2 * np.sign(position) - position, position)
        velocity = np.where(outside, -velocity, velocity)
        obs.append(np.concatenate([position, velocity]))
        actions.append(action)
        bounces.append(bool(outside.any()))
    reward = np.zeros(STEPS + 1)
    reward[0] = np.nan
    return {"obs": np.float32(obs), "action": np.float32(actions), "reward": np.float32(reward), "bounce": np.array(bounces)}


class Model:
    """Predicts the change of the observation by one step, trained on CPU tensors."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self._network = nn.Sequential(nn.Linear(6, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 4))
        self._optimizer = torch.optim.Adam(self._network.parameters(), lr=1e-3)

    def train(self, batch: Batch) -> torch.Tensor:
        """Makes one update and returns the errors before it, [H, B]: what the priorities should be."""
        predicted = self._network(torch.cat([batch.obs[:-1], batch.action], dim=-1))
        error = 100 * (predicted - (batch.obs[1:] - batch.obs[:-1])).square().sum(-1)
        loss = (batch.weight * error.mean(0)).mean()
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        errors: torch.Tensor = error.detach().sqrt()
        return errors


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_address = os.environ.get("TOUCHLINE_ADDRESS", "127.0.0.1:50051")
    parser.add_argument("--address", default=default_address, help="server to use (default: $TOUCHLINE_ADDRESS, else 127.0.0.1:50051)")
    parser.add_argument("--updates", type=int, default=1_000, help="number of updates")
    parser.add_argument("--seed", type=int, default=0, help="seed of the network, the episodes and the draws")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(1)  # more of them cost more than so small a network gains
    rng = np.random.default_rng(args.seed)
    model = Model(args.seed)
    stored: list[float] = []
    drawn: list[float] = []
    errors: list[float] = []
    with ReplayClient(args.address) as client:

        def add_episode() -> None:
            episode = play(rng)
            stored.append(float(episode["bounce"][1:].mean()))
            client.add(episode, actor="actor")

        for _ in range(40):
            add_episode()
        batches = client.batches(law="prioritized", batch_size=BATCH, horizon=HORIZON, seed=args.seed, as_numpy=False)
        for update, batch in enumerate(islice(batches, args.updates), start=1):
            error = model.train(batch)
            client.update_priorities(batch, error)
            errors.append(float(error.mean()))
            drawn.append(float(batch.extra["bounce"][1:].float().mean()))
            if update % EPISODE_EVERY == 0:
                add_episode()
            if update % REPORT_EVERY == 0:
                report: dict[str, Any] = {"update": update, "error": float(np.mean(errors[-REPORT_EVERY:]))}
                report["bounces_drawn"] = float(np.mean(drawn[-REPORT_EVERY:]))
                report["bounces_stored"] = float(np.mean(stored))
                report["times_uniform"] = report["bounces_drawn"] / report["bounces_stored"]
                print(json.dumps(report), flush=True)
        batches.close()
        counters = client.priorities.flush()
        totals = {"slices_updated": counters.updated, "slices_evicted": counters.evicted, "slices_dropped": counters.dropped}
        print(json.dumps(totals), flush=True)


if __name__ == "__main__":
    main()
