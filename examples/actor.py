"""An actor: plays robot soccer and sends the episodes of the four players to a replay server.

    python examples/actor.py --address 127.0.0.1:50051 --matches 10

Prints a line of JSON for each match, and at the end one with its totals. SIGTERM or Ctrl-C ends the match in progress, sends it, and exits
with 0. While the server is away it keeps playing, until 64 episodes a player wait; they are sent when the server is back. With
--spool-dir they wait on the disk, 1 GiB a player, and are sent when the server or, after a kill or a power cut, this program is back. With
--lockstep a match is one episode of all players instead of one a player.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import signal
import socket
import sys
import time
import zlib
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from soccer import PLAYERS, MatchRows, NoisyChaser, TeamRows, make_match, play_match, shaped_reward
from touchline import ReplayClient, UnacknowledgedError
from touchline.recorders import DmEnvRecorder

if TYPE_CHECKING:
    import dm_env

FLUSH_TIMEOUT_S = 30.0
"""Time for the server to acknowledge the waiting episodes after the last match."""


class StopRequest:
    """Flag that the first SIGTERM or SIGINT sets; a second one kills."""

    def __init__(self) -> None:
        self.requested = False
        signal.signal(signal.SIGTERM, self._request)
        signal.signal(signal.SIGINT, self._request)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(number, signal.SIG_DFL)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_address = os.environ.get("TOUCHLINE_ADDRESS", "127.0.0.1:50051")
    parser.add_argument("--address", default=default_address, help="server to use (default: $TOUCHLINE_ADDRESS, else 127.0.0.1:50051)")
    parser.add_argument("--actor-name", default=f"soccer-{socket.gethostname()}", help="default: soccer-<hostname>")
    parser.add_argument("--table", default="", help="table on the server for the episodes (default: the server's default table)")
    parser.add_argument("--spool-dir", type=Path, help="folder for unacknowledged episodes (default: none, they wait in memory)")
    parser.add_argument("--seed", type=int, help="seed of pitch and policies (default: derived from the actor's name)")
    parser.add_argument("--matches", type=int, default=0, help="number of matches; 0, the default: until stopped")
    parser.add_argument("--match-seconds", type=float, default=10.0, help="time limit of a match, in the simulation's time")
    parser.add_argument("--lockstep", action="store_true", help="send each match as one episode of all players (default: one a player)")
    return parser.parse_args()


def rewards_of(step: dm_env.TimeStep) -> list[float]:
    """Returns the reward of each player for a step."""
    return [shaped_reward(float(goal), observation) for goal, observation in zip(step.reward, step.observation, strict=True)]


def main() -> int:
    args = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    stop = StopRequest()
    seed = zlib.crc32(args.actor_name.encode()) if args.seed is None else args.seed
    environment = make_match(seed=seed, match_seconds=args.match_seconds)
    policies = [NoisyChaser(seed=(seed, player)) for player in range(PLAYERS)]
    rows, tracks = (TeamRows(), 1) if args.lockstep else (MatchRows(), PLAYERS)
    episodes = steps = 0

    with (
        ReplayClient(args.address, table=args.table, actor=args.actor_name) as client,
        DmEnvRecorder(environment, client, lockstep=args.lockstep, transform=rows, spool_dir=args.spool_dir) as match,
    ):
        for number in range(args.matches) if args.matches else itertools.count():
            rows.match, length, returns = number, 0, [0.0] * PLAYERS
            for step in play_match(match, policies):
                length += 1
                if not step.first():
                    returns = [sum(pair) for pair in zip(returns, rewards_of(step), strict=True)]
                if stop.requested:
                    break
            if length > 1:  # a match stopped at its first row has no transition to send
                episodes, steps = episodes + tracks, steps + tracks * length
                report = {"time": time.time(), "match": number, "steps": length, "returns": returns, "cut": stop.requested}
                print(json.dumps(report), flush=True)
            if stop.requested:
                break

        try:
            match.recording.close(FLUSH_TIMEOUT_S)  # returns once everything is acknowledged, or waits in the spool
        except UnacknowledgedError as error:
            logging.error("%s", error)
        counters = match.recording.counters
        totals = {
            "episodes_played": episodes,
            "episodes_acknowledged": counters.acknowledged,
            "steps_played": steps,
            "steps_acknowledged": counters.steps_acknowledged,
        }
        if args.spool_dir:
            totals["episodes_resumed"] = counters.resumed
            totals["episodes_waiting"] = counters.pending
        print(json.dumps(totals), flush=True)
    safe = totals["episodes_acknowledged"] + totals.get("episodes_waiting", 0)
    return 0 if safe == episodes + totals.get("episodes_resumed", 0) else 1


if __name__ == "__main__":
    sys.exit(main())
