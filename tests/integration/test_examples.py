"""The examples and the demo, in processes of their own and with a real server."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.fault_tally import long

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from processes import Child, ChildError
from touchline import ReplayClient
from touchline_server import Config
from touchline_server.service.app import ServerThread

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts an example with its arguments; kills it at the end if it still runs."""
    started: list[subprocess.Popen[str]] = []

    def start(example: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(EXAMPLES / example), *arguments]
        variables = {**os.environ, "PYTHONUNBUFFERED": "1", **environment}
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=(tmp_path / f"{example}.log").open("w"), text=True, env=variables, cwd=tmp_path
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.terminate()
        try:
            process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def _serve(port: int = 0) -> ServerThread:
    return ServerThread(
        Config(
            config={"buffer_size": 5_000, "batch_size": 32, "min_history": 1_000, "horizon": 3},
            storage={"device": "cpu"},
            server={"port": port},
        )
    )


def _lines(process: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    assert process.stdout is not None
    for line in process.stdout:
        yield json.loads(line)


def _stop(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    """Sends SIGTERM and returns the lines of JSON that were not read before."""
    process.terminate()
    rest = list(_lines(process))
    assert process.wait() == 0
    return rest


def _nobody_listens(address: str) -> bool:
    host, port = address.rsplit(":", 1)
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) != 0


def test_actor_after_its_matches_has_everything_acknowledged(start: Start) -> None:
    with _serve() as server, ReplayClient(server.address) as client:
        actor = start("actor.py", "--address", server.address, "--matches", "2", "--match-seconds", "1", "--actor-name", "left")
        *matches, totals = _lines(actor)
        assert actor.wait() == 0

        counts = client.counts()
        assert [match["match"] for match in matches] == [0, 1]
        assert totals == {"episodes_played": 8, "episodes_acknowledged": 8, "steps_played": 8 * 41, "steps_acknowledged": 8 * 41}
        assert (counts.episodes_stored, counts.steps_stored) == (8, 8 * 41)
        batch = client.sample(batch_size=256)
        assert {batch.actor_names[int(actor)] for actor in batch.actor} == {f"left/{player}" for player in range(4)}
        assert set(batch.extra["match"].flatten().tolist()) == {0, 1}


def test_actor_in_lockstep_sends_one_episode_a_match_and_the_learner_trains_on_it(start: Start) -> None:
    with _serve() as server, ReplayClient(server.address) as client:
        actor = start(
            "actor.py", "--address", server.address, "--lockstep", "--matches", "25", "--match-seconds", "1", "--actor-name", "left"
        )
        *matches, totals = _lines(actor)
        assert actor.wait() == 0
        counts = client.counts()
        assert totals == {"episodes_played": 25, "episodes_acknowledged": 25, "steps_played": 25 * 41, "steps_acknowledged": 25 * 41}
        assert (counts.episodes_stored, counts.steps_stored) == (25, 25 * 41)
        batch = client.sample(batch_size=64)
        assert tuple(batch.obs.shape[:3]) == (4, 64, 4) and tuple(batch.reward.shape) == (3, 64, 4)
        assert set(batch.actor_names.values()) == {"left"}

        learner = start("learner.py", "--address", server.address, "--updates", "30", "--seconds", "120")
        *_, last = _lines(learner)
        assert learner.wait() == 0
        assert last["updates"] == 30 and last["held_out"]["slices"] > 0
    assert [len(match["returns"]) for match in matches] == [4] * 25


def test_actor_stopped_in_a_match_sends_what_it_played(start: Start) -> None:
    with _serve() as server, ReplayClient(server.address) as client:
        actor = start("actor.py", "--address", server.address, "--match-seconds", "5")
        next(_lines(actor))

        totals = _stop(actor)[-1]

        counts = client.counts()
        assert totals["episodes_played"] == totals["episodes_acknowledged"] == counts.episodes_added > 0
        assert totals["steps_played"] == totals["steps_acknowledged"] == counts.steps_added > 0


def test_learner_on_demonstrations_and_online_data_has_exactly_half_of_each_and_learns(start: Start) -> None:
    with _serve() as server, ReplayClient(server.address) as client:
        learner = start("train_mixed.py", "--address", server.address, "--updates", "400")
        *_, last = reports = list(_lines(learner))
        assert learner.wait() == 0

        assert [report["slices"] for report in reports] == [{"online": 64 * n, "demos": 64 * n} for n in (100, 200, 300, 400)]
        assert last["return"] > reports[0]["return"] / 2  # returns are negative: it comes at least twice as near to the goal
        assert client.counts(table="demos").episodes_added == 20
        assert client.counts(table="online").episodes_added == 1 + 400 // 25
        assert client.counts().episodes_added == 0


def test_multi_task_trainer_on_half_demonstrations_learns_every_task(start: Start) -> None:
    with _serve() as server, ReplayClient(server.address) as client:
        trainer = start("train_newt_style.py", "--address", server.address, "--rounds", "3")
        first, *_, last = list(_lines(trainer))
        assert trainer.wait() == 0

        assert last["reward_error"] < first["reward_error"] / 4 and last["policy_error"] < first["policy_error"]
        for task in range(3):  # returns are negative: it comes at least three times as near to the goal
            assert last["returns"][task] > first["returns"][task] / 3
        assert client.counts(table="demos").episodes_added == 30
        assert client.counts(table="online").episodes_added == 9
        assert client.counts().episodes_added == 0


def test_learner_in_jax_learns_from_batches_of_the_ring(start: Start) -> None:
    with _serve() as server, ReplayClient(server.address) as client:
        learner = start("train_jax.py", "--address", server.address, "--updates", "400", JAX_PLATFORMS="cpu")
        first, *_, last = list(_lines(learner))
        assert learner.wait() == 0

        assert (first["update"], last["update"]) == (100, 400)
        assert {first["transport"], last["transport"]} == {"ring"}
        assert last["loss"] < first["loss"] / 4
        assert client.counts().episodes_added == 20 + 400 // 25


def test_learner_with_priorities_draws_more_of_what_it_predicts_badly(start: Start) -> None:
    with _serve() as server, ReplayClient(server.address) as client:
        learner = start("train_prioritized.py", "--address", server.address, "--updates", "400")
        *reports, totals = list(_lines(learner))
        assert learner.wait() == 0

        assert [report["update"] for report in reports] == [100, 200, 300, 400]
        assert reports[-1]["error"] < reports[0]["error"] / 2
        # Uniform draws would have as many bounces as are stored.
        assert reports[-1]["times_uniform"] > 1.4 > reports[0]["times_uniform"]
        assert totals["slices_updated"] + totals["slices_evicted"] == 400 * 64
        assert totals["slices_updated"] > totals["slices_evicted"]
        assert client.counts().episodes_added == 40 + 400 // 25


@pytest.mark.slow
def test_actor_with_a_spool_leaves_its_episodes_there_and_the_next_one_sends_them(start: Start, tmp_path: Path) -> None:
    arguments = ("--match-seconds", "1", "--matches", "1", "--spool-dir", str(tmp_path / "spool"))
    with socket.create_server(("127.0.0.1", 0)) as unanswered:  # no process accepts its connections
        actor = start("actor.py", "--address", f"127.0.0.1:{unanswered.getsockname()[1]}", *arguments)
        next(_lines(actor))  # the match is over and its episodes are on the disk
        actor.kill()
        actor.wait()

    with _serve() as server, ReplayClient(server.address) as client:
        actor = start("actor.py", "--address", server.address, *arguments)
        *_, totals = _lines(actor)
        assert actor.wait() == 0
        stored = client.counts().episodes_added

    assert totals["episodes_acknowledged"] == stored == 8
    assert (totals["episodes_played"], totals["episodes_resumed"], totals["episodes_waiting"]) == (4, 4, 0)


def test_actor_of_the_same_seed_plays_the_same_match(start: Start) -> None:
    with _serve() as server:
        arguments = ("--address", server.address, "--matches", "1", "--match-seconds", "1", "--seed")
        first, again, other = (start("actor.py", *arguments, seed) for seed in ("7", "7", "8"))
        (match, _), (same_match, _), (other_match, _) = map(_lines, (first, again, other))
    returns = [played["returns"] for played in (match, same_match, other_match)]

    assert returns[0] == returns[1] != returns[2]


@pytest.mark.slow
def test_actor_and_learner_go_on_after_a_restart_of_the_server(start: Start, tmp_path: Path) -> None:
    checkpoint = tmp_path / "model.pt"
    with _serve() as server:
        address = server.address
        actor = start("actor.py", "--address", address, "--match-seconds", "2")
        learner = start("learner.py", "--address", address, "--checkpoint", str(checkpoint))
        reports = _lines(learner)
        next(reports)

    with _serve(int(address.rsplit(":", 1)[1])), ReplayClient(address) as client:
        client.wait_until_ready(timeout_s=120)
        returned = time.time()
        before = next(report for report in reports if report["time"] > returned)
        after = next(report for report in reports if report["updates"] > before["updates"] + 20)
        last = _stop(learner)[-1]
        totals = _stop(actor)[-1]

    assert last["final"] and last["updates"] >= after["updates"]
    assert checkpoint.exists()
    assert totals["episodes_acknowledged"] == totals["episodes_played"] > 0


def test_reader_ranks_the_actors_of_the_newest_episodes(start: Start) -> None:
    with _serve() as server, ReplayClient(server.address) as client:
        for number in range(12):
            reward = np.array([np.nan, number, 1], np.float32)
            episode = {"obs": np.zeros((3, 2), np.float32), "action": np.zeros((3, 1), np.float32), "reward": reward}
            client.add(episode, actor=f"actor-{number % 2}")

        reader = start("read_episodes.py", "--address", server.address, "--newest", "5")
        ranks = list(_lines(reader))
        assert reader.wait() == 0

    assert ranks == [
        {"actor": "actor-1", "episodes": 3, "mean_return": 10.0},
        {"actor": "actor-0", "episodes": 2, "mean_return": 10.0},
    ]


def test_learner_takes_its_checkpoint_up(start: Start, tmp_path: Path) -> None:
    with _serve() as server:
        start("actor.py", "--address", server.address, "--match-seconds", "2", "--matches", "8")
        arguments = ("--address", server.address, "--updates", "30", "--checkpoint", str(tmp_path / "model.pt"))
        first = start("learner.py", *arguments)
        of_first = list(_lines(first))
        again = start("learner.py", *arguments)
        of_again = list(_lines(again))

    assert first.wait() == again.wait() == 0
    assert of_first[-1]["updates"] == of_again[-1]["updates"] == 30
    # The number of updates in a report depends on their pace: the first one may already show learning.
    first_loss, first_loss_again = (next(line["reward"] for line in lines if "reward" in line) for lines in (of_first, of_again))
    assert first_loss_again < first_loss
    assert "goes on from" in (tmp_path / "learner.py.log").read_text()


@pytest.mark.parametrize(
    ("example", "package", "install"), [("actor.py", "dm_control", "requirements.txt"), ("learner.py", "torch", "./client[torch]")]
)
def test_example_without_its_package_says_what_to_install(example: str, package: str, install: str) -> None:
    program = f"import runpy, sys; sys.modules[{package!r}] = None; sys.argv = [{example!r}]; sys.path.insert(0, {str(EXAMPLES)!r}); " + (
        f"runpy.run_path({str(EXAMPLES / example)!r}, run_name='__main__')"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)

    assert run.returncode == 1
    assert package in run.stderr and install in run.stderr and "Traceback" not in run.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("options", [(), pytest.param(("--lockstep",), marks=long)])
def test_demo_accounts_for_every_episode_and_beats_the_mean(start: Start, tmp_path: Path, options: tuple[str, ...]) -> None:
    for seconds in (30, 90, 270):  # a slow machine may learn only by the last report
        demo = start("demo.py", "--seconds", str(seconds), "--match-seconds", "5", "--output", "out", *options)
        assert demo.stdout is not None
        output = demo.stdout.read()
        if demo.wait() == 0:
            break

    assert demo.wait() == 0, output
    assert "played = acknowledged = stored + evicted: holds" in output
    assert "beats predicting the mean" in output
    assert (tmp_path / "out" / "demo.png").read_bytes().startswith(PNG_SIGNATURE)
    assert _nobody_listens(_address_in(output))


@pytest.mark.slow
def test_demo_interrupted_stops_what_it_started(start: Start, tmp_path: Path) -> None:
    demo = start("demo.py", "--output", "out")
    assert demo.stdout is not None
    line = next(line for line in demo.stdout if "the server listens on" in line)
    next(line for line in demo.stdout if "episodes" in line)

    demo.send_signal(signal.SIGINT)
    rest = demo.stdout.read()

    assert demo.wait() == 130
    assert "interrupted" in rest
    assert _nobody_listens(_address_in(line))


def test_demo_whose_server_fails_shows_why(start: Start) -> None:
    demo = start("demo.py", "--output", "out", TOUCHLINE_CONFIG__BATCH_SIZE="0")
    assert demo.stdout is not None
    output = demo.stdout.read()

    assert demo.wait() == 1
    assert "server ended with status" in output
    assert "batch_size" in output


SLOW_TO_STOP = """
import signal, time
def stop(number, frame):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    print("stopping", flush=True)
signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
signal.pause()
time.sleep(1)  # what it has to finish
"""


def test_child_asked_to_stop_twice_gets_one_signal(tmp_path: Path) -> None:
    child = Child("slow", [sys.executable, "-c", SLOW_TO_STOP], tmp_path)
    try:
        child.wait_for_line("ready", timeout_s=120)
        child.ask_to_stop()
        child.wait_for_line("stopping", timeout_s=120)

        child.stop()  # a second signal would end it with status -15
    finally:
        child.end(grace_s=0)


def test_child_that_ends_by_itself_is_an_error_with_its_log(tmp_path: Path) -> None:
    child = Child("broken", [sys.executable, "-c", "raise SystemExit('out of grass')"], tmp_path)

    with pytest.raises(ChildError, match=r"(?s)broken ended with status 1.*out of grass"):
        child.wait_for_line("ready", timeout_s=120)


def _address_in(output: str) -> str:
    return output.split("the server listens on ")[1].split(";")[0]
