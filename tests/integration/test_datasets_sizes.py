"""Episodes that announce more than the limit are refused before memory is allocated for them; the others of the file are stored."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import h5py
import minari
import numpy as np
import pytest
import torch
from minari.data_collector.episode_buffer import EpisodeBuffer

from support import dataset_bombs as bombs
from support.dataset_cases import assert_same, make_episode, serve, stored, write_hdf5, write_npz
from touchline import ReplayClient, datasets
from touchline.datasets import ColumnTransforms, DatasetError

MIB = 1 << 20
MAX_EPISODE_BYTES = 32 * MIB
CEILING_BYTES = 400 * MIB
"""Limit of the address space for all files together, beyond what the packages take."""
GROWTH_BYTES = 100 * MIB
"""Limit of the memory that is really used."""

CHILD = """
import json, resource, sys
import h5py, minari, torch
from touchline import datasets
from touchline.datasets import hdf5, npz, tdmpc2, minari as _
from touchline.errors import TouchlineError

limits = json.loads(sys.argv[1])
torch.zeros(8).sum()

def read(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name))

resource.setrlimit(resource.RLIMIT_AS, (read("VmSize") + limits["ceiling"], resource.RLIM_INFINITY))
before = read("VmHWM")
for source in sys.stdin.read().splitlines():
    try:
        report, _ = datasets.inspect(source, max_episode_bytes=limits["episode"], infos=True, transforms=datasets.ColumnTransforms(task=3))
        told = [report.stored, report.refused, [refusals.examples[0][1] for refusals in report.reasons.values()]]
    except TouchlineError as error:
        told = [0, 0, [str(error)]]
    print(json.dumps([source, *told]), flush=True)
print(json.dumps(["growth", read("VmHWM") - before]))
"""


class Camera(gymnasium.Env[Any, Any]):
    """An environment whose observations Minari stores as JPEGs."""

    observation_space = gymnasium.spaces.Box(0, 255, (64, 64, 3), np.uint8)
    action_space = gymnasium.spaces.Box(-1, 1, (2,))


def _minari(folder: Path, episodes: int = 3) -> Path:
    """Writes a Minari data set and returns its folder."""
    rng = np.random.default_rng(0)
    buffers = [
        EpisodeBuffer(
            observations=rng.integers(0, 255, (4, 64, 64, 3), np.uint8),
            actions=rng.random((3, 2), np.float32),
            rewards=[0.0, 1.0, 2.0],
            terminations=[False] * 3,
            truncations=[False, False, True],
            infos={"clock": np.arange(4)},
        )
        for _ in range(episodes)
    ]
    env = Camera()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no environment, no author
        minari.create_dataset_from_buffers(folder.name, buffers, observation_space=env.observation_space, action_space=env.action_space)
    return folder


def _minari_jpeg(folder: Path) -> Path:
    frames = np.stack([bombs.jpeg_announcing(11_000, 16_000)] * 4)
    return bombs.change_minari(_minari(folder), 1, "observations", data=frames)


BOMBS: dict[str, tuple[Callable[[Path], Path], int, str]] = {
    # Name of the file: the function that writes it, the number of good episodes, the reason for which the bomb is refused.
    "announcing.npz": (
        bombs.npz_announcing,
        2,
        "obs: float32 (1000000000000,): with this column the episode would take 12,000,0",
    ),
    "zeros.npz": (
        bombs.npz_zeros,
        2,
        "obs: float32 (33554432,): with this column the episode would take 402,653,184 bytes",
    ),
    "member.npz": (bombs.npz_lying_about_a_member, 2, "1/obs.npy: cannot be read: 100 bytes of values, expected 8,388,608"),
    "text.npz": (bombs.npz_long_text, 2, "episode.json: cannot be read: more than 65,536 bytes of text"),
    "nothing.npz": (
        bombs.npz_rows_of_nothing,
        2,
        "obs: float32 (1000000000000, 0): with this column the episode would take 8,000,000",
    ),
    "without-storage.h5": (bombs.hdf5_without_storage, 2, "obs: float32 (1000000000000,): with this column the episode would take 12,00"),
    "zeros.h5": (bombs.hdf5_zeros, 2, "obs: uint8 (536870912,): with this column the episode would take 4,831,838,208 bytes"),
    "any-length.h5": (bombs.hdf5_values_of_any_length, 2, "obs: an array of objects (object), expected numbers"),
    "itself.h5": (bombs.hdf5_group_in_itself, 2, "nested more than 8 levels deep"),
    "groups.h5": (bombs.hdf5_groups_of_groups, 2, "more than 4,096 columns and groups in one episode"),
    "expanded.pt": (bombs.pt_expanded, 0, "obs: float32 (1000000, 1000000): with this column the episode would take"),
    "sparse.pt": (bombs.pt_sparse, 0, "obs: a sparse_coo tensor, expected one with a value for every element"),
    "jpeg-v0": (_minari_jpeg, 2, "observations: uint8 (4, 16000, 11000, 3): with this column the episode would take 2,112,0"),
    "observations-v0": (
        lambda folder: bombs.change_minari(_minari(folder), 1, "observations", shape=(bombs.HUGE,), dtype="u1", chunks=(1024,)),
        2,
        "observations: uint8 (1000000000000,): with this column the episode would take",
    ),
    "infos-v0": (
        lambda folder: bombs.change_minari(_minari(folder), 1, "infos/clock", shape=(bombs.HUGE,), dtype="u1", chunks=(1024,)),
        2,
        "infos.clock: uint8 (1000000000000,): with this column the episode would take",
    ),
    "flags-v0": (
        lambda folder: bombs.change_minari(_minari(folder), 1, "truncations", shape=(bombs.HUGE,), dtype="?", chunks=(1024,)),
        2,
        "truncations: bool (1000000000000,): with this column the episode would take",
    ),
}


@pytest.fixture(scope="module")
def inspected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Inspects all bombs in one child process with a ceiling of memory, and returns what it found for each."""
    folder = tmp_path_factory.mktemp("bombs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(folder))
        places = [str(make(folder / name)) for name, (make, _, _) in BOMBS.items()]
    limits = json.dumps({"episode": MAX_EPISODE_BYTES, "ceiling": CEILING_BYTES})
    child = subprocess.run([sys.executable, "-c", CHILD, limits], input="\n".join(places), capture_output=True, text=True, check=False)
    told: dict[str, Any] = {Path(source).name: rest for source, *rest in map(json.loads, child.stdout.splitlines())}
    assert child.returncode == 0, f"{child.stderr[-2000:]} after {list(told)[-1:]}"
    return told


@pytest.mark.parametrize("name", BOMBS)
def test_bomb_is_refused_and_the_others_of_its_file_are_read(inspected: dict[str, Any], name: str) -> None:
    _, good, reason = BOMBS[name]

    found, refused, messages = inspected[name]

    assert len(messages) == 1 and reason in messages[0], messages
    assert found == good
    assert refused == (1 if good else 0) or name == "expanded.pt"


def test_bombs_take_no_memory(inspected: dict[str, Any]) -> None:
    (growth,) = inspected["growth"]

    assert growth < GROWTH_BYTES


def test_load_refuses_what_the_server_would_refuse_without_reading_it(tmp_path: Path) -> None:
    path = bombs.npz_zeros(tmp_path / "demos.npz")
    with serve(max_episode_bytes=MIB) as server, ReplayClient(server.address) as client:
        tracemalloc.start()
        try:
            report = datasets.load(client, str(path))
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()

        assert (report.stored, report.refused) == (2, 1)
        assert "expected at most 1,048,576; if this is intended, split the episode" in next(iter(report.reasons.values())).examples[0][1]
        assert_same(stored(server), [make_episode(0), make_episode(2)])
    assert peak < bombs.LONG_BYTES // 4


def test_tensor_without_a_value_for_every_element_is_refused_with_trust_too(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="obs: a sparse_coo tensor, expected one with a value for every element"):
        datasets.inspect(str(bombs.pt_sparse(tmp_path / "sparse.pt")), trust_pickle=True)


def test_limit_counts_what_would_be_stored(tmp_path: Path) -> None:
    """Each of 11 rows has 8 float64 that become float32; the camera is dropped. A limit of one byte less refuses the episode."""
    columns = make_episode(0) | {"obs": np.zeros((11, 8)), "camera": np.zeros((11, 64, 64, 3), np.uint8)}
    write_hdf5(tmp_path / "demos.h5", [columns])
    write_npz(tmp_path / "demos.npz", [columns])
    torch.save({name: torch.from_numpy(column[None]) for name, column in columns.items()}, tmp_path / "demos.pt")
    changes = ColumnTransforms(drop=("camera",), float32=True, task=1)
    size_bytes = 11 * (8 * 4 + 2 * 4 + 4 + 4 + 8)

    for name in ("demos.h5", "demos.npz", "demos.pt"):
        reports = [datasets.inspect(str(tmp_path / name), transforms=changes, max_episode_bytes=size_bytes - less)[0] for less in (0, 1)]

        assert [(report.stored, report.refused) for report in reports] == [(1, 0), (0, 1)]
        assert reports[0].size_bytes == size_bytes


def test_column_that_is_left_out_is_not_read(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "demos.h5", "w") as file:
        for name, column in make_episode(0).items():
            file[f"episodes/0/{name}"] = column
        file["episodes/0"].create_dataset("camera", (bombs.HUGE,), "u1", chunks=(1024,))

    report, columns = datasets.inspect(str(tmp_path / "demos.h5"), transforms=ColumnTransforms(drop=("camera",)))

    assert report.stored == 1 and "camera" not in columns


@pytest.mark.parametrize(
    "options",
    [{"compression": "gzip"}, {"compression": "lzf", "shuffle": True}, {"fletcher32": True}, {"scaleoffset": 0}],
    ids=lambda options: "-".join(options.get("compression", name) for name in options),
)
def test_file_with_any_filter_that_hdf5_has_is_read(tmp_path: Path, options: dict[str, Any]) -> None:
    columns = make_episode(0) | {"task": np.full(11, 3, np.int32)}
    with h5py.File(tmp_path / "demos.h5", "w") as file:
        for name, column in columns.items():
            file.create_dataset(f"episodes/0/{name}", data=column, **(options if name == "task" else {}))

    report, _ = datasets.inspect(str(tmp_path / "demos.h5"))

    assert (report.stored, report.refused) == (1, 0), report.reasons
