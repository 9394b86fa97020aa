"""Reads stored episodes back from a replay server and ranks the actors by their mean return.

    python examples/read_episodes.py --address 127.0.0.1:50051 --newest 200

Prints a line of JSON for each actor, the best one first. Only the column `reward` is transferred.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import defaultdict

import numpy as np

from touchline import ReplayClient


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_address = os.environ.get("TOUCHLINE_ADDRESS", "127.0.0.1:50051")
    parser.add_argument("--address", default=default_address, help="server to use (default: $TOUCHLINE_ADDRESS, else 127.0.0.1:50051)")
    parser.add_argument("--newest", type=int, default=None, help="number of episodes to read, the newest ones (default: all)")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    returns: dict[str, list[float]] = defaultdict(list)
    with ReplayClient(args.address) as client, client.episodes(newest=args.newest, columns=["reward"]) as episodes:
        for episode in episodes:
            # Row 0 is the reset observation; its reward is undefined.
            returns[episode.actor].append(float(episode.columns["reward"][1:].sum()))
    for actor, values in sorted(returns.items(), key=lambda item: -np.mean(item[1])):
        print(json.dumps({"actor": actor, "episodes": len(values), "mean_return": float(np.mean(values))}))


if __name__ == "__main__":
    main()
