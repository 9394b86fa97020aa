"""Stores a Minari data set on a replay server, each episode once, however often this is run.

    python examples/load_minari.py D4RL/door/human-v2 --address replay-host:50051

Needs touchline[minari], and the data set in Minari's folder (``minari download D4RL/door/human-v2``).
The status is 1 if episodes were refused.
"""

from __future__ import annotations

import argparse
import json
import os

from touchline import ReplayClient, datasets

if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("dataset", help="id of the data set in Minari's folder")
    default_address = os.environ.get("TOUCHLINE_ADDRESS", "127.0.0.1:50051")
    arguments.add_argument("--address", default=default_address, help="server to use (default: $TOUCHLINE_ADDRESS, else 127.0.0.1:50051)")
    options = arguments.parse_args()

    with ReplayClient(options.address, actor=options.dataset) as client:
        # D4RL's data is float64; TD-MPC2 and the recorders store float32.
        report = datasets.load(client, f"minari:{options.dataset}", transforms=datasets.ColumnTransforms(float32=True))
        for reason, refusals in report.reasons.items():
            print(json.dumps({"refused": refusals.count, "reason": reason}))
        print(json.dumps({"stored": report.stored, "duplicates": report.duplicates, "episodes_on_the_server": client.num_eps}))
    raise SystemExit(1 if report.refused else 0)
