"""Killed actors and absent servers: no partial episode is ever visible, and every spooled episode arrives once."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from support import spooling_actor
from support.durable_cases import contents, durable_config
from support.fault_tally import ACTOR_KILLS, note
from support.service_calls import Caller, ServerProcess, eventually
from support.spooling_actor import played
from support.store_cases import as_bits
from touchline_server import ReplayBuffer

CAPACITY = 16_000


class ActorProcess:
    """An actor in a process of its own that plays on request. A context manager: kills the process at the end if it still runs."""

    def __init__(self, address: str, spool_dir: Path | str, *, name: str = "left", timeout_s: float = 5.0) -> None:
        self.process = subprocess.Popen(
            [sys.executable, spooling_actor.__file__, address, name, str(timeout_s), str(spool_dir)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._expect("open")

    def begin(self, number: int, *, rows: int) -> None:
        """Starts an episode; returns after its first ``rows`` rows."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{number}\n")
        self.process.stdin.flush()
        for _ in range(rows):
            self._expect("row")

    def play(self, number: int) -> None:
        """Plays a whole episode; returns once ``end_episode`` has returned."""
        self.begin(number, rows=len(played(number)["obs"]))
        self._expect(f"ended {number}")

    def kill(self) -> list[int]:
        """Kills the actor; returns the episodes that it had ended without having reported them."""
        self.process.kill()
        assert self.process.stdout is not None
        rest = self.process.stdout.read().splitlines()
        self.process.wait()
        return [int(line.split()[1]) for line in rest if line.startswith("ended")]

    def finish(self) -> dict[str, int]:
        """Closes its writer; returns the counters."""
        out, log = self.process.communicate(timeout=300)
        assert self.process.returncode == 0, log
        counters: dict[str, int] = json.loads(out.splitlines()[-1])
        return counters

    def _expect(self, line: str) -> None:
        assert self.process.stdout is not None and self.process.stderr is not None
        found = self.process.stdout.readline().strip()
        assert found == line, f"{found!r}: {self.process.stderr.read() if not found else ''}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None and not pipe.closed:
                pipe.close()


def serve(folder: Path, *options: str) -> ServerProcess:
    return ServerProcess(folder, *options, TOUCHLINE_CONFIG__BUFFER_SIZE=str(CAPACITY), TOUCHLINE_STORAGE__DATA_DIR=str(folder / "data"))


def stored(folder: Path) -> list[tuple[str, int]]:
    """The actor and the number of each episode that a server left, oldest first, each compared bit for bit with what was played."""
    buffer = ReplayBuffer(durable_config(folder / "data", capacity=CAPACITY))
    found = contents(buffer)
    buffer.close()
    for actor, number, columns in found.values():
        assert columns == {name: as_bits(column) for name, column in played(number).items()}, (actor, number)
    return [(actor, number) for actor, number, _ in found.values()]


@pytest.mark.slow
@pytest.mark.timeout(600 + 10 * ACTOR_KILLS)
@pytest.mark.parametrize("spooled", [True, False])
def test_killed_actor_leaves_no_partial_episode_and_a_spool_loses_and_doubles_nothing(tmp_path: Path, spooled: bool) -> None:
    rng = random.Random(ACTOR_KILLS)
    spool_dir: Path | str = tmp_path / "spool" if spooled else ""
    ended: list[int] = []
    begun = resumed = 0
    moments = {"in mid-episode": 0, "in mid-upload": 0, "in end_episode": 0}

    with serve(tmp_path) as server:
        for kill in range(ACTOR_KILLS):
            with ActorProcess(server.address, spool_dir) as actor:
                for _ in range(rng.randint(1, 5)):
                    actor.play(begun)
                    ended.append(begun)
                    begun += 1
                moment = list(moments)[kill % 3]
                moments[moment] += 1
                if moment != "in mid-upload":  # otherwise the last episodes are being sent now
                    rows = len(played(begun)["obs"])
                    actor.begin(begun, rows=rows if moment == "in end_episode" else rng.randrange(rows))
                    begun += 1
                ended += actor.kill()
        with ActorProcess(server.address, spool_dir) as actor:
            actor.play(begun)
            ended.append(begun)
            counters = actor.finish()
            resumed = counters["resumed"]
        with Caller(server.address) as caller:
            counts = caller.counts()
        server.signal(signal.SIGTERM)
        assert server.wait() == 0, server.log

    found = [number for _, number in stored(tmp_path)]
    assert len(found) == len(set(found)) == counts.episodes_added, "an episode was stored twice"
    assert set(found) <= set(range(begun + 1))
    assert found[-1] == begun
    if spooled:
        assert set(ended) <= set(found)
        assert found == sorted(found), "oldest first"
        assert counters["pending"] == counters["refused"] == counters["dropped"] == 0
    note(actor_kills=ACTOR_KILLS, **{kill.replace(" ", "_").replace("-", "_"): count for kill, count in moments.items()})
    if spooled:
        note(episodes_spooled=len(ended), resumed_at_the_end=resumed, lost=0, doubled=0)


@pytest.mark.slow
def test_server_away_for_longer_than_the_deadline_holds_no_spooled_actor_up_and_everything_arrives_once(tmp_path: Path) -> None:
    timeout_s = 0.5
    numbers = {"left": 0, "right": 10_000}
    while_away = dict.fromkeys(numbers, 0)

    with serve(tmp_path) as first:
        address = first.address
        actors = {name: ActorProcess(address, tmp_path / name, name=name, timeout_s=timeout_s) for name in numbers}

        def play(name: str) -> None:
            actors[name].play(numbers[name])
            numbers[name] += 1

        for name in actors:
            play(name)
        with Caller(address) as caller:
            eventually(lambda: caller.counts().episodes_stored == 2, "both actors reach the server")
        first.signal(signal.SIGKILL)
        first.wait()

    with actors["left"], actors["right"]:
        away = time.monotonic()
        # The server is not back before this is over: an actor that waited for an answer would wait forever. Actors play at a pace, so
        # that the ring holds all on the quickest machine.
        pace = threading.Event()
        while time.monotonic() - away < 4 * timeout_s or min(while_away.values()) < 10:
            for name in actors:
                play(name)
                while_away[name] += 1
            pace.wait(timeout_s / 5)
        with serve(tmp_path, "--port", address.rpartition(":")[2]) as second:
            assert second.address == address
            for name in actors:
                play(name)
            counters: dict[str, Any] = {name: actor.finish() for name, actor in actors.items()}
            second.signal(signal.SIGTERM)
            assert second.wait() == 0, second.log

    found = stored(tmp_path)
    assert sorted(found) == [("left", number) for number in range(numbers["left"])] + [
        ("right", number) for number in range(10_000, numbers["right"])
    ]
    for name, count in while_away.items():
        assert counters[name]["acknowledged"] == counters[name]["appended"] == count + 2
        assert counters[name]["dropped"] == counters[name]["refused"] == counters[name]["pending"] == 0
