"""An actor that plays on request, for tests that kill it: ``python spooling_actor.py ADDRESS NAME TIMEOUT_S SPOOL_DIR``.

Each line on its input is the number of an episode. It prints ``row`` after each row, ``ended NUMBER`` once ``end_episode`` has returned,
and when its input ends it closes its writer and prints the counters.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import numpy as np

from touchline import EpisodeWriter, ReplayClient

WIDTH = 2048


def played(number: int) -> dict[str, np.ndarray]:
    """Returns the columns of an episode of 20 to 59 rows of 8 KiB that follow from its number."""
    rng = np.random.default_rng(number)
    length = int(rng.integers(20, 60))
    return {
        "obs": rng.standard_normal((length, WIDTH), dtype=np.float32),
        "action": rng.standard_normal((length, 3)),
        "reward": rng.standard_normal(length, dtype=np.float32),
    }


def main() -> None:
    address, name, timeout_s, spool_dir = sys.argv[1:]
    # Messages so small that an episode goes in some ten to twenty chunks.
    client = ReplayClient(address, timeout_s=float(timeout_s), max_message_bytes=1 << 16)
    writer = EpisodeWriter(client, actor=name, spool_dir=spool_dir or None)
    print("open", flush=True)
    for line in sys.stdin:
        number = int(line)
        columns = played(number)
        writer.policy_version = number
        for row in range(len(columns["obs"])):
            writer.append({name: column[row] for name, column in columns.items()})
            print("row", flush=True)
        writer.end_episode()
        print(f"ended {number}", flush=True)
    writer.close(60)
    print(json.dumps(asdict(writer.counters)), flush=True)


if __name__ == "__main__":
    main()
