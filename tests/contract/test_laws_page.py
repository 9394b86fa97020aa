"""The arguments that docs/laws.md recommends are accepted, and the page names every law."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.service_calls import make_config
from touchline import ReplayClient
from touchline_server.selectors.registry import LAWS
from touchline_server.service.app import ServerThread

PAGE = (Path(__file__).parents[2] / "docs" / "laws.md").read_text("utf-8")
CHOICES = PAGE.partition("| You want |")[2].partition("\n\n")[0]


def _arguments() -> list[dict[str, Any]]:
    """Returns the keyword arguments of each piece of code of the table that is nothing else."""
    found = []
    for code in re.findall(r"`([a-z_]+=[^`]+)`", CHOICES):
        (call,) = ast.parse(f"f({code.replace('{...}', repr({'online': 1, 'demos': 3}))})").body
        assert isinstance(call, ast.Expr)
        assert isinstance(call.value, ast.Call)
        found.append({str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.value.keywords})
    return found


@pytest.fixture(scope="module")
def client() -> Iterator[ReplayClient]:
    config = make_config(sampling={"recent_steps": 20}, tables={"demos": {}, "online": {}})
    columns = {"obs": np.zeros((21, 4), np.float32), "action": np.zeros((21, 2), np.float32), "reward": np.zeros(21, np.float32)}
    with ServerThread(config) as server, ReplayClient(server.address, as_numpy=True) as client:
        for table in ("", "demos", "online"):
            client.add(columns | {"task": np.zeros(21, np.int64)}, table=table)
        yield client


def test_page_helps_to_choose_every_law() -> None:
    assert {arguments["law"] for arguments in _arguments() if "law" in arguments} == set(LAWS)
    assert set(re.findall(r"^\| `(\w+)`.* \| O\(", PAGE, re.MULTILINE)) == set(LAWS)


@pytest.mark.parametrize("arguments", _arguments(), ids=str)
def test_arguments_of_the_page_are_accepted(client: ReplayClient, arguments: dict[str, Any]) -> None:
    batch = client.sample(batch_size=8, **arguments)

    assert batch.obs.shape == (4, 8, 4)
    if "mix" in arguments:
        assert batch.table_names == ("online", "demos")
        assert batch.table is not None
    assert (batch.valid is not None) == ("pad" in arguments)
