"""Actors and learners of a limited table are killed at random: the others go on, or the table says who has to move.

``FAULT_LIMITED_KILLS`` sets the number of kills, ``FAULT_SEED`` the schedule.
"""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from support import limited_peers
from support.limited_peers import STEPS
from support.service_calls import eventually, make_config
from touchline_server.service.app import ServerThread

KILLS = int(os.environ.get("FAULT_LIMITED_KILLS", "3"))
SEED = os.environ.get("FAULT_SEED") or str(random.SystemRandom().randrange(2**32))
RATE = {"samples_per_insert": 2, "tolerance": 40, "min_steps": STEPS}
WAIT_S = 120.0
"""Processes start, and the server notices a dead one: on a busy machine both take a while."""


class Peers:
    """The processes that act and learn, and the limit between them."""

    def __init__(self, server: ServerThread) -> None:
        self.server = server
        self.alive: dict[str, list[subprocess.Popen[bytes]]] = {"act": [], "learn": []}
        self.started = 0

    def start(self, role: str) -> None:
        which = f"actor-{self.started}" if role == "act" else ("ring", "messages")[self.started % 2]
        self.started += 1
        self.alive[role].append(limited_peers.start(role, self.server.address, which))

    def kill(self, role: str, position: int) -> None:
        process = self.alive[role].pop(position)
        process.kill()
        process.wait()

    def check(self) -> None:
        """Waits until both sides have gone on, or the only side that is left waits and is named the one that has to move."""
        limiter = self.server.buffer.table.rate
        before = limiter.status()
        acts, learns = (bool(self.alive[role]) for role in ("act", "learn"))

        def holds() -> bool:
            status = limiter.status()
            if acts and learns:
                return status.steps_added > before.steps_added and status.slices_delivered > before.slices_delivered
            if acts:
                return bool(status.adds_held) and "learners have to take" in status.adds_wait_for
            if learns:
                return bool(status.batches_held) and "actors have to add steps" in status.batches_wait_for
            return not status.adds_held and not status.batches_held  # the dead wait for nothing

        left = {role: len(processes) for role, processes in self.alive.items()}
        eventually(holds, lambda: f"seed {SEED}, alive {left}, before {before}, now {limiter.status()}", timeout_s=WAIT_S, every_s=0.02)
        status = limiter.status()
        assert abs(status.owed_slices) <= RATE["tolerance"] + STEPS * RATE["samples_per_insert"]


@contextmanager
def peers() -> Iterator[Peers]:
    with ServerThread(make_config(rate=RATE)) as server:
        running = Peers(server)
        try:
            yield running
        finally:
            for role, processes in running.alive.items():
                while processes:
                    running.kill(role, 0)


@pytest.mark.slow
@pytest.mark.timeout(300 + 150 * KILLS)
def test_whoever_is_killed_the_others_go_on_or_learn_who_has_to_move() -> None:
    rng = random.Random(SEED)
    print(f"FAULT_SEED={SEED}")
    with peers() as running:
        for role in ("act", "act", "learn", "learn"):
            running.start(role)
        running.check()
        for _ in range(KILLS):
            role = rng.choice([role for role, processes in running.alive.items() if processes] or ["none"])
            if role != "none":
                running.kill(role, rng.randrange(len(running.alive[role])))
                running.check()
            if rng.random() < 0.5:
                running.start(rng.choice(["act", "learn"]))
                running.check()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_side_that_is_left_waits_until_the_other_is_back() -> None:
    with peers() as running:
        running.start("act")
        running.start("learn")
        running.check()
        for role in ("learn", "act"):
            running.kill(role, 0)
            running.check()

            running.start(role)
            running.check()
