"""Assembling rows into columns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from touchline import InvalidEpisodeError
from touchline._actor.rows import EpisodeRows, row_columns
from touchline_protos.types.dtypes import BFLOAT16


def _append(rows: EpisodeRows, **step: Any) -> None:
    rows.append(row_columns(step))


def test_rows_become_columns_in_order() -> None:
    rows = EpisodeRows()
    for number in range(300):  # more than the first allocation holds
        _append(rows, obs=np.full(2, number, np.float32), reward=np.float64(number))

    columns = rows.take()

    assert columns["obs"].shape == (300, 2)
    assert columns["obs"].dtype == np.float32
    assert columns["reward"].tolist() == list(range(300))
    assert columns["obs"].flags.c_contiguous
    assert len(rows) == 0


def test_rows_are_copied() -> None:
    rows = EpisodeRows()
    reused = np.zeros(2)
    for number in range(3):
        reused[:] = number
        _append(rows, obs=reused)

    assert rows.take()["obs"][:, 0].tolist() == [0, 1, 2]


def test_taken_columns_are_not_written_by_the_next_episode() -> None:
    rows = EpisodeRows()
    _append(rows, obs=1)
    _append(rows, obs=2)
    taken = rows.take(overlap=True)

    _append(rows, obs=3)

    assert taken["obs"].tolist() == [1, 2]
    assert rows.take()["obs"].tolist() == [2, 3]


def test_columns_that_the_first_row_leaves_out_are_undefined_there() -> None:
    torch = pytest.importorskip("torch")
    rows = EpisodeRows()
    _append(rows, obs=np.zeros(1))
    _append(
        rows, obs=np.zeros(1), action=np.ones(2, np.float32), reward=1.0, task=np.int64(3), done=True, half=torch.ones(1).to(torch.bfloat16)
    )

    columns = rows.take()

    assert np.isnan(columns["action"][0]).all() and columns["action"][1].tolist() == [1, 1]
    assert np.isnan(columns["reward"][0]) and columns["reward"].dtype == np.float32
    assert columns["task"].tolist() == [0, 3]
    assert columns["done"].tolist() == [False, True]
    assert columns["half"].dtype == BFLOAT16
    half = torch.from_numpy(columns["half"].view(np.int16)).view(torch.bfloat16)
    assert torch.isnan(half[0]).all() and half[1] == 1


def test_plain_numbers_have_the_dtypes_of_torch_and_nested_values_flatten() -> None:
    row = row_columns({"obs": {"x": 1.5, "y": {"z": [1, 2]}}, "reward": 2.0, "task": 3, "done": False, "wide": np.float64(1)})

    assert {name: value.dtype.name for name, value in row.items()} == {
        "obs.x": "float32",
        "obs.y.z": "int64",
        "reward": "float32",
        "task": "int64",
        "done": "bool",
        "wide": "float64",
    }


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"obs": np.zeros(2), "reward": 1.0}, r"^action: missing in row 2, expected as in the rows before$"),
        (
            {"obs": np.zeros(2), "action": np.zeros(1), "reward": 1.0, "aux": 1},
            r"^aux: unknown column in row 2, expected obs, action, reward$",
        ),
        (
            {"obs": np.zeros(2, np.float32), "action": np.zeros(1), "reward": 1.0},
            r"^obs: dtype float32 in row 2, expected float64 as in the rows before$",
        ),
        (
            {"obs": np.zeros(3), "action": np.zeros(1), "reward": 1.0},
            r"^obs: shape \(3,\) in row 2, expected \(2,\) as in the rows before$",
        ),
    ],
)
def test_row_unlike_those_before_is_refused_and_not_added(step: dict[str, Any], message: str) -> None:
    rows = EpisodeRows()
    _append(rows, obs=np.zeros(2))
    _append(rows, obs=np.ones(2), action=np.zeros(1), reward=1.0)

    with pytest.raises(InvalidEpisodeError, match=message):
        _append(rows, **step)

    assert len(rows) == 2
    assert rows.take()["obs"].tolist() == [[0, 0], [1, 1]]


def test_second_row_may_not_leave_out_what_the_first_had() -> None:
    rows = EpisodeRows()
    _append(rows, obs=1, task=2)

    with pytest.raises(InvalidEpisodeError, match=r"^task: missing in row 1"):
        _append(rows, obs=1, action=1)


def test_row_after_a_cut_may_bring_no_new_column() -> None:
    rows = EpisodeRows()
    _append(rows, obs=1)
    _append(rows, obs=1)
    rows.take(overlap=True)

    with pytest.raises(InvalidEpisodeError, match=r"^action: unknown column in row 1"):
        _append(rows, obs=1, action=1)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (5, r"^step: int, expected a mapping"),
        ({"obs": "text"}, r"^obs: text \('text'\), expected numbers"),
        ({"obs": 1j}, r"^obs: complex128, expected real numbers"),
        ({"obs": object()}, r"^obs: "),
    ],
)
def test_row_that_is_no_numbers_is_refused(step: Any, message: str) -> None:
    with pytest.raises(InvalidEpisodeError, match=message):
        row_columns(step)
