"""An actor with several environments: steps a Gymnasium vector environment at random and sends every episode to a replay server.

    python examples/record_vector.py --address 127.0.0.1:50051 --environments 8 --steps 500

Environments reset themselves at the end of their episodes, and the recorder finds the borders. Each environment's episodes have an
actor of their own, `CartPole-v1/0`, `CartPole-v1/1`, ... Prints a line of JSON at the end.
"""

from __future__ import annotations

import argparse
import json
import os

import gymnasium

from touchline import ReplayClient
from touchline.recorders import GymnasiumVectorRecorder

TASK = "CartPole-v1"

if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--environments", type=int, default=8, help="number of parallel environments")
    arguments.add_argument("--steps", type=int, default=500, help="steps of each environment, over any number of episodes")
    arguments.add_argument("--seed", type=int, default=0, help="seed of the task and of the random actions")
    default_address = os.environ.get("TOUCHLINE_ADDRESS", "127.0.0.1:50051")
    arguments.add_argument("--address", default=default_address, help="server to use (default: $TOUCHLINE_ADDRESS, else 127.0.0.1:50051)")
    options = arguments.parse_args()

    environments = gymnasium.make_vec(TASK, num_envs=options.environments, vectorization_mode="sync")
    with ReplayClient(options.address, actor=TASK) as client, GymnasiumVectorRecorder(environments, client) as env:
        env.action_space.seed(options.seed)
        env.reset(seed=options.seed)
        for _ in range(options.steps):
            env.step(env.action_space.sample())
    counters = env.recording.counters  # the unfinished episodes were truncated and sent, too
    print(json.dumps({"episodes_acknowledged": counters.acknowledged, "steps_acknowledged": counters.steps_acknowledged}))
