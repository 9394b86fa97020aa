"""``touchline episodes`` on a real server: the list and its filters, and one episode with plots."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from support.service_calls import make_config
from touchline import ReplayClient
from touchline._cli.app import app
from touchline._cli.plots import lines_of
from touchline_server.service.app import ServerThread

ROWS = 12


def make_episode(number: int) -> dict[str, np.ndarray]:
    """Returns an episode whose rewards are its number, with columns of every kind that is shown in another way."""
    reward = np.full(ROWS, number, np.float32)
    reward[0] = np.nan
    return {
        "obs.state": np.linspace(-1, 1, ROWS * 6, dtype=np.float32).reshape(ROWS, 6),
        "obs.rgb": np.full((ROWS, 8, 9, 3), number, np.uint8),
        "action": np.zeros((ROWS, 2, 3), np.float32),
        "reward": reward,
        "task": np.full(ROWS, 7, np.int64),
    }


@pytest.fixture(scope="module")
def server() -> Iterator[ServerThread]:
    with ServerThread(make_config(tables={"empty": {}})) as server, ReplayClient(server.address) as client:
        for number in range(6):
            client.add(make_episode(number), actor=f"striker-{number % 2}", policy_version=number)
        yield server


def run(server: ServerThread, *arguments: str, **environment: str) -> Any:
    variables = {"TOUCHLINE_ADDRESS": server.address, "COLUMNS": "100", **environment}
    return CliRunner().invoke(app, ["episodes", *arguments], env=variables, prog_name="touchline")


@pytest.mark.parametrize(
    ("options", "ids"),
    [
        ((), [5, 4, 3, 2, 1, 0]),
        (("--newest", "2"), [5, 4]),
        (("--actor", "striker-0"), [4, 2, 0]),
        (("--actor", "striker-0", "--newest", "1", "--last", "3"), [2]),
        (("--first", "3"), [5, 4, 3]),
        (("--actor", "nobody"), []),
    ],
)
def test_list_has_the_newest_first_and_only_what_matches(server: ServerThread, options: tuple[str, ...], ids: list[int]) -> None:
    found = json.loads(run(server, "list", *options, "--json").stdout)["episodes"]

    assert [one["id"] for one in found] == ids
    for one in found:
        number = one["id"]
        assert one == {
            "id": number,
            "actor": f"striker-{number % 2}",
            "rows": ROWS,
            "return": (ROWS - 1) * number,
            "policy_version": number,
        }


def test_list_as_text_has_a_line_for_each(server: ServerThread) -> None:
    found = run(server, "list", "--newest", "2")
    empty = run(server, "list", "--table", "empty")

    assert found.stdout.splitlines()[0].split() == ["ID", "ACTOR", "ROWS", "RETURN", "POLICY"]
    assert found.stdout.splitlines()[1].split() == ["5", "striker-1", "12", "55", "5"]
    assert found.stdout.endswith(f"{server.address}: 2 episodes listed\n")
    assert (empty.exit_code, empty.stdout.splitlines()[-1]) == (0, f"{server.address}, table 'empty': 0 episodes listed")


def test_show_has_ranges_plots_and_the_shape_of_images(server: ServerThread) -> None:
    found = run(server, "show", "3")

    assert found.exit_code == 0, found.output
    lines = found.stdout.splitlines()
    assert lines[0] == "episode 3: 12 rows, actor striker-1, policy version 3, return 33, 3.3 kB"
    assert next(line.split() for line in lines if line.startswith("reward")) == ["reward", "float32", "[]", "3", "3", "3"]
    assert "obs.state, the first 4 of 6 dimensions" in found.stdout
    assert "obs.rgb: an image of 8 x 9 x 3 in each row; the server's web page shows them" in found.stdout
    assert "reward: 3 in every row" in found.stdout and "task: 7 in every row" in found.stdout
    assert "\x1b[" not in found.stdout


def test_show_of_named_columns_plots_only_these(server: ServerThread) -> None:
    found = run(server, "show", "--column", "action")
    named = json.loads(run(server, "show", "4", "--column", "obs", "--json").stdout)

    assert "episode 5: " in found.stdout and "obs" not in found.stdout
    assert (named["id"], [column["name"] for column in named["columns"]]) == (4, ["obs.state", "obs.rgb"])
    assert named["columns"][1] == {
        "name": "obs.rgb",
        "dtype": "uint8",
        "shape": [8, 9, 3],
        "size": 216,
        "image": True,
        "min": 4.0,
        "mean": 4.0,
        "max": 4.0,
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("show", "99"), "99"),
        (("show", "--table", "empty"), "no episode is stored; touchline doctor says what to do"),
        (("show", "3", "--column", "nothing"), "nothing"),
        (("list", "--table", "gone"), "'gone' does not exist"),
    ],
)
def test_what_is_not_there_is_an_error_in_one_sentence(server: ServerThread, arguments: tuple[str, ...], words: str) -> None:
    found = run(server, *arguments)

    assert (found.exit_code, found.stdout) == (1, "")
    assert words in found.stderr and "Traceback" not in found.stderr


def test_lines_leave_out_what_is_not_finite_and_flatten_a_row() -> None:
    values = np.array([[[1, np.nan], [3, 4]]] * 5)

    lines = lines_of("action", values)

    assert [name for name, _ in lines] == ["action[0]", "action[1]", "action[2]", "action[3]"]
    assert lines[3][1].tolist() == [4] * 5
