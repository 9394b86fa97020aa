"""Loading in any format: refusals, and each episode once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.dataset_cases import assert_same, make_episode, serve, stored, write_hdf5, write_npz
from support.serving import ServerThread
from touchline import ReplayClient, datasets
from touchline.datasets import ColumnTransforms, DatasetEpisode
from touchline.datasets.npz import NpzSource
from touchline.errors import UnavailableError


@pytest.fixture
def server() -> Iterator[ServerThread]:
    with serve() as server:
        yield server


@pytest.fixture
def client(server: ServerThread) -> Iterator[ReplayClient]:
    with ReplayClient(server.address) as client:
        yield client


def test_refusals_are_counted_by_reason_with_examples(tmp_path: Path) -> None:
    episodes = [make_episode(number) for number in range(8)]
    for number in (1, 3, 4, 6):
        episodes[number]["obs"][number] = np.inf
    episodes[7] = make_episode(7, obs=5)
    write_npz(tmp_path / "demos.npz", episodes)

    with serve(allow_non_finite=False) as server, ReplayClient(server.address) as client:
        report = datasets.load(client, str(tmp_path / "demos.npz"))

    assert (report.read, report.stored, report.refused) == (8, 3, 5)
    infinite, other = sorted(report.reasons.values(), key=lambda refusals: -refusals.count)
    assert (infinite.count, [position for position, _ in infinite.examples]) == (4, [1, 3, 4])
    assert "obs: a value that is not finite in row 3" in infinite.examples[1][1]
    assert (other.count, other.examples[0][0]) == (1, 7)


def test_refusals_of_other_sizes_have_one_reason(client: ReplayClient, tmp_path: Path) -> None:
    """Digits in a dtype are not counted as numbers."""
    write_npz(tmp_path / "demos.npz", [make_episode(number, rows=rows) for number, rows in enumerate((5, 500, 50_000))])

    report = datasets.load(client, str(tmp_path / "demos.npz"), max_episode_bytes=10)

    ((reason, refusals),) = report.reasons.items()
    assert refusals.count == 3
    assert "obs: float32 (#, #): with this column the episode would take # bytes, expected at most #" in reason


def test_loading_again_stores_nothing_twice_whatever_the_name(server: ServerThread, client: ReplayClient, tmp_path: Path) -> None:
    write_npz(tmp_path / "demos.npz", [make_episode(number) for number in range(5)])
    datasets.load(client, str(tmp_path / "demos.npz"), limit=3)
    (tmp_path / "demos.npz").rename(tmp_path / "renamed.npz")

    report = datasets.load(client, str(tmp_path / "renamed.npz"))

    assert (report.stored, report.duplicates) == (2, 3)
    assert_same(stored(server), [make_episode(number) for number in range(5)])


def test_load_reads_no_more_ahead_than_one_call(client: ReplayClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Besides the call in progress."""
    monkeypatch.setattr("touchline.datasets.loader.CALL_BYTES", 10_000)
    episodes = [make_episode(number, rows=50) for number in range(100)]
    write_npz(tmp_path / "demos.npz", episodes)
    read = 0
    ahead: list[tuple[int, int]] = []
    read_one = NpzSource._read

    def count(*arguments: Any) -> DatasetEpisode:
        nonlocal read
        read += 1
        return read_one(*arguments)

    def progress(stage: str, done: int, total: int, report: datasets.LoadReport) -> None:
        if stage == "load" and done:
            ahead.append((done, read))

    monkeypatch.setattr(NpzSource, "_read", count)
    datasets.load(client, str(tmp_path / "demos.npz"), progress=progress)

    a_call = -(-10_000 // sum(column.nbytes for column in episodes[0].values()))
    assert len(ahead) >= 100 // a_call
    assert all(read <= done + a_call + 2 for done, read in ahead)


def test_load_that_fails_half_way_reads_no_further(client: ReplayClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("touchline.datasets.loader.CALL_BYTES", 10_000)
    write_npz(tmp_path / "demos.npz", [make_episode(number, rows=50) for number in range(100)])

    def progress(stage: str, done: int, total: int, report: datasets.LoadReport) -> None:
        if stage == "load" and done:
            raise UnavailableError("away")

    with pytest.raises(UnavailableError, match="away"):
        datasets.load(client, str(tmp_path / "demos.npz"), progress=progress)
    reading = [thread for thread in threading.enumerate() if thread.name == "touchline-read-ahead"]
    report = datasets.load(client, str(tmp_path / "demos.npz"))

    assert reading == []
    assert report.duplicates > 0 and report.duplicates + report.stored == 100
    assert client.num_eps == 100


def test_file_that_was_changed_is_another_source(server: ServerThread, client: ReplayClient, tmp_path: Path) -> None:
    write_npz(tmp_path / "demos.npz", [make_episode(number) for number in range(3)])
    datasets.load(client, str(tmp_path / "demos.npz"))
    write_npz(tmp_path / "demos.npz", [make_episode(number) for number in range(10, 14)])

    report = datasets.load(client, str(tmp_path / "demos.npz"))

    assert (report.stored, report.refused) == (4, 0)
    assert_same(stored(server), [make_episode(number) for number in (0, 1, 2, 10, 11, 12, 13)])


@pytest.mark.parametrize(
    "other",
    [{"reload_label": "more"}, {"transforms": ColumnTransforms(task=1)}, {"transforms": ColumnTransforms(drop=("extra",))}],
    ids=["again", "task", "drop"],
)
def test_the_same_file_loaded_otherwise_is_other_episodes(client: ReplayClient, tmp_path: Path, other: dict[str, Any]) -> None:
    write_npz(tmp_path / "demos.npz", [make_episode(0) | {"extra": np.zeros(11), "task": np.zeros(11, np.int64)}])
    datasets.load(client, str(tmp_path / "demos.npz"))
    if "drop" in str(other):
        client.clear()  # another schema

    reports = [datasets.load(client, str(tmp_path / "demos.npz"), **other) for _ in range(2)]

    assert [(report.stored, report.duplicates) for report in reports] == [(1, 0), (0, 1)]


def test_duplicate_of_an_evicted_episode_stays_one_and_again_brings_it_back(tmp_path: Path) -> None:
    write_npz(tmp_path / "demos.npz", [make_episode(number) for number in range(6)])
    with serve(buffer_size=33) as server, ReplayClient(server.address) as client:
        datasets.load(client, str(tmp_path / "demos.npz"))

        repeated = datasets.load(client, str(tmp_path / "demos.npz"))
        more = datasets.load(client, str(tmp_path / "demos.npz"), reload_label="2", limit=1)

        assert (repeated.stored, repeated.duplicates, more.stored) == (0, 6, 1)
        assert_same(stored(server), [make_episode(number) for number in (4, 5, 0)])


def test_key_of_the_source_is_the_key(client: ReplayClient, tmp_path: Path) -> None:
    write_hdf5(tmp_path / "one.h5", [make_episode(0)], key_client_id="robot", key_incarnation=4, key_sequence=9)
    write_hdf5(tmp_path / "two.h5", [make_episode(0)], name="other_{}", key_client_id="robot", key_incarnation=4, key_sequence=9)
    datasets.load(client, str(tmp_path / "one.h5"))

    report = datasets.load(client, str(tmp_path / "two.h5"))

    assert (report.stored, report.duplicates) == (0, 1)
