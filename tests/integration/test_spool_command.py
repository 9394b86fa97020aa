"""``touchline spool`` and its sending, with a real server: each episode arrives once, whatever interrupts it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from support.client_faults import ScriptedServer, failing
from support.dataset_cases import assert_same, make_episode, serve, stored
from support.serving import ServerThread, needs_server
from support.spool_cases import LIMIT, damage, fill, keys_in, spooled
from touchline import ReplayClient
from touchline._spool import maintenance
from touchline._spool.maintenance import SendReport
from touchline._spool.queue import MAX_REFUSED, Spool
from touchline_protos.codec import decode_add_episode
from touchline_protos.v1 import replay_pb2 as pb

COMMAND = (sys.executable, "-m", "touchline", "spool")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def server() -> Iterator[ServerThread]:
    with serve(allow_non_finite=False) as server:
        yield server


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def run(*arguments: str, **environment: str) -> tuple[int, str, str]:
        environment = {**os.environ, "COLUMNS": "200", **environment}
        found = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=100)
        return found.returncode, found.stdout, found.stderr

    return run


def stored_keys(server: ServerThread) -> list[int]:
    """Returns the sequence numbers of the stored episodes' keys, in the order of the ids."""
    with ReplayClient(server.address) as client:
        return [episode.key.sequence for episode in client.episodes() if episode.key is not None]


# Sending


def test_waiting_episodes_are_sent_under_their_keys_oldest_first_bit_for_bit(server: ServerThread, tmp_path: Path) -> None:
    episodes = [spooled(number) for number in range(40)]
    fill(tmp_path, *episodes)
    seen: list[tuple[int, int, int]] = []

    report = maintenance.send(tmp_path, server.address, progress=lambda told: seen.append((told.sent, told.pending, told.size_bytes)))

    assert (report.total, report.sent, report.steps, report.refused, report.pending, report.error) == (40, 40, 440, 0, 0, None)
    assert seen[-1] == (40, 0, report.size_bytes) and report.size_bytes > 40 * 300
    with ReplayClient(server.address) as client:
        found = list(client.episodes())
    assert [(episode.key, episode.actor, episode.policy_version) for episode in found] == [
        (episode.key, "left", episode.policy_version) for episode in episodes
    ]
    assert_same([episode.columns for episode in found], [episode.columns for episode in episodes])
    assert maintenance.inspect(tmp_path).waiting == []


def test_episodes_whose_acknowledgement_was_lost_are_not_stored_again(server: ServerThread, tmp_path: Path) -> None:
    episodes = [spooled(number) for number in range(6)]
    fill(tmp_path, *episodes)
    with ReplayClient(server.address) as client:
        for episode in episodes[:4]:
            client.deliver(episode)

    report = maintenance.send(tmp_path, server.address)

    assert report.sent == 6
    assert sorted(stored_keys(server)) == list(range(6))


def test_sending_that_is_interrupted_goes_on_and_stores_each_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("touchline._actor.send_loop.GROUP_EPISODES", 1)
    monkeypatch.setattr(maintenance, "PROGRESS_INTERVAL_S", 0.01)
    permits = threading.Semaphore(0)
    arrived: list[int] = []

    def add(request: bytes, context: object) -> bytes:
        """Stores an episode once it is allowed to, perhaps after its client has gone without an acknowledgement."""
        assert permits.acquire(timeout=60)
        _, episode = decode_add_episode(request)
        assert episode.key is not None
        arrived.append(episode.key.sequence)
        return b""

    def interrupt(report: SendReport) -> None:
        if report.sent >= 2:
            raise KeyboardInterrupt

    fill(tmp_path, *(spooled(number) for number in range(9)))
    rounds = 0
    with ScriptedServer(AddEpisode=add) as scripted:
        while maintenance.inspect(tmp_path).waiting:
            rounds += 1
            permits.release(3)
            with contextlib.suppress(KeyboardInterrupt):
                maintenance.send(tmp_path, scripted.address, progress=interrupt)
        permits.release(100)

    assert rounds >= 3
    assert list(dict.fromkeys(arrived)) == list(range(9))  # the server drops what is sent again under the same key


def test_refused_episodes_are_kept_with_the_reason_and_sent_once_the_server_accepts_them(server: ServerThread, tmp_path: Path) -> None:
    count = MAX_REFUSED + 6
    fill(tmp_path, spooled(0), *(spooled(number, obs=7) for number in range(1, count + 1)), spooled(count + 1))

    report = maintenance.send(tmp_path, server.address)
    aside = maintenance.inspect(tmp_path)
    with serve() as other:
        retried = maintenance.retry(tmp_path)
        again = maintenance.send(tmp_path, other.address)

    assert (report.total, report.sent, report.refused, report.pending) == (count + 2, 2, count, 0)
    (reason,) = report.reasons
    assert "obs" in reason and report.reasons[reason].count == count
    assert len(aside.refused) == retried == again.sent == count and aside.waiting == []


def test_damaged_episodes_are_set_aside_and_the_others_sent(server: ServerThread, tmp_path: Path) -> None:
    fill(tmp_path, *(spooled(number) for number in range(5)))
    damage(tmp_path, 2)

    report = maintenance.send(tmp_path, server.address)

    assert (report.total, report.sent, report.refused) == (5, 4, 1)
    assert [("damaged" in reason, refusals.examples[0][0]) for reason, refusals in report.reasons.items()] == [(True, 2)]
    assert sorted(stored_keys(server)) == [0, 2, 3, 4]


def test_server_that_stays_away_ends_the_sending_and_everything_waits_as_before(tmp_path: Path) -> None:
    fill(tmp_path, spooled(0), spooled(1))
    with ScriptedServer() as gone:
        address = gone.address

    report = maintenance.send(tmp_path, address, timeout_s=0.5)

    assert (report.sent, report.pending, type(report.error).__name__) == (0, 2, "UnavailableError")
    assert keys_in(tmp_path) == [0, 1]


@needs_server
def test_unauthorized_client_ends_the_sending_immediately(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, spooled(0))
    monkeypatch.setenv("TOUCHLINE_SERVER_TOKENS", "actor:robots:actor-token-0123456789")
    with serve() as guarded:
        report = maintenance.send(tmp_path, guarded.address, timeout_s=3600)

    assert (report.pending, type(report.error).__name__) == (1, "UnauthenticatedError")
    assert keys_in(tmp_path) == [0]


def test_folder_stays_within_its_writers_limit_while_it_is_emptied(server: ServerThread, tmp_path: Path) -> None:
    spool, count = Spool(tmp_path, limit_bytes=LIMIT), 0
    while spool.put(spool.pack(spooled(count, obs=2000)), drop_oldest=False).kept:
        count += 1
    spool.close()
    most = []

    report = maintenance.send(tmp_path, server.address, progress=lambda _: most.append(_disk_bytes(tmp_path)))

    assert report.sent == count > 20
    assert max(most) <= LIMIT and _disk_bytes(tmp_path) < LIMIT // 8


def _disk_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.exists())


def test_episodes_of_another_table_go_to_that_one(tmp_path: Path) -> None:
    asked: list[str] = []

    def add(request: bytes, context: object) -> bytes:
        asked.append(pb.AddEpisodeRequest.FromString(request).table)
        return b""

    fill(tmp_path, spooled(0), table="pitch")
    with ScriptedServer(AddEpisode=add) as scripted:
        maintenance.send(tmp_path, scripted.address)

    assert asked == ["pitch"]


# The command


def test_show_prints_the_content_of_a_spool(run: Run, tmp_path: Path) -> None:
    fill(tmp_path / "spool", *(spooled(number) for number in range(1500)), refused=5)
    damage(tmp_path / "spool", 1000)

    status, output, errors = run("show", "spool")

    assert (status, errors) == (0, "")
    assert "spool: not in use; " in output
    assert "  pending          1,494  16,434 steps, " in output and ", oldest of 20" in output
    assert "  refused              5  55 steps, " in output
    assert "    5 × obs: as the test wants, for the #th time\n" in output
    assert "      episode 1: obs: as the test wants, for the 0th time\n" in output and "      and 2 more\n" in output
    assert "touchline spool retry spool" in output
    assert "  damaged              1" in output and "missing" not in output


def test_commands_on_what_is_no_spool_say_so_without_a_trace(run: Run, tmp_path: Path) -> None:
    for arguments in (("show", "gone"), ("send", "gone", "127.0.0.1:1")):
        status, output, errors = run(*arguments)

        assert (status, output) == (1, "")
        assert errors == "touchline: gone is not a spool: it does not exist; name the spool_dir of an EpisodeWriter\n"
    assert list(tmp_path.iterdir()) == []


def test_retry_and_send_say_what_they_did(server: ServerThread, run: Run, tmp_path: Path) -> None:
    fill(tmp_path / "spool", *(spooled(number) for number in range(8)), spooled(8, obs=5), refused=2)

    retried = run("retry", "spool")
    again = run("retry", "spool")
    first = run("send", "spool", server.address)
    rest = run("send", "spool", TOUCHLINE_ADDRESS=server.address)

    assert (retried[0], again[0], first[0], rest[0]) == (0, 0, 1, 0)
    assert retried[1].startswith("spool: 2 refused episodes pending again\n") and "touchline spool send spool" in retried[1]
    assert again[1] == "spool: no refused episodes\n"
    assert f"spool to {server.address}: 8 episodes, 88 steps in " in first[1]
    assert "  acknowledged         8\n" in first[1] and "  refused              1  still in the spool" in first[1]
    assert "1 × obs: " in first[1] and "episode 9: obs: " in first[1]
    assert rest[1] == "spool: nothing is pending\n"
    assert sorted(stored_keys(server)) == list(range(8))


def test_send_without_a_server_fails_before_it_opens_the_spool(run: Run, tmp_path: Path) -> None:
    fill(tmp_path / "spool", spooled(0))

    status, _, errors = run("send", "spool", "127.0.0.1:1")

    assert status == 1
    assert errors.startswith("touchline: no server: 127.0.0.1:1") and "Traceback" not in errors


def test_send_to_a_server_that_goes_away_reports_the_unsent_episodes(run: Run, tmp_path: Path) -> None:
    fill(tmp_path / "spool", spooled(0), spooled(1))

    def info(request: bytes, context: object) -> bytes:
        return pb.InfoResponse().SerializeToString()

    away = failing(grpc.StatusCode.UNAVAILABLE, "draining", details="gone for lunch")
    with ScriptedServer(Info=info, AddEpisode=away, LoadEpisodes=away) as scripted:
        status, output, errors = run("send", "spool", scripted.address, "--timeout-s", "0.5")

    assert status == 1
    assert "  acknowledged         0\n" in output and "  left                 2  still pending\n" in output
    assert "touchline: retrying: " in errors and "touchline: gave up: " in errors and "gone for lunch" in errors
    assert keys_in(tmp_path / "spool") == [0, 1]


def test_actor_that_uses_the_spool_is_shown_and_not_disturbed(server: ServerThread, run: Run, tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "support" / "spooling_actor.py"
    actor = subprocess.Popen(
        [sys.executable, str(script), server.address, "left", "30", str(tmp_path / "spool")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert actor.stdin is not None and actor.stdout is not None
        assert actor.stdout.readline() == "open\n"

        shown, retried, sent = run("show", "spool"), run("retry", "spool"), run("send", "spool", server.address)
        actor.stdin.write("7\n")
        actor.stdin.close()
        rest = actor.stdout.read()
    finally:
        actor.kill()
        actor.wait()
        actor.stdout.close()

    assert shown[0] == 0 and f"spool: in use by process {actor.pid}; " in shown[1]
    for status, output, errors in (retried, sent):
        assert (status, output) == (1, "")
        assert errors == (
            f"touchline: spool is in use by process {actor.pid}: stop that program first. While it runs, it sends what waits by itself\n"
        )
    assert '"acknowledged": 1' in rest


def test_interrupted_send_says_that_nothing_is_lost(server: ServerThread, tmp_path: Path) -> None:
    fill(tmp_path / "spool", spooled(0), spooled(1))
    asked, go_on = threading.Event(), threading.Event()

    def add(request: bytes, context: object) -> bytes:
        asked.set()
        go_on.wait(60)
        return b""

    def info(request: bytes, context: object) -> bytes:
        return pb.InfoResponse().SerializeToString()

    with ScriptedServer(Info=info, AddEpisode=add) as scripted:
        process = subprocess.Popen(
            [*COMMAND, "send", "spool", scripted.address], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert asked.wait(60)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=300)
        go_on.set()

    assert process.returncode == 130
    assert "touchline: interrupted; what was not acknowledged is still pending, run the same command again to continue\n" in errors
    assert "Traceback" not in errors and output == ""
    assert maintenance.send(tmp_path / "spool", server.address).sent == 2
    assert_same(stored(server), [make_episode(0), make_episode(1)])
