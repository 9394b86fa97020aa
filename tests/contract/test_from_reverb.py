"""Touchline's side of docs/from-reverb.md runs as written; the only change is the address of the test's server. Reverb's side is Python."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest

from touchline import ReplayClient
from touchline_server import Config, read_cfg
from touchline_server.service.app import ServerThread

PAGE = Path(__file__).parents[2] / "docs" / "from-reverb.md"
TEXT = PAGE.read_text("utf-8")
BLOCKS = re.findall(r"<!-- test: ([^>]*) -->\n```\w+\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def _block(name: str) -> str:
    (code,) = [code for found, code in BLOCKS if found == name]
    return code


def _run(name: str, address: str) -> dict[str, Any]:
    code = _block(name)
    assert code.count("host:50051") == 1
    variables: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(code.replace("host:50051", address), PAGE.name, "exec"), variables)
    return variables


@pytest.fixture
def config(tmp_path: Path) -> Config:
    file = tmp_path / "replay.toml"
    file.write_text(_block("configuration"), "utf-8")
    config = read_cfg(file)
    return config.model_copy(update={"server": config.server.model_copy(update={"port": 0})})


def test_every_program_of_the_page_has_a_test() -> None:
    assert [name for name, _ in BLOCKS] == ["reverb", "configuration", "reverb", "actor", "reverb", "learner"]
    assert len(re.findall(r"^```\w+$", TEXT, re.MULTILINE)) == len(BLOCKS)


def test_actor_and_learner_run_as_written(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    with ServerThread(config) as server, ReplayClient(server.address) as client:
        _run("actor", server.address)
        counts = client.counts(table="replay")
        learner = _run("learner", server.address)
        rate = client.info(table="replay").rate

    assert (counts.episodes_stored, counts.steps_stored) == (10, 10 * 201)
    assert learner["obs"].shape == (4, 256, 24)
    assert learner["weight"].shape == (256,)
    assert learner["batch"].reward.max() > 0
    assert rate is not None
    assert (rate.samples_per_insert, rate.tolerance, rate.min_steps) == (8.0, 10_000, 1_000)
    assert capsys.readouterr().out.strip() == re.findall(r"print\(client.priorities.counters\(\).updated\)  # (\d+)", TEXT)[0]


@pytest.mark.parametrize("code", [code for name, code in BLOCKS if name == "reverb"])
def test_code_of_reverb_is_python(code: str) -> None:
    assert "import reverb" in code
    ast.parse(code)
