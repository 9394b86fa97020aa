"""Files that are damaged at rest: never a wrong episode, always a message that says what to do."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.durable_cases import assert_whole, contents, durable_config, keyed_episode
from support.fault_tally import FLIPS, note
from touchline_server import DamagedStoreError, ReplayBuffer, ReplayError
from touchline_server.durability import maintenance, recovery

EPISODES = 60
CAPACITY = 1_000


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that was closed cleanly."""
    folder = tmp_path_factory.mktemp("good") / "data"
    buffer = ReplayBuffer(durable_config(folder, capacity=CAPACITY, durability="sync"))
    for sequence in range(EPISODES):
        buffer.add_episode(keyed_episode(0, sequence))
    buffer.close()
    return folder


@pytest.fixture(scope="module")
def unclosed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder as a killed server leaves it: the last commits are only in the log."""
    root = tmp_path_factory.mktemp("unclosed")
    buffer = ReplayBuffer(durable_config(root / "living", capacity=CAPACITY, durability="sync"))
    for sequence in range(EPISODES):
        buffer.add_episode(keyed_episode(0, sequence))
    shutil.copytree(root / "living", root / "data")
    buffer.close()
    assert (root / "data" / "touchline.db-wal").stat().st_size > 100_000
    yield root / "data"


def start(folder: Path) -> dict[int, Any]:
    """Returns the episodes that a server would have after a start on a folder."""
    buffer = ReplayBuffer(durable_config(folder, capacity=CAPACITY))
    try:
        return contents(buffer)
    finally:
        buffer.close()


def says_what_to_do(error: ReplayError) -> bool:
    return "touchline-server recover --data-dir" in str(error) or "choose another storage.data_dir" in str(error)


def flip(file: Path, rng: random.Random) -> str:
    """Flips one bit and returns which."""
    position, bit = rng.randrange(file.stat().st_size), rng.randrange(8)
    with file.open("r+b") as opened:
        opened.seek(position)
        (byte,) = opened.read(1)
        opened.seek(position)
        opened.write(bytes([byte ^ 1 << bit]))
    return f"bit {bit} of byte {position} of {file.name}"


@pytest.mark.timeout(600 + FLIPS)
@pytest.mark.parametrize("state", ["good", "unclosed"])
def test_flipped_bit_never_gives_a_wrong_episode(state: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    source: Path = request.getfixturevalue(state)
    reference = tmp_path / "reference"
    shutil.copytree(source, reference)
    whole = start(reference)
    rng, refused = random.Random(state), 0
    for number in range(FLIPS):
        folder = tmp_path / f"{number}"
        shutil.copytree(source, folder)
        names = ["touchline.db", "touchline.db-wal"] if state == "unclosed" else ["touchline.db"]
        what = flip(folder / rng.choice(names), rng)
        try:
            found = start(folder)
        except ReplayError as error:
            refused += 1
            assert says_what_to_do(error), (what, error)
        else:
            assert found == whole, what
        shutil.rmtree(folder)
    note(flipped_bits=FLIPS)
    # A bit in a free page or in what the log replaces does no harm.
    assert refused > FLIPS // 4


@pytest.mark.parametrize("state", ["good", "unclosed"])
@pytest.mark.parametrize("kept", [0, 100, 8192, 0.5, 0.9])
def test_truncated_file_is_refused_and_what_is_whole_recovered(
    state: str, kept: float, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    source: Path = request.getfixturevalue(state)
    folder = tmp_path / "data"
    shutil.copytree(source, folder)
    file = folder / ("touchline.db-wal" if state == "unclosed" else "touchline.db")
    os.truncate(file, int(file.stat().st_size * kept) if kept < 1 else int(kept))

    with pytest.raises(DamagedStoreError) as caught:
        start(folder)

    assert says_what_to_do(caught.value), caught.value


def test_deleted_log_is_refused_and_recover_goes_on_without_it(unclosed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(unclosed, folder)
    for suffix in ("-wal", "-shm"):
        os.unlink(folder / f"touchline.db{suffix}")

    with pytest.raises(DamagedStoreError, match="transactions are missing"):
        start(folder)
    recovered = recovery.recover(folder, accept_loss=True)

    assert any("acknowledged transactions are missing" in line for line in recovered.lost)
    assert_whole(start(folder))


def damage_payload(folder: Path, *numbers: int) -> None:
    """Changes payloads without updating their checksums."""
    connection = sqlite3.connect(folder / "touchline.db")
    for number in numbers:
        connection.execute("UPDATE payloads SET data = zeroblob(length(data)) WHERE episode_id = ? AND column = 'obs.state'", (number,))
    connection.commit()
    connection.close()


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "touchline_server", *arguments], capture_output=True, text=True, timeout=300, check=False)


def test_check_names_the_damage_and_recover_keeps_all_else(good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(good, folder)
    whole = start(folder)
    lost = [list(whole)[3], list(whole)[7]]
    damage_payload(folder, *lost)

    with pytest.raises(DamagedStoreError, match=f"the payload of episode {lost[0]} is damaged"):
        start(folder)
    check = run("check", "--data-dir", str(folder))
    refused = run("recover", "--data-dir", str(folder))
    still = run("check", "--data-dir", str(folder))
    recover = run("recover", "--data-dir", str(folder), "--accept-loss")
    again = run("check", "--data-dir", str(folder))

    assert check.returncode == 1
    assert all(f"episode {number}: " in check.stdout for number in lost)
    assert f"`touchline-server recover --data-dir {folder}` keeps what is whole" in check.stderr
    assert refused.returncode == 1
    assert f"{len(whole) - 2} episodes" in refused.stdout and "can be kept" in refused.stdout
    assert f"`touchline-server recover --accept-loss --data-dir {folder}`" in refused.stderr
    assert (still.stdout, still.returncode) == (check.stdout, 1)
    assert recover.returncode == 0, recover.stderr
    assert all(f"episode {number}: " in recover.stdout for number in lost)
    assert (again.returncode, f"{len(whole) - 2} episodes" in again.stdout) == (0, True), again.stdout
    assert (folder / "touchline.db.damaged").exists()
    found = start(folder)
    assert found == {number: episode for number, episode in whole.items() if number not in lost}
    assert_whole(found)
    buffer = ReplayBuffer(durable_config(folder, capacity=CAPACITY))
    assert buffer.add_episode(keyed_episode(0, 0)).duplicate  # evicted long ago
    assert buffer.add_episode(keyed_episode(0, EPISODES)).episode_id >= EPISODES
    buffer.close()


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE counts SET name = 'e`isodes_too_short' WHERE name = 'episodes_too_short'",
        "UPDATE counts SET value = value + 4 WHERE name = 'episodes_duplicate'",
        "UPDATE meta SET value = value - 4 WHERE name = 'next_id'",
        "UPDATE meta SET name = 'nexu_id' WHERE name = 'next_id'",
        "UPDATE meta SET value = replace(value, 'obs.state', 'obs.ctate') WHERE name = 'schema'",
    ],
)
def test_damaged_figure_or_setting_is_refused_named_and_recovered(change: str, good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(good, folder)
    whole = start(folder)
    connection = sqlite3.connect(folder / "touchline.db")
    assert connection.execute(change).rowcount == 1
    connection.commit()
    connection.close()

    with pytest.raises(DamagedStoreError, match="is damaged") as caught:
        start(folder)
    assert says_what_to_do(caught.value), caught.value
    assert any("is damaged" in line for line in maintenance.check(folder).damage)
    recovery.recover(folder, accept_loss=True)

    assert start(folder) == whole
    assert maintenance.check(folder).damage == []


def test_mark_lost_is_no_reason_to_refuse(good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(good, folder)
    os.unlink(folder / "acknowledged")

    assert_whole(start(folder))
