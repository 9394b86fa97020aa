"""The network fails between actors, learner and server: actors keep playing, everything arrives once, no batch is wrong."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from support.durable_cases import keyed_episode
from support.fault_tally import EPISODES, long, note
from support.playing import Learner, Players, assert_stored_once
from support.service_calls import Caller, ServerProcess, serving
from support.tcp_proxy import Line, TcpProxy
from touchline import DeadlineError, UnavailableError

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 0.5
"""Deadline of the clients' calls; each outage lasts several times as long."""
OUTAGE_S = 4 * TIMEOUT_S
BAD = Line(delay_s=0.02, bytes_per_s=2_000_000, stall_share=0.1, stall_s=0.2, reset_share=0.02)

OUTAGES: dict[str, tuple[Callable[[TcpProxy], None], Callable[[TcpProxy], None]]] = {
    "silent": (TcpProxy.pause, TcpProxy.resume),
    "cut": (TcpProxy.cut, TcpProxy.restore),
}


def serve(folder: Path, **environment: str) -> ServerProcess:
    return ServerProcess(folder, TOUCHLINE_STORAGE__DATA_DIR=str(folder / "data"), **environment)


def stop_and_verify(process: ServerProcess, players: Players, folder: Path) -> None:
    """Stops the server and compares what it stored with what was played."""
    with Caller(process.address) as caller:
        counts = caller.counts()
    process.signal(signal.SIGTERM)
    assert process.wait() == 0, process.log
    assert_stored_once(folder / "data", players.everything)
    assert counts.episodes_added == len(players.everything)
    note(episodes_acknowledged=len(players.everything), sent_again=counts.episodes_duplicate, lost=0, doubled=0)


@pytest.mark.timeout(600 + EPISODES)
@pytest.mark.parametrize("spooled", [False, True])
def test_outages_longer_than_the_deadline_stop_no_actor_and_cost_no_episode(tmp_path: Path, spooled: bool) -> None:
    spool_dir = tmp_path / "spool" if spooled else None
    with (
        serve(tmp_path) as process,
        TcpProxy(process.address) as proxy,
        Players(proxy.address, timeout_s=TIMEOUT_S, spool_dir=spool_dir) as players,
    ):
        players.play(EPISODES)
        players.flush_all()
        for begin, end in OUTAGES.values():
            begin(proxy)
            players.play(EPISODES)
            errors = players.pending_errors(OUTAGE_S)
            players.play(EPISODES)
            waiting = [writer.counters.pending for writer in players.writers]
            end(proxy)
            players.flush_all()

            assert len(errors) == EPISODES * len(players.writers)
            assert {type(why) for why in errors} <= {DeadlineError, UnavailableError}, errors
            assert waiting == [2 * EPISODES] * len(players.writers)
        stop_and_verify(process, players, tmp_path)


@pytest.mark.timeout(600 + 4 * EPISODES)
def test_slow_and_lossy_line_costs_no_episode_whole_or_in_chunks(tmp_path: Path) -> None:
    with (
        serve(tmp_path, TOUCHLINE_LIMITS__MAX_MESSAGE_BYTES="4096") as process,
        TcpProxy(process.address, BAD) as proxy,
        Players(proxy.address, timeout_s=2 * TIMEOUT_S) as players,
    ):
        while players.played < EPISODES or not proxy.resets:
            players.play(EPISODES)
            players.flush_all()

        # Those below the limit of a message went whole, the others in chunks.
        sizes = [keyed_episode(actor, number).size_bytes for actor in range(4) for number in range(players.played)]
        assert min(sizes) < 3000 and max(sizes) > 5000
        stop_and_verify(process, players, tmp_path)


@pytest.mark.timeout(600 + 4 * EPISODES)
@pytest.mark.parametrize("limit", [pytest.param(1 << 20, id="groups"), pytest.param(4096, id="chunks", marks=long)])
def test_stream_goes_on_by_itself_after_outages_and_is_never_wrong(limit: int) -> None:
    with (
        serving(limits={"max_message_bytes": limit}) as (server, _),
        TcpProxy(server.address) as proxy,
        Players(proxy.address, timeout_s=TIMEOUT_S) as players,
    ):
        players.play(EPISODES)
        players.flush_all()
        with Learner(proxy.address, batch_size=16) as learner:
            learner.wait_for(20)
            for begin, end in OUTAGES.values():
                begin(proxy)
                players.play(1)
                assert players.pending_errors(OUTAGE_S)
                end(proxy)
                players.flush_all()
                learner.wait_for(20)
            for _ in range(EPISODES):
                proxy.reset()
                learner.wait_for(5)
            proxy.shape(BAD)
            learner.wait_for(5 * EPISODES)

            assert proxy.resets >= EPISODES
            note(batches_checked=learner.batches)


@long
def test_stream_with_a_timeout_raises_it_and_another_stream_resumes() -> None:
    with serving() as (server, _), TcpProxy(server.address) as proxy, Players(server.address) as players:
        players.play(2)
        players.flush_all()
        proxy.pause()
        with Learner(proxy.address, timeout_s=TIMEOUT_S) as hasty, pytest.raises((UnavailableError, DeadlineError), match="no batch"):
            hasty.wait_for(1)
        with Learner(proxy.address) as patient:
            proxy.resume()
            patient.wait_for(20)


@long
def test_line_that_loses_packets_of_a_network_of_its_own(tmp_path: Path) -> None:
    if shutil.which("unshare") is None:
        pytest.skip("no `unshare` here to make a network namespace with")
    scenario = [sys.executable, "-m", "support.lossy_network", str(tmp_path), str(EPISODES)]

    ended = subprocess.run(
        ["unshare", "--map-root-user", "--net", *scenario], cwd=ROOT / "tests", capture_output=True, text=True, timeout=500
    )

    if ended.returncode != 0 and "AssertionError" not in ended.stderr and "Traceback" not in ended.stderr:
        pytest.skip(f"no network namespace that loses packets may be made here: {ended.stderr.strip()}")
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout.splitlines()[-1])
    assert found["packets_lost"] > 0
    note(episodes_acknowledged=found["episodes"], sent_again=found["sent_again"], lost=0, doubled=0, batches_checked=found["batches"])
