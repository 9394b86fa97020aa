"""The priorities of a durable store over a restart, and a file of them that is missing, damaged, old or another store's."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from support.durable_cases import durable_config
from support.store_cases import traced
from touchline_server import ReplayBuffer
from touchline_server.durability import priorities as saving
from touchline_server.durability.priorities import FILE_NAME, PriorityKeeper, read_priorities, write_priorities
from touchline_server.selectors.prioritized import SavedPriorities

SAMPLING = {"law": "prioritized", "priority_alpha": 1.0, "seed": 1}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


def opened(folder: Path, *, capacity: int = 400, **sampling: object) -> ReplayBuffer:
    return ReplayBuffer(durable_config(folder, capacity=capacity, sampling=SAMPLING | sampling), accept_eviction=True)


def played(folder: Path) -> ReplayBuffer:
    """A buffer with 12 episodes of 30 rows, of which the first steps of some have priorities; the ring has wrapped around."""
    buffer = opened(folder)
    for number in range(20):
        buffer.add_episode(traced(number, 30))
    ids = np.arange(20)
    buffer.update_priorities((ids, ids), np.random.default_rng(0).random((3, 20)) * 9)
    return buffer


def chances(buffer: ReplayBuffer) -> dict[tuple[int, int], float]:
    batch = buffer.sample(batch_size=5_000, horizon=3, seed=0)
    return dict(zip(zip(batch.episode_id.tolist(), batch.start.tolist(), strict=True), batch.probability.tolist(), strict=True))


def test_priorities_are_the_same_after_a_restart(folder: Path) -> None:
    buffer = played(folder)
    before = chances(buffer)
    buffer.close()

    again = opened(folder)

    assert chances(again) == pytest.approx(before, rel=1e-12)
    assert len(set(before.values())) > 30
    again.add_episode(traced(20, 30))  # with the highest priority that was ever given
    found = chances(again)
    assert found[20, 0] == pytest.approx(max(found.values()), rel=1e-6)
    again.close()


def test_steps_added_after_the_last_save_are_new_after_a_restart(folder: Path) -> None:
    buffer = played(folder)
    keeper = buffer.table._priorities
    assert keeper is not None
    keeper.save()
    buffer.add_episode(traced(20, 30))
    before = chances(buffer)
    buffer.close()

    again = opened(folder)

    assert chances(again) == pytest.approx(before, rel=1e-12)
    again.close()


def test_priorities_of_a_smaller_ring_are_those_of_the_episodes_that_are_left(folder: Path) -> None:
    buffer = played(folder)
    before = chances(buffer)
    buffer.close()

    again = opened(folder, capacity=100)

    found = chances(again)
    kept = {cell: before[cell] for cell in found if cell in before}
    assert {number for number, _ in found} == {17, 18, 19}
    # The others are gone, so shares grow by one factor.
    factors = {round(found[cell] / chance, 9) for cell, chance in kept.items()}
    assert len(factors) == 1
    again.close()


def test_save_without_a_change_writes_nothing(folder: Path) -> None:
    buffer = played(folder)
    keeper = buffer.table._priorities
    assert keeper is not None
    keeper.save()
    (folder / FILE_NAME).unlink()

    keeper.save()
    assert not (folder / FILE_NAME).exists()
    buffer.update_priorities((np.array([19]), np.array([0])), np.ones((3, 1)))
    keeper.save()

    assert (folder / FILE_NAME).exists()
    buffer.close()


def test_priorities_are_saved_at_the_stated_interval(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []

    class Ticks:
        """An event that says three times that it is time to save."""

        left = 3

        def wait(self, seconds: float) -> bool:
            assert seconds == saving.SAVE_INTERVAL_S
            self.left -= 1
            return self.left < 0

    keeper = PriorityKeeper.__new__(PriorityKeeper)
    keeper._stop = Ticks()  # type: ignore[assignment]
    monkeypatch.setattr(keeper, "save", lambda: written.append(1))

    keeper._run()

    assert len(written) == 3


def test_table_without_priorities_leaves_no_file(folder: Path) -> None:
    buffer = opened(folder, law="episode")
    buffer.add_episode(traced(0, 30))
    buffer.sample()
    buffer.close()

    assert not (folder / FILE_NAME).exists()


def damage(text: bytes) -> bytes:
    return text[:-1] + bytes([text[-1] ^ 1])


def header(text: bytes, **changes: object) -> bytes:
    line, _, body = text.partition(b"\n")
    return json.dumps(json.loads(line) | changes).encode() + b"\n" + body


FAULTS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "a bit": (damage, "the file is damaged"),
    "cut": (lambda text: text[: len(text) // 2], "the file is damaged"),
    "empty": (lambda text: b"", "the file is damaged"),
    "noise": (lambda text: b"\xff\x00" * 5_000, "the file is damaged"),
    "list": (lambda text: b"[]\n", "the file is damaged"),
    "newer": (lambda text: header(text, touchline_priorities=2), "format 2, expected 1"),
    "other store": (lambda text: header(text, store_generation=7), "they belong to another store"),
}


@pytest.fixture(params=FAULTS)
def fault(request: pytest.FixtureRequest) -> Iterator[tuple[Callable[[bytes], bytes], str]]:
    yield FAULTS[request.param]


def test_file_that_cannot_be_used_only_makes_all_steps_new(
    folder: Path, fault: tuple[Callable[[bytes], bytes], str], caplog: pytest.LogCaptureFixture
) -> None:
    change, words = fault
    played(folder).close()
    path = folder / FILE_NAME
    path.write_bytes(change(path.read_bytes()))

    again = opened(folder)

    assert again.num_eps == 13
    assert len(set(chances(again).values())) == 1
    assert any(f"priorities are not restored, every step is new again: {words}" in record.getMessage() for record in caplog.records)
    again.close()
    assert len(read_priorities(path, again.store.store_generation).episodes) == 13


def test_store_without_the_file_opens_and_says_nothing(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    played(folder).close()
    (folder / FILE_NAME).unlink()

    again = opened(folder)

    assert len(set(chances(again).values())) == 1
    assert not any("priorities" in record.getMessage() for record in caplog.records)
    again.close()


def test_disk_that_cannot_be_written_is_logged_and_tried_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    buffer = played(folder)
    keeper = buffer.table._priorities
    assert keeper is not None

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(saving, "write_priorities", full)
        keeper.save()
    assert any("priorities were not saved, trying again later: No space left" in record.getMessage() for record in caplog.records)
    keeper.save()

    assert read_priorities(folder / FILE_NAME, buffer.store.store_generation).episodes[:, 0].tolist() == list(range(7, 20))
    buffer.close()


def test_written_file_is_read_back_exactly(tmp_path: Path) -> None:
    saved = SavedPriorities(4, 2.5, np.array([[3, 2], [9, 1]]), np.array([0.1, 7, 3], np.float32))

    write_priorities(tmp_path / "p", saved, 17)
    found = read_priorities(tmp_path / "p", 17)

    assert (found.highest, found.episodes.tolist(), found.priorities.tolist()) == (2.5, [[3, 2], [9, 1]], saved.priorities.tolist())
    assert (tmp_path / "p").stat().st_mode & 0o077 == 0
