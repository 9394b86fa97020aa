"""The documentation is true: the README's code runs as written, its table is the configuration, and what pages name exists.

A block that is run follows a comment ``<!-- test: NAME -->``. Networked blocks run against a server that the test starts with the README's
own command and ``--port 0``; the only change to their code is that server's address instead of :data:`ADDRESS`.
"""

from __future__ import annotations

import os
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from support.service_calls import ServerProcess
from touchline import ReplayClient
from touchline._rpc.calls import ERROR_OF_REASON, ERROR_OF_STATUS
from touchline_server import read_cfg
from touchline_server.service.grpc_status import INTERNAL, STATUS_OF

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
ADDRESS = "127.0.0.1:50051"
"""The server's address in the README."""

PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / folder / "README.md" for folder in ("protos", "client", "server"))]
)
BLOCK = re.compile(r"<!-- test: ([^>]*) -->\n```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
QUICK_START = (
    "from touchline_server import ReplayBuffer, read_cfg",
    "from tensordict import TensorDict",
    "import torch",
    "buffer = ReplayBuffer(read_cfg())",
    'episode = TensorDict({"obs": torch.randn(100, 64), "action": torch.randn(100, 8), "reward": torch.randn(100), '
    '"done": torch.zeros(100)}, batch_size=[100])',
    "buffer.add(episode)",
    "if buffer.ready():",
    "    obs, action, reward, done = buffer.sample()",
)
"""The code that the project promised first; not even a formatter may change it."""

IN_PROCESS, SERVER, NETWORKED, ACTOR_AND_LEARNER = (
    "quick start, in process",
    "server command",
    "quick start, networked",
    "actor and learner",
)


def blocks() -> dict[str, str]:
    return {name: code for name, _, code in BLOCK.findall(README)}


def run(code: str) -> dict[str, Any]:
    """Runs a block as a program of its own and returns its variables."""
    variables: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(code, "README.md", "exec"), variables)
    return variables


def run_networked(name: str, address: str) -> dict[str, Any]:
    code = blocks()[name]
    assert code.count(ADDRESS) == 1
    return run(code.replace(ADDRESS, address))


def shapes(variables: dict[str, Any]) -> list[tuple[int, ...]]:
    values = [variables[name] for name in ("obs", "action", "reward", "done")]
    assert all(isinstance(value, torch.Tensor) and value.dtype == torch.float32 and value.isfinite().all() for value in values)
    return [tuple(value.shape) for value in values]


def table(text: str, marker: str) -> list[list[str]]:
    """Returns the cells of the table after a comment, without its head."""
    _, found, rest = text.partition(f"<!-- test: {marker} -->\n")
    assert found
    rows = [line.strip("| ").split(" | ") for line in rest.partition("\n\n")[0].splitlines()]
    return rows[2:]


def code_of(cell: str) -> str:
    assert cell.startswith("`") and cell.endswith("`"), cell
    return cell.strip("`")


@pytest.fixture(autouse=True)
def _no_settings_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in os.environ:
        if variable.upper().startswith("TOUCHLINE_"):
            monkeypatch.delenv(variable)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server that runs the README's command."""
    program, command, *options = shlex.split(blocks()[SERVER])
    assert (Path(program).name, command) == ("touchline-server", "serve")
    with ServerProcess(tmp_path_factory.mktemp("server"), *options, "--port", "0") as server:
        yield server.address


# Code


def test_every_program_of_the_readme_is_run() -> None:
    assert list(blocks()) == [IN_PROCESS, SERVER, NETWORKED, ACTOR_AND_LEARNER]
    assert len(re.findall(r"^```\w+$", README, re.MULTILINE)) == len(blocks())


def test_quick_start_in_process_runs_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)

    variables = run(blocks()[IN_PROCESS])

    assert blocks()[IN_PROCESS].splitlines() == list(QUICK_START)
    assert shapes(variables) == [(4, 256, 64), (3, 256, 8), (3, 256, 1), (3, 256, 1)]
    assert variables["buffer"].num_eps == 1


def test_quick_start_over_the_network_runs_as_written(address: str) -> None:
    variables = run_networked(NETWORKED, address)

    with ReplayClient(address) as client:
        config = tomllib.loads(client.info().config_toml)["config"]
        assert client.num_eps >= 1
    batch_size, horizon = config["batch_size"], config["horizon"]
    assert shapes(variables) == [
        (horizon + 1, batch_size, 64),
        (horizon, batch_size, 8),
        (horizon, batch_size, 1),
        (horizon, batch_size, 1),
    ]


def test_actor_and_learner_run_as_written(address: str) -> None:
    with ReplayClient(address) as client:
        before = client.counts()

    variables = run_networked(ACTOR_AND_LEARNER, address)

    assert shapes(variables) == [(6, 128, 64), (5, 128, 8), (5, 128, 1), (5, 128, 1)]
    assert variables["update"] == 99
    assert "left-foot" in variables["actors"]
    with ReplayClient(address) as client:
        after = client.counts()
    assert (after.episodes_added - before.episodes_added, after.steps_added - before.steps_added) == (3, 3 * 201)


# Configuration


def test_environment_variables_of_the_readme_override_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    named = re.findall(r"\bTOUCHLINE_([A-Z]+)__([A-Z_]+)=([\w.:]+)", README)
    assert len(named) >= 3

    for table_name, key, value in named:
        with monkeypatch.context() as patch:
            patch.setenv(f"TOUCHLINE_{table_name}__{key}", value)
            config = read_cfg(ROOT / "cfg" / "default.toml")
        assert str(getattr(getattr(config, table_name.lower()), key.lower())) == value


# What pages name


def slugs(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    dead = []
    for path, anchor in re.findall(r"\]\((?!https?://)([^)#\s]*)#?([^)\s]*)\)", page.read_text("utf-8")):
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in slugs(target)):
            dead.append(f"{path}#{anchor}" if anchor else path)

    assert dead == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_of_the_repository_that_are_named_exist(page: Path) -> None:
    named = re.findall(r"`((?:server|client|protos|tests|examples|benchmarks|docs|cfg|docker)/[\w./-]+)", page.read_text("utf-8"))

    assert [path for path in named if not (ROOT / path).exists()] == []


def test_make_targets_that_are_named_exist() -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    named = set()
    for page in PAGES:
        text = page.read_text("utf-8")
        code = re.findall(r"`([^`\n]+)`", text) + re.findall(r"^ {4}(.*)$", text, re.MULTILINE)
        named |= {target for line in code for target in re.findall(r"(?:^|[ =])make (?:[A-Z]+=\S+ )*([a-z][a-z-]*)", line)}

    assert {"demo", "test", "install", "serve"} <= named
    assert named - targets == set()


# Statuses


def test_protocol_page_has_every_status_and_reason() -> None:
    rows = table((ROOT / "docs" / "wire.md").read_text("utf-8"), "statuses")

    found = [(code_of(status), code_of(reason)) for status, reason, *_ in rows]

    assert len(found) == len(set(found))
    assert set(found) == {(status.code.name, status.reason) for status in (*STATUS_OF.values(), INTERNAL)}


def test_troubleshooting_says_which_error_each_status_and_reason_becomes() -> None:
    rows = table((ROOT / "docs" / "troubleshooting.md").read_text("utf-8"), "reasons")

    found = {tuple(where.replace("`", "").split(", ")): code_of(error) for error, where, *_ in rows}

    statuses = {*STATUS_OF.values(), INTERNAL}
    assert found == {
        (status.code.name, status.reason): (ERROR_OF_REASON.get(status.reason) or ERROR_OF_STATUS[status.code]).__name__
        for status in statuses
    }
