"""An actor: plays a Gymnasium task at random and sends every episode to a replay server.

    python examples/record_gymnasium.py --address 127.0.0.1:50051 --task Pendulum-v1 --episodes 10

An actor only wraps its environment; its loop stays the same. Prints a line of JSON at the end.
"""

from __future__ import annotations

import argparse
import json
import os

import gymnasium

from touchline import ReplayClient
from touchline.recorders import GymnasiumRecorder


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_address = os.environ.get("TOUCHLINE_ADDRESS", "127.0.0.1:50051")
    parser.add_argument("--address", default=default_address, help="server to use (default: $TOUCHLINE_ADDRESS, else 127.0.0.1:50051)")
    parser.add_argument("--task", default="Pendulum-v1", help="name of the task in Gymnasium's registry")
    parser.add_argument("--episodes", type=int, default=10, help="number of episodes to play")
    parser.add_argument("--seed", type=int, default=0, help="seed of the task and of the random actions")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    with ReplayClient(args.address, actor=args.task) as client, GymnasiumRecorder(gymnasium.make(args.task), client) as env:
        env.action_space.seed(args.seed)
        for number in range(args.episodes):
            env.reset(seed=args.seed + number)
            over = False
            while not over:
                _, _, terminated, truncated, _ = env.step(env.action_space.sample())
                over = terminated or truncated
    counters = env.recording.counters  # everything was acknowledged when the environment was closed
    print(json.dumps({"episodes_acknowledged": counters.acknowledged, "steps_acknowledged": counters.steps_acknowledged}))


if __name__ == "__main__":
    main()
