"""Writes a replay server's episodes to an HDF5 file, and reads one of them with h5py.

    python examples/export_hdf5.py everything.h5 --address replay-host:50051

Needs touchline[hdf5]. The layout is in docs/datasets.md; `touchline load everything.h5` stores the episodes again.
"""

from __future__ import annotations

import argparse
import json
import os

import h5py

from touchline import ReplayClient, datasets

if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("path", help="file to write")
    default_address = os.environ.get("TOUCHLINE_ADDRESS", "127.0.0.1:50051")
    arguments.add_argument("--address", default=default_address, help="server to use (default: $TOUCHLINE_ADDRESS, else 127.0.0.1:50051)")
    options = arguments.parse_args()

    with ReplayClient(options.address) as client:
        report = datasets.export(client, options.path)
    with h5py.File(options.path) as file:
        rewards = [episode["reward"] for episode in file["episodes"].values()]
        print(json.dumps({"episodes": report.written, "steps": sum(len(column) for column in rewards)}))
