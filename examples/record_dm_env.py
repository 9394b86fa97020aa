"""An actor: plays a task of the dm_control suite at random and sends every episode to a replay server.

    python examples/record_dm_env.py --address 127.0.0.1:50051 --domain cartpole --task swingup --episodes 10

Needs touchline[recorders] and dm_control. The suite's observations are several float64 arrays, which would be stored as they are:
`obs.position`, `obs.velocity`. `transform=` joins them into the one float32 array that TD-MPC2 trains on. Prints a line of JSON at the end.
"""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

import numpy as np

os.environ.setdefault("MUJOCO_GL", "disabled")  # nothing is drawn; read when dm_control is imported
from dm_control import suite

from touchline import ReplayClient
from touchline.recorders import DmEnvRecorder


def flat(row: dict[str, Any]) -> dict[str, Any]:
    """Returns the row with its observation as one array, without float64."""
    row["obs"] = np.concatenate([np.ravel(part) for part in row["obs"].values()])
    return {name: value.astype(np.float32) for name, value in row.items()}


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--domain", default="cartpole", help="domain of the suite")
    arguments.add_argument("--task", default="swingup", help="task of the domain")
    arguments.add_argument("--episodes", type=int, default=10, help="number of episodes to play")
    arguments.add_argument("--seed", type=int, default=0, help="seed of the task and of the random actions")
    default_address = os.environ.get("TOUCHLINE_ADDRESS", "127.0.0.1:50051")
    arguments.add_argument("--address", default=default_address, help="server to use (default: $TOUCHLINE_ADDRESS, else 127.0.0.1:50051)")
    options = arguments.parse_args()

    task = suite.load(options.domain, options.task, task_kwargs={"random": options.seed})
    rng = np.random.default_rng(options.seed)
    with ReplayClient(options.address, actor=options.task) as client, DmEnvRecorder(task, client, transform=flat) as env:
        spec = env.action_spec()
        for _ in range(options.episodes):
            step = env.reset()
            while not step.last():
                step = env.step(rng.uniform(spec.minimum, spec.maximum, spec.shape))
    counters = env.recording.counters  # everything was acknowledged when the environment was closed
    print(json.dumps({"episodes_acknowledged": counters.acknowledged, "steps_acknowledged": counters.steps_acknowledged}))
