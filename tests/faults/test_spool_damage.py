"""Bits of a spool's files are flipped, as on a failing disk: an episode is sent correctly, or reported and not sent."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from support.codec_cases import same_episode
from support.durable_cases import keyed_episode
from support.fault_tally import FLIPS, note
from touchline import SpoolError
from touchline._spool.file import FILE_NAME
from touchline._spool.queue import Spool
from touchline_protos.codec import Episode

LIMIT = 8 << 20
EPISODES = 8


def flip(path: Path, rng: random.Random) -> None:
    """Flips one bit of a file."""
    at = rng.randrange(path.stat().st_size)
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << rng.randrange(8)]))


def drain(folder: Path) -> tuple[list[int], int]:
    """Takes everything out of a spool as a writer does; returns the correct episodes, and the number of reports."""
    try:
        spool = Spool(folder, limit_bytes=LIMIT)
    except SpoolError:
        return [], 1
    arrived, told = [], int(spool.missing > 0)
    try:
        while (taken := spool.peek()) is not None:
            assert len(arrived) + told <= EPISODES, "more episodes than were put in"
            waiting, found = taken
            if isinstance(found, Episode):
                assert found.key is not None
                assert same_episode(found, keyed_episode(0, found.key.sequence)), "a wrong episode"
                spool.acknowledge(waiting)
                arrived.append(found.key.sequence)
            else:
                spool.dead_letter(waiting, found)
                told += 1
    except SpoolError:
        told += 1
    finally:
        spool.close()
    return arrived, told


@pytest.mark.parametrize("state", ["closed", "killed"])
def test_flipped_bit_in_a_spool_never_yields_a_wrong_episode(tmp_path: Path, state: str) -> None:
    rng, whole, noticed = random.Random(state), tmp_path / "whole", 0
    spool = Spool(tmp_path / "spool", limit_bytes=LIMIT)
    for number in range(EPISODES):
        assert spool.put(spool.pack(keyed_episode(0, number)), drop_oldest=False).kept
    if state == "killed":
        shutil.copytree(tmp_path / "spool", whole)
    spool.close()
    if state == "closed":
        shutil.copytree(tmp_path / "spool", whole)
    assert (whole / f"{FILE_NAME}-wal").exists() == (state == "killed")

    for number in range(FLIPS):
        folder = tmp_path / f"flip-{number}"
        shutil.copytree(whole, folder)
        flip(folder / (FILE_NAME if state == "closed" else f"{FILE_NAME}-wal"), rng)

        arrived, told = drain(folder)

        assert arrived == sorted(set(arrived)), "one was sent twice"
        assert told or arrived == list(range(EPISODES)), "an episode is missing without a word"
        noticed += told > 0
        shutil.rmtree(folder)

    assert noticed > FLIPS // 4
    note(flipped_bits=FLIPS, wrong_episodes=0)
