"""Writes some columns of a replay server's newest episodes to a compressed NPZ file, and reads them with numpy.

    python examples/export_npz.py newest.npz --newest 100 --column obs --column reward --address replay-host:50051

Needs only numpy. The members of the file are `<episode id>/<column>`; only the requested columns are transferred. Prints a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os

import numpy as np

from touchline import ReplayClient, datasets

if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("path", help="file to write")
    arguments.add_argument("--newest", type=int, default=100, help="number of episodes")
    arguments.add_argument("--column", action="append", help="column to write; repeatable (default: all)")
    default_address = os.environ.get("TOUCHLINE_ADDRESS", "127.0.0.1:50051")
    arguments.add_argument("--address", default=default_address, help="server to use (default: $TOUCHLINE_ADDRESS, else 127.0.0.1:50051)")
    options = arguments.parse_args()

    with ReplayClient(options.address) as client:
        report = datasets.export(client, options.path, newest=options.newest, columns=options.column, compress=True)
    with np.load(options.path) as file:
        returns = {name.removesuffix("/reward"): float(file[name][1:].sum()) for name in file.files if name.endswith("/reward")}
    print(json.dumps({"episodes": report.written, "steps": report.steps, "return_of_episode": returns}))
