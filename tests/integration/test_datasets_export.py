"""Exports, read by the formats' own libraries, and loaded into an empty server again: the same episodes, bit for bit."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import minari
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.codec_cases import DTYPES
from support.dataset_cases import Columns, assert_same, make_episode, serve, stored
from support.dataset_cases import datasets as any_datasets
from support.serving import ServerThread
from touchline import EpisodeKey, ReplayClient, datasets
from touchline.datasets import DatasetError
from touchline_protos.types.dtypes import BFLOAT16

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MINARI_DTYPES = [dtype for dtype in DTYPES if dtype != BFLOAT16]

PLACES = [("all.h5", None), ("all.npz", None), ("all.pt", None), ("all-v0", "minari"), ("all", "tdmpc2")]

Pair = tuple[tuple[ServerThread, ReplayClient], tuple[ServerThread, ReplayClient]]


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    """Two servers: one to export from, one to load into."""
    with serve() as one, serve() as other, ReplayClient(one.address) as from_one, ReplayClient(other.address) as to_other:
        yield (one, from_one), (other, to_other)


@pytest.fixture
def empty(pair: Pair) -> Pair:
    for _, client in pair:
        client.clear()
    return pair


@pytest.fixture
def minari_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path / "minari"


def _add(client: ReplayClient, episodes: Sequence[Mapping[str, np.ndarray]], **options: Any) -> None:
    for episode in episodes:
        client.add(episode, **options)


def _origins(client: ReplayClient) -> list[tuple[EpisodeKey | None, str, int]]:
    return [(episode.key, episode.actor, episode.policy_version) for episode in client.episodes(columns=["reward"])]


# Round trips of arbitrary episodes

UNDISTURBED = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def _round_trip(pair: Pair, target: Path, episodes: list[Columns], format: str | None = None, **options: Any) -> None:
    (one, from_one), (other, to_other) = pair
    from_one.clear()
    to_other.clear()
    _add(from_one, episodes, actor="le ft/ü%", policy_version=-3)

    exported = datasets.export(from_one, str(target), format=format, force=True, **options)
    # These files hold no keys, and a cleared server remembers the keys that it stored.
    report = datasets.load(to_other, str(target), format=format, reload_label=secrets.token_hex() if target.suffix == ".pt" else "")

    assert (exported.written, exported.left_out, report.stored, report.refused) == (len(episodes), 0, len(episodes), 0)
    assert_same(stored(other), stored(one))
    assert_same(stored(one), episodes)


@UNDISTURBED
@given(episodes=any_datasets(), compress=st.booleans())
def test_hdf5_round_trip_of_any_episodes_is_exact(pair: Pair, tmp_path: Path, episodes: list[Columns], compress: bool) -> None:
    _round_trip(pair, tmp_path / "all.h5", episodes, compress=compress)

    assert _origins(pair[1][1]) == _origins(pair[0][1])


@UNDISTURBED
@given(episodes=any_datasets(), compress=st.booleans())
def test_npz_round_trip_of_any_episodes_is_exact(pair: Pair, tmp_path: Path, episodes: list[Columns], compress: bool) -> None:
    _round_trip(pair, tmp_path / "all.npz", episodes, compress=compress)

    assert _origins(pair[1][1]) == _origins(pair[0][1])


@UNDISTURBED
@given(episodes=any_datasets(equal=True))
def test_pt_round_trip_of_any_episodes_of_one_length_is_exact(pair: Pair, tmp_path: Path, episodes: list[Columns]) -> None:
    _round_trip(pair, tmp_path / "all.pt", episodes)


@UNDISTURBED
@given(episodes=any_datasets(dtypes=MINARI_DTYPES, empty=False, least_rows=2))
def test_minari_round_trip_of_any_episodes_is_exact(pair: Pair, tmp_path: Path, episodes: list[Columns]) -> None:
    _round_trip(pair, tmp_path / "all-v0", episodes, format="minari")

    assert _origins(pair[1][1]) == _origins(pair[0][1])


@pytest.mark.parametrize("name", ["all.h5", "all.npz", "all-v0"])
def test_rows_of_the_other_convention_come_back_too(tmp_path: Path, name: str) -> None:
    episodes = [{column: value[::-1].copy() for column, value in make_episode(number).items()} for number in range(3)]
    format = "minari" if name == "all-v0" else None
    with serve(row_convention="outgoing") as one, serve(row_convention="outgoing") as other, ReplayClient(one.address) as client:
        _add(client, episodes)
        datasets.export(client, str(tmp_path / name), format=format)

        with ReplayClient(other.address) as into:
            datasets.load(into, str(tmp_path / name))

        assert_same(stored(other), episodes)


def test_loading_an_export_into_its_own_server_stores_nothing(empty: Pair, tmp_path: Path) -> None:
    _, client = empty[0]
    _add(client, [make_episode(number) for number in range(4)])
    datasets.export(client, str(tmp_path / "all.npz"))
    datasets.export(client, str(tmp_path / "all.h5"))

    reports = [datasets.load(client, str(tmp_path / name)) for name in ("all.npz", "all.h5")]

    assert [(report.stored, report.duplicates) for report in reports] == [(0, 4), (0, 4)]


def test_selection_is_what_is_written(empty: Pair, tmp_path: Path) -> None:
    (_, client), (other, into) = empty
    _add(client, [make_episode(number) for number in range(3)], actor="left")
    _add(client, [make_episode(number) for number in range(3, 6)], actor="right")

    report = datasets.export(client, str(tmp_path / "some.h5"), actor="right", newest=2, columns=["obs", "action", "reward"])
    datasets.load(into, str(tmp_path / "some.h5"))

    assert (report.written, report.steps) == (2, 22)
    expected = [make_episode(number) for number in (4, 5)]
    assert_same(stored(other), [{name: episode[name] for name in ("obs", "action", "reward")} for episode in expected])


# Read by the formats' own programs


def test_minari_reads_its_export_as_transitions(empty: Pair, minari_folder: Path) -> None:
    _, client = empty[0]
    episodes = [make_episode(number, rows=4 + number) | {"task": np.full(4 + number, 3)} for number in range(4)]
    _add(client, episodes, actor="left")

    datasets.export(client, "minari:soccer/left/all-v3")

    dataset = minari.load_dataset("soccer/left/all-v3")
    assert (dataset.total_episodes, dataset.total_steps) == (4, 3 + 4 + 5 + 6)
    assert "soccer/left/all-v3" in minari.list_local_datasets()
    for read, episode in zip(dataset.iterate_episodes(), episodes, strict=True):
        assert dataset.observation_space.contains(read.observations[0]) and dataset.action_space.contains(read.actions[0])
        assert read.observations.tobytes() == episode["obs"].tobytes()
        assert read.actions.tobytes() == episode["action"][1:].tobytes()
        assert read.rewards.tobytes() == episode["reward"][1:].tobytes()
        assert read.terminations.tolist() == (episode["done"][1:] == 1).tolist()
        assert read.truncations.tolist() == [False] * (len(read) - 1) + [episode["done"][-1] == 0]
        assert read.infos["task"].tolist() == [3] * len(episode["obs"])


def test_minari_images_are_kept_without_loss(empty: Pair, minari_folder: Path) -> None:
    (_, client), (other, into) = empty
    image = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), np.uint8)
    episode = {name: value for name, value in make_episode(0, rows=5).items() if name != "obs"} | {"obs": image}
    client.add(episode)

    datasets.export(client, "minari:pixels-v0")
    datasets.load(into, "minari:pixels-v0")

    assert_same(stored(other), [episode])


def test_tdmpc2s_own_way_of_loading_reads_a_pt_file(empty: Pair, tmp_path: Path) -> None:
    _, client = empty[0]
    episodes = [make_episode(number) for number in range(5)]
    _add(client, episodes)

    datasets.export(client, str(tmp_path / "chunk_0.pt"))

    td = torch.load(tmp_path / "chunk_0.pt", weights_only=False)
    assert td.shape == (5, 11)
    assert set(td.keys()) == {"obs", "action", "reward", "terminated"}
    assert [td["obs"][row].numpy().tobytes() for row in range(5)] == [episode["obs"].tobytes() for episode in episodes]


def test_episodes_of_several_lengths_need_a_folder_of_pt_files(empty: Pair, tmp_path: Path) -> None:
    (_, client), (other, into) = empty
    episodes = [make_episode(number, rows=5 + number % 2) for number in range(4)]
    _add(client, episodes)

    with pytest.raises(DatasetError, match=r"episodes of 5 and of 6 rows, expected equal numbers of rows in one file.*--format tdmpc2"):
        datasets.export(client, str(tmp_path / "all.pt"))
    datasets.export(client, str(tmp_path / "all"), format="tdmpc2")
    datasets.load(into, str(tmp_path / "all"))

    assert sorted(path.name for path in tmp_path.iterdir()) == ["all"]
    assert_same(stored(other), [episodes[number] for number in (0, 2, 1, 3)])


def test_hdf5_is_laid_out_as_documented(empty: Pair, tmp_path: Path) -> None:
    _, client = empty[0]
    episode = make_episode(0)
    episode["obs.state"] = episode.pop("obs")
    key = EpisodeKey("robot", 4, 9)
    client.add(episode, actor="left", policy_version=7, key=key)

    datasets.export(client, str(tmp_path / "all.h5"))

    with h5py.File(tmp_path / "all.h5") as file:
        ((name, group),) = file["episodes"].items()
        assert file.attrs["row_convention"] == "incoming"
        assert dict(group.attrs) == {
            "id": int(name),
            "actor": "left",
            "policy_version": 7,
            "key_client_id": "robot",
            "key_incarnation": 4,
            "key_sequence": 9,
        }
        assert group["obs/state"][()].tobytes() == episode["obs.state"].tobytes()


def test_numpy_reads_an_npz_as_documented(empty: Pair, tmp_path: Path) -> None:
    _, client = empty[0]
    client.add(make_episode(0), actor="left")

    datasets.export(client, str(tmp_path / "all.npz"))

    with np.load(tmp_path / "all.npz") as file:
        number = next(name for name in file.files if name.endswith("/obs")).removesuffix("/obs")
        assert file[f"{number}/obs"].tobytes() == make_episode(0)["obs"].tobytes()
        assert json.loads(file[f"{number}/episode.json"])["actor"] == "left"


# Unsupported episodes and failures


def test_single_rows_are_left_out_of_minari_and_reported(empty: Pair, minari_folder: Path) -> None:
    _, client = empty[0]
    _add(client, [make_episode(0), make_episode(1, rows=1), make_episode(2)])

    report = datasets.export(client, "minari:some-v0")

    assert (report.written, report.left_out) == (2, 1)
    ((reason, ids),) = report.reasons.items()
    assert "a single row, expected at least 2" in reason and len(ids) == 1
    assert minari.load_dataset("some-v0").total_episodes == 2


@pytest.mark.parametrize(
    ("name", "columns", "message"),
    [
        ("minari:a-v0", {"obs": np.zeros(3, BFLOAT16)}, "obs: bfloat16; Minari has no such dtype"),
        ("minari:a-v0", {"obs": np.zeros((3, 0))}, r"obs: shape \(0,\) per row; Minari cannot store empty arrays"),
        ("minari:a", {"obs": np.zeros(3)}, "id 'a', expected <name>-v<number>"),
        (
            "a.pt",
            {"obs": np.zeros(3), "terminated": np.zeros(3), "done": np.zeros(3)},
            "terminated: a column of this name would be read back as done",
        ),
        ("no/a.h5", {"obs": np.zeros(3)}, "the folder .*no does not exist"),
        ("a.csv", {"obs": np.zeros(3)}, "unknown format, expected"),
    ],
)
def test_unsupported_export_is_refused_and_leaves_nothing(
    empty: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, columns: Columns, message: str
) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    _, client = empty[0]
    client.add({"action": np.zeros(3), "reward": np.zeros(3), **columns})
    target = name if name.startswith("minari:") else str(tmp_path / name)

    with pytest.raises(DatasetError, match=message):
        datasets.export(client, target)

    assert list(tmp_path.iterdir()) == []


def test_empty_server_has_nothing_to_export(empty: Pair, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no episodes are stored, so there is nothing to export"):
        datasets.export(empty[0][1], str(tmp_path / "all.h5"))

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "format"), PLACES)
def test_relative_path_will_do(empty: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, format: str | None) -> None:
    (_, client), (other, into) = empty
    monkeypatch.chdir(tmp_path)
    client.add(make_episode(0))

    datasets.export(client, name, format=format)
    datasets.load(into, name, format=format, reload_label=f"relative {name}")

    assert_same(stored(other), [make_episode(0)])


@pytest.mark.parametrize(("name", "format"), PLACES)
def test_existing_target_is_replaced_only_by_force(empty: Pair, tmp_path: Path, name: str, format: str | None) -> None:
    (_, client), (other, into) = empty
    target = str(tmp_path / name)
    client.add(make_episode(0))
    datasets.export(client, target, format=format)
    client.add(make_episode(1))

    with pytest.raises(DatasetError, match="already exists; --force"):
        datasets.export(client, target, format=format)
    datasets.export(client, target, format=format, force=True)
    datasets.load(into, target, reload_label=f"replaced {name}")

    assert_same(stored(other), [make_episode(0), make_episode(1)])
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("format", ["tdmpc2", "minari", "hdf5"])
def test_folder_with_something_else_in_it_is_not_replaced(empty: Pair, tmp_path: Path, format: str) -> None:
    (tmp_path / "mine-v0").mkdir()
    (tmp_path / "mine-v0" / "thesis.tex").touch()
    empty[0][1].add(make_episode(0))

    with pytest.raises(DatasetError, match="a folder that holds something else and is not replaced"):
        datasets.export(empty[0][1], str(tmp_path / "mine-v0"), format=format, force=True)

    assert (tmp_path / "mine-v0" / "thesis.tex").exists()


class Stopped(Exception):
    """Error that tests raise in the middle of an export."""


@pytest.mark.parametrize(("name", "format"), PLACES)
def test_export_that_fails_leaves_what_was_there(empty: Pair, tmp_path: Path, name: str, format: str | None) -> None:
    (_, client), (other, into) = empty
    client.add(make_episode(0))
    datasets.export(client, str(tmp_path / name), format=format)
    client.add(make_episode(1))

    def stop(done: int, total: int, report: datasets.ExportReport) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        datasets.export(client, str(tmp_path / name), format=format, force=True, progress=stop)
    datasets.load(into, str(tmp_path / name), reload_label=f"left {name}")

    assert_same(stored(other), [make_episode(0)])
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_export_that_is_killed_leaves_no_file_that_looks_whole(empty: Pair, tmp_path: Path) -> None:
    (one, client), _ = empty
    _add(client, [make_episode(number) for number in range(3)])
    code = (
        "import os, signal, sys; from touchline import ReplayClient, datasets\n"
        "def die(done, total, report): os.kill(os.getpid(), signal.SIGKILL) if done == 2 else None\n"
        "datasets.export(ReplayClient(sys.argv[1]), sys.argv[2], progress=die)"
    )

    killed = [
        subprocess.run([sys.executable, "-c", code, one.address, str(tmp_path / name)], check=False) for name in ("a.h5", "a.npz", "a.pt")
    ]

    assert [process.returncode for process in killed] == [-9, -9, -9]
    assert all(path.name.startswith(".") and path.name.endswith(".partial") for path in tmp_path.iterdir())


def test_export_command_writes_and_the_example_too(empty: Pair, tmp_path: Path) -> None:
    (one, client), (other, into) = empty
    _add(client, [make_episode(number) for number in range(3)])

    command = subprocess.run(
        [sys.executable, "-m", "touchline", "export", str(tmp_path / "all.npz"), "--address", one.address],
        capture_output=True,
        text=True,
        check=True,
    )
    example = subprocess.run(
        [sys.executable, str(EXAMPLES / "export_hdf5.py"), str(tmp_path / "all.h5"), "--address", one.address],
        capture_output=True,
        text=True,
        check=True,
    )
    report = datasets.load(into, str(tmp_path / "all.h5"))

    assert "all.npz: 3 episodes, 33 steps in " in command.stdout.replace("\n", "")
    assert json.loads(example.stdout) == {"episodes": 3, "steps": 33}
    assert report.stored == 3
    assert_same(stored(other), [make_episode(number) for number in range(3)])
