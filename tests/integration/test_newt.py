"""Newt's buffers on a server: its verbs, exact halves, tasks, files, and ranks that share one buffer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict

from support.newt_ranks import STEPS, TASKS, demonstrations, episode, train
from touchline import InvalidArgumentError, InvalidEpisodeError, ReplayClient
from touchline.newt import Buffer, EnsembleBuffer
from touchline_server import Config
from touchline_server.service.app import ServerThread


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ServerThread]:
    config = {"buffer_size": 10_000, "batch_size": 8, "horizon": 3, "min_history": 0}
    with ServerThread(Config(config=config, storage={"device": "cpu"})) as started:
        monkeypatch.setenv("TOUCHLINE_ADDRESS", started.address)
        yield started


def _ensemble(batch_size: int = 16) -> EnsembleBuffer:
    """Returns the buffers as Newt's launcher makes them."""
    arguments = {"capacity": 5_000, "batch_size": batch_size, "horizon": 3, "multiproc": True, "compile": False}
    return EnsembleBuffer(Buffer(**{**arguments, "batch_size": batch_size // 2, "cache_values": True}), **arguments)


def test_buffer_has_newts_verbs_shapes_and_numbers(server: ServerThread) -> None:
    buffer = Buffer(capacity=2_000, batch_size=10, horizon=3)
    buffer.set_storage_device("cuda:0")
    assert buffer.load_demos(demonstrations(2)) == 2 * TASKS
    assert (buffer.capacity, buffer.num_eps) == (2_000, 0)
    assert buffer.next_episode_id(4, 3) == 2 * TASKS + 3

    assert buffer.add(episode(1, 9, played=True).unsqueeze(0)) == 1
    obs, action, reward, task = buffer.sample("cpu")

    assert buffer.next_episode_id(4, 3) == 2 * TASKS + 4 + 3
    assert task is not None
    assert [tuple(value.shape) for value in (obs, action, reward, task)] == [(4, 10, 4), (3, 10, 2), (3, 10, 1), (3, 10)]
    assert task.dtype == torch.int32 and (task == obs[:-1, :, 0]).all()
    with ReplayClient(server.address) as client:
        assert client.counts(table="online").episodes_stored == 2 * TASKS + 1
        assert client.info(table="online").capacity == 2_000
    buffer.close()


def test_nested_observations_come_back_as_a_tensordict(server: ServerThread) -> None:
    buffer = Buffer(batch_size=6)
    td = episode(0, 0, played=True)
    td["obs"] = TensorDict({"state": td["obs"], "rgb": torch.zeros(STEPS + 1, 5)}, batch_size=[STEPS + 1])
    buffer.add(td.unsqueeze(0))

    obs, *_ = buffer.sample("cpu")

    assert isinstance(obs, TensorDict) and obs.batch_size == (4, 6)
    assert tuple(obs["rgb"].shape) == (4, 6, 5)
    buffer.close()


def test_ensemble_has_exactly_half_demonstrations_first(server: ServerThread) -> None:
    buffer = _ensemble()
    buffer._offline.load_demos(demonstrations(3))
    for task in range(TASKS):
        buffer.add(episode(task, 0, played=True).unsqueeze(0))

    for _ in range(20):
        obs, _, _, task = buffer.sample("cpu")
        assert obs[0, :, 2].tolist() == [0.0] * 8 + [1.0] * 8
        assert task is not None and task.shape == (3, 16)
    offline, *_ = buffer._offline.sample("cpu")
    assert tuple(offline.shape) == (4, 8, 4) and not offline[:, :, 2].any()
    buffer.close()


def test_saved_buffer_is_loaded_as_demonstrations_bit_for_bit(server: ServerThread, tmp_path: Path) -> None:
    buffer = _ensemble()
    for number in range(5):
        buffer.add(episode(number % TASKS, number, played=True).unsqueeze(0))
    buffer.save(tmp_path / "buffer.pt")
    rows = torch.load(tmp_path / "buffer.pt", weights_only=False)

    assert rows["episode"].tolist() == [number for number in range(5) for _ in range(STEPS + 1)]
    assert buffer._offline.load_demos(rows) == 5
    with ReplayClient(server.address) as client:
        stored = [[episode.columns for episode in client.episodes(table=table)] for table in ("online", "demos")]
    for one, other in zip(*stored, strict=True):
        assert one.keys() == other.keys()
        assert all(one[name].tobytes() == other[name].tobytes() for name in one)
    buffer.close()


def test_ranks_share_one_buffer_and_draw_distinct_parts_with_exact_halves(server: ServerThread, tmp_path: Path) -> None:
    buffer = _ensemble()
    buffer._offline.load_demos(demonstrations(3))
    out = str(tmp_path / "rank{rank}.json")

    torch.multiprocessing.spawn(train, args=(2, str(tmp_path / "rendezvous"), buffer, out), nprocs=2)

    ranks = [json.loads(Path(out.format(rank=rank)).read_text()) for rank in range(2)]
    assert [rank["num_eps"] for rank in ranks] == [6 * TASKS // 2] * 2
    ids = [number for rank in ranks for number in rank["ids"]]
    assert len(set(ids)) == len(ids) == 6 * TASKS
    for rank in ranks:
        for rows in rank["batches"]:
            assert [row[2] for row in rows] == [0.0] * 8 + [1.0] * 8
    assert ranks[0]["batches"] != ranks[1]["batches"]
    # Each rank samples what the other has played: tasks 0 and 2 are of rank 0, tasks 1 and 3 of rank 1.
    for rank in ranks:
        assert {row[0] for rows in rank["batches"] for row in rows[8:]} == {0.0, 1.0, 2.0, 3.0}
    with ReplayClient(server.address) as client:
        assert client.counts(table="online").episodes_stored == 6 * TASKS
        assert client.counts(table="demos").episodes_stored == 3 * TASKS
    buffer.close()


def test_fresh_empties_the_tables_once_and_not_again_in_the_ranks(server: ServerThread, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    first = Buffer(batch_size=4)
    first.add(episode(0, 0, played=True).unsqueeze(0))
    first.close()
    monkeypatch.setenv("TOUCHLINE_FRESH", "1")
    buffer = Buffer(batch_size=4)
    buffer.add(episode(1, 1, played=True).unsqueeze(0))

    copies = [pickle.loads(pickle.dumps(buffer)) for _ in range(2)]
    for copy in copies:
        copy.add(episode(2, 2, played=True).unsqueeze(0))

    with ReplayClient(server.address) as client:
        assert client.counts(table="online").episodes_stored == 3
    for copy in (buffer, *copies):
        copy.close()


def test_bad_input_is_refused_by_name(server: ServerThread, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    buffer = Buffer(batch_size=4)
    with pytest.raises(InvalidEpisodeError, match=r"td: shape \(13,\), expected \[1, rows\]"):
        buffer.add(episode(0, 0, played=True))
    with pytest.raises(InvalidEpisodeError, match="tds: no column episode"):
        buffer.load_demos(episode(0, 0, played=True))
    mixed = demonstrations(2)
    mixed["episode"] = mixed["episode"] % 3
    with pytest.raises(InvalidEpisodeError, match="episode: rows of an episode do not follow each other"):
        buffer.load_demos(mixed)
    with pytest.raises(InvalidArgumentError, match="save: table 'online' is empty"):
        buffer.save(tmp_path / "x.pt")
    buffer.add(episode(0, 0, played=True).unsqueeze(0))
    with pytest.raises(InvalidArgumentError, match="load_demos: after 1 episodes"):
        buffer.load_demos(demonstrations(1))
    buffer.close()
    with pytest.raises(InvalidArgumentError, match="capacity: 0"):
        Buffer(capacity=0)
    with pytest.raises(InvalidArgumentError, match="batch_size: 1, expected at least 2"):
        _ensemble(2).__class__(Buffer(), batch_size=1)
    with pytest.raises(InvalidArgumentError, match="table: 'online' for the offline buffer too"):
        EnsembleBuffer(Buffer(table="online"), batch_size=4)
    monkeypatch.delenv("TOUCHLINE_ADDRESS")
    with pytest.raises(InvalidArgumentError, match="no server: set TOUCHLINE_ADDRESS"):
        Buffer()
