"""A trainer in the style of TD-MPC2 with Touchline as its buffer: alternately plays a task and trains a world model.

    python examples/train_tdmpc2_style.py --address 127.0.0.1:50051 --episodes 20

In TD-MPC2's own code only the import changes: `from touchline.tdmpc2 import Buffer` instead of `from common.buffer import Buffer`. With
`--in-process` there is no server: the buffer is in this process, like TD-MPC2's. Prints a line of JSON for each episode.
"""

from __future__ import annotations

import argparse
import json
import os
from types import SimpleNamespace
from typing import Any

import gymnasium
import torch
from tensordict import TensorDict

from touchline.tdmpc2 import Buffer
from world_model import WorldModel

SEED_EPISODES = 3
"""Episodes played before training starts."""
UPDATES = 40
"""Updates after each episode."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_address = os.environ.get("TOUCHLINE_ADDRESS", "127.0.0.1:50051")
    parser.add_argument("--address", default=default_address, help="server to use (default: $TOUCHLINE_ADDRESS, else 127.0.0.1:50051)")
    parser.add_argument("--in-process", action="store_true", help="use a buffer in this process instead of a server")
    parser.add_argument("--episodes", type=int, default=20, help="number of episodes to play")
    return parser.parse_args()


def make_buffer(cfg: Any, *, in_process: bool) -> Buffer:
    """Returns TD-MPC2's buffer, on a server or in this process."""
    if not in_process:
        return Buffer(cfg)
    from touchline_server import Config, ReplayBuffer

    return Buffer(cfg, backend=ReplayBuffer(Config(config={"buffer_size": min(cfg.buffer_size, cfg.steps), "horizon": cfg.horizon})))


def row(obs: Any, action: torch.Tensor, reward: float, terminated: float) -> TensorDict:
    """Returns one row [1] of an episode."""
    columns = {"obs": torch.as_tensor(obs), "action": action, "reward": torch.tensor(reward), "terminated": torch.tensor(terminated)}
    return TensorDict(columns).unsqueeze(0)


def play(env: Any, *, seed: int) -> TensorDict:
    """Returns an episode [rows] of random play; row 0 is the reset, with NaN for action, reward and termination."""
    obs, _ = env.reset(seed=seed)
    rows = [row(obs, torch.full(env.action_space.shape, torch.nan), torch.nan, torch.nan)]
    over = False
    while not over:
        action = torch.from_numpy(env.action_space.sample())
        obs, reward, terminated, truncated, _ = env.step(action.numpy())
        rows.append(row(obs, action, float(reward), float(terminated)))
        over = terminated or truncated
    return torch.cat(rows)


def update(model: WorldModel, optimizer: torch.optim.Optimizer, buffer: Buffer) -> float:
    """Makes one update, as TD-MPC2's agent does from its buffer, and returns the error of the rewards."""
    obs, action, reward, _terminated, _task = buffer.sample()
    losses = model.loss(obs, action, reward)
    optimizer.zero_grad()
    losses.total.backward()
    optimizer.step()
    model.follow()
    return losses.reward.item()


def main() -> None:
    args = parse_arguments()
    cfg = SimpleNamespace(buffer_size=1_000_000, steps=100_000, batch_size=64, horizon=3, replay_address=args.address)
    env = gymnasium.make("Pendulum-v1")
    env.action_space.seed(0)
    model = WorldModel(*env.observation_space.shape, *env.action_space.shape).to("cuda" if torch.cuda.is_available() else "cpu")
    optimizer = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], lr=1e-3)
    with make_buffer(cfg, in_process=args.in_process) as buffer:
        for episode in range(args.episodes):
            episodes = buffer.add(play(env, seed=episode))
            if episode + 1 < SEED_EPISODES:
                continue
            errors = [update(model, optimizer, buffer) for _ in range(UPDATES)]
            print(json.dumps({"episodes": episodes, "reward_error": sum(errors) / len(errors)}), flush=True)


if __name__ == "__main__":
    main()
