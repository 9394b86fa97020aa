"""``touchline doctor`` on real servers: each thing that it can name is provoked, and what it says to do is there."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from support import small_disk
from support.certificates import Authority, Pair
from support.durable_cases import durable_config, keyed_episode
from support.service_calls import eventually, make_config
from touchline import OverLimitError, ReplayClient
from touchline._cli.app import app
from touchline._learner import stream_session
from touchline_server.service.app import ServerThread

LEVELS = {"ok", "note", "warning", "failed"}
TOKENS = {role: f"{role}-token-0123456789" for role in ("actor", "learner", "admin")}


def episode(rows: int = 20) -> dict[str, np.ndarray]:
    return {name: np.zeros((rows, 2), np.float32) for name in ("obs", "action")} | {"reward": np.zeros(rows, np.float32)}


@pytest.fixture(autouse=True)
def _no_settings_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SERVER_TOKENS", "TOKEN", "TLS_CA", "TLS_CERT", "TLS_KEY", "TLS_SERVER_NAME", "ADDRESS"):
        monkeypatch.delenv(f"TOUCHLINE_{name}", raising=False)


def doctor(address: str, *options: str, seconds: str | None = "0", **environment: str) -> SimpleNamespace:
    """Runs the command with --json; ``levels`` and ``texts`` are by check."""
    arguments = ["doctor", "--address", address, "--json", *options, *(["--seconds", seconds] if seconds is not None else [])]
    found = CliRunner().invoke(app, arguments, env=environment, prog_name="touchline")
    document = json.loads(found.stdout)
    findings = {finding["check"]: finding for finding in document["findings"]}
    assert document["exit_status"] == found.exit_code
    assert {finding["level"] for finding in document["findings"]} <= LEVELS
    assert all(finding["advice"] for finding in document["findings"] if finding["level"] in ("warning", "failed"))
    return SimpleNamespace(
        status=found.exit_code,
        todo=document["todo"],
        findings=findings,
        levels={name: finding["level"] for name, finding in findings.items()},
        texts={name: finding["text"] for name, finding in findings.items()},
    )


@contextmanager
def listening(answer: bytes = b"") -> Iterator[str]:
    """Yields the address of something that is no Touchline server: it answers every connection with a few bytes and closes it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(60)


@pytest.fixture(scope="module")
def server() -> Iterator[ServerThread]:
    """A server with episodes, a table that is empty, and one whose episodes are too short."""
    with ServerThread(make_config(tables={"empty": {}, "short": {}})) as server, ReplayClient(server.address) as client:
        for _ in range(10):
            client.add(episode())
        client.add(episode(3), table="short")
        yield server


def test_everything_works_on_the_servers_own_host(server: ServerThread) -> None:
    found = doctor(server.address, seconds="0.2")

    assert (found.status, found.todo) == (0, [])
    assert set(found.levels.values()) <= {"ok", "note"}
    assert [name for name in found.levels if name not in ("waits", "refused")] == [
        *("settings", "resolve", "connect", "tls", "answer", "version", "token", "round_trip", "storage", "data", "rate_limit"),
        *("batch", "ring", "throughput"),
    ]
    figures = {name: finding["figures"] for name, finding in found.findings.items()}
    assert (figures["batch"]["slices"], figures["batch"]["horizon"], figures["ring"]["transport"]) == (8, 3, "ring")
    assert figures["throughput"]["batches_per_s"] > 0 < figures["throughput"]["bytes_per_s"]
    assert 0 < figures["round_trip"]["median_s"] <= figures["round_trip"]["max_s"]
    assert "in memory, a restart loses them" in found.texts["storage"]


def test_text_ends_with_what_to_do(server: ServerThread) -> None:
    fine = CliRunner().invoke(app, ["doctor", "--address", server.address, "--seconds", "0"])
    empty = CliRunner().invoke(app, ["doctor", "--address", server.address, "--table", "empty"])

    assert (fine.exit_code, fine.stdout.splitlines()[-1]) == (0, "Everything works; there is nothing to do.")
    assert (empty.exit_code, empty.stdout.splitlines()[-2:]) == (
        3,
        ["What to do:", "1.   Start an actor, or load a data set: touchline load FILE."],
    )
    assert "\x1b[" not in fine.stdout + empty.stdout


@pytest.mark.parametrize(
    ("table", "text", "advice"),
    [
        ("empty", "the table is empty: nothing can be sampled", "touchline load"),
        ("short", "the longest has 3", "at least 4 rows, sample with a smaller horizon, or pad"),
    ],
)
def test_table_without_anything_to_sample_is_a_warning(server: ServerThread, table: str, text: str, advice: str) -> None:
    found = doctor(server.address, "--table", table)

    assert (found.status, found.levels["data"], len(found.todo)) == (3, "warning", 1)
    assert text in found.texts["data"] and advice in found.todo[0]
    assert "batch" not in found.levels and "with the first batch" in found.texts["ring"]


def test_unknown_table_is_named_with_those_that_exist(server: ServerThread) -> None:
    found = doctor(server.address, "--table", "demo")

    assert (found.status, found.levels["table"]) == (1, "failed")
    assert "'short'" in found.texts["table"] and "touchline table create" in found.todo[0]


@pytest.mark.parametrize(
    ("address", "check", "advice"),
    [
        ("127.0.0.1:1", "connect", "touchline-server serve"),
        ("no-such-host.invalid:50051", "resolve", "Check the spelling of 'no-such-host.invalid'"),
        ("replay-host", "settings", "Correct the address"),
        ("unix:/no/such.sock", "resolve", "--unix-socket"),
    ],
)
def test_address_that_leads_nowhere(address: str, check: str, advice: str) -> None:
    found = doctor(address)

    assert (found.status, list(found.levels)[-1], found.levels[check]) == (1, check, "failed")
    assert advice in found.todo[0]


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_something_else_that_listens_there(answer: bytes) -> None:
    with listening(answer) as address:
        found = doctor(address, "--timeout-s", "1")

    assert (found.status, found.levels["answer"]) == (1, "failed")
    assert "does not speak gRPC as this client does (TOUCHLINE_TLS_CA is not set)" in found.todo[0]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def pair(authority: Authority) -> Pair:
    return authority.issue("server", "localhost", "127.0.0.1")


def tls_server(pair: Pair, **tls: str) -> ServerThread:
    return ServerThread(make_config(tls={"cert": str(pair.cert), "key": str(pair.key), **tls}))


def test_tls_is_explained_from_both_sides(authority: Authority, pair: Pair, server: ServerThread, tmp_path: Path) -> None:
    stranger = Authority(tmp_path, "stranger")
    with tls_server(pair) as secured:
        port = secured.address.rpartition(":")[2]
        fine = doctor(secured.address, TOUCHLINE_TLS_CA=str(authority.cert))
        plain = doctor(secured.address)
        distrusted = doctor(secured.address, TOUCHLINE_TLS_CA=str(stranger.cert))
        named = doctor(f"127.0.0.1:{port}", TOUCHLINE_TLS_CA=str(authority.cert), TOUCHLINE_TLS_SERVER_NAME="localhost")
    onesided = doctor(server.address, TOUCHLINE_TLS_CA=str(authority.cert))
    missing = doctor(server.address, TOUCHLINE_TLS_CA=str(tmp_path / "missing.pem"))

    for found, text in ((fine, "certificate for localhost, 127.0.0.1 until 20"), (named, "certificate for localhost, 127.0.0.1 until 20")):
        assert text in found.texts["tls"] and found.levels["answer"] == "ok"
    assert [found.status for found in (plain, distrusted, onesided, missing)] == [1, 1, 1, 1]
    assert plain.texts["tls"] == "the server uses TLS and this client does not" and "TOUCHLINE_TLS_CA" in plain.todo[0]
    assert "not trusted" in distrusted.texts["tls"] and "CA that signed" in distrusted.todo[0]
    assert "this client uses TLS and the server does not" in onesided.texts["tls"] and "unset TOUCHLINE_TLS_CA" in onesided.todo[0]
    assert "No such file" in missing.texts["settings"] and "environment variable" in missing.todo[0]


def test_certificate_that_ends_soon_and_one_that_has_ended(authority: Authority) -> None:
    soon = authority.issue("soon", "127.0.0.1", ends=timedelta(days=3))
    with tls_server(soon) as server:
        found = doctor(server.address, TOUCHLINE_TLS_CA=str(authority.cert))
        other_name = doctor(server.address, TOUCHLINE_TLS_CA=str(authority.cert), TOUCHLINE_TLS_SERVER_NAME="replay-host")

    assert (found.levels["tls"], found.levels["answer"]) == ("warning", "ok")
    assert "Renew the server's certificate" in found.todo[0]
    assert "TOUCHLINE_TLS_SERVER_NAME" in other_name.todo[0] and "'replay-host' is not one" in other_name.todo[0]


def test_server_that_asks_for_a_client_certificate(authority: Authority, pair: Pair) -> None:
    own = authority.issue("client")
    with tls_server(pair, client_ca=str(authority.cert)) as server:
        plain = doctor(server.address)
        without = doctor(server.address, TOUCHLINE_TLS_CA=str(authority.cert))
        files = {"TOUCHLINE_TLS_CERT": str(own.cert), "TOUCHLINE_TLS_KEY": str(own.key)}
        having = doctor(server.address, TOUCHLINE_TLS_CA=str(authority.cert), **files)

    assert (without.status, having.levels["answer"]) == (1, "ok")
    assert plain.texts["tls"] == "the server uses TLS and this client does not"
    assert "TOUCHLINE_TLS_CERT" in without.todo[0]


def test_tokens_their_roles_and_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    variable = " ".join(f"{role}:{role}-name:{token}" for role, token in TOKENS.items())
    with monkeypatch.context() as patch:
        patch.setenv("TOUCHLINE_SERVER_TOKENS", variable)
        guarded = ServerThread(make_config())
    with guarded as server:
        with ReplayClient(server.address, token=TOKENS["actor"]) as client:
            client.add(episode())
        nobody = doctor(server.address)
        wrong = doctor(server.address, TOUCHLINE_TOKEN="wrong-token-0123456789")
        found = {role: doctor(server.address, TOUCHLINE_TOKEN=token) for role, token in TOKENS.items()}

    assert [nobody.status, wrong.status] == [1, 1]
    assert "no token" in nobody.texts["token"] and "TOUCHLINE_TOKEN" in nobody.todo[0]
    assert "not one of this server's" in wrong.texts["token"] and "TOUCHLINE_TOKEN" in wrong.todo[0]
    assert {role: one.status for role, one in found.items()} == {"actor": 0, "learner": 0, "admin": 0}
    assert found["actor"].texts["token"] == "the token 'actor-name' is for actor: it may add episodes"
    assert found["learner"].texts["token"] == "the token 'learner-name' is for learner: it may sample and read episodes"
    assert found["admin"].findings["token"]["figures"]["roles"] == ["actor", "learner", "admin"]
    assert found["actor"].texts["batch"] == "not tried: the token may not sample"
    assert found["learner"].texts["ring"] == "batches come through a ring in shared memory"
    for one in (found["learner"], found["admin"]):  # what doctor's own calls were refused is no news
        assert not re.search("SetTable|no-such-table", one.texts["refused"])


def test_ring_that_the_server_does_not_offer(server: ServerThread, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_session, "shared_memory_id", lambda: "another-host")
    elsewhere = doctor(server.address)
    monkeypatch.undo()
    with ServerThread(make_config(ring={"max_rings": 0})) as limited, ReplayClient(limited.address) as client:
        client.add(episode())
        off = doctor(limited.address)

    assert (elsewhere.status, elsewhere.levels["ring"], off.status, off.levels["ring"]) == (3, "warning", 3, "warning")
    assert "another /dev/shm" in elsewhere.texts["ring"] and "ipc: host" in elsewhere.todo[0]
    assert "max_rings is 0" in off.texts["ring"] and "Set ring.max_rings" in off.todo[0]


def test_rate_limit_that_waits_for_steps_or_holds_an_actor_back() -> None:
    rate = {"samples_per_insert": 1, "tolerance": 8, "min_steps": 40}
    with ServerThread(make_config(rate=rate)) as server, ReplayClient(server.address, timeout_s=60) as client:
        client.add(episode())
        early = doctor(server.address, seconds=None)
        client.add(episode())
        fine = doctor(server.address, seconds=None)
        delivered = client.info().rate
        with ThreadPoolExecutor(1) as pool:

            def fill() -> None:
                with pytest.raises(OverLimitError):
                    while True:
                        client_of_actor.add(episode())

            with ReplayClient(server.address, timeout_s=5, actor="striker") as client_of_actor:
                filling = pool.submit(fill)
                eventually(lambda: (client.info().rate or delivered).adds_held > 0, "an actor is held back", every_s=0.05)
                held = doctor(server.address, seconds=None)
                filling.result()

    assert (early.status, early.levels["rate_limit"]) == (3, "warning")
    assert "batches wait for 40 steps, 20 are stored" in early.texts["rate_limit"] and "rate.min_steps" in early.todo[0]
    assert (fine.status, fine.levels["throughput"]) == (0, "note"), fine.texts
    assert "--seconds 2 measures" in fine.texts["throughput"]
    assert delivered is not None and delivered.slices_delivered <= 4, "only single slices may be drawn"
    assert (held.status, held.levels["rate_limit"]) == (3, "warning")
    assert "it holds 1 actors back" in held.texts["rate_limit"] and "start a learner" in held.todo[0]


def test_law_that_counts_draws_is_not_used(server: ServerThread) -> None:
    with ReplayClient(server.address) as client:
        client.create_table("fresh", law="fresh_first")
        client.add(episode(), table="fresh")
        found = doctor(server.address, "--table", "fresh", seconds="0.1")
        with client.batches(table="fresh", batch_size=17, as_numpy=True) as batches:
            starts = np.asarray(next(batches).start)

    assert found.status == 0
    assert sorted(starts.tolist()) == list(range(17)), "each start was still to come"


def test_disk_that_is_full(tmp_path: Path) -> None:
    with small_disk.mounted(tmp_path / "disk", 8 << 20) as disk, ServerThread(durable_config(disk, capacity=100_000)) as server:
        with ReplayClient(server.address, timeout_s=2) as client:
            client.deliver(keyed_episode(0, 0))
            small_disk.fill(disk / "ballast")
            with pytest.raises(OverLimitError):
                for sequence in range(1, 1000):
                    client.deliver(keyed_episode(0, sequence))
        found = doctor(server.address)

    assert (found.status, found.levels["storage"]) == (1, "failed")
    assert "takes no episodes" in found.texts["storage"] and "Free space" in found.todo[0]


def test_interrupted_or_wrong_command_line(server: ServerThread, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = CliRunner().invoke(app, ["doctor", "--seconds", "-1"])

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("touchline._cli.doctor.network.resolve", interrupt)
    interrupted = CliRunner().invoke(app, ["doctor", "--address", server.address])

    assert (wrong.exit_code, interrupted.exit_code) == (2, 130)
    assert interrupted.stderr == "touchline: interrupted\n"
