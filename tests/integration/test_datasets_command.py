"""The command ``touchline`` in a process of its own, with a real server: output, exit status, and that killing it is harmless."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from support.dataset_cases import assert_same, make_episode, serve, stored, write_npz
from support.serving import ServerThread, needs_server
from touchline import ReplayClient

KILLS = 3

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts the command; kills it at the end if it still runs."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "touchline", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "COLUMNS": "200", **environment},
            cwd=tmp_path,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def run(start: Start) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: str, **environment: str) -> tuple[int, str, str]:
        process = start(*arguments, **environment)
        output, errors = process.communicate(timeout=300)
        return process.returncode, output, errors

    return run


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def server() -> Iterator[ServerThread]:
    with serve(allow_non_finite=False) as server:
        yield server


def test_load_prints_what_it_stored(server: ServerThread, run: Run, tmp_path: Path) -> None:
    write_npz(tmp_path / "demos.npz", [make_episode(number) for number in range(5)])

    status, output, errors = run("load", "demos.npz", TOUCHLINE_ADDRESS=server.address)
    again, repeated, _ = run("load", "demos.npz", "--address", server.address)

    assert (status, again, errors) == (0, 0, "")
    assert "demos.npz: 5 episodes, 55 steps in " in output
    assert "stored               5" in output
    assert f"{server.address} has 5 episodes, 55 steps" in output
    assert "stored               0" in repeated
    assert "duplicates           5" in repeated
    assert_same(stored(server), [make_episode(number) for number in range(5)])


def test_load_with_refused_episodes_exits_with_1_and_prints_why(server: ServerThread, run: Run, tmp_path: Path) -> None:
    episodes = [make_episode(number) for number in range(6)]
    for number in (1, 2, 3, 4):
        episodes[number]["obs"][number] = np.nan
    write_npz(tmp_path / "demos.npz", episodes)

    status, output, _ = run("load", "demos.npz", "--address", server.address)
    allowed, _, _ = run("load", "demos.npz", "--address", server.address, "--allow-refused")

    assert (status, allowed) == (1, 0)
    assert "refused              4" in output
    assert "4 × obs: a value that is not finite in row #, expected finite values" in output
    assert "episode 2: obs: a value that is not finite in row 2" in output
    assert "and 1 more" in output


def test_source_that_cannot_be_read_does_not_stop_the_others(server: ServerThread, run: Run, tmp_path: Path) -> None:
    write_npz(tmp_path / "demos.npz", [make_episode(0)])
    (tmp_path / "broken.npz").write_bytes(b"PK")

    status, output, errors = run("load", "broken.npz", "gone.h5", "demos.npz", "--address", server.address)

    assert status == 1
    assert "touchline: broken.npz: not an NPZ file" in errors and "touchline: gone.h5: no such file or folder" in errors
    assert "stored               1" in output
    assert "Traceback" not in errors


def test_dry_run_needs_no_server_and_shows_the_columns(run: Run, tmp_path: Path) -> None:
    write_npz(tmp_path / "demos.npz", [make_episode(0), make_episode(1, obs=3)])

    status, output, _ = run("load", "demos.npz", "--dry-run", "--task", "4", "--address", "127.0.0.1:1")

    assert status == 1
    assert "obs     float32 [4]" in output and "task    int64 []" in output
    assert "episode 1: obs: float32 (3,), expected float32 (4,) as in the first episode" in output


def test_unreachable_server_is_reported_before_anything_is_read(run: Run, tmp_path: Path) -> None:
    write_npz(tmp_path / "demos.npz", [make_episode(0)])

    status, _, errors = run("load", "demos.npz", "--address", "127.0.0.1:1")

    assert status == 1
    assert "no server: 127.0.0.1:1" in errors and "touchline-server serve" in errors and "Traceback" not in errors


@needs_server
def test_token_of_an_actor_loads_and_that_of_a_learner_exports(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_npz(tmp_path / "demos.npz", [make_episode(0)])
    actor, learner = "actor-token-0123456789", "learner-token-0123456789"
    with monkeypatch.context() as patch:
        patch.setenv("TOUCHLINE_SERVER_TOKENS", f"actor:robots:{actor} learner:trainer:{learner}")
        with serve() as guarded:
            address = guarded.address
            loaded, _, _ = run("load", "demos.npz", "--address", address, TOUCHLINE_TOKEN=actor)
            exported, _, _ = run("export", "all.h5", "--address", address, TOUCHLINE_TOKEN=learner)
            refused, _, errors = run("load", "demos.npz", "--address", address, TOUCHLINE_TOKEN=learner)

    assert (loaded, exported, refused) == (0, 0, 1)
    assert "touchline: AccessDeniedError: " in errors and "Traceback" not in errors


def test_no_arguments_show_the_commands(run: Run) -> None:
    _, output, errors = run()

    assert "touchline load" in output + errors


def test_command_without_the_extra_says_what_to_install() -> None:
    code = "import sys; sys.modules['typer'] = None; from touchline._cli.main import main; main()"

    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert found.returncode == 1
    assert "pip install '" in found.stderr and "'rich>=13' 'typer>=0.16'" in found.stderr and "Traceback" not in found.stderr


@pytest.mark.parametrize(
    ("package", "file", "command"),
    [
        ("h5py", "a.h5", "pip install 'h5py>="),
        ("minari", "minari:a-v0", "pip install 'minari[hdf5]>="),
        ("torch", "a.pt", "'torch>=2.7'"),
    ],
)
def test_format_without_its_package_says_what_to_install(tmp_path: Path, package: str, file: str, command: str) -> None:
    (tmp_path / file).touch()
    code = f"import sys; sys.modules[{package!r}] = None; from touchline import datasets; datasets.open_source({file!r})"

    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)

    assert command in found.stderr.splitlines()[-1]


def _wait_until(server: ServerThread, episodes: int, process: subprocess.Popen[str]) -> None:
    """Returns once ``episodes`` were added or the process has ended."""
    with ReplayClient(server.address) as client:
        while client.counts().episodes_added < episodes and process.poll() is None:
            pass


def test_load_killed_half_way_and_started_again_stores_each_episode_once(server: ServerThread, start: Start, tmp_path: Path) -> None:
    """Loads sixty megabytes in two calls, killed later each time and started again."""
    total = 600
    episodes = [make_episode(number, rows=50, obs=500) for number in range(total)]
    write_npz(tmp_path / "demos.npz", episodes)
    half_way = 0

    for kill in range(KILLS):
        process = start("load", "demos.npz", "--address", server.address)
        _wait_until(server, 1 + total * kill // KILLS, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
        with ReplayClient(server.address) as client:
            half_way += 0 < client.counts().episodes_added < total
    last = start("load", "demos.npz", "--address", server.address)
    output, errors = last.communicate(timeout=300)

    assert half_way > 0
    assert last.returncode == 0, errors
    assert Counter(episode["obs"].tobytes() for episode in stored(server)) == Counter(episode["obs"].tobytes() for episode in episodes)
    assert f"{server.address} has 600 episodes" in output


def test_interrupted_load_says_how_to_continue(server: ServerThread, start: Start, tmp_path: Path) -> None:
    write_npz(tmp_path / "demos.npz", [make_episode(number, rows=50, obs=500) for number in range(600)])
    process = start("load", "demos.npz", "--address", server.address)
    _wait_until(server, 1, process)

    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)

    assert process.returncode == 130
    assert "touchline: interrupted; run the same command again to continue, nothing is stored twice\n" in errors


def test_interrupt_swallowed_by_python_still_ends_the_command(server: ServerThread, tmp_path: Path) -> None:
    """An exception in the callback of a weak reference is only printed."""
    with ReplayClient(server.address) as client:
        client.add(make_episode(0))
    code = """
import os, signal, sys, weakref
from touchline import datasets
from touchline import datasets
from touchline._cli import app as commands
plain = datasets.export

class Referent:
    pass

def export(*arguments, progress, **options):
    def report_and_press(*told):
        referent = Referent()
        reference = weakref.ref(referent, lambda _: (os.kill(os.getpid(), signal.SIGINT), sum(range(1000))))
        del referent
        progress(*told)
    return plain(*arguments, progress=report_and_press, **options)

datasets.export = export
sys.argv = ["touchline", "export", "all.npz", "--address", sys.argv[1]]
commands.app()
"""
    found = subprocess.run([sys.executable, "-c", code, server.address], capture_output=True, text=True, check=False, cwd=tmp_path)

    assert "Exception ignored in" in found.stderr
    assert "touchline: interrupted; nothing was written" in found.stderr
    assert found.returncode == 130
    assert list(tmp_path.iterdir()) == []
