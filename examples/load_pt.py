"""Stores TD-MPC2's multi-task .pt files on a replay server, each episode once, however often this is run and whatever the files are called.

    python examples/load_pt.py mt30/*.pt --address replay-host:50051

Needs touchline[torch]. Files are read without unpickling. A file with anything except tensors is refused, with the name of that object;
`--trust-pickle` reads it anyway, which runs any code in it. Prints a line of JSON for each file.
"""

from __future__ import annotations

import argparse
import json
import os

from touchline import ReplayClient, datasets

if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("files", nargs="+", help="files of TensorDicts [episodes, rows]; a folder of such files is one source")
    arguments.add_argument("--actor", default="mt30", help="actor of the episodes, which the files do not name (default: mt30)")
    arguments.add_argument("--trust-pickle", action="store_true", help="unpickle anything; only for files whose maker you trust")
    default_address = os.environ.get("TOUCHLINE_ADDRESS", "127.0.0.1:50051")
    arguments.add_argument("--address", default=default_address, help="server to use (default: $TOUCHLINE_ADDRESS, else 127.0.0.1:50051)")
    options = arguments.parse_args()

    refused = 0
    with ReplayClient(options.address, actor=options.actor) as client:
        for file in options.files:
            report = datasets.load(client, file, trust_pickle=options.trust_pickle)
            print(json.dumps({"file": file, "stored": report.stored, "duplicates": report.duplicates, "refused": report.refused}))
            refused += report.refused
    raise SystemExit(1 if refused else 0)
