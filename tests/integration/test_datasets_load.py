"""Loading data sets that the formats' own libraries made."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import h5py
import minari
import numpy as np
import pytest
import tensordict.tensordict
import torch
from minari.data_collector.episode_buffer import EpisodeBuffer
from tensordict import TensorDict

from dataset_cases import assert_same, make_episode, serve, stored
from touchline import ReplayClient, datasets
from touchline.datasets import Changes, DatasetError
from touchline_protos.dtypes import BFLOAT16
from touchline_server.app import ServerThread

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def server() -> Iterator[ServerThread]:
    with serve() as server:
        yield server


@pytest.fixture
def client(server: ServerThread) -> Iterator[ReplayClient]:
    with ReplayClient(server.address) as client:
        yield client


# TD-MPC2's .pt files.


def _multitask(episodes: int, rows: int, seed: int = 0) -> TensorDict:
    """Returns what the files of TD-MPC2's multi-task data sets hold."""
    generator = torch.Generator().manual_seed(seed)
    td = TensorDict(
        {
            "obs": torch.randn(episodes, rows, 5, generator=generator),
            "action": torch.randn(episodes, rows, 2, generator=generator),
            "reward": torch.randn(episodes, rows, generator=generator),
            "task": torch.arange(episodes).unsqueeze(1).expand(episodes, rows),
        },
        [episodes, rows],
    )
    td["action"][:, 0] = float("nan")
    td["reward"][:, 0] = float("nan")
    return td


def _episodes_of(td: TensorDict) -> list[dict[str, np.ndarray]]:
    return [{name: td[name][row].numpy() for name in td.keys()} for row in range(len(td))]  # noqa: SIM118


def test_pt_file_as_tdmpc2_has_them_is_stored_to_the_bit(server: ServerThread, client: ReplayClient, tmp_path: Path) -> None:
    td = _multitask(6, 11)
    torch.save(td, tmp_path / "chunk_0.pt")

    report = datasets.load(client, str(tmp_path / "chunk_0.pt"))

    assert (report.read, report.stored, report.duplicates, report.refused, report.steps) == (6, 6, 0, 0, 66)
    assert_same(stored(server), _episodes_of(td))


def test_pt_file_with_terminated_and_nested_obs_is_stored_under_our_names(
    server: ServerThread, client: ReplayClient, tmp_path: Path
) -> None:
    td = _multitask(3, 4)
    td["obs"] = TensorDict({"rgb": torch.randint(0, 255, (3, 4, 2, 2), dtype=torch.uint8), "z": torch.ones(3, 4, 2).bfloat16()}, [3, 4])
    td["terminated"] = torch.zeros(3, 4)
    torch.save(td, tmp_path / "chunk.pt")

    datasets.load(client, str(tmp_path / "chunk.pt"))

    found = stored(server)
    assert set(found[0]) == {"obs.rgb", "obs.z", "action", "reward", "task", "done"}
    assert found[0]["obs.z"].dtype == BFLOAT16
    assert [np.array_equal(episode["obs.rgb"], td["obs", "rgb"][row]) for row, episode in enumerate(found)] == [True] * 3


def test_folder_of_chunks_is_one_source_in_the_order_of_names(server: ServerThread, client: ReplayClient, tmp_path: Path) -> None:
    chunks = [_multitask(2, 3, seed) for seed in range(3)]
    for number, chunk in enumerate(chunks):
        torch.save(chunk, tmp_path / f"chunk_{number}.pt")

    report = datasets.load(client, str(tmp_path), first=1, limit=4)

    assert report.stored == 4
    assert_same(stored(server), [episode for chunk in chunks for episode in _episodes_of(chunk)][1:5])


def test_dict_of_tensors_in_the_layout_of_before_zip_files_is_read(server: ServerThread, client: ReplayClient, tmp_path: Path) -> None:
    td = _multitask(2, 3)
    torch.save(dict(td.items()), tmp_path / "old.pt", _use_new_zipfile_serialization=False)

    datasets.load(client, str(tmp_path / "old.pt"))

    assert_same(stored(server), _episodes_of(td))


def test_file_of_an_early_tensordict_is_read_without_trust(
    server: ServerThread, client: ReplayClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its class was in another module, and was pickled as any object: class and attributes."""
    td = _multitask(2, 3)
    early = type("TensorDict", (), {"__module__": "tensordict.tensordict"})
    saved = early()
    saved.__dict__.update(_tensordict=dict(td.items()), _batch_size=torch.Size([2, 3]), _device=None, _is_shared=False, _is_memmap=False)
    with monkeypatch.context() as patch:
        patch.setattr(tensordict.tensordict, "TensorDict", early, raising=False)
        torch.save(saved, tmp_path / "early.pt")

    datasets.load(client, str(tmp_path / "early.pt"))

    assert_same(stored(server), _episodes_of(td))


class Payload:
    """An object whose unpickling runs code."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return _run, (self.marker,)


def _run(marker: str) -> dict[str, torch.Tensor]:
    Path(marker).touch()
    return dict(_multitask(2, 3).items())


def test_pt_file_with_code_in_it_needs_trust(server: ServerThread, client: ReplayClient, tmp_path: Path) -> None:
    torch.save(Payload(str(tmp_path / "ran")), tmp_path / "code.pt")

    with pytest.raises(DatasetError, match=r"it holds .*_run, expected a TensorDict.*--trust-pickle"):
        datasets.load(client, str(tmp_path / "code.pt"))
    ran = (tmp_path / "ran").exists()
    report = datasets.load(client, str(tmp_path / "code.pt"), trust_pickle=True)

    assert not ran
    assert report.stored == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"obs": torch.zeros(2, 3), "reward": torch.zeros(3, 3)}, r"reward: shape \(3, 3\), expected \(2, 3\) episodes and rows"),
        ({"obs": torch.zeros(2)}, r"obs: shape \(2,\), expected \(episodes, rows"),
        ({"obs": 3}, "obs: int, expected a tensor"),
        ({"done": torch.zeros(2, 3), "terminated": torch.zeros(2, 3)}, "done: given beside terminated"),
        (torch.zeros(3), "Tensor, expected a TensorDict"),
        ({}, "no columns"),
    ],
)
def test_pt_file_of_something_else_says_what_it_is(client: ReplayClient, tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "other.pt")

    with pytest.raises(DatasetError, match=message):
        datasets.load(client, str(tmp_path / "other.pt"))


# Minari.


@pytest.fixture
def minari_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path / "minari"


def _play(env: gymnasium.Env[Any, Any], episodes: int, **last: Any) -> list[EpisodeBuffer]:
    """Plays at random and returns what happened, as Minari takes it."""
    env.action_space.seed(0)
    played = []
    for number in range(episodes):
        obs, info = env.reset(seed=number)
        buffer: dict[str, list[Any]] = {"obs": [obs], "action": [], "reward": [], "terminated": [], "truncated": [], "info": [info]}
        over = False
        while not over:
            action = env.action_space.sample()
            obs, reward, terminated, truncated, _ = env.step(action)
            over = terminated or truncated
            for name, value in {"obs": obs, "action": action, "reward": reward, "terminated": terminated, "truncated": truncated}.items():
                buffer[name].append(value)
        steps = len(buffer["action"])
        played.append(
            EpisodeBuffer(
                observations=np.stack(buffer["obs"]),
                actions=np.stack(buffer["action"]),
                rewards=buffer["reward"],
                terminations=buffer["terminated"],
                truncations=buffer["truncated"] if not last else [False] * (steps - 1) + [last["truncated"]],
                infos={"clock": np.arange(steps + 1), "name": ["x"] * (steps + 1)},
            )
        )
    return played


@pytest.mark.filterwarnings("ignore")
def _create(name: str, played: list[EpisodeBuffer], env: gymnasium.Env[Any, Any], **options: Any) -> None:
    minari.create_dataset_from_buffers(name, played, observation_space=env.observation_space, action_space=env.action_space, **options)


@pytest.mark.filterwarnings("ignore")
def test_minari_dataset_is_stored_in_rows_as_recorders_write_them(server: ServerThread, client: ReplayClient, minari_folder: Path) -> None:
    env = gymnasium.make("Pendulum-v1", max_episode_steps=20)
    played = _play(env, 3)
    _create("pendulum/random-v0", played, env)

    report = datasets.load(client, "minari:pendulum/random-v0", actor="left")

    found = stored(server)
    assert (report.stored, report.steps) == (3, 63)
    assert list(found[0]) == ["obs", "action", "reward", "done"]
    for episode, buffer in zip(found, played, strict=True):
        assert episode["obs"].tobytes() == buffer.observations.tobytes()
        assert episode["action"][1:].tobytes() == buffer.actions.tobytes()
        assert episode["reward"][1:].tolist() == buffer.rewards
        assert episode["done"].dtype == np.float32 and not episode["done"][1:].any()
        assert all(np.isnan(episode[name][0]).all() for name in ("action", "reward", "done"))
    assert set(client.sample().actor_names.values()) == {"left"}


@pytest.mark.filterwarnings("ignore")
def test_minari_termination_is_done_and_discrete_actions_are_kept(server: ServerThread, client: ReplayClient, minari_folder: Path) -> None:
    env = gymnasium.make("CartPole-v1")
    played = _play(env, 4)
    _create("cartpole/random-v0", played, env)

    datasets.load(client, str(minari_folder / "cartpole" / "random-v0"), infos=True, changes=Changes(float32=True, task=7))

    for episode, buffer in zip(stored(server), played, strict=True):
        assert set(episode) == {"obs", "action", "reward", "done", "info.clock", "task"}
        assert episode["done"][1:].astype(bool).tolist() == buffer.terminations
        assert episode["action"].dtype == np.int64 and episode["action"][1:].tolist() == buffer.actions.tolist()
        assert episode["reward"].dtype == np.float32
        assert episode["info.clock"].tolist() == list(range(len(episode["obs"])))
        assert episode["task"].tolist() == [7] * len(episode["obs"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("truncated", [True, False])
def test_minari_truncations_that_the_end_does_not_tell_become_a_column(
    server: ServerThread, client: ReplayClient, minari_folder: Path, truncated: bool
) -> None:
    """CartPole terminates; told by that is that it was not truncated."""
    env = gymnasium.make("CartPole-v1")
    _create("cartpole/both-v0", _play(env, 2, truncated=truncated), env)

    datasets.load(client, "minari:cartpole/both-v0")

    for episode in stored(server):
        assert ("truncated" in episode) == truncated
        if truncated:
            assert episode["truncated"].tolist() == [False] * (len(episode["obs"]) - 1) + [True]


class Arm(gymnasium.Env[Any, Any]):
    """Observations in a Dict with a Tuple in it."""

    observation_space = gymnasium.spaces.Dict(
        {
            "image": gymnasium.spaces.Box(0, 255, (2, 2, 3), np.uint8),
            "joints": gymnasium.spaces.Tuple([gymnasium.spaces.Box(-1, 1, (2,)), gymnasium.spaces.Discrete(3)]),
        }
    )
    action_space = gymnasium.spaces.Box(-1, 1, (2,))


@pytest.mark.filterwarnings("ignore")
def test_minari_nested_observations_are_flattened_with_dots(server: ServerThread, client: ReplayClient, minari_folder: Path) -> None:
    rng = np.random.default_rng(0)
    image, angle, mode = rng.integers(0, 255, (4, 2, 2, 3), np.uint8), rng.random((4, 2), np.float32), rng.integers(0, 3, 4)
    buffer = EpisodeBuffer(
        observations={"image": image, "joints": (angle, mode)},
        actions=rng.random((3, 2), np.float32),
        rewards=[0.0, 1.0, 2.0],
        terminations=[False] * 3,
        truncations=[False, False, True],
    )
    _create("arm-v0", [buffer], Arm())

    datasets.load(client, "minari:arm-v0")

    episode = stored(server)[0]
    assert np.array_equal(episode["obs.image"], image)
    assert np.array_equal(episode["obs.joints.0"], angle)
    assert np.array_equal(episode["obs.joints.1"], mode)


def test_minari_dataset_that_is_not_there_says_where_it_was_sought(client: ReplayClient, minari_folder: Path) -> None:
    with pytest.raises(DatasetError, match=r"minari:D4RL/door/human-v2: not in Minari's folder .*minari download D4RL/door/human-v2"):
        datasets.load(client, "minari:D4RL/door/human-v2")


@pytest.mark.filterwarnings("ignore")
def test_minari_rows_are_made_in_the_servers_convention(minari_folder: Path) -> None:
    env = gymnasium.make("Pendulum-v1", max_episode_steps=5)
    played = _play(env, 1)
    _create("pendulum/random-v0", played, env)

    with serve(row_convention="outgoing") as server, ReplayClient(server.address) as client:
        datasets.load(client, "minari:pendulum/random-v0")

        episode = stored(server)[0]
    assert episode["action"][:-1].tobytes() == played[0].actions.tobytes()
    assert np.isnan(episode["action"][-1]).all()


# HDF5 and NPZ, written by hand as docs/datasets.md says.


def _write_hdf5(path: Path, episodes: list[dict[str, np.ndarray]], name: str = "episode_{}", **attributes: Any) -> None:
    with h5py.File(path, "w") as file:
        for number, columns in enumerate(episodes):
            group = file.create_group(f"episodes/{name.format(number)}")
            group.attrs.update(attributes)
            for column, value in columns.items():
                group[column.replace(".", "/")] = value


def _write_npz(path: Path, episodes: list[dict[str, np.ndarray]]) -> None:
    np.savez(path, **{f"{number}/{name}": value for number, columns in enumerate(episodes) for name, value in columns.items()})


def test_hdf5_of_plain_groups_is_stored_in_natural_order(server: ServerThread, client: ReplayClient, tmp_path: Path) -> None:
    episodes = [make_episode(number, rows=3 + number) for number in range(12)]
    _write_hdf5(tmp_path / "demos.h5", episodes, actor="teleoperation", policy_version=5)

    report = datasets.load(client, str(tmp_path / "demos.h5"))

    assert report.stored == 12
    assert_same(stored(server), episodes)
    batch = client.sample()
    assert {batch.actor_names[int(number)] for number in batch.actor} == {"teleoperation"}
    assert set(batch.policy_version.tolist()) == {5}


def test_hdf5_nested_groups_are_columns_with_dots(server: ServerThread, client: ReplayClient, tmp_path: Path) -> None:
    episode = make_episode(1)
    episode["obs.state"], episode["obs.deep.er"] = episode.pop("obs"), np.arange(11, dtype=np.uint8)
    _write_hdf5(tmp_path / "demos.hdf5", [episode])

    datasets.load(client, str(tmp_path / "demos.hdf5"))

    assert_same(stored(server), [episode])


def test_npz_of_savez_is_stored(server: ServerThread, client: ReplayClient, tmp_path: Path) -> None:
    episodes = [make_episode(number, rows=3 + number) for number in range(12)]
    _write_npz(tmp_path / "demos.npz", episodes)

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
    assert "Object arrays cannot be loaded" in reason
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
    _write_npz(tmp_path / "demos.npz", [*bad, make_episode(4)])
    _write_hdf5(tmp_path / "demos.h5", [make_episode(5)], key_client_id="", actor="x")
    _write_hdf5(tmp_path / "actor.h5", [make_episode(5)], actor="x" * 129)

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
        ("a.npz", b"no zip", "no NPZ file"),
        ("a.h5", b"no hdf5", "no HDF5 file"),
        ("a.pt", b"no torch", "no file of torch.save"),
        ("a.csv", b"1,2", "not told by its name what it is"),
    ],
)
def test_file_of_another_kind_says_so(client: ReplayClient, tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)

    with pytest.raises(DatasetError, match=message):
        datasets.load(client, str(tmp_path / name))


def test_npz_with_arrays_of_no_episode_says_how_it_is_laid_out(client: ReplayClient, tmp_path: Path) -> None:
    np.savez(tmp_path / "demos.npz", **make_episode(0))

    with pytest.raises(DatasetError, match=r"obs: an array outside of any episode, expected names '<episode>/<column>'"):
        datasets.load(client, str(tmp_path / "demos.npz"))


def test_hdf5_without_the_group_says_what_it_found(client: ReplayClient, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "demos.h5", "w") as file:
        file["data/demo_0/obs"] = np.zeros(3)

    with pytest.raises(DatasetError, match=r"no group 'episodes'.*found data"):
        datasets.load(client, str(tmp_path / "demos.h5"))


def test_hdf5_that_reaches_into_other_files_is_refused(client: ReplayClient, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"x" * 11)
    _write_hdf5(tmp_path / "other.h5", [make_episode(0)])
    _write_hdf5(tmp_path / "demos.h5", [make_episode(number) for number in range(3)])
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
    _write_hdf5(tmp_path / "other.h5", [make_episode(0)])
    _write_hdf5(tmp_path / "demos.h5", [make_episode(1)])
    with h5py.File(tmp_path / "demos.h5", "a") as file:
        file["away"] = h5py.ExternalLink("other.h5", "/episodes")
        file["episodes/episode_1"] = h5py.ExternalLink("other.h5", "/episodes/episode_0")
        file["episodes/episode_2"] = h5py.SoftLink("/away/episode_0")
        file["episodes/episode_3/action"] = h5py.SoftLink("/away/episode_0/action")
        # Within the file they are as good as what they name.
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
    _write_npz(tmp_path / "demos.npz", [make_episode(0)])

    with (
        serve(row_convention="outgoing") as server,
        ReplayClient(server.address) as client,
        pytest.raises(DatasetError, match="convention 'incoming', expected 'outgoing'"),
    ):
        datasets.load(client, str(tmp_path / "demos.npz"))


# Refused by the server, and once only.


def test_refusals_are_counted_by_reason_with_examples(tmp_path: Path) -> None:
    episodes = [make_episode(number) for number in range(8)]
    for number in (1, 3, 4, 6):
        episodes[number]["obs"][number] = np.inf
    episodes[7] = make_episode(7, obs=5)
    _write_npz(tmp_path / "demos.npz", episodes)

    with serve(allow_non_finite=False) as server, ReplayClient(server.address) as client:
        report = datasets.load(client, str(tmp_path / "demos.npz"))

    assert (report.read, report.stored, report.refused) == (8, 3, 5)
    infinite, other = sorted(report.reasons.values(), key=lambda refusals: -refusals.count)
    assert (infinite.count, [position for position, _ in infinite.examples]) == (4, [1, 3, 4])
    assert "obs: a value that is not finite in row 3" in infinite.examples[1][1]
    assert (other.count, other.examples[0][0]) == (1, 7)


def test_loading_again_stores_nothing_twice_whatever_the_name(server: ServerThread, client: ReplayClient, tmp_path: Path) -> None:
    _write_npz(tmp_path / "demos.npz", [make_episode(number) for number in range(5)])
    datasets.load(client, str(tmp_path / "demos.npz"), limit=3)
    (tmp_path / "demos.npz").rename(tmp_path / "renamed.npz")

    report = datasets.load(client, str(tmp_path / "renamed.npz"))

    assert (report.stored, report.duplicates) == (2, 3)
    assert_same(stored(server), [make_episode(number) for number in range(5)])


def test_load_reads_no_more_ahead_than_one_call(client: ReplayClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("touchline.datasets.loading.CALL_BYTES", 10_000)
    episodes = [make_episode(number, rows=50) for number in range(100)]
    _write_npz(tmp_path / "demos.npz", episodes)
    ahead: list[tuple[int, int]] = []

    def watch(stage: str, done: int, total: int, report: datasets.LoadReport) -> None:
        if stage == "load" and done:
            ahead.append((done, report.size_bytes))

    datasets.load(client, str(tmp_path / "demos.npz"), watch=watch)

    size_bytes = sum(column.nbytes for column in episodes[0].values())
    assert len(ahead) >= 100 * size_bytes // 10_000
    assert all(read_bytes <= (done + 1) * size_bytes for done, read_bytes in ahead)


def test_file_that_was_changed_is_another_source(server: ServerThread, client: ReplayClient, tmp_path: Path) -> None:
    _write_npz(tmp_path / "demos.npz", [make_episode(number) for number in range(3)])
    datasets.load(client, str(tmp_path / "demos.npz"))
    _write_npz(tmp_path / "demos.npz", [make_episode(number) for number in range(10, 14)])

    report = datasets.load(client, str(tmp_path / "demos.npz"))

    assert (report.stored, report.refused) == (4, 0)
    assert_same(stored(server), [make_episode(number) for number in (0, 1, 2, 10, 11, 12, 13)])


@pytest.mark.parametrize(
    "other", [{"again": "more"}, {"changes": Changes(task=1)}, {"changes": Changes(drop=("extra",))}], ids=["again", "task", "drop"]
)
def test_the_same_file_loaded_otherwise_is_other_episodes(client: ReplayClient, tmp_path: Path, other: dict[str, Any]) -> None:
    _write_npz(tmp_path / "demos.npz", [make_episode(0) | {"extra": np.zeros(11), "task": np.zeros(11, np.int64)}])
    datasets.load(client, str(tmp_path / "demos.npz"))
    if "drop" in str(other):
        client.clear()  # another schema

    reports = [datasets.load(client, str(tmp_path / "demos.npz"), **other) for _ in range(2)]

    assert [(report.stored, report.duplicates) for report in reports] == [(1, 0), (0, 1)]


def test_duplicate_of_an_evicted_episode_stays_one_and_again_brings_it_back(tmp_path: Path) -> None:
    _write_npz(tmp_path / "demos.npz", [make_episode(number) for number in range(6)])
    with serve(buffer_size=33) as server, ReplayClient(server.address) as client:
        datasets.load(client, str(tmp_path / "demos.npz"))

        repeated = datasets.load(client, str(tmp_path / "demos.npz"))
        more = datasets.load(client, str(tmp_path / "demos.npz"), again="2", limit=1)

        assert (repeated.stored, repeated.duplicates, more.stored) == (0, 6, 1)
        assert_same(stored(server), [make_episode(number) for number in (4, 5, 0)])


def test_key_of_the_source_is_the_key(client: ReplayClient, tmp_path: Path) -> None:
    _write_hdf5(tmp_path / "one.h5", [make_episode(0)], key_client_id="robot", key_incarnation=4, key_sequence=9)
    _write_hdf5(tmp_path / "two.h5", [make_episode(0)], name="other_{}", key_client_id="robot", key_incarnation=4, key_sequence=9)
    datasets.load(client, str(tmp_path / "one.h5"))

    report = datasets.load(client, str(tmp_path / "two.h5"))

    assert (report.stored, report.duplicates) == (0, 1)


@pytest.mark.filterwarnings("ignore")
def test_example_stores_a_minari_dataset_once(server: ServerThread, minari_folder: Path) -> None:
    env = gymnasium.make("CartPole-v1")
    _create("cartpole/random-v0", _play(env, 3), env)
    command = [sys.executable, str(EXAMPLES / "load_minari.py"), "cartpole/random-v0", "--address", server.address]

    told = [json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(2)]

    assert told == [
        {"stored": 3, "duplicates": 0, "episodes_on_the_server": 3},
        {"stored": 0, "duplicates": 3, "episodes_on_the_server": 3},
    ]
