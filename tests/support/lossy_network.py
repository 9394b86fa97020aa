"""Actors and a learner over a network whose packets get lost.

Usage: ``unshare --map-root-user --net python tests/support/lossy_network.py FOLDER EPISODES``. Changes the loopback device of the network
namespace that it runs in, which therefore has to be one of its own. Loses 10% of the packets and delays the others by 50 ms (``tc``'s
netem); on kernels without netem the firewall loses them (``iptables``), without a delay. Prints what it counted as JSON.
"""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

from support.playing import Learner, Players, assert_stored_once
from support.service_calls import Caller, ServerProcess
from touchline import DeadlineError, UnavailableError

LOSS = 0.1
TIMEOUT_S = 1.0
_STATISTIC = ("OUTPUT", "-o", "lo", "-m", "statistic", "--mode", "random", "--probability", str(LOSS), "-j", "DROP")


def command(*words: str) -> str:
    """Runs a system command; ends this program with the command's output if it fails."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise SystemExit(f"no command `{words[0]}`") from None
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def lose_packets() -> str:
    """Makes the loopback device lossy; returns the means, netem or the firewall."""
    others = [name for _, name in socket.if_nameindex() if name != "lo"]
    if others:
        raise SystemExit(f"this network has {', '.join(others)} beside lo: it is not one of its own")
    command("ip", "link", "set", "lo", "up")
    netem = ("tc", "qdisc", "add", "dev", "lo", "root", "netem", "loss", f"{LOSS:.0%}", "delay", "50ms")
    if subprocess.run(netem, capture_output=True, check=False).returncode == 0:
        return "netem"
    command("iptables", "-A", *_STATISTIC)
    return "iptables"


def packets_lost(by: str) -> int:
    """Returns the number of packets lost so far."""
    if by == "netem":
        (count,) = re.findall(r"dropped (\d+)", command("tc", "-s", "qdisc", "show", "dev", "lo"))
        return int(count)
    listed = command("iptables", "-L", "OUTPUT", "-v", "-x", "-n").splitlines()
    return sum(int(line.split()[0]) for line in listed if "DROP" in line and "statistic" in line)


def pull_cable(pulled: bool) -> None:
    """Starts or stops losing every packet."""
    command("iptables", *(("-I", "OUTPUT", "1") if pulled else ("-D", "OUTPUT")), "-o", "lo", "-j", "DROP")


def main(folder: Path, episodes: int) -> dict[str, object]:
    by = lose_packets()
    environment = {"TOUCHLINE_STORAGE__DATA_DIR": str(folder / "data"), "TOUCHLINE_CONFIG__MIN_HISTORY": "0"}
    with ServerProcess(folder, **environment) as process, Players(process.address, timeout_s=TIMEOUT_S) as players:
        players.play(episodes)
        players.flush_all()
        with Learner(process.address, batch_size=16) as learner:
            learner.wait_for(20)
            pull_cable(True)
            players.play(episodes)
            errors = players.pending_errors(3 * TIMEOUT_S)
            pull_cable(False)
            players.flush_all()
            learner.wait_for(20)
            assert len(errors) == episodes * len(players.writers), errors
            assert {type(why) for why in errors} <= {DeadlineError, UnavailableError}, errors
            batches = learner.batches
        with Caller(process.address) as caller:
            counts = caller.counts()
        lost = packets_lost(by)
        process.signal(signal.SIGTERM)
        assert process.wait() == 0, process.log
        assert_stored_once(folder / "data", players.everything)
        assert counts.episodes_added == len(players.everything)
    return {
        "by": by,
        "episodes": len(players.everything),
        "sent_again": counts.episodes_duplicate,
        "batches": batches,
        "packets_lost": lost,
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]))))
