"""The code of README, of every page and of docstrings runs as written, against real servers; ``support/code_blocks.py`` says how."""

from __future__ import annotations

import inspect
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from support.code_blocks import ADDRESS, PageRun, examples_of, read_blocks
from support.recorder_cases import serve
from support.serving import ServerThread
from support.shell_blocks import check_commands
from touchline import EpisodeWriter, ReplayClient, recorders
from touchline.tdmpc2 import Buffer
from touchline_protos.codec import EpisodeKey

os.environ.setdefault("MUJOCO_GL", "disabled")  # read when dm_control is imported

ROOT = Path(__file__).parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path
    for path in [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / folder / "README.md" for folder in ("protos", "client", "server")),
    ]
}
WITH_CODE = [name for name, path in PAGES.items() if "```" in path.read_text("utf-8")]
NOT_RUN = {
    "docs/command-line.md": 1,  # jq
    "docs/containers.md": 10,  # Docker
    "docs/from-reverb.md": 3,  # Reverb
    "docs/getting-started.md": 2,  # another machine, an index of wheels
    "docs/gpu.md": 3,  # a CUDA device
    "docs/http.md": 1,  # the port of the web page
    "docs/metrics.md": 2,  # Docker, a collector
    "docs/operations.md": 1,  # systemd
    "docs/several-learners.md": 1,  # torchrun; tests/integration/test_rank_streams.py runs it
    "docs/wire.md": 1,  # Node
}
"""Blocks of each page that are not run here; the reason stands before each."""
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


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in os.environ:
        if variable.upper().startswith("TOUCHLINE_"):
            monkeypatch.delenv(variable)
    monkeypatch.chdir(tmp_path)


# Pages


def test_commands_in_the_runbooks_of_alerts_are_accepted() -> None:
    place = "deploy/prometheus/alerts.yml"
    commands = re.findall(r"`(touchline[^`]*)`", (ROOT / place).read_text("utf-8"))

    assert len(commands) >= 5
    for command in commands:
        check_commands(" ".join(command.split()), place)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", WITH_CODE)
def test_blocks_of_a_page_run_as_written(name: str, tmp_path: Path) -> None:
    with PageRun(tmp_path) as run:
        for block in read_blocks(name, PAGES[name].read_text("utf-8")):
            run.run(block)


def test_blocks_that_are_not_run_are_the_listed_ones() -> None:
    not_run = Counter(name for name in WITH_CODE for block in read_blocks(name, PAGES[name].read_text("utf-8")) if block.not_run)

    assert not_run == NOT_RUN


def test_readme_begins_with_the_quick_start_as_promised() -> None:
    first = next(block for block in read_blocks("README.md", PAGES["README.md"].read_text("utf-8")) if block.language == "python")

    assert first.code.splitlines() == list(QUICK_START)


@pytest.mark.parametrize(
    ("page", "fault"),
    [
        ("```\nmake test\n```\n", "page.md:1: a block without a language"),
        ("Text\n\n    make test\n", "page.md:3: a block by indentation"),
        ("<!-- test: runn -->\n```sh\nmake test\n```\n", "says nothing that can be done"),
        ("Text\n<!-- test check\nassert True\n-->\n", "page.md:2: a check without a block"),
        ("```sh\nmake tset\n```\n", "page.md:1: the Makefile has no 'tset'"),
        ("```sh\nmake soak SOAK_HOURS=1\n```\n", "the Makefile has no 'SOAK_HOURS=1'"),
        ("```sh\ntouchline-server serve --prot 0\n```\n", "page.md:1: touchline-server serve --prot 0: No such option"),
        ("```sh\ntouchline cleer\n```\n", "touchline cleer: No such command"),
        ("```sh\ntouchline-server serve && touchline-server heal\n```\n", "heal: No such command"),
        ("```sh\npython examples/demo.py --secs 3\n```\n", "examples/demo.py has no options"),
        ("```sh\nexport TOUCHLINE_ADDRES=a:1\n```\n", "nothing reads TOUCHLINE_ADDRES"),
        ("```sh\nTOUCHLINE_CONFIG__BATCH_SISE=3 touchline-server serve\n```\n", "batch_sise"),
        ("```sh\ndocker compose up\n```\n", "nothing knows 'docker'"),
        ("```toml\n[config]\nbuffer_sise = 3\n```\n", "buffer_sise"),
        ('```toml\n[[token]]\nname = "a"\nrole = "king"\nvalue = "..."\n```\n', "token 1 (a): expected a role"),
        ("```yaml\na: [\n```\n", "expected the node content"),
        ("```ruby\nputs\n```\n", "nothing runs ruby"),
        ("```python\nassert 1 == 2\n```\n", "page.md:2"),
        ("```python\nprint(1)  # 2\n```\n", "printed '1\\n', expected '2'"),
        ("```python\nx = 1\n```\n<!-- test check\nassert x == 2\n-->\n", "page.md:1, check"),
        ("<!-- test: run -->\n```sh\necho gone\ncat nothing\n```\n", "page.md:2: gone"),
        ("<!-- test: not run, a reason -->\n```python\nx =\n```\n", "invalid syntax"),
    ],
)
def test_planted_fault_is_found(page: str, fault: str, tmp_path: Path) -> None:
    with pytest.raises(Exception) as raised, PageRun(tmp_path) as run:
        for block in read_blocks("page.md", page):
            run.run(block)

    assert fault in f"{raised.value}{raised.traceback[-1].path}:{raised.traceback[-1].lineno + 1}"


def test_block_that_continues_has_the_variables_of_the_one_before(tmp_path: Path) -> None:
    page = "```python\nx = 3\n```\n<!-- test: continues -->\n```python\nassert x == 3\n```\n```python\nassert 'x' not in globals()\n```\n"

    with PageRun(tmp_path) as run:
        for block in read_blocks("page.md", page):
            run.run(block)


# Docstrings


@pytest.fixture
def server() -> Any:
    with serve() as server:
        yield server


def run_example(thing: Any, server: ServerThread) -> dict[str, Any]:
    """Runs the first example of a docstring and returns its variables."""
    code = next(examples_of(inspect.getdoc(thing) or ""))
    assert len(ADDRESS.findall(code)) == 1
    variables: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(ADDRESS.sub(server.address, code), f"<{thing.__name__}>", "exec"), variables)
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
    run_example(getattr(recorders, recorder), server)

    assert stored(server) == expected
