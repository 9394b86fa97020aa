"""Stores the episodes of an HDF5 file on a replay server, under one actor and as one of the tasks that a learner trains on.

    python examples/load_hdf5.py demos.h5 --actor teleoperation --task 3 --drop camera --address replay-host:50051

Needs touchline[hdf5]. The layout of the file is in docs/datasets.md: a group an episode, a dataset a column. float64
is stored as float32, as TD-MPC2 does. Prints lines of JSON; the status is 1 if episodes were refused.
"""

from __future__ import annotations

import argparse
import json
import os

from touchline import ReplayClient, datasets

if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("path", help="file to load")
    arguments.add_argument("--actor", help="actor of the episodes (default: as the file says)")
    arguments.add_argument("--task", type=int, help="number to store as the column `task`")
    arguments.add_argument("--drop", action="append", default=[], help="column to leave out; repeatable")
    default_address = os.environ.get("TOUCHLINE_ADDRESS", "127.0.0.1:50051")
    arguments.add_argument("--address", default=default_address, help="server to use (default: $TOUCHLINE_ADDRESS, else 127.0.0.1:50051)")
    options = arguments.parse_args()

    transforms = datasets.ColumnTransforms(task=options.task, drop=tuple(options.drop), float32=True)
    with ReplayClient(options.address) as client:
        report = datasets.load(client, options.path, actor=options.actor, transforms=transforms)
        for reason, refusals in report.reasons.items():
            print(json.dumps({"refused": refusals.count, "reason": reason, "first_at": refusals.examples[0][0]}))
        print(json.dumps({"stored": report.stored, "duplicates": report.duplicates, "columns": list(client.info().columns)}))
    raise SystemExit(1 if report.refused else 0)
