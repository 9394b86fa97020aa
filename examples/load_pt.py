"""Stores TD-MPC2's multi-task .pt files on a replay server, each episode once, however often this is run and whatever the files are called.

    python examples/load_pt.py mt30/*.pt --address replay-host:50051

Needs touchline[torch]. Files are read without unpickling. One with more in it than tensors is refused, with the name of what that is;
`--trust-pickle` reads it all the same, which runs whatever code is in it. Prints a line of JSON for each file.
"""

from __future__ import annotations

import argparse
import json
import os

from touchline import ReplayClient, datasets

if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("files", nargs="+", help="of TensorDicts [episodes, rows]; a folder of such files is one source")
    arguments.add_argument("--actor", default="mt30", help="who played the episodes; the files do not say (default: mt30)")
    arguments.add_argument("--trust-pickle", action="store_true", help="for files whose maker you trust")
    default_address = os.environ.get("TOUCHLINE_ADDRESS", "127.0.0.1:50051")
    arguments.add_argument("--address", default=default_address, help="of the server (default: $TOUCHLINE_ADDRESS, else 127.0.0.1:50051)")
    options = arguments.parse_args()

    refused = 0
    with ReplayClient(options.address, actor=options.actor) as client:
        for file in options.files:
            report = datasets.load(client, file, trust_pickle=options.trust_pickle)
            print(json.dumps({"file": file, "stored": report.stored, "duplicates": report.duplicates, "refused": report.refused}))
            refused += report.refused
    raise SystemExit(1 if refused else 0)
