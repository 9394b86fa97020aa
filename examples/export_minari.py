"""Writes an actor's episodes from a replay server to a data set in Minari's folder, and reads it with Minari.

    python examples/export_minari.py soccer/left-v0 --actor left --address replay-host:50051

Needs touchline[minari]. Minari holds transitions: T + 1 rows become T of them. Prints lines of JSON.
"""

from __future__ import annotations

import argparse
import json
import os

import minari

from touchline import ReplayClient, datasets

if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("dataset", help="id of the data set to make: <name>-v<number>, optionally with <namespace>/ before it")
    arguments.add_argument("--actor", help="actor whose episodes are exported (default: all)")
    default_address = os.environ.get("TOUCHLINE_ADDRESS", "127.0.0.1:50051")
    arguments.add_argument("--address", default=default_address, help="server to use (default: $TOUCHLINE_ADDRESS, else 127.0.0.1:50051)")
    options = arguments.parse_args()

    with ReplayClient(options.address) as client:
        report = datasets.export(client, f"minari:{options.dataset}", actor=options.actor)
    for reason, ids in report.reasons.items():
        print(json.dumps({"left_out": len(ids), "reason": reason}))
    episodes = list(minari.load_dataset(options.dataset))
    returns = [float(episode.rewards.sum()) for episode in episodes]
    terminated = sum(bool(episode.terminations[-1]) for episode in episodes)
    print(json.dumps({"episodes": len(episodes), "terminated": terminated, "mean_return": sum(returns) / len(returns)}))
