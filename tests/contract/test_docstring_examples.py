"""The examples at the head of public classes run as written, against a real server; only its address is replaced."""

from __future__ import annotations

import inspect
import os
import re
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from support.recorder_cases import serve
from support.serving import ServerThread
from touchline import EpisodeWriter, ReplayClient
from touchline.tdmpc2 import Buffer
from touchline_protos.codec import EpisodeKey

os.environ.setdefault("MUJOCO_GL", "disabled")  # read when dm_control is imported

ADDRESS = "127.0.0.1:50051"
"""Address of the server in the examples."""


@pytest.fixture
def server() -> Iterator[ServerThread]:
    with serve() as server:
        yield server


def run_example(thing: Any, server: ServerThread) -> dict[str, Any]:
    """Runs the first code block of a docstring and returns its variables."""
    doc = inspect.getdoc(thing) or ""
    match = re.search(r"::\n\n((?:    .*\n|\n)+)", doc)
    assert match is not None, "no example"
    code = textwrap.dedent(match.group(1))
    assert code.count(ADDRESS) == 1
    variables: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(code.replace(ADDRESS, server.address), f"<{thing.__name__}>", "exec"), variables)
    return variables


def stored(server: ServerThread) -> list[tuple[str, int]]:
    """Returns actor and rows of each stored episode, and checks that row 0 has no action and every later row has one."""
    episodes = []
    with ReplayClient(server.address) as client:
        for episode in client.episodes():
            action = torch.as_tensor(episode.columns["action"])
            assert not action[1:].isnan().any()
            assert action[0].isnan().all() or not action.is_floating_point()
            episodes.append((episode.actor, len(action)))
    return sorted(episodes)


def test_example_of_episode_writer_stores_its_episode_once(server: ServerThread) -> None:
    variables = run_example(EpisodeWriter, server)

    assert isinstance(variables["key"], EpisodeKey) and variables["writer"].counters.acknowledged == 1
    assert stored(server) == [("arm-3", 11)]


def test_example_of_the_drop_in_buffer_samples_the_shapes_that_it_names(server: ServerThread) -> None:
    variables = run_example(Buffer, server)

    shapes = [tuple(variables[name].shape) for name in ("obs", "action", "reward", "terminated")]
    assert shapes == [(4, 256, 24), (3, 256, 6), (3, 256, 1), (3, 256, 1)] and variables["task"] is None
    assert stored(server) == [("", 51)]


@pytest.mark.parametrize(
    ("recorder", "expected"),
    [
        ("GymnasiumRecorder", [("arm-3", 201)]),
        ("GymnasiumVectorRecorder", [("arms/0", 50), ("arms/0", 201), ("arms/1", 50), ("arms/1", 201)]),
        ("DmEnvRecorder", [("cartpole", 101)]),
        ("PettingZooRecorder", [(f"spread/agent_{number}", 26) for number in range(3)]),
    ],
)
def test_example_of_a_recorder_stores_every_transition(server: ServerThread, recorder: str, expected: list[tuple[str, int]]) -> None:
    from touchline import recorders

    run_example(getattr(recorders, recorder), server)

    assert stored(server) == expected
