"""A file's values are stored exactly, or their episode is refused; a dry run finds what a server would refuse."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from support.dataset_cases import make_episode, serve, stored, write_hdf5, write_npz
from support.serving import ServerThread
from touchline import ReplayClient, datasets
from touchline.datasets import ColumnTransforms

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "load_npz.py"
NAN = np.full((11, 4), np.nan, np.float32)


def without(name: str) -> dict[str, np.ndarray]:
    return {key: value for key, value in make_episode(1).items() if key != name}


REFUSED: dict[str, tuple[dict[str, np.ndarray], str]] = {
    "no reward": (without("reward"), "reward: missing, expected the columns obs, action, reward"),
    "no observation": (without("obs"), "obs: missing"),
    "terminated beside no done": (without("done") | {"terminated": np.zeros(11)}, "terminated: given without done"),
    "an observation that is not finite": (make_episode(1) | {"obs": NAN}, "obs: a value that is not finite in row 0"),
    "a reward that is not finite": (make_episode(1) | {"reward": np.full(11, np.inf)}, "reward: a value that is not finite in row 1"),
    "rows that do not match": (make_episode(1) | {"reward": np.zeros(10)}, "reward: "),
    "no rows": ({name: value[:0] for name, value in make_episode(1).items()}, "obs: zero rows"),
    "a wide reward": (make_episode(1) | {"reward": np.zeros((11, 2))}, "reward: shape"),
    "a reserved name": (make_episode(1) | {"index": np.zeros(11)}, "index: a reserved column name"),
    "an unsupported dtype": (make_episode(1) | {"c": np.zeros(11, np.uint32)}, "c: dtype uint32 is not supported"),
    "text": (make_episode(1) | {"c": np.array(["x"] * 11)}, "c: text"),
}


@pytest.fixture
def server() -> Iterator[ServerThread]:
    with serve(allow_non_finite=False) as server:
        yield server


@pytest.mark.parametrize(("columns", "message"), REFUSED.values(), ids=list(REFUSED))
def test_inspect_refuses_what_a_server_refuses(server: ServerThread, tmp_path: Path, columns: dict[str, np.ndarray], message: str) -> None:
    write_npz(tmp_path / "bad.npz", [columns, make_episode(2), columns])

    found, _ = datasets.inspect(str(tmp_path / "bad.npz"))
    with ReplayClient(server.address) as client:
        report = datasets.load(client, str(tmp_path / "bad.npz"))

    assert (found.stored, found.refused) == (report.stored, report.refused) == (1, 2)
    assert any(reason.startswith(message.replace("0", "#").replace("1", "#")) for reason in found.reasons), found.reasons


@pytest.mark.parametrize("columns", [without("reward"), make_episode(1) | {"obs": NAN}], ids=["a missing column", "not finite"])
def test_dry_run_and_example_exit_with_1_if_an_episode_is_refused(tmp_path: Path, columns: dict[str, np.ndarray]) -> None:
    write_npz(tmp_path / "bad.npz", [make_episode(0), columns])
    commands = [("-m", "touchline", "load", "bad.npz", "--dry-run"), (str(EXAMPLE), "bad.npz", "--address", "127.0.0.1:1")]

    for arguments in commands:
        ran = subprocess.run([sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
        assert ran.returncode == 1 and "refused" in ran.stdout, (arguments, ran)


def test_example_exits_with_1_if_the_server_refuses_an_episode(server: ServerThread, tmp_path: Path) -> None:
    write_npz(tmp_path / "other.npz", [make_episode(0)])
    with ReplayClient(server.address) as client:
        client.add(make_episode(0, obs=9))

    command = [sys.executable, str(EXAMPLE), "other.npz", "--address", server.address]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)

    assert ran.returncode == 1 and "obs: shape" in ran.stdout, ran


def test_float32_that_would_be_infinite_is_refused(server: ServerThread, tmp_path: Path) -> None:
    write_npz(tmp_path / "wide.npz", [make_episode(0), make_episode(1) | {"value": np.full(11, 1e300)}])

    found, _ = datasets.inspect(str(tmp_path / "wide.npz"), transforms=ColumnTransforms(float32=True))

    assert found.refused == 1 and "inf as float" in next(iter(found.reasons))


def test_npz_member_present_twice_is_refused(server: ServerThread, tmp_path: Path) -> None:
    path = tmp_path / "twice.npz"
    write_npz(path, [make_episode(0)])
    with zipfile.ZipFile(path, "a") as file, pytest.warns(UserWarning, match="Duplicate name"):
        file.writestr("0/obs.npy", file.read("0/obs.npy"))

    found, _ = datasets.inspect(str(path))

    assert found.refused == 1 and "given twice" in next(iter(found.reasons))


def test_hdf5_dotted_name_below_obs_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "dots.h5"
    write_hdf5(path, [without("obs")])
    with h5py.File(path, "a") as file:
        file["episodes/episode_0/obs/observation.state"] = np.zeros((11, 3), np.float32)

    found, _ = datasets.inspect(str(path))

    assert found.refused == 1 and "a dot in the name" in next(iter(found.reasons))


@pytest.mark.parametrize("value", [2, np.nan, 0.5])
def test_minari_flag_that_is_neither_true_nor_false_is_refused(value: Any) -> None:
    for name in ("minari", "PIL"):
        pytest.importorskip(name)
    from touchline.datasets import minari

    with pytest.raises(datasets.DatasetError, match=r"^terminations: "):
        minari._flags("terminations", np.array([0, value]))
    assert minari._flags("terminations", np.array([0, 1])).tolist() == [False, True]


def test_order_of_columns_comes_back(server: ServerThread, tmp_path: Path) -> None:
    columns = make_episode(0)
    with ReplayClient(server.address) as client:
        client.add({name: columns[name] for name in ("reward", "obs", "done", "action")})
        datasets.export(client, str(tmp_path / "all.h5"))
        client.clear()
        datasets.load(client, str(tmp_path / "all.h5"), reload_label="once more")

    assert list(stored(server)[0]) == ["reward", "obs", "done", "action"]
