"""Input that TorchRL's methods cannot store exactly is refused before anything is added, whatever was collected before."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import NonTensorData, TensorDict, lazy_stack

from support.service_calls import make_config
from support.serving import ServerThread
from touchline import InvalidEpisodeError, ReplayClient
from touchline.torchrl import RemoteReplayBuffer
from touchline_server import InvalidEpisodeError as ServerInvalidEpisodeError
from touchline_server import ReplayBuffer

NAN = float("nan")


def transitions(steps: int = 3, *, first: int = 0, done: Any = None, **others: Any) -> TensorDict:
    """Returns steps of one trajectory, each observation its number."""
    numbers = torch.arange(first, first + steps + 1, dtype=torch.float32)[:, None]
    after = {"observation": numbers[1:], "reward": torch.zeros(steps, 1), "done": torch.zeros(steps, 1, dtype=torch.bool)}
    if done is not None:
        after["done"] = done
    return TensorDict({"observation": numbers[:-1], "action": torch.zeros(steps, 1), "next": after, **others}, [steps])


@pytest.fixture
def client() -> Iterator[ReplayClient]:
    config = make_config(config={"min_history": 1, "horizon": 1})
    with ServerThread(config) as server, ReplayClient(server.address) as client:
        yield client


REFUSED: dict[str, tuple[Any, str]] = {
    "done of NaN": (transitions(first=3, done=torch.full((3, 1), NAN)), "next.done: a value that is neither 0 nor 1"),
    "done of 2": (transitions(first=3, done=torch.full((3, 1), 2)), "next.done: a value that is neither 0 nor 1"),
    "mask of 0.5": (transitions(first=3, collector={"mask": torch.full((3,), 0.5)}), "collector.mask: a value that is neither 0 nor 1"),
    "ids of NaN": (transitions(first=3, collector={"traj_ids": torch.full((3,), NAN)}), "collector.traj_ids: several values .* or NaN"),
    "two ids": (transitions(first=3, collector={"traj_ids": torch.tensor([[0, 1]] * 3)}), "collector.traj_ids: several values"),
    "an unsupported dtype": (
        transitions(first=3, extra=torch.zeros(3, dtype=torch.uint16)),
        "extra: dtype uint16 .* exclude it or cast it first",
    ),
    "complex": (transitions(first=3, extra=torch.zeros(3, dtype=torch.complex64)), "extra: complex64, expected real numbers"),
    "text": (transitions(first=3, extra=NonTensorData("x", batch_size=[3])), "extra: .*expected a tensor"),
    "sparse": (transitions(first=3, extra=torch.zeros(3, 2).to_sparse()), "extra: Tensor is not an array"),
    "unequal parts": (lazy_stack([transitions(2), transitions(3)]), "data: a lazy stack whose parts differ in shape"),
    "another key": (transitions(first=3, extra=torch.zeros(3)), "extra: torch.float32 .*, expected no such key as in the earlier steps"),
    "another dtype": (transitions(first=3).double(), "observation: torch.float64 .*, expected torch.float32 .* as in the earlier steps"),
    "another shape": (
        transitions(first=3).set("action", torch.zeros(3, 2)),
        r"action: torch.float32 \(2,\), expected torch.float32 \(1,\)",
    ),
}


@pytest.mark.parametrize(("data", "message"), REFUSED.values(), ids=list(REFUSED))
def test_extend_that_cannot_be_stored_is_refused_and_what_was_collected_stays(client: ReplayClient, data: Any, message: str) -> None:
    with RemoteReplayBuffer(client, batch_size=1) as buffer:
        buffer.extend(transitions())
        with pytest.raises(InvalidEpisodeError, match=f"^{message}"):
            buffer.extend(data)
        buffer.extend(transitions(first=3))

    (episode,) = client.episodes()
    assert episode.columns["obs"][:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert episode.columns["obs"].dtype == np.float32


@pytest.mark.parametrize("data", [transitions(0), transitions(0)[None], transitions(3)[None][:0]], ids=["no steps", "a lane", "no lanes"])
def test_extend_of_nothing_takes_nothing_in(client: ReplayClient, data: TensorDict) -> None:
    with RemoteReplayBuffer(client, batch_size=1) as buffer:
        buffer.extend(data)

    assert client.num_eps == 0


@pytest.mark.parametrize("data", [TensorDict({}, [0]), TensorDict({}, []), [], None, {"a": 1}, "text"], ids=str)
def test_extend_of_no_transitions_is_refused(client: ReplayClient, data: Any) -> None:
    with RemoteReplayBuffer(client, batch_size=1) as buffer, pytest.raises(InvalidEpisodeError, match=r"^data: \w+, expected a TensorDict"):
        buffer.extend(data)


def episode(rows: int) -> dict[str, torch.Tensor]:
    return {"obs": torch.zeros(rows, 2), "action": torch.full((rows, 1), NAN if rows < 2 else 1.0), "reward": torch.zeros(rows)}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (TensorDict({}, [0]), "no columns, expected obs"),
        (TensorDict(episode(0), [0]), "obs: zero rows"),
        (TensorDict(episode(0) | {"episode": torch.zeros(0)}, [0]), "obs: zero rows"),
        ([], r"extend\(\) takes a TensorDict of shape \[rows\]"),
        (TensorDict({name: torch.stack([value] * 2) for name, value in episode(3).items()}, [2, 3]), r"extend\(\) .*found \[2, 3\]"),
        (TensorDict(episode(3) | {"episode": torch.tensor([1, NAN, 2])}, [3]), "episode: NaN"),
        (TensorDict(episode(3) | {"episode": torch.zeros(3, 2)}, [3]), r"episode: shape \(3, 2\), expected one number a row"),
        (lazy_stack([TensorDict(episode(2), [2]), TensorDict(episode(3), [3])]), r"extend\(\) .*found \[2, -1\]"),
    ],
    ids=["empty", "no rows", "no rows, numbered", "list", "two dimensions", "NaN as a number", "two numbers", "lazy stack"],
)
def test_extend_in_process_says_what_it_takes(data: Any, message: str) -> None:
    buffer = ReplayBuffer(make_config())

    with pytest.raises(ServerInvalidEpisodeError, match=f"^{message}"):
        buffer.as_torchrl().extend(data)
    assert buffer.num_eps == 0


def test_load_in_process_takes_what_the_client_takes(client: ReplayClient) -> None:
    def numbered(rows: int) -> dict[str, Any]:
        columns = {
            "obs": np.full((rows, 1), rows, np.float32),
            "action": np.zeros((rows, 1), np.float32),
            "reward": np.zeros(rows, np.float32),
        }
        columns["action"][0] = np.nan
        return columns

    ways = {
        "list": lambda: [numbered(3), numbered(5)],
        "iterator": lambda: iter([numbered(3), numbered(5)]),
        "generator": lambda: (numbered(rows) for rows in (3, 5)),
        "lazy stack": lambda: lazy_stack([TensorDict(numbered(rows), [rows]) for rows in (3, 5)]),
        "stacked": lambda: {name: np.stack([value] * 2) for name, value in numbered(4).items()},
        "nothing": list,
    }
    for name, make in ways.items():
        buffer = ReplayBuffer(make_config())
        client.clear()
        assert buffer.load(make(), actor="a") == client.load(make(), actor="a"), name
        here, there = list(buffer.episodes()), list(client.episodes())
        assert [(one.actor, one.columns["obs"].tolist()) for one in here] == [(one.actor, one.columns["obs"].tolist()) for one in there], (
            name
        )


def test_load_in_process_names_the_episode_that_is_refused_and_keeps_those_before() -> None:
    buffer = ReplayBuffer(make_config())
    good = {name: value.numpy() for name, value in episode(3).items()}

    with pytest.raises(ServerInvalidEpisodeError, match=r"^episode 1: reward: None, expected numbers"):
        buffer.load([good, good | {"reward": None}, good])
    assert buffer.num_eps == 1 and buffer.counts().episodes_refused == 1
