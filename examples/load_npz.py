"""Inspects an NPZ file of episodes, and stores them on a replay server if all of them are valid.

    python examples/load_npz.py demos.npz --address replay-host:50051

Such a file is made with only numpy: np.savez("demos.npz", **{"0/obs": obs, "0/action": action, "0/reward": reward, "1/obs": ...}), columns
[rows, ...] whose row 0 is the reset observation's. Prints lines of JSON; if episodes cannot be stored, it
prints the reasons and exits with 1.
"""

from __future__ import annotations

import argparse
import json
import os

from touchline import ReplayClient, datasets

if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("path", help="file to load")
    default_address = os.environ.get("TOUCHLINE_ADDRESS", "127.0.0.1:50051")
    arguments.add_argument("--address", default=default_address, help="server to use (default: $TOUCHLINE_ADDRESS, else 127.0.0.1:50051)")
    options = arguments.parse_args()

    found, columns = datasets.inspect(options.path)  # needs no server
    for name, column in columns.items():
        print(json.dumps({"column": name, "dtype": column.dtype, "shape": column.shape}))
    for reason, refusals in found.reasons.items():
        print(json.dumps({"refused": refusals.count, "reason": reason}))
    if found.refused:
        raise SystemExit(1)
    with ReplayClient(options.address, actor="demos") as client:
        report = datasets.load(client, options.path)
    for reason, refusals in report.reasons.items():
        print(json.dumps({"refused": refusals.count, "reason": reason}))
    print(json.dumps({"stored": report.stored, "duplicates": report.duplicates, "steps": report.steps}))
    raise SystemExit(1 if report.refused else 0)
