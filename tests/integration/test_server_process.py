"""The command ``touchline-server serve`` as a process: listening, draining, exit codes, and the cost of many clients."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from support.leaving_clients import ROUNDS, held
from support.service_calls import (
    DEADLINE_S,
    SERVICE,
    Caller,
    Refusal,
    ServerProcess,
    eventually,
    key,
    make_config,
    make_episode,
    refused,
)
from touchline_protos.codec import encode_add_episode, encode_load
from touchline_protos.v1 import replay_pb2 as pb
from touchline_server.service.app import AddressInUseError, ServerThread

IDLE = 300
ACTIVE = 64
MAX_THREADS_FOR_CLIENTS = 24
"""Threads that a server may add after its first client: its own pools and gRPC's, which grow with the cores."""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "touchline_server", *arguments], capture_output=True, text=True, timeout=DEADLINE_S * 2, check=False
    )


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server that every test leaves running without open streams."""
    with ServerProcess(tmp_path_factory.mktemp("server"), TOUCHLINE_LIMITS__MAX_STREAMS=str(IDLE + ACTIVE)) as server:
        yield server


def test_serve_prints_where_it_listens_and_is_reached_there(process: ServerProcess) -> None:
    host, _, port = process.address.rpartition(":")

    assert host == "127.0.0.1"
    assert int(port) > 0
    with Caller(process.address) as caller:
        config = caller.stub.Info(pb.InfoRequest(), timeout=DEADLINE_S).config_toml
    assert 'device = "cpu"' in config
    assert 'storage.device = "cpu"' in process.log


def test_healthcheck_of_a_running_server_exits_0(process: ServerProcess) -> None:
    result = run("healthcheck", "--address", process.address)

    assert (result.returncode, result.stderr) == (0, f"{process.address}: SERVING\n")


def test_serve_on_a_port_in_use_exits_1_and_says_what_to_do(process: ServerProcess) -> None:
    port = process.address.rpartition(":")[2]

    result = run("serve", "--port", port)

    assert result.returncode == 1
    assert result.stdout == ""
    assert f"touchline-server: cannot listen on 127.0.0.1:{port}: the address is in use" in result.stderr
    assert "stop the other server or choose another --host, --port or --unix-socket" in result.stderr
    assert "Traceback" not in result.stderr


def test_serve_on_a_socket_in_a_missing_folder_exits_1_with_the_reason(tmp_path: Path) -> None:
    result = run("serve", "--unix-socket", str(tmp_path / "none" / "s"))

    assert (result.returncode, result.stdout) == (1, "")
    assert f"touchline-server: cannot listen on unix:{tmp_path}/none/s: its folder does not exist or is not writable" in result.stderr
    assert "Traceback" not in result.stderr


def test_serve_with_a_bad_configuration_exits_2_and_names_the_key(tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_text("[config]\nbatch_sise = 8\n", encoding="utf-8")

    result = run("serve", "--config", str(file))

    assert result.returncode == 2
    assert "batch_sise" in result.stderr
    assert str(file) in result.stderr
    assert "Traceback" not in result.stderr


def test_hundreds_of_clients_take_a_bounded_number_of_threads_and_leave_nothing(process: ServerProcess) -> None:
    with Caller(process.address) as caller:
        caller.add(make_episode(50))
        threads_before, files_before = process.threads, process.open_files

        for _ in range(2):  # the second time, no stream is admitted in place of one that is still open
            threads = files = 0
            with held(process.address, idle=IDLE, active=ACTIVE) as steps:
                for number in range(ROUNDS):
                    assert next(steps) == f"read {number}"
                    threads, files = max(threads, process.threads), max(files, process.open_files)
                assert next(steps) == "all read"
                refusal = refused(caller.stream().open(credits=1).rest)
                assert refusal.reason == "over-limit", refusal
                assert next(steps) == "half closed"

            assert files >= files_before + IDLE + ACTIVE
            assert threads - threads_before <= MAX_THREADS_FOR_CLIENTS
            eventually(
                lambda: process.open_files <= files_before,
                lambda: f"{process.open_files} open files of the server; {files_before} before {IDLE + ACTIVE} clients came",
            )
            assert process.threads - threads_before <= MAX_THREADS_FOR_CLIENTS
        caller.stub.Clear(pb.ClearRequest(), timeout=DEADLINE_S)


def final_episodes_added(process: ServerProcess) -> int:
    """Returns the count that the server logs when it has stopped."""
    match = re.search(r"stopped: steps_stored=.* episodes_added=(\d+)", process.log)
    assert match, process.log
    return int(match[1])


def test_sigterm_under_load_loses_nothing_that_was_acknowledged_and_exits_0(tmp_path: Path) -> None:
    with ServerProcess(tmp_path) as process:
        message = encode_add_episode(make_episode(100))
        busy = threading.Semaphore(0)

        def add_until_refused(address: str) -> tuple[int, Refusal]:
            acknowledged = 0
            with Caller(address) as caller:
                while True:
                    try:
                        caller.add(message)
                    except grpc.RpcError as error:
                        return acknowledged, Refusal(error)
                    acknowledged += 1
                    busy.release()

        with ThreadPoolExecutor(4) as pool:
            senders = [pool.submit(add_until_refused, process.address) for _ in range(4)]
            for _ in range(100):
                assert busy.acquire(timeout=DEADLINE_S)
            process.signal(signal.SIGTERM)
            ends = [sender.result() for sender in senders]

        assert process.wait() == 0
        # gRPC cancels calls that arrive just as it closes the connections; they have not reached the service.
        assert {refusal.code for _, refusal in ends} <= {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}, ends
        # An episode of a call that broke off may have been stored without an answer, at most one for each sender.
        assert 0 <= final_episodes_added(process) - sum(acknowledged for acknowledged, _ in ends) <= len(ends)
        assert "Traceback" not in process.log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_signal_drains_ends_streams_and_lets_work_in_progress_end(number: signal.Signals, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with ServerProcess(tmp_path, "--unix-socket", str(path)) as process:
        assert process.address == f"unix:{path}"
        parts = list(encode_load(make_episode(30, key=key(1)), chunk_bytes=100))
        draining = threading.Event()

        def messages() -> Iterator[bytes]:
            yield from encode_load(make_episode(20, key=key(0)))
            yield from parts[:3]
            draining.wait(DEADLINE_S)
            yield from parts[3:]

        with Caller(process.address) as caller, Caller(process.address) as newcomer:
            learners = [caller.stream().open(credits=0), caller.stream().open(credits=5, horizon=500)]
            watch = health_pb2_grpc.HealthStub(caller.channel).Watch(health_pb2.HealthCheckRequest(), timeout=DEADLINE_S)
            waiting = caller.stub.Ready.future(pb.ReadyRequest(min_steps=5000, wait_s=60), timeout=DEADLINE_S)
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
            load = caller.channel.stream_unary(SERVICE + "LoadEpisodes").future(messages(), timeout=DEADLINE_S)
            eventually(lambda: newcomer.counts().episodes_stored == 1, "the load is in progress")

            process.signal(number)
            assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
            ends = [refused(learner.rest) for learner in learners]
            not_reached = waiting.result()
            refusal = refused(newcomer.add, make_episode(20))
            draining.set()
            answer = pb.LoadEpisodesResponse.FromString(load.result())

        assert [(end.code, end.reason) for end in ends] == [(grpc.StatusCode.UNAVAILABLE, "draining")] * 2
        assert (not_reached.min_steps_reached, not_reached.counts.steps_stored) == (False, 20)
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "draining")
        assert [result.outcome for result in answer.results] == [pb.EpisodeResult.OUTCOME_ACCEPTED] * 2
        assert process.wait() == 0
        assert final_episodes_added(process) == 2
        assert "Traceback" not in process.log
        assert not path.exists()
        gone = run("healthcheck", "--address", process.address, "--timeout-s", "60")
        assert (gone.returncode, f"{process.address}: UNAVAILABLE" in gone.stderr) == (1, True)


def test_server_takes_over_a_socket_that_a_killed_one_left_but_not_that_of_a_living_one(tmp_path: Path) -> None:
    config = make_config(server={"unix_socket": str(tmp_path / "s")})
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(config.server.unix_socket)

    with ServerThread(config) as living, Caller(living.address) as caller:
        with pytest.raises(AddressInUseError, match=f"cannot listen on {living.address}: another server does"), ServerThread(config):
            pass

        assert caller.add(make_episode()).counts.episodes_stored == 1
