"""Clients sent to other processes, by spawn, cloudpickle and copies: address and credentials travel; what cannot be sent says so."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest

from support.certificates import Authority
from support.service_calls import make_config, make_episode
from touchline import ClosedError, EpisodeWriter, ReplayClient, TlsConfig
from touchline_server.service.app import ServerThread

TOKEN = "actor-token-0123456789"
COPIES: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
    "cloudpickle": lambda thing: pickle.loads(cloudpickle.dumps(thing)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}


def play(client: ReplayClient) -> tuple[str, int]:
    """Uses a client in a worker process."""
    with EpisodeWriter(client, actor="worker") as writer:
        for number in range(3):
            row = {"obs": np.full(4, number, np.float32)}
            writer.append(row if not number else {**row, "action": np.zeros(2, np.float32), "reward": 0.0})
        writer.end_episode()
    return client.client_id, client.add(make_episode().columns)


def test_client_with_tls_and_a_token_works_in_spawned_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = Authority(tmp_path)
    pair = authority.issue("server", "127.0.0.1")
    monkeypatch.setenv("TOUCHLINE_SERVER_TOKENS", f"admin:tester:{TOKEN}")
    config = make_config(tls={"cert": str(pair.cert), "key": str(pair.key)})
    with ServerThread(config) as server, multiprocessing.get_context("spawn").Pool(2) as pool:
        monkeypatch.delenv("TOUCHLINE_SERVER_TOKENS")
        with ReplayClient(server.address, tls=TlsConfig(ca=authority.cert), token=TOKEN) as client:
            client.info()  # its channel is open

            played = [pool.apply_async(play, (client,)) for _ in range(4)]
            names = {result.get(timeout=120)[0] for result in played}

            assert client.num_eps == 8
            assert len(names | {client.client_id}) == 5


@pytest.mark.parametrize("way", COPIES)
def test_client_copied_has_its_settings_a_channel_and_keys_of_its_own(way: str) -> None:
    with ServerThread(make_config()) as server:
        options = {"timeout_s": 7.0, "actor": "ada", "as_numpy": True, "client_id": "named", "max_message_bytes": 1 << 20}
        with ReplayClient(server.address, **options) as client:
            client.add(make_episode().columns)
            other = COPIES[way](client)

            assert other.client_id == client.client_id == "named"
            assert (other.timeout_s, other.actor, other.table, other.address) == (7.0, "ada", client.table, client.address)
            assert other.next_key() != client.next_key()
            other.add(make_episode().columns)
            assert isinstance(other.sample().obs, np.ndarray)
        assert other.num_eps == 2  # the first client's channel is closed, this one's is open
        other.close()


def test_client_closed_is_not_copied() -> None:
    client = ReplayClient("127.0.0.1:1")
    client.close()

    with pytest.raises(ClosedError, match="expected an open one"):
        pickle.dumps(client)


def test_client_copied_keeps_credentials_whatever_the_other_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOUCHLINE_TOKEN", TOKEN)
    made = pickle.dumps(ReplayClient("127.0.0.1:1"))
    monkeypatch.setenv("TOUCHLINE_TOKEN", "another-token-0123456789")

    assert dict(pickle.loads(made)._channel.metadata)["authorization"] == f"Bearer {TOKEN}"


@pytest.mark.parametrize("way", COPIES)
def test_object_bound_to_a_process_refuses_to_be_copied(way: str) -> None:
    pytest.importorskip("tensordict")
    from types import SimpleNamespace

    from touchline.tdmpc2 import Buffer

    with ServerThread(make_config()) as server, ReplayClient(server.address) as client:
        client.add(make_episode().columns)
        cfg = SimpleNamespace(buffer_size=2000, steps=2000, batch_size=8, horizon=3, device="cpu", replay_address=server.address)
        with EpisodeWriter(client) as writer, client.batches() as batches, client.episodes() as episodes, Buffer(cfg) as buffer:
            for thing, instead in (
                (writer, "make a writer there"),
                (batches, r"batches\(\)"),
                (episodes, r"episodes\(\)"),
                (buffer, "same cfg"),
            ):
                with pytest.raises(TypeError, match=rf"{type(thing).__name__}: cannot be pickled or copied.*{instead}"):
                    COPIES[way](thing)


def make_env() -> Any:
    from torchrl.envs import GymEnv

    return GymEnv("Pendulum-v1")


def test_remote_buffer_copied_begins_without_what_is_under_way() -> None:
    torch = pytest.importorskip("torch")
    from tensordict import TensorDict

    from touchline.torchrl import RemoteReplayBuffer

    rows = 6
    data = TensorDict(
        {
            "observation": torch.arange(4.0 * rows).reshape(rows, 4),
            "action": torch.zeros(rows, 2),
            "next": {
                "observation": torch.arange(4.0, 4.0 * (rows + 1)).reshape(rows, 4),
                "reward": torch.zeros(rows, 1),
                "done": torch.zeros(rows, 1, dtype=torch.bool),
            },
        },
        batch_size=[rows],
    )
    with ServerThread(make_config()) as server, RemoteReplayBuffer(server.address, batch_size=8, slice_len=4) as buffer:
        buffer.extend(data)
        with pickle.loads(pickle.dumps(buffer)) as other:
            other.flush()
            assert len(other) == 0
            other.extend(data)
            other.flush()
            assert len(other) == buffer.write_count == rows
            assert other.sample().shape == (8,)
        buffer.flush()
        assert len(buffer) == 2 * rows


@pytest.mark.slow
def test_remote_buffer_takes_what_the_workers_of_a_collector_play() -> None:
    collectors = pytest.importorskip("torchrl.collectors")
    pytest.importorskip("gymnasium")
    from touchline.torchrl import RemoteReplayBuffer

    # Its name before torchrl 0.11.
    collector_of = getattr(collectors, "MultiSyncCollector", None) or collectors.MultiSyncDataCollector
    config = make_config(config={"buffer_size": 10_000, "batch_size": 8, "min_history": 1, "horizon": 3})
    with ServerThread(config) as server, RemoteReplayBuffer(server.address, batch_size=32, slice_len=4, max_steps=50) as buffer:
        collector = collector_of([make_env, make_env], policy=None, frames_per_batch=200, total_frames=400, replay_buffer=buffer)
        try:
            assert list(collector) == [None, None]
            assert (len(buffer), buffer.write_count) == (400, 400)
            assert buffer.sample()["next", "reward"].shape == (32, 1)
        finally:
            collector.shutdown()
