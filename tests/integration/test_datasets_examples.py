"""The short examples of docs/datasets.md, in processes of their own and with a real server; their output is read by its format's library.

Those of Minari's load and HDF5's export are with the tests of these.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import minari
import numpy as np
import pytest
import torch
from tensordict import TensorDict

from support.dataset_cases import Columns, assert_same, make_episode, serve, stored
from support.serving import ServerThread
from touchline import ReplayClient

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def server() -> Iterator[ServerThread]:
    with serve() as server:
        yield server


@pytest.fixture
def client(server: ServerThread) -> Iterator[ReplayClient]:
    with ReplayClient(server.address) as client:
        client.clear()
        yield client


def _run(example: str, *arguments: str, status: int = 0, **environment: str) -> list[dict[str, Any]]:
    """Runs an example to its end and returns its lines of JSON."""
    command = [sys.executable, str(EXAMPLES / example), *arguments]
    variables = {**os.environ, **environment}
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300, env=variables, check=False)
    assert finished.returncode == status, finished.stderr
    return [json.loads(line) for line in finished.stdout.splitlines()]


def _saved(path: Path, episodes: list[Columns], **others: Any) -> str:
    """Writes a file like TD-MPC2's."""
    columns = {name: torch.from_numpy(np.stack([episode[name] for episode in episodes])) for name in episodes[0]}
    columns["terminated"] = columns.pop("done")
    torch.save(columns | others if others else TensorDict(columns, batch_size=[len(episodes), len(episodes[0]["obs"])]), path)
    return str(path)


def test_pt_files_are_stored_once_whatever_they_are_called(server: ServerThread, client: ReplayClient, tmp_path: Path) -> None:
    episodes = [make_episode(number) for number in range(5)]
    chunk = _saved(tmp_path / "chunk_0.pt", episodes[:3])
    renamed = tmp_path / "renamed.pt"
    renamed.write_bytes(Path(chunk).read_bytes())
    not_only_tensors = _saved(tmp_path / "chunk_1.pt", episodes[3:], episode=np.arange(2))

    told = _run("load_pt.py", chunk, str(renamed), not_only_tensors, "--trust-pickle", "--address", server.address)

    assert told == [
        {"file": chunk, "stored": 3, "duplicates": 0, "refused": 0},
        {"file": str(renamed), "stored": 0, "duplicates": 3, "refused": 0},
        {"file": not_only_tensors, "stored": 2, "duplicates": 0, "refused": 0},
    ]
    assert_same(stored(server), episodes)
    assert {episode.actor for episode in client.episodes(columns=["reward"])} == {"mt30"}


def test_hdf5_file_is_stored_as_one_task_and_its_bad_episodes_are_reported(
    server: ServerThread, client: ReplayClient, tmp_path: Path
) -> None:
    episodes = [make_episode(number) for number in range(10, 13)]
    with h5py.File(tmp_path / "demos.h5", "w") as file:
        for number, episode in enumerate(episodes):
            group = file.create_group(f"episodes/{number}")
            for name, column in episode.items():
                group[name] = column.astype(np.float64)
            group["camera"] = np.zeros((11, 8, 8, 3), np.uint8)
        del file["episodes/1/reward"]

    arguments = ("--actor", "teleoperation", "--task", "3", "--drop", "camera", "--address", server.address)
    refused, summary = _run("load_hdf5.py", str(tmp_path / "demos.h5"), *arguments, status=1)

    assert (refused["refused"], refused["first_at"]) == (1, 1)
    assert "reward" in refused["reason"]
    assert (summary["stored"], summary["duplicates"]) == (2, 0)
    assert set(summary["columns"]) == {"obs", "action", "reward", "done", "task"}
    expected = [episode | {"task": np.full(11, 3, np.int64)} for episode in (episodes[0], episodes[2])]
    assert_same(stored(server), expected)
    assert {episode.actor for episode in client.episodes(columns=["reward"])} == {"teleoperation"}


def test_npz_file_is_stored_if_all_of_it_can_be(server: ServerThread, client: ReplayClient, tmp_path: Path) -> None:
    episodes = [make_episode(number, rows=5 + number) for number in range(20, 23)]
    members = {f"{number}/{name}": column for number, episode in enumerate(episodes) for name, column in episode.items()}
    np.savez(tmp_path / "good.npz", **members)
    np.savez(tmp_path / "bad.npz", **members | {"1/obs": np.zeros((26, 9), np.float32)})

    *columns, refused = _run("load_npz.py", str(tmp_path / "bad.npz"), "--address", server.address, status=1)
    assert client.num_eps == 0
    *_, summary = _run("load_npz.py", str(tmp_path / "good.npz"), "--address", server.address)

    assert {column["column"]: (column["dtype"], column["shape"]) for column in columns} == {
        "obs": ("float32", [4]),
        "action": ("float32", [2]),
        "reward": ("float32", []),
        "done": ("float32", []),
    }
    assert refused["refused"] == 1 and "obs" in refused["reason"]
    assert summary == {"stored": 3, "duplicates": 0, "steps": 25 + 26 + 27}
    assert_same(stored(server), episodes)


def test_minari_has_the_episodes_of_the_actor(server: ServerThread, client: ReplayClient, tmp_path: Path) -> None:
    episodes = [make_episode(number) for number in range(30, 35)]
    for number, episode in enumerate(episodes):
        client.add(episode, actor="right" if number == 2 else "left")
    client.add({name: column[:1] for name, column in episodes[0].items()}, actor="left")  # only a reset
    mine = [episode for number, episode in enumerate(episodes) if number != 2]

    folder = str(tmp_path / "minari")
    left_out, summary = _run(
        "export_minari.py", "soccer/left-v0", "--actor", "left", "--address", server.address, MINARI_DATASETS_PATH=folder
    )

    assert left_out["left_out"] == 1 and "single row" in left_out["reason"]
    assert summary["episodes"] == 4
    assert summary["terminated"] == sum(int(episode["done"][-1]) for episode in mine) == 2
    assert summary["mean_return"] == pytest.approx(np.mean([episode["reward"][1:].sum() for episode in mine]))
    dataset = minari.MinariDataset(Path(folder) / "soccer" / "left-v0" / "data")
    for written, episode in zip(dataset, mine, strict=True):
        assert np.array_equal(written.observations, episode["obs"])
        assert np.array_equal(written.actions, episode["action"][1:])
        assert np.array_equal(written.rewards, episode["reward"][1:])


def test_pt_files_hold_the_newest_episodes_by_their_numbers_of_rows(server: ServerThread, client: ReplayClient, tmp_path: Path) -> None:
    episodes = [make_episode(number, rows=rows) for number, rows in enumerate((7, 9, 11, 9))]
    for episode in episodes:
        client.add(episode)

    arguments = (str(tmp_path / "chunks"), "--address", server.address)
    _run("export_pt.py", *arguments)
    told = _run("export_pt.py", *arguments, "--newest", "3")  # replaces the four

    columns = ["action", "obs", "reward", "terminated"]
    assert told == [
        {"file": "rows_000009.pt", "episodes": 2, "rows": 9, "columns": columns},
        {"file": "rows_000011.pt", "episodes": 1, "rows": 11, "columns": columns},
    ]
    saved = torch.load(tmp_path / "chunks" / "rows_000009.pt", weights_only=False)
    for name in ("obs", "action", "reward", "done"):
        column = saved["terminated" if name == "done" else name].numpy()
        assert np.array_equal(column, np.stack([episodes[1][name], episodes[3][name]]), equal_nan=True)
    assert sorted(path.name for path in (tmp_path / "chunks").iterdir()) == ["rows_000009.pt", "rows_000011.pt"]


def test_npz_file_holds_the_columns_of_the_newest_episodes(server: ServerThread, client: ReplayClient, tmp_path: Path) -> None:
    episodes = [make_episode(number) | {"still": np.zeros((11, 1000), np.float32)} for number in range(40, 44)]
    for episode in episodes:
        client.add(episode)
    ids = [episode.id for episode in client.episodes(newest=2, columns=["reward"])]

    path = tmp_path / "newest.npz"
    arguments = ("--newest", "2", "--column", "reward", "--column", "still", "--address", server.address)
    (told,) = _run("export_npz.py", str(path), *arguments)

    assert (told["episodes"], told["steps"]) == (2, 22)
    returns = {str(id): pytest.approx(float(episode["reward"][1:].sum())) for id, episode in zip(ids, episodes[2:], strict=True)}
    assert told["return_of_episode"] == returns
    with np.load(path) as file:
        assert {name for name in file.files if not name.endswith(".json")} == {f"{id}/{name}" for id in ids for name in ("reward", "still")}
        assert np.array_equal(file[f"{ids[1]}/reward"], episodes[3]["reward"], equal_nan=True)
    assert path.stat().st_size < 20_000  # 88 kB of zeros, compressed
