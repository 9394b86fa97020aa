"""An actor with a spool that plays without end, for schedules that kill it: ``python scheduled_actor.py ADDRESS CLIENT FIRST SPOOL_DIR``.

It plays an episode for each line of its input, and prints ``ended NUMBER`` once ``end_episode`` has returned, from FIRST on. When its input
ends, it closes its writer and prints how many episodes are left or were refused.
"""

from __future__ import annotations

import sys

from support.durable_cases import keyed_episode
from touchline import EpisodeWriter, ReplayClient

CLOSING_S = 300.0


def main() -> None:
    address, client, first, spool_dir = sys.argv[1:]
    writer = EpisodeWriter(ReplayClient(address, timeout_s=5.0), actor=f"actor-{client}", spool_dir=spool_dir, max_pending=100_000)
    number = int(first)
    for _ in sys.stdin:
        episode = keyed_episode(int(client), number)
        writer.policy_version = number
        for row in range(episode.length):
            writer.append({name: column[row] for name, column in episode.columns.items()})
        assert writer.end_episode() is not None
        print(f"ended {number}", flush=True)
        number += 1
    writer.close(CLOSING_S)
    print(f"left {writer.counters.pending} refused {writer.counters.refused} dropped {writer.counters.dropped}", flush=True)


if __name__ == "__main__":
    main()
