"""Loading HDF5 and NPZ files written by hand, as docs/datasets.md describes them, and invalid files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest

from support.dataset_cases import assert_same, make_episode, serve, stored, write_hdf5, write_npz
from support.serving import ServerThread
from touchline import ReplayClient, datasets
from touchline.datasets import DatasetError


@pytest.fixture
def server() -> Iterator[ServerThread]:
    with serve() as server:
        yield server


@pytest.fixture
def client(server: ServerThread) -> Iterator[ReplayClient]:
    with ReplayClient(server.address) as client:
        yield client


def test_hdf5_of_plain_groups_is_stored_in_natural_order(server: ServerThread, client: ReplayClient, tmp_path: Path) -> None:
    episodes = [make_episode(number, rows=3 + number) for number in range(12)]
    write_hdf5(tmp_path / "demos.h5", episodes, actor="teleoperation", policy_version=5)

    report = datasets.load(client, str(tmp_path / "demos.h5"))

    assert report.stored == 12
    assert_same(stored(server), episodes)
    batch = client.sample()
    assert {batch.actor_names[int(number)] for number in batch.actor} == {"teleoperation"}
    assert set(batch.policy_version.tolist()) == {5}


def test_hdf5_nested_groups_are_columns_with_dots(server: ServerThread, client: ReplayClient, tmp_path: Path) -> None:
    episode = make_episode(1)
    episode["obs.state"], episode["obs.deep.er"] = episode.pop("obs"), np.arange(11, dtype=np.uint8)
    write_hdf5(tmp_path / "demos.hdf5", [episode])

    datasets.load(client, str(tmp_path / "demos.hdf5"))

    assert_same(stored(server), [episode])


def test_npz_of_savez_is_stored(server: ServerThread, client: ReplayClient, tmp_path: Path) -> None:
    episodes = [make_episode(number, rows=3 + number) for number in range(12)]
    write_npz(tmp_path / "demos.npz", episodes)

    report = datasets.load(client, str(tmp_path / "demos.npz"))

    assert report.stored == 12
    assert_same(stored(server), episodes)


def test_episode_that_cannot_be_read_is_refused_and_the_others_are_stored(
    server: ServerThread, client: ReplayClient, tmp_path: Path
) -> None:
    np.savez(
        tmp_path / "demos.npz",
        **{f"0/{name}": value for name, value in make_episode(0).items()},
        **{"1/obs": np.array([{"a": "pickle"}], dtype=object)},
        **{f"2/{name}": value for name, value in make_episode(2).items()},
    )

    report = datasets.load(client, str(tmp_path / "demos.npz"))

    assert (report.stored, report.refused) == (2, 1)
    ((reason, refusals),) = report.reasons.items()
    assert "an array of objects (object), expected numbers" in reason
    assert refusals.examples[0][0] == 1
    assert_same(stored(server), [make_episode(0), make_episode(2)])


def test_episodes_that_no_message_can_hold_are_refused_and_the_others_are_stored(
    server: ServerThread, client: ReplayClient, tmp_path: Path
) -> None:
    small = make_episode(2, rows=2)
    bad = [
        make_episode(0) | {"x" * 257: np.zeros(11)},
        small | {f"column_{number}": np.zeros(2, np.uint8) for number in range(260)},
        make_episode(3) | {"": np.zeros(11)},
    ]
    write_npz(tmp_path / "demos.npz", [*bad, make_episode(4)])
    write_hdf5(tmp_path / "demos.h5", [make_episode(5)], key_client_id="", actor="x")
    write_hdf5(tmp_path / "actor.h5", [make_episode(5)], actor="x" * 129)

    report = datasets.load(client, str(tmp_path / "demos.npz"))
    of_bad_key, of_bad_actor = (datasets.load(client, str(tmp_path / name)) for name in ("demos.h5", "actor.h5"))

    assert (report.stored, report.refused) == (1, 3)
    assert [refusals.examples[0][1].partition(",")[0] for refusals in report.reasons.values()] == [
        "column name of 257 characters",
        "264 columns",
        "a column without a name",
    ]
    assert "client_id of 0 characters" in next(iter(of_bad_key.reasons.values())).examples[0][1]
    assert "actor: 129 characters" in next(iter(of_bad_actor.reasons.values())).examples[0][1]
    assert_same(stored(server), [make_episode(4)])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.npz", b"no zip", "not an NPZ file"),
        ("a.h5", b"no hdf5", "not an HDF5 file"),
        ("a.pt", b"no torch", "not written by torch.save"),
        ("a.csv", b"1,2", "unknown format, expected"),
    ],
)
def test_file_of_another_kind_is_refused(client: ReplayClient, tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)

    with pytest.raises(DatasetError, match=message):
        datasets.load(client, str(tmp_path / name))


def test_npz_with_an_array_outside_any_episode_is_refused_with_the_layout(client: ReplayClient, tmp_path: Path) -> None:
    np.savez(tmp_path / "demos.npz", **make_episode(0))

    with pytest.raises(DatasetError, match=r"obs: an array outside any episode, expected names '<episode>/<column>'"):
        datasets.load(client, str(tmp_path / "demos.npz"))


def test_hdf5_without_the_group_says_what_it_found(client: ReplayClient, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "demos.h5", "w") as file:
        file["data/demo_0/obs"] = np.zeros(3)

    with pytest.raises(DatasetError, match=r"found data, expected a group 'episodes'"):
        datasets.load(client, str(tmp_path / "demos.h5"))


def test_hdf5_that_reaches_into_other_files_is_refused(client: ReplayClient, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"x" * 11)
    write_hdf5(tmp_path / "other.h5", [make_episode(0)])
    write_hdf5(tmp_path / "demos.h5", [make_episode(number) for number in range(3)])
    with h5py.File(tmp_path / "demos.h5", "a") as file:
        file["episodes/episode_0"].create_dataset("raw", (11,), "u1", external=[(str(tmp_path / "secret"), 0, 11)])
        file["episodes/episode_1/linked"] = h5py.ExternalLink("other.h5", "/episodes/episode_0/obs")
        layout = h5py.VirtualLayout((11,), "f4")
        layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "episodes/episode_0/reward", (11,))
        file["episodes/episode_2"].create_virtual_dataset("virtual", layout)

    report = datasets.load(client, str(tmp_path / "demos.h5"))

    assert (report.stored, report.refused) == (0, 3)
    assert [refusals.examples[0][1].partition(": cannot be read: ")[2] for refusals in report.reasons.values()] == [
        "raw: its values are in another file, which is not read",
        "linked: a link to another file, which is not followed",
        "virtual: its values are in another file, which is not read",
    ]


def test_hdf5_whose_episodes_are_links_into_other_files_is_refused(client: ReplayClient, tmp_path: Path) -> None:
    write_hdf5(tmp_path / "other.h5", [make_episode(0)])
    write_hdf5(tmp_path / "demos.h5", [make_episode(1)])
    with h5py.File(tmp_path / "demos.h5", "a") as file:
        file["away"] = h5py.ExternalLink("other.h5", "/episodes")
        file["episodes/episode_1"] = h5py.ExternalLink("other.h5", "/episodes/episode_0")
        file["episodes/episode_2"] = h5py.SoftLink("/away/episode_0")
        file["episodes/episode_3/action"] = h5py.SoftLink("/away/episode_0/action")
        # Links within the file are as good as their targets.
        file["episodes/episode_4"] = h5py.SoftLink("/episodes/episode_0")

    report = datasets.load(client, str(tmp_path / "demos.h5"))

    assert (report.stored, report.refused) == (2, 3)
    reasons = [example[1].partition(": cannot be read: ")[2] for refusals in report.reasons.values() for example in refusals.examples]
    assert sorted(reasons) == sorted(f"{name}: in another file, which is not read" for name in ("episode_1", "episode_2", "action"))

    with h5py.File(tmp_path / "whole.h5", "w") as file:
        file["episodes"] = h5py.ExternalLink("other.h5", "/episodes")
    with pytest.raises(DatasetError, match=r"whole\.h5: episodes: in another file, which is not read"):
        datasets.load(client, str(tmp_path / "whole.h5"))


def test_rows_of_the_other_convention_are_not_loaded(tmp_path: Path) -> None:
    write_npz(tmp_path / "demos.npz", [make_episode(0)])

    with (
        serve(row_convention="outgoing") as server,
        ReplayClient(server.address) as client,
        pytest.raises(DatasetError, match="row convention 'incoming', expected 'outgoing'"),
    ):
        datasets.load(client, str(tmp_path / "demos.npz"))
