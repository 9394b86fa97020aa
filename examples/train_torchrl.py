"""A TorchRL trainer with Touchline as its replay buffer: DQN on CartPole.

    python examples/train_torchrl.py --address 127.0.0.1:50051 --frames 5000

The collector, the loss and the loop are TorchRL's; only the line that makes the buffer changes. Prints lines of JSON: frames
played, transitions on the server, and the mean length of the episodes that ended since the line before, which grows as it learns.
"""

from __future__ import annotations

import argparse
import json
import os

import torch
from tensordict.nn import TensorDictSequential
from torch import nn
from torchrl.envs import GymEnv, StepCounter, TransformedEnv
from torchrl.modules import EGreedyModule, QValueActor
from torchrl.objectives import DQNLoss, SoftUpdate

from touchline.torchrl import RemoteReplayBuffer

try:
    from torchrl.collectors import Collector
except ImportError:  # TorchRL before 0.11
    from torchrl.collectors import SyncDataCollector as Collector

FRAMES_PER_BATCH = 100
RANDOM_FRAMES = 500
UPDATES = 50
"""Updates after each batch of frames."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_address = os.environ.get("TOUCHLINE_ADDRESS", "127.0.0.1:50051")
    parser.add_argument("--address", default=default_address, help="server to use (default: $TOUCHLINE_ADDRESS, else 127.0.0.1:50051)")
    parser.add_argument("--frames", type=int, default=5000, help="number of frames to play")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(0)
    env = TransformedEnv(GymEnv("CartPole-v1"), StepCounter())
    env.set_seed(0)
    net = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    actor = QValueActor(net, in_keys=["observation"], spec=env.action_spec)
    explore = EGreedyModule(env.action_spec, eps_init=0.5, eps_end=0.05, annealing_num_steps=args.frames // 2)
    collector = Collector(
        env,
        TensorDictSequential(actor, explore),
        frames_per_batch=FRAMES_PER_BATCH,
        total_frames=args.frames,
        init_random_frames=RANDOM_FRAMES,
    )
    loss_module = DQNLoss(actor, action_space=env.action_spec, delay_value=True)
    loss_module.make_value_estimator(gamma=0.98)
    target = SoftUpdate(loss_module, eps=0.98)
    optimizer = torch.optim.Adam(loss_module.parameters(), lr=1e-3)

    # Of torchrl.data: ReplayBuffer(storage=LazyTensorStorage(100_000), batch_size=128)
    with RemoteReplayBuffer(args.address, batch_size=128) as buffer:
        frames, lengths = 0, []
        for data in collector:
            buffer.extend(data)
            frames += data.numel()
            explore.step(data.numel())
            lengths += data["next", "step_count"][data["next", "done"]].tolist()
            if frames < RANDOM_FRAMES:
                continue
            for _ in range(UPDATES):
                loss = loss_module(buffer.sample())["loss"]
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                target.step()
            if frames % 1000 == 0 and lengths:
                print(json.dumps({"frames": frames, "stored": len(buffer), "length": sum(lengths) / len(lengths)}), flush=True)
                lengths = []
    collector.shutdown()


if __name__ == "__main__":
    main()
