"""The client's TorchRL adapter, on the output of TorchRL's own collectors, compared with TorchRL's own buffer."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from tensordict import NonTensorData, TensorDict
from torchrl.collectors.utils import split_trajectories
from torchrl.data import LazyTensorStorage
from torchrl.data import ReplayBuffer as TorchRLReplayBuffer
from torchrl.data.replay_buffers.samplers import SliceSampler
from torchrl.envs import DoubleToFloat, GymEnv, InitTracker, RewardScaling, SerialEnv, StepCounter, TransformedEnv

from support.serving import Config, ServerThread, stored_episodes
from touchline import ClosedError, InvalidArgumentError, InvalidEpisodeError, NotReadyError, ReplayClient
from touchline.recorders import GymnasiumRecorder
from touchline.torchrl import RemoteReplayBuffer

try:
    from torchrl.collectors import Collector
except ImportError:  # TorchRL before 0.11
    from torchrl.collectors import SyncDataCollector as Collector

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(params=["incoming", "outgoing"])
def server(request: pytest.FixtureRequest) -> Iterator[ServerThread]:
    with ServerThread(_config(row_convention=request.param)) as server:
        yield server


def _config(**sampling: Any) -> Config:
    return Config(
        config={"buffer_size": 20_000, "batch_size": 8, "min_history": 1, "horizon": 2},
        sampling={"seed": 4, **sampling},
        storage={"device": "cpu"},
        server={"port": 0},
    )


def _make_env(max_steps: int = 15) -> TransformedEnv:
    env = TransformedEnv(GymEnv("CartPole-v1"), StepCounter(max_steps=max_steps))
    env.append_transform(InitTracker())
    return env


def _collect(*, envs: int = 3, frames: int = 240, per_batch: int = 30, **options: Any) -> list[TensorDict]:
    """Returns a collector's batches [envs, time] of random play; trajectories go across batches, some are terminated, some truncated."""
    torch.manual_seed(8)
    env = SerialEnv(envs, _make_env)
    env.set_seed(3)
    collector = Collector(env, None, frames_per_batch=per_batch, total_frames=frames, **options)
    batches = [batch.contiguous().clone() for batch in collector]
    collector.shutdown()
    return batches


def _rows(data: TensorDict) -> dict[bytes, TensorDict]:
    """Returns transitions by their trajectory and step."""
    flat = data.reshape(-1)
    ids, counts = flat["collector", "traj_ids"].reshape(-1).tolist(), flat["step_count"].reshape(-1).tolist()
    return {f"{traj}/{count}".encode(): flat[row] for row, (traj, count) in enumerate(zip(ids, counts, strict=True))}


def _all_rows(batches: list[TensorDict]) -> dict[bytes, TensorDict]:
    return {name: row for batch in batches for name, row in _rows(batch).items()}


def _check_same(found: TensorDict, expected: TensorDict) -> None:
    keys = set(expected.keys(True, True))
    assert set(found.keys(True, True)) == keys
    for key in keys:
        assert found[key].dtype == expected[key].dtype, key
        assert torch.equal(found[key], expected[key]), key


def _sample_all(buffer: RemoteReplayBuffer, batches: int) -> dict[bytes, TensorDict]:
    return {name: row for _ in range(batches) for name, row in _rows(buffer.sample()).items()}


def _stored_lengths(server: ServerThread) -> list[int]:
    """Returns the rows of each stored episode."""
    return [len(columns["action"]) for _, columns in stored_episodes(server)]


def test_every_key_of_every_transition_comes_back(server: ServerThread) -> None:
    batches = _collect()
    expected = _all_rows(batches)
    assert {bool(row["next", "terminated"]) for row in expected.values() if row["next", "done"]} == {True, False}

    with RemoteReplayBuffer(server.address, batch_size=256) as buffer:
        for batch in batches:
            buffer.extend(batch)
        complete = len(buffer)
        assert 0 < complete < len(expected)  # unfinished trajectories are not stored yet
        buffer.flush()
        assert len(buffer) == len(expected) == 240
        found = _sample_all(buffer, 30)

    assert set(found) == set(expected)
    for name, row in found.items():
        _check_same(row, expected[name])


def test_slices_are_consecutive_and_flat_as_slice_sampler_gives_them(server: ServerThread) -> None:
    batches = _collect()
    expected = _all_rows(batches)

    with RemoteReplayBuffer(server.address, batch_size=40, slice_len=5) as buffer:
        for batch in batches:
            buffer.extend(batch)
        sample, info = buffer.sample(return_info=True)
        assert buffer.sample(15).batch_size == (15,)
        assert [len(data) for data, _ in zip(buffer, range(3), strict=False)] == [40] * 3

    assert sample.batch_size == (40,)
    slices = sample.reshape(8, 5)
    assert (slices["step_count"].squeeze(-1).diff(dim=1) == 1).all()
    assert (slices["collector", "traj_ids"] == slices["collector", "traj_ids"][:, :1]).all()
    assert torch.equal(slices["next", "observation"][:, :-1], slices["observation"][:, 1:])
    assert all(torch.equal(row["action"], expected[name]["action"]) for name, row in _rows(sample).items())
    assert torch.equal(info["start"], slices["step_count"][:, 0, 0])


def test_law_is_slice_samplers() -> None:
    batches = _collect(frames=300)
    local = TorchRLReplayBuffer(
        storage=LazyTensorStorage(1000), sampler=SliceSampler(slice_len=4, traj_key=("collector", "traj_ids")), batch_size=256
    )
    with ServerThread(_config()) as server, RemoteReplayBuffer(server.address, batch_size=256, slice_len=4) as buffer:
        for batch in batches:
            buffer.extend(batch)
            local.extend(batch.reshape(-1)[batch.reshape(-1)["collector", "traj_ids"].argsort(stable=True)])
        buffer.flush()

        def starts(source: Any) -> dict[bytes, int]:
            found: dict[bytes, int] = {}
            for _ in range(150):
                for name in _rows(source.sample().reshape(-1, 4)[:, 0]):
                    found[name] = found.get(name, 0) + 1
            return found

        ours = starts(buffer)
        complete = {name.split(b"/")[0] for name in ours}
        assert len(complete) > 10

    # TorchRL's buffer splits a trajectory that spans two batches, so only whole ones are compared, each by itself.
    theirs = starts(local)
    compared = 0
    for trajectory in complete:
        names = sorted(name for name in ours if name.startswith(trajectory + b"/"))
        if len(names) > 1 and all(name in theirs for name in names):
            table = [[ours[name] for name in names], [theirs[name] for name in names]]
            assert scipy.stats.chi2_contingency(table).pvalue > 1e-4
            compared += 1
    assert compared > 3


def test_flat_and_masked_batches_are_told_apart_by_trajectory(server: ServerThread) -> None:
    batches = _collect()
    expected = _all_rows(batches)

    for form in (lambda batch: batch.reshape(-1), split_trajectories):
        with ReplayClient(server.address) as client:
            client.clear()
            with RemoteReplayBuffer(client, batch_size=256) as buffer:
                for batch in batches:
                    buffer.extend(form(batch))
                buffer.flush()
                assert len(buffer) == len(expected)
                found = _sample_all(buffer, 30)
                episodes = client.num_eps

        assert episodes == len({name.split(b"/")[0] for name in expected})
        assert all(torch.equal(row["observation"], expected[name]["observation"]) for name, row in found.items())


def test_other_readers_find_episodes_of_the_servers_convention(server: ServerThread) -> None:
    batches = _collect(envs=1)
    with RemoteReplayBuffer(server.address) as buffer:
        for batch in batches:
            buffer.extend(batch)

    with ReplayClient(server.address) as client:
        batch = client.sample(batch_size=64, horizon=1)
    expected = {row["observation"].numpy().tobytes(): row for row in _all_rows(batches).values()}
    for number in range(64):
        row = expected[batch.obs[0, number].numpy().tobytes()]
        assert torch.equal(batch.obs[1, number], row["next", "observation"])
        assert torch.equal(batch.action[0, number], row["action"])
        assert torch.equal(batch.reward[0, number], row["next", "reward"])
        assert torch.equal(batch.done[0, number], row["next", "terminated"])


def test_reads_what_a_recorder_wrote() -> None:
    import gymnasium

    with ServerThread(_config()) as server:
        with ReplayClient(server.address) as client, GymnasiumRecorder(gymnasium.make("Pendulum-v1", max_episode_steps=20), client) as env:
            env.reset(seed=1)
            for _ in range(20):
                env.step(np.zeros(1, np.float32))
        with RemoteReplayBuffer(server.address, batch_size=12, slice_len=3) as buffer:
            sample = buffer.sample()

    assert set(sample.keys(True, True)) == {
        "observation",
        "action",
        *(("next", name) for name in ("observation", "reward", "done", "terminated")),
    }
    assert sample["next", "done"].dtype == torch.bool
    slices = sample.reshape(4, 3)
    assert torch.equal(slices["next", "observation"][:, :-1], slices["observation"][:, 1:])


def test_broken_chain_is_cut_and_nothing_is_lost(server: ServerThread, caplog: pytest.LogCaptureFixture) -> None:
    (batch,) = _collect(envs=1, frames=30)
    whole = (batch["collector", "traj_ids"] == 0).sum()
    assert whole > 6
    batch["next", "observation"][0, 3, 0] = -0.0  # equal to 0.0, but with other bits
    batch["observation"][0, 4, 0] = 0.0
    expected = _rows(batch)

    with caplog.at_level(logging.WARNING, "touchline._learner.trajectories"), RemoteReplayBuffer(server.address, batch_size=128) as buffer:
        buffer.extend(batch)
        buffer.flush()
        assert len(buffer) == 30
        found = _sample_all(buffer, 10)

    assert _stored_lengths(server)[:2] == [5, int(whole) - 4 + 1]
    assert set(found) == set(expected)
    for name, row in found.items():
        _check_same(row, expected[name])
    assert torch.signbit(found[b"0/3"]["next", "observation"][0])
    assert not torch.signbit(found[b"0/4"]["observation"][0])
    assert [record.name for record in caplog.records].count("touchline._learner.trajectories") == 1


def test_max_steps_and_max_trajectories_send_early(server: ServerThread) -> None:
    batches = _collect(envs=2, frames=60)

    with RemoteReplayBuffer(server.address, max_steps=4, max_trajectories=1) as buffer:
        buffer.extend(batches[0])
        assert max(_stored_lengths(server)) == 4 + 1
        assert 60 > len(buffer) >= batches[0].numel() - 4
        buffer.extend(batches[1])

    assert server.buffer.size - server.buffer.num_eps == 60


def test_add_takes_single_transitions(server: ServerThread) -> None:
    (batch,) = _collect(envs=1, frames=30)
    expected = _rows(batch)

    with RemoteReplayBuffer(server.address, batch_size=64) as buffer:
        for row in batch.reshape(-1).exclude("collector"):
            buffer.add(row)
        sampled = buffer.sample()
        buffer.flush()
        assert len(buffer) == 30

    assert "collector" not in set(sampled.keys())
    observations = {row["observation"].numpy().tobytes() for row in expected.values()}
    assert all(row["observation"].numpy().tobytes() in observations for row in sampled)
    assert server.buffer.num_eps == len({name.split(b"/")[0] for name in expected})


def test_transforms_run_on_samples_and_their_inverse_on_what_is_added(server: ServerThread) -> None:
    batches = _collect(envs=1, frames=30)

    class Shift(RewardScaling):
        """Transform that adds 3 to samples, after the scaling."""

    with RemoteReplayBuffer(
        server.address, batch_size=16, transform=RewardScaling(loc=0.0, scale=10.0, in_keys=[("next", "reward")])
    ) as buffer:
        assert buffer.append_transform(Shift(loc=3.0, scale=1.0, in_keys=[("next", "reward")])) is buffer
        buffer.extend(batches[0])
        assert buffer.sample()["next", "reward"].unique().tolist() == [13.0]

    doubles = [batch.update({"observation": batch["observation"].double()}) for batch in _collect(envs=1, frames=30)]
    doubles = [batch.update({"next": {"observation": batch["next", "observation"].double()}}) for batch in doubles]
    with ReplayClient(server.address) as client:
        client.clear()
        to_float = DoubleToFloat(in_keys_inv=["observation", ("next", "observation")], in_keys=["observation", ("next", "observation")])
        with RemoteReplayBuffer(client, batch_size=16, transform=to_float) as buffer:
            buffer.extend(doubles[0])
            assert buffer.sample()["observation"].dtype == torch.float32
        assert doubles[0]["observation"].dtype == torch.float64


def test_truncated_key_marks_slice_ends_as_slice_sampler_does(server: ServerThread) -> None:
    with RemoteReplayBuffer(server.address, batch_size=40, slice_len=4, truncated_key=("next", "truncated")) as buffer:
        for batch in _collect():
            buffer.extend(batch)
        slices = buffer.sample().reshape(10, 4)

    assert slices["next", "truncated"][:, -1].all()
    assert slices["next", "done"][:, -1].all()
    assert not slices["next", "truncated"][:, :-1].any()


def test_padded_slices_say_what_is_real_and_where_they_end(server: ServerThread) -> None:
    options = {"batch_size": 800, "slice_len": 4, "truncated_key": ("next", "truncated"), "law": "step", "pad": "end"}
    with RemoteReplayBuffer(server.address, **options) as buffer:
        for batch in _collect():
            buffer.extend(batch)
        buffer.flush()
        slices = buffer.sample().reshape(200, 4)

    valid, steps = slices["valid"][..., 0], slices["next", "step_count"][..., 0]
    assert valid[:, 0].all() and not valid.all()
    assert torch.equal(steps.diff(dim=1) == 1, valid[:, 1:])
    ends = torch.cat([~valid[:, 1:], torch.ones(200, 1, dtype=torch.bool)], dim=1)
    assert torch.equal(slices["next", "truncated"][..., 0], ends)


def test_recent_law_draws_the_newest_trajectories(server: ServerThread) -> None:
    with RemoteReplayBuffer(server.address, batch_size=300, law="recent", recent_steps=20) as buffer:
        for batch in _collect():
            buffer.extend(batch)
        buffer.flush()
        sampled = _rows(buffer.sample())
        everything = len(buffer)

    assert 10 <= len(sampled) <= 20 < everything


@pytest.mark.parametrize("mixed", [False, True])
def test_update_priority_takes_the_index_of_a_sample_as_torchrls_buffer_does(mixed: bool, server: ServerThread) -> None:
    client = ReplayClient(server.address)
    options: dict[str, Any] = {"mix": {"": 0.5, "other": 0.5}} if mixed else {}
    if mixed and "other" not in client.tables():
        client.create_table("other", priority_alpha=1.0)
    with client, RemoteReplayBuffer(client, batch_size=40, slice_len=4, law="prioritized", beta=1.0, **options) as buffer:
        for batch in _collect():
            buffer.extend(batch)
        if mixed:
            client.load((episode.columns for episode in client.episodes()), table="other")
        _, info = buffer.sample(return_info=True)
        assert info["index"].shape == (40, 4)
        assert info["priority_weight"].tolist() == [1.0] * 40  # all are new
        assert torch.equal(info["index"][::4, 0], info["episode_id"])

        buffer.update_priority(info["index"], 100 * torch.ones(40, 1))
        assert client.priorities.flush().updated == 10

        for table in options.get("mix", {"": 1}):
            found = client.sample(table=table, law="prioritized", batch_size=4000, horizon=4, as_numpy=True)
            part = info["episode_id"] if not mixed else info["episode_id"][info["table"] == list(options["mix"]).index(table)]
            of_updated = np.isin(found.episode_id, part.numpy())
            assert found.probability[of_updated].max() > 10 * found.probability.min()
            assert not mixed or found.probability[~of_updated].max() == found.probability.min()

        for index, priority, words in (
            (info["index"][:-1], torch.ones(39), "of whole slices of 4"),
            (info["index"].flip(0).roll(1, 0), torch.ones(40), "are not those of whole slices"),
            (torch.arange(40), torch.ones(40), "expected info"),
            (info["index"], torch.ones(10), "one for each row"),
            (info["index"], -torch.ones(40), "finite numbers of at least 0"),
        ):
            with pytest.raises(InvalidArgumentError, match=words):
                buffer.update_priority(index, priority)


def test_several_and_nested_observations(server: ServerThread) -> None:
    (batch,) = _collect(envs=1, frames=30)
    for part in (batch, batch["next"]):
        part["robot"] = TensorDict({"pixels": (part["observation"][..., :1] * 50).to(torch.uint8)}, batch_size=batch.batch_size)
    expected = _rows(batch)

    with RemoteReplayBuffer(server.address, batch_size=64, observation_keys=["observation", ("robot", "pixels")]) as buffer:
        buffer.extend(batch)
        found = _sample_all(buffer, 5)

    assert "obs.robot.pixels" in stored_episodes(server)[0][1]
    for name, row in found.items():
        _check_same(row, expected[name])


def test_what_cannot_be_mapped_is_refused_and_nothing_is_taken_in(server: ServerThread) -> None:
    (batch,) = _collect(envs=1, frames=30)
    bad = {
        r"data: TensorDict, expected a TensorDict \[\.\.\., time\]": batch.exclude("next"),
        r"\('next', 'done'\): missing": batch.exclude(("next", "done")),
        r"observation: expected in the root and in next, as an observation; found \['action'": batch.exclude("observation"),
        r"action: expected only in the root": batch.exclude("action"),
        r"reward: expected only in next": batch.exclude(("next", "reward")),
        r"next.reward: shape \(1, 30, 2\), expected \(1, 30, 1\)": batch.clone().set(("next", "reward"), torch.zeros(1, 30, 2)),
        r"'a\.b': cannot be the name of a column": batch.clone().set("a.b", torch.zeros(1, 30)),
        r"note: \w+, expected a tensor": batch.clone().set("note", NonTensorData("x", batch_size=batch.batch_size)),
    }

    with RemoteReplayBuffer(server.address) as buffer:
        for message, data in bad.items():
            with pytest.raises(InvalidEpisodeError, match=message):
                buffer.extend(data)
        buffer.flush()
        assert len(buffer) == 0


def test_arguments_out_of_range(server: ServerThread) -> None:
    with pytest.raises(InvalidArgumentError, match="slice_len: 0"):
        RemoteReplayBuffer(server.address, slice_len=0)
    with pytest.raises(InvalidArgumentError, match="batch_size: 10, expected a multiple of slice_len, 3"):
        RemoteReplayBuffer(server.address, slice_len=3, batch_size=10)
    with pytest.raises(InvalidArgumentError, match="max_steps: 0"):
        RemoteReplayBuffer(server.address, max_steps=0)
    with pytest.raises(InvalidArgumentError, match="observation_keys"):
        RemoteReplayBuffer(server.address, observation_keys=[])
    with RemoteReplayBuffer(server.address) as buffer, pytest.raises(InvalidArgumentError, match="batch_size: None"):
        buffer.sample()


def test_sampling_before_a_trajectory_is_complete_ends_after_the_timeout(server: ServerThread) -> None:
    with RemoteReplayBuffer(server.address, batch_size=8, timeout_s=0.3) as buffer:
        buffer.extend(_collect(envs=1, frames=3, per_batch=3)[0])
        with pytest.raises(NotReadyError):
            buffer.sample()
    with pytest.raises(ClosedError):
        buffer.sample()


def test_empty_clears_and_a_failing_body_discards_what_is_under_way(server: ServerThread) -> None:
    (batch,) = _collect(envs=1, frames=30)

    with pytest.raises(ZeroDivisionError), RemoteReplayBuffer(server.address) as buffer:
        buffer.extend(batch)
        assert len(buffer) > 0
        buffer.empty()
        assert len(buffer) == 0
        buffer.extend(batch[:, :3])
        raise ZeroDivisionError

    assert server.buffer.num_eps == 0


def test_example_learns(tmp_path: Path) -> None:
    with ServerThread(_config()) as server:
        finished = subprocess.run(
            [sys.executable, str(EXAMPLES / "train_torchrl.py"), "--address", server.address, "--frames", "4000"],
            capture_output=True,
            text=True,
            timeout=300,
            cwd=tmp_path,
            check=False,
        )
        assert finished.returncode == 0, finished.stderr
        stored = server.buffer.size - server.buffer.num_eps

    reports = [json.loads(line) for line in finished.stdout.splitlines() if line.startswith("{")]
    assert stored == 4000
    assert [report["frames"] for report in reports] == [1000, 2000, 3000, 4000]
    assert max(report["length"] for report in reports[1:]) > 1.3 * reports[0]["length"]
