"""Several agents in one PettingZoo world: plays a task at random and sends an episode an agent to a replay server.

    python examples/record_pettingzoo.py --address 127.0.0.1:50051 --episodes 10

Needs touchline[recorders], mpe2 and pygame-ce. Each agent's episodes have an actor of their own, `simple_spread/agent_0`, ...; a learner
distinguishes them by `batch.actor_names`. Prints a line of JSON at the end.
"""

from __future__ import annotations

import argparse
import json
import os

from touchline import ReplayClient
from touchline.recorders import PettingZooRecorder

try:
    from mpe2 import simple_spread_v3
except ImportError:  # PettingZoo before 1.25 has it itself
    from pettingzoo.mpe import simple_spread_v3

if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--episodes", type=int, default=10, help="number of episodes to play, of 25 steps each")
    arguments.add_argument("--seed", type=int, default=0, help="seed of the task and of the random actions")
    default_address = os.environ.get("TOUCHLINE_ADDRESS", "127.0.0.1:50051")
    arguments.add_argument("--address", default=default_address, help="server to use (default: $TOUCHLINE_ADDRESS, else 127.0.0.1:50051)")
    options = arguments.parse_args()

    world = simple_spread_v3.parallel_env(N=3, max_cycles=25, continuous_actions=True)
    with ReplayClient(options.address, actor="simple_spread") as client, PettingZooRecorder(world, client) as env:
        for number, agent in enumerate(env.possible_agents):
            env.action_space(agent).seed(options.seed + number)
        for episode in range(options.episodes):
            env.reset(seed=options.seed + episode)
            while env.agents:  # the agents that are not done yet
                env.step({agent: env.action_space(agent).sample() for agent in env.agents})
    counters = env.recording.counters  # everything was acknowledged when the environment was closed
    print(json.dumps({"episodes_acknowledged": counters.acknowledged, "steps_acknowledged": counters.steps_acknowledged}))
