"""Writes a replay server's episodes to .pt files, which TD-MPC2's own trainer loads, and reads them with torch.

    python examples/export_pt.py chunks --newest 24000 --address replay-host:50051

Needs touchline[torch]. A file holds a TensorDict [episodes, rows], so there is one for each number of rows that the episodes have. A
further run replaces them. They are read with `weights_only` and mapped, not read into memory. Prints a line of JSON for each file.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
from tensordict import TensorDict
from tensordict._reductions import _make_td

from touchline import ReplayClient, datasets

if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("folder", type=Path, help="folder for the files")
    arguments.add_argument("--newest", type=int, help="number of episodes, the newest ones (default: all)")
    default_address = os.environ.get("TOUCHLINE_ADDRESS", "127.0.0.1:50051")
    arguments.add_argument("--address", default=default_address, help="server to use (default: $TOUCHLINE_ADDRESS, else 127.0.0.1:50051)")
    options = arguments.parse_args()

    with ReplayClient(options.address) as client:
        datasets.export(client, str(options.folder), format="tdmpc2", force=True, newest=options.newest)
    for path in sorted(options.folder.glob("*.pt")):
        # Besides tensors, the file may contain only a TensorDict and its parts: no other code in it would run.
        with torch.serialization.safe_globals([TensorDict, _make_td]):
            saved = torch.load(path, weights_only=True, mmap=True)
        episodes, rows = saved.shape
        print(json.dumps({"file": path.name, "episodes": episodes, "rows": rows, "columns": sorted(saved.keys())}))
