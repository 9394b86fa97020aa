"""Small files that announce gigabytes: refused before memory is taken for them, the others of the file stored."""

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
from touchline.datasets import Changes, DatasetError

MIB = 1 << 20
MAX_EPISODE_BYTES = 32 * MIB
CEILING_BYTES = 400 * MIB
"""Address space for reading all files in sequence, on top of what the packages take."""
GROWTH_BYTES = 100 * MIB
"""Limit of resident memory."""

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
        report, _ = datasets.survey(source, max_episode_bytes=limits["episode"], infos=True, changes=datasets.Changes(task=3))
        told = [report.stored, report.refused, [refusals.examples[0][1] for refusals in report.reasons.values()]]
    except TouchlineError as error:
        told = [0, 0, [str(error)]]
    print(json.dumps([source, *told]), flush=True)
print(json.dumps(["growth", read("VmHWM") - before]))
"""


class Camera(gymnasium.Env[Any, Any]):
    """Observations that Minari stores as JPEGs."""

    observation_space = gymnasium.spaces.Box(0, 255, (64, 64, 3), np.uint8)
    action_space = gymnasium.spaces.Box(-1, 1, (2,))


def _minari(folder: Path, episodes: int = 3) -> Path:
    """Writes a data set of Minari's, and returns its folder."""
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
    # name of the file: what makes it, how many are good, how the bomb is refused
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
    "member.npz": (bombs.npz_lying_about_a_member, 2, "bytes, expected no more than the member has, "),
    "header.npz": (bombs.npz_long_header, 2, "EOF: reading array header"),
    "text.npz": (bombs.npz_long_text, 2, "episode.json: cannot be read: 134,222,679 bytes, expected at most 65,536"),
    "understated.npz": (bombs.npz_understated_text, 2, "episode.json: cannot be read: "),
    "nothing.npz": (
        bombs.npz_rows_of_nothing,
        2,
        "obs: float32 (1000000000000, 0): with this column the episode would take 8,000,000",
    ),
    "without-storage.h5": (bombs.hdf5_without_storage, 2, "obs: float32 (1000000000000,): with this column the episode would take 12,00"),
    "zeros.h5": (bombs.hdf5_zeros, 2, "obs: uint8 (536870912,): with this column the episode would take 4,831,838,208 bytes"),
    "chunk.h5": (bombs.hdf5_lying_chunk, 2, "obs: a chunk that inflates to more than 1,024 bytes"),
    "chunks.h5": (bombs.hdf5_chunk_larger_than_its_dataset, 2, "obs: chunks of 536,870,912 bytes (536870912,), expected at most 268,435,"),
    "twice.h5": (bombs.hdf5_twice_compressed, 2, "obs: filters [1, 1] one after the other, expected one compressor"),
    "filter.h5": (bombs.hdf5_filter_of_another_kind, 2, "obs: compressed by HDF5's filter 6 (scaleoffset), expected gzip or lzf"),
    "any-length.h5": (bombs.hdf5_values_of_any_length, 2, "obs: Object arrays cannot be loaded"),
    "itself.h5": (bombs.hdf5_group_in_itself, 2, "nested more than 8 levels deep"),
    "groups.h5": (bombs.hdf5_groups_of_groups, 2, "more than 4,096 columns and groups in one episode"),
    "expanded.pt": (bombs.pt_expanded, 0, "obs: float32 (1000000, 1000000): with this column the episode would take"),
    "bytearray.pt": (bombs.pt_bytearray, 0, "it holds __builtin__.bytearray, expected a TensorDict"),
    "early-bytearray.pt": (bombs.pt_bytearray_of_before_zip_files, 0, "it holds __builtin__.bytearray, expected a TensorDict"),
    "deflated.pt": (bombs.pt_deflated, 0, "expected records that are not compressed, as torch.save writes them"),
    "sparse.pt": (bombs.pt_sparse, 0, "it holds torch._utils._rebuild_sparse_tensor"),
    "early-storage.pt": (bombs.pt_storage_of_before_zip_files, 0, "early-storage.pt: no file of torch.save, or a damaged one ("),
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
    "count-v0": (lambda folder: bombs.announce_minari_episodes(_minari(folder), bombs.HUGE), 0, "total_episodes: 1000000000000, expected"),
}


@pytest.fixture(scope="module")
def surveyed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Inspects all bombs in one child with a memory limit; returns what it printed for each."""
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
def test_bomb_is_refused_and_the_others_of_its_file_are_read(surveyed: dict[str, Any], name: str) -> None:
    _, good, reason = BOMBS[name]

    found, refused, messages = surveyed[name]

    assert len(messages) == 1 and reason in messages[0], messages
    assert found == good
    assert refused == (1 if good else 0) or name == "expanded.pt"


def test_bombs_take_no_memory(surveyed: dict[str, Any]) -> None:
    (growth,) = surveyed["growth"]

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
        assert "expected at most 1,048,576; if it is meant, cut it up" in next(iter(report.reasons.values())).examples[0][1]
        assert_same(stored(server), [make_episode(0), make_episode(2)])
    assert peak < bombs.LONG_BYTES // 4


def test_tensor_without_a_value_for_every_element_is_refused_with_trust_too(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="obs: a sparse_coo tensor, expected one with a value for every element"):
        datasets.survey(str(bombs.pt_sparse(tmp_path / "sparse.pt")), trust_pickle=True)


def test_limit_counts_what_would_be_stored(tmp_path: Path) -> None:
    """For 11 rows: 8 float64 that become float32, and no camera; one byte less is too little."""
    columns = make_episode(0) | {"obs": np.zeros((11, 8)), "camera": np.zeros((11, 64, 64, 3), np.uint8)}
    write_hdf5(tmp_path / "demos.h5", [columns])
    write_npz(tmp_path / "demos.npz", [columns])
    torch.save({name: torch.from_numpy(column[None]) for name, column in columns.items()}, tmp_path / "demos.pt")
    changes = Changes(drop=("camera",), float32=True, task=1)
    size_bytes = 11 * (8 * 4 + 2 * 4 + 4 + 4 + 8)

    for name in ("demos.h5", "demos.npz", "demos.pt"):
        reports = [datasets.survey(str(tmp_path / name), changes=changes, max_episode_bytes=size_bytes - less)[0] for less in (0, 1)]

        assert [(report.stored, report.refused) for report in reports] == [(1, 0), (0, 1)]
        assert reports[0].size_bytes == size_bytes


def test_column_that_is_left_out_is_not_read(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "demos.h5", "w") as file:
        for name, column in make_episode(0).items():
            file[f"episodes/0/{name}"] = column
        file["episodes/0"].create_dataset("camera", (bombs.HUGE,), "u1", chunks=(1024,))

    report, columns = datasets.survey(str(tmp_path / "demos.h5"), changes=Changes(drop=("camera",)))

    assert report.stored == 1 and "camera" not in columns


@pytest.mark.parametrize("options", [{"compression": "gzip"}, {"compression": "lzf", "shuffle": True}, {"fletcher32": True}], ids=str)
def test_large_chunks_of_an_honest_file_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    """Noise, which does not become smaller: what gzip has stored of it is looked at."""
    monkeypatch.setattr("touchline.datasets.chunks.SPARE_BYTES", 128 * MIB)
    columns = make_episode(0, rows=1024) | {"obs": np.random.default_rng(0).standard_normal((1024, 256), np.float32)}
    with h5py.File(tmp_path / "demos.h5", "w") as file:
        for name, column in columns.items():
            file.create_dataset(f"episodes/0/{name}", data=column, chunks=column.shape, **options)

    report, _ = datasets.survey(str(tmp_path / "demos.h5"), max_episode_bytes=2 * MIB)

    assert (report.stored, report.refused) == (1, 0), report.reasons
