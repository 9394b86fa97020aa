"""Every program of docs/mixing.md runs as written; the only change is the address of the test's server."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from touchline_server import Config
from touchline_server.service.app import ServerThread

PAGE = Path(__file__).parents[2] / "docs" / "mixing.md"
PROGRAMS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("program", PROGRAMS, ids=["over the network", "in process"])
def test_program_runs_as_written(program: str) -> None:
    config = Config(config={"buffer_size": 10_000, "min_history": 0}, storage={"device": "cpu"}, server={"port": 0})
    variables: dict[str, Any] = {"__name__": "__main__"}
    with ServerThread(config) as server:
        exec(compile(program.replace("host:50051", server.address), PAGE.name, "exec"), variables)

    assert variables["batch"].table_names == ("online", "demos")
