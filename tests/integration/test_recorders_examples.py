"""The short examples of docs/recorders.md, in processes of their own and with a real server."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from support.recorder_cases import serve
from support.serving import ServerThread, needs_server, stored_episodes
from touchline import ReplayClient

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def _run(example: str, *arguments: str, forbidden: str = "") -> list[dict[str, Any]]:
    """Runs an example to its end and returns its lines of JSON; ``forbidden`` is a module that it must not import."""
    code = f"import runpy, sys; sys.argv = sys.argv[1:]; sys.path.insert(0, {str(EXAMPLES)!r}); "
    code += f"sys.modules[{forbidden!r}] = None; " if forbidden else ""
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    finished = subprocess.run(
        [sys.executable, "-c", code, str(EXAMPLES / example), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return [json.loads(line) for line in finished.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def shared_server() -> Iterator[ServerThread]:
    with serve() as server:
        yield server


@pytest.fixture
def empty_server(shared_server: ServerThread) -> ServerThread:
    with ReplayClient(shared_server.address) as client:
        client.clear()
    return shared_server


def _by_actor(server: ServerThread) -> dict[str, list[dict[str, np.ndarray]]]:
    """Returns the stored episodes, oldest first, and asserts what every recorder guarantees."""
    lines: dict[str, list[dict[str, np.ndarray]]] = defaultdict(list)
    for actor, columns in stored_episodes(server):
        assert np.isnan(columns["reward"][0]) and np.isnan(columns["done"][0])
        assert not np.isnan(columns["reward"][1:]).any()
        assert not columns["done"][1:-1].any()
        lines[actor].append(columns)
    return dict(lines)


def test_vector_recorder_finds_the_borders_of_episodes(empty_server: ServerThread) -> None:
    steps = 120
    (totals,) = _run("record_vector.py", "--address", empty_server.address, "--environments", "3", "--steps", str(steps))
    lines = _by_actor(empty_server)
    limits = gymnasium.make("CartPole-v1").unwrapped

    assert set(lines) == {f"CartPole-v1/{number}" for number in range(3)}
    assert totals["episodes_acknowledged"] == sum(map(len, lines.values()))
    assert totals["steps_acknowledged"] == sum(len(columns["reward"]) for episodes in lines.values() for columns in episodes)
    for episodes in lines.values():
        rows = sum(len(columns["reward"]) for columns in episodes)
        if gymnasium.__version__.startswith("0."):  # each step is a transition, and each episode has the row of its reset besides
            assert rows == steps + len(episodes)
        else:  # each step gave a row, the first of all rows is the reset's; a last one that would stand alone is left out
            assert rows == steps + 1 or (rows == steps and episodes[-1]["done"][-1] == 1)
        assert len(episodes) > 2
        assert all(columns["done"][-1] == 1 for columns in episodes[:-1])
        for columns in episodes:
            fell = (abs(columns["obs"][:, 0]) > limits.x_threshold) | (abs(columns["obs"][:, 2]) > limits.theta_threshold_radians)
            assert fell.tolist() == np.nan_to_num(columns["done"]).astype(bool).tolist()  # the last observation is of the episode it ends


def test_pettingzoo_recorder_sends_an_episode_an_agent(empty_server: ServerThread) -> None:
    (totals,) = _run("record_pettingzoo.py", "--address", empty_server.address, "--episodes", "4")
    lines = _by_actor(empty_server)

    assert totals == {"episodes_acknowledged": 12, "steps_acknowledged": 12 * 26}
    assert {actor: len(episodes) for actor, episodes in lines.items()} == {f"simple_spread/agent_{number}": 4 for number in range(3)}
    for episodes in lines.values():
        for columns in episodes:
            velocity, position = columns["obs"][:, :2], columns["obs"][:, 2:4]
            assert np.allclose(np.diff(position, axis=0), 0.1 * velocity[:-1], atol=1e-5)  # one agent's way, rows 0.1 s apart
            assert columns["done"][-1] == 0  # the time limit truncates
    assert len({columns["obs"].tobytes() for episodes in lines.values() for columns in episodes}) == 12


def test_dm_env_recorder_sends_the_rows_that_its_transform_makes(empty_server: ServerThread) -> None:
    arguments = ("--address", empty_server.address, "--domain", "pendulum", "--task", "swingup", "--episodes", "2")
    (totals,) = _run("record_dm_env.py", *arguments)
    (actor, episodes), *others = _by_actor(empty_server).items()

    assert totals == {"episodes_acknowledged": 2, "steps_acknowledged": 2 * 1001}
    assert (actor, others, len(episodes)) == ("swingup", [], 2)
    for columns in episodes:
        assert {name: (column.dtype.name, column.shape) for name, column in columns.items()} == {
            "obs": ("float32", (1001, 3)),
            "action": ("float32", (1001, 1)),
            "reward": ("float32", (1001,)),
            "done": ("float32", (1001,)),
        }
        assert np.allclose(np.hypot(columns["obs"][:, 0], columns["obs"][:, 1]), 1.0)  # cosine and sine of the pole's angle
        assert columns["done"][-1] == 0
    assert not np.array_equal(episodes[0]["obs"], episodes[1]["obs"])


def test_numpy_learner_trains_on_what_the_recorder_sent_without_torch() -> None:
    with serve(min_history=500, batch_size=64) as server:
        (totals,) = _run("record_gymnasium.py", "--address", server.address, "--episodes", "5", forbidden="torch")
        assert totals == {"episodes_acknowledged": 5, "steps_acknowledged": 5 * 201}
        assert server.buffer.size == 5 * 201

        reports = _run("train_numpy.py", "--address", server.address, "--updates", "300", forbidden="torch")

    assert [report["update"] for report in reports] == [100, 200, 300]
    assert reports[-1]["loss"] < 0.5 * reports[0]["loss"]
    assert reports[-1]["loss"] < 0.3  # of the variance of the rewards


@pytest.mark.parametrize("place", ["server", pytest.param("in process", marks=needs_server)])
def test_trainer_of_tdmpc2s_shape_learns(place: str) -> None:
    with serve(buffer_size=100_000) as server:
        where = ("--in-process",) if place == "in process" else ("--address", server.address)
        reports = _run("train_tdmpc2_style.py", *where, "--episodes", "7")
        stored = server.buffer.num_eps

    assert stored == (0 if place == "in process" else 7)
    assert [report["episodes"] for report in reports] == [3, 4, 5, 6, 7]
    assert reports[-1]["reward_error"] < 0.3 * reports[0]["reward_error"]
