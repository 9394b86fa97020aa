"""Access: real servers with real certificates and tokens, every role with every method, and the places that must not show a secret."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from typer.testing import CliRunner

from support.certificates import Authority, Pair
from support.client_faults import trying_once
from support.service_calls import DEADLINE_S, SERVICE, Caller, ServerProcess, eventually, make_config, make_episode, refused
from touchline import AccessDeniedError, EpisodeWriter, ReplayClient, TlsConfig, TlsError, UnacknowledgedError, UnavailableError
from touchline._learner.priorities import update_request
from touchline._rpc.calls import Backoff
from touchline_protos.codec import encode_add_episode
from touchline_protos.types.priorities import PriorityUpdate
from touchline_protos.v1 import replay_pb2 as pb
from touchline_server.cli import main as cli
from touchline_server.service.access import ROLES_OF
from touchline_server.service.app import ServerThread

TOKENS = {role: f"{role}-token-0123456789" for role in ("actor", "learner", "admin")}
VARIABLE = " ".join(f"{role}:{role}-name:{token}" for role, token in TOKENS.items())
WRONG = "wrong-token-0123456789"
EPISODE = {name: np.zeros((20, 2), np.float32) for name in ("obs", "action")} | {"reward": np.zeros(20, np.float32)}


@pytest.fixture(autouse=True)
def _no_settings_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TOUCHLINE_SERVER_TOKENS", "TOUCHLINE_TOKEN", "TOUCHLINE_TLS_CA", "TOUCHLINE_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def other_authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("other"), "other-authority")


@pytest.fixture(scope="module")
def pair(authority: Authority) -> Pair:
    return authority.issue("server", "localhost", "127.0.0.1")


def tls_server(pair: Pair, *, client_ca: Path | None = None, **tables: dict[str, Any]) -> ServerThread:
    tls = {"cert": str(pair.cert), "key": str(pair.key)} | ({"client_ca": str(client_ca)} if client_ca else {})
    return ServerThread(make_config(tls=tls, **tables))


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[ServerThread]:
    """A server with a token for each role."""
    monkeypatch.setenv("TOUCHLINE_SERVER_TOKENS", VARIABLE)
    with ServerThread(make_config(tables={"spare": {}})) as server:
        yield server


def ask(server: ServerThread, tls: TlsConfig | bool | None) -> bool:
    with ReplayClient(server.address, tls=tls) as client:
        return trying_once(client).ready()


def play(client: ReplayClient) -> None:
    """Writes one episode."""
    with EpisodeWriter(client) as writer:
        for _ in range(5):
            writer.append({name: column[0] for name, column in EPISODE.items()})


# TLS


def test_everything_goes_by_tls(authority: Authority, pair: Pair) -> None:
    with tls_server(pair) as server, ReplayClient(server.address, tls=TlsConfig(authority.cert), as_numpy=True) as client:
        assert client.add(EPISODE) == 1
        assert client.load([EPISODE] * 3) == 4
        play(client)
        assert client.wait_until_ready(min_steps=1, timeout_s=60).can_sample
        assert client.sample().obs.shape == (4, 8, 2)
        for ring in (False, True):
            with client.batches(ring=ring) as batches:
                assert next(batches).obs.shape == (4, 8, 2)
        with client.episodes() as episodes:
            assert len(list(episodes)) == 5
        assert client.clear().episodes_stored == 0


def test_name_of_the_certificate_may_be_another_than_the_address(authority: Authority) -> None:
    pair = authority.issue("elsewhere", "replay.example.org")
    with tls_server(pair) as server:
        assert ask(server, TlsConfig(authority.cert, server_name="replay.example.org")) is False
        for name, wanted in (
            ("", r"'127\.0\.0\.1' \(the address's host\)"),
            ("other.example.org", r"'other\.example\.org' \(server_name\)"),
        ):
            with pytest.raises(TlsError, match=rf"^{server.address}: the server's certificate is not for {wanted}; .*server_name="):
                ask(server, TlsConfig(authority.cert, server_name=name or None))


def test_client_that_trusts_others_or_speaks_plainly_does_not_get_in(other_authority: Authority, pair: Pair) -> None:
    with tls_server(pair) as server:
        for tls in (TlsConfig(other_authority.cert), True):
            with pytest.raises(TlsError, match=f"^{server.address}: the client does not trust the server's certificate"):
                ask(server, tls)
        with pytest.raises(UnavailableError, match=f"^{server.address}: .* that uses no TLS, as this client does"):
            ask(server, False)


def test_client_that_speaks_plainly_leaves_a_line_on_the_servers_stderr(pair: Pair, tmp_path: Path) -> None:
    variables = {"TOUCHLINE_TLS__CERT": str(pair.cert), "TOUCHLINE_TLS__KEY": str(pair.key)}
    with ServerProcess(tmp_path, "--port", "0", **variables) as process:
        with ReplayClient(process.address, tls=False) as client, pytest.raises(UnavailableError):
            trying_once(client).ready()
        eventually(lambda: "Handshake failed with error SSL_ERROR_SSL" in process.log, "gRPC has said so on stderr")


def test_tls_to_a_plain_server_fails(authority: Authority) -> None:
    with ServerThread(make_config()) as server, pytest.raises(TlsError, match=f"^{server.address}: the server does not use TLS"):
        ask(server, TlsConfig(authority.cert))


VERBS: dict[str, Callable[[ReplayClient], Any]] = {
    "add": lambda client: client.add(EPISODE),
    "load": lambda client: client.load([EPISODE]),
    "sample": lambda client: client.sample(),
    "stream": lambda client: next(client.batches(ring=False)),
    "ring": lambda client: next(client.batches()),
    "episodes": lambda client: next(client.episodes()),
    "wait_until_ready": lambda client: client.wait_until_ready(),
    "info": lambda client: client.info(),
    "clear": lambda client: client.clear(),
    "writer": play,
}


@pytest.mark.parametrize("wrong", ["authority", "name", "key", "expired", "plain"])
def test_wrong_certificate_name_or_key_is_raised_immediately_by_every_method(
    wrong: str, authority: Authority, other_authority: Authority, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A retry waits for half an hour here, so one attempt has to suffice."""
    monkeypatch.setattr("touchline._learner.outputs.RECONNECT_S", 3600.0)
    tls = TlsConfig(authority.cert)
    with ExitStack() as stack:
        if wrong == "expired":
            old = authority.issue("old", "127.0.0.1", starts=timedelta(days=-2), ends=timedelta(days=-1))
            plain = stack.enter_context(plain_grpc_server(grpc.ssl_server_credentials([(old.key.read_bytes(), old.cert.read_bytes())])))
        else:
            server = stack.enter_context(ServerThread(make_config()) if wrong == "plain" else tls_server(pair))
            plain = server.address
        if wrong == "authority":
            tls = TlsConfig(other_authority.cert)
        elif wrong == "name":
            tls = TlsConfig(authority.cert, server_name="other.example.org")
        elif wrong == "key":
            tls = TlsConfig(authority.cert, authority.issue("one").cert, authority.issue("two").key)
        for verb, call in VERBS.items():
            client = stack.enter_context(ReplayClient(plain, tls=tls, timeout_s=3600.0))
            client._rpc.backoff = Backoff(first_s=1800.0)
            with pytest.raises((TlsError, UnacknowledgedError)) as caught:
                call(client)
            found = caught.value.results[0].error if isinstance(caught.value, UnacknowledgedError) else caught.value
            assert isinstance(found, TlsError), verb


@contextmanager
def plain_grpc_server(credentials: grpc.ServerCredentials) -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(2))
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0).wait()


def test_server_that_comes_back_with_its_certificate_is_waited_for(authority: Authority, pair: Pair) -> None:
    """An absent server is not a TLS failure, even on a port that used TLS."""
    with tls_server(pair) as server:
        port = int(server.address.rpartition(":")[2])
    with ReplayClient(f"127.0.0.1:{port}", tls=TlsConfig(authority.cert)) as client:
        client._rpc.backoff = Backoff(first_s=0.05, max_s=0.05)
        counting: list[int] = []
        asker = threading.Thread(target=lambda: counting.append(client.num_eps))
        asker.start()
        config = make_config(tls={"cert": str(pair.cert), "key": str(pair.key)}, server={"port": port})
        with ServerThread(config):
            asker.join()

    assert counting == [0]


def test_server_with_client_ca_admits_only_clients_with_its_certificate(
    authority: Authority, other_authority: Authority, pair: Pair
) -> None:
    good, expired = authority.issue("robot"), authority.issue("retired", starts=timedelta(days=-2), ends=timedelta(days=-1))
    foreign = other_authority.issue("stranger")
    with tls_server(pair, client_ca=authority.cert) as server:
        assert ask(server, TlsConfig(authority.cert, *good)) is False
        for shown in ((), expired, foreign):
            with pytest.raises(UnavailableError):
                ask(server, TlsConfig(authority.cert, *shown))
        assert ask(server, TlsConfig(authority.cert, *good)) is False


def test_expired_server_is_not_started_and_says_why(authority: Authority, tmp_path: Path) -> None:
    expired = authority.issue("late", "localhost", starts=timedelta(days=-2), ends=timedelta(days=-1))

    with ServerProcess(tmp_path, TOUCHLINE_TLS__CERT=str(expired.cert), TOUCHLINE_TLS__KEY=str(expired.key)) as process:
        assert process.wait() == 2
        assert "touchline-server: tls.cert: " in process.log
        assert "CN=late expired on " in process.log


def test_unix_socket_speaks_tls_too(authority: Authority, pair: Pair, tmp_path: Path) -> None:
    path = tmp_path / "replay.sock"
    with tls_server(pair, server={"unix_socket": str(path)}) as server:
        assert server.address == f"unix:{path}"
        assert ask(server, TlsConfig(authority.cert, server_name="localhost")) is False


# Tokens

REQUESTS = {
    "AddEpisode": encode_add_episode(make_episode()),
    "LoadEpisodes": encode_add_episode(make_episode()),
    "SampleStream": pb.SampleStreamRequest(open=pb.SampleStreamOpen(credits=1)).SerializeToString(),
    "UpdatePriorities": update_request("", PriorityUpdate(np.zeros(1, np.int64), np.zeros(1, np.int64), np.ones((3, 1), np.float32))),
    "CreateTable": pb.CreateTableRequest(table="new").SerializeToString(),
    "SetTable": pb.SetTableRequest(config_toml="rate.min_steps = 0").SerializeToString(),
    "DropTable": pb.DropTableRequest(table="spare").SerializeToString(),
}
"""One message for each method; the others accept an empty one."""


def call(channel: grpc.Channel, method: str, message: bytes, token: str | None) -> list[bytes]:
    """Calls a method of any kind."""
    metadata = () if token is None else (("authorization", f"Bearer {token}"),)
    return list(channel.stream_stream(method)(iter([message]), metadata=metadata, timeout=DEADLINE_S))


@pytest.mark.parametrize("role", TOKENS)
@pytest.mark.parametrize("method", ROLES_OF)
def test_role_may_call_its_methods_and_no_others(guarded: ServerThread, role: str, method: str) -> None:
    with Caller(guarded.address) as caller:
        call(caller.channel, f"{SERVICE}AddEpisode", REQUESTS["AddEpisode"], TOKENS["actor"])
        message = REQUESTS.get(method, b"")
        if role == "admin" or role in ROLES_OF[method]:
            assert call(caller.channel, SERVICE + method, message, TOKENS[role])
        else:
            refusal = refused(call, caller.channel, SERVICE + method, message, TOKENS[role])
            assert (refusal.code, refusal.reason) == (grpc.StatusCode.PERMISSION_DENIED, "permission-denied")
            assert f"the token '{role}-name' is for {role}, expected one for " in refusal.details
            assert guarded.buffer.num_eps == 1


@pytest.mark.parametrize("method", ROLES_OF)
@pytest.mark.parametrize("token", [None, "", WRONG])
def test_call_without_a_token_of_the_server_is_refused_before_its_message_is_read(
    guarded: ServerThread, method: str, token: str | None
) -> None:
    never: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    metadata = () if token is None else (("authorization", f"Bearer {token}"),)
    with Caller(guarded.address) as caller:
        stream = caller.channel.stream_stream(SERVICE + method)(iter(never.get, b""), metadata=metadata, timeout=DEADLINE_S)

        refusal = refused(list, stream)

        never.put(b"")
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAUTHENTICATED, "unauthenticated")
    assert "authorization: Bearer TOKEN" in refusal.details
    assert guarded.buffer.num_eps == 0


def test_health_is_open_and_reflection_is_the_admins(guarded: ServerThread) -> None:
    reflection = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    question = reflection_pb2.ServerReflectionRequest(list_services="").SerializeToString()
    with Caller(guarded.address) as caller:
        (health,) = call(caller.channel, "/grpc.health.v1.Health/Check", b"", None)
        (services,) = call(caller.channel, reflection, question, TOKENS["admin"])

        assert health_pb2.HealthCheckResponse.FromString(health).status == health_pb2.HealthCheckResponse.SERVING
        assert "touchline.v1.Replay" in str(reflection_pb2.ServerReflectionResponse.FromString(services))
        for token, code in ((None, "UNAUTHENTICATED"), (TOKENS["learner"], "PERMISSION_DENIED")):
            assert refused(call, caller.channel, reflection, question, token).code.name == code


def test_client_shows_its_token_with_everything(guarded: ServerThread) -> None:
    with (
        ReplayClient(guarded.address, token=TOKENS["actor"]) as actor,
        ReplayClient(guarded.address, token=TOKENS["learner"], as_numpy=True) as learner,
    ):
        actor.add(EPISODE)
        actor.load([EPISODE] * 2)
        play(actor)
        learner.wait_until_ready(min_steps=1, timeout_s=60)
        learner.sample()
        for ring in (False, True):
            with learner.batches(ring=ring) as batches:
                next(batches)
        with learner.episodes() as episodes:
            assert len(list(episodes)) == 4
        assert learner.info().counts.episodes_stored == 4

        with pytest.raises(AccessDeniedError, match=r"'actor-name' is for actor, expected one for admin or learner to call Sample "):
            actor.sample()
        with pytest.raises(AccessDeniedError, match="expected one for admin or learner to call SampleStream"):
            next(actor.batches())
        with pytest.raises(AccessDeniedError, match="expected one for actor or admin to call AddEpisode"):
            learner.add(EPISODE)
        with pytest.raises(AccessDeniedError, match="expected one for admin to call Clear"):
            learner.clear()
    with ReplayClient(guarded.address) as nobody, pytest.raises(AccessDeniedError, match="no token"):
        nobody.ready()


def test_drop_ins_take_token_and_tls_of_the_environment(authority: Authority, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    from tensordict import TensorDict

    from touchline.tdmpc2 import Buffer
    from touchline.torchrl import RemoteReplayBuffer

    player = "player-token-0123456789"
    monkeypatch.setenv("TOUCHLINE_SERVER_TOKENS", f"actor+learner:player:{player}")
    monkeypatch.setenv("TOUCHLINE_TOKEN", player)
    monkeypatch.setenv("TOUCHLINE_TLS_CA", str(authority.cert))
    with tls_server(pair) as server:
        cfg = SimpleNamespace(buffer_size=2000, steps=2000, batch_size=4, horizon=3, device="cpu", replay_address=server.address)
        rows = {"obs": torch.zeros(20, 2), "action": torch.zeros(20, 1), "reward": torch.zeros(20), "terminated": torch.zeros(20)}
        with Buffer(cfg) as buffer:
            assert buffer.add(TensorDict(rows, batch_size=[20])) == 1
            assert buffer.sample()[0].shape == (4, 4, 2)
        remote = RemoteReplayBuffer(server.address, batch_size=4, slice_len=2)
        remote.flush()
        assert len(remote) == 19
        remote.close()


def test_mutual_tls_and_tokens_are_both_asked_for(authority: Authority, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOUCHLINE_SERVER_TOKENS", VARIABLE)
    tls = TlsConfig(authority.cert, *authority.issue("robot-2"))
    with tls_server(pair, client_ca=authority.cert) as server:
        with ReplayClient(server.address, tls=tls, token=TOKENS["actor"]) as client:
            assert client.ready() is False
        with ReplayClient(server.address, tls=tls) as client, pytest.raises(AccessDeniedError, match="no token"):
            client.ready()
        certless = ReplayClient(server.address, tls=TlsConfig(authority.cert), token=TOKENS["actor"])
        with certless, pytest.raises(UnavailableError):
            trying_once(certless).ready()


# Secrets


def outcome(ask: Callable[[], Any]) -> str:
    """Everything that a caller sees of a call."""
    try:
        return str(ask())
    except Exception as error:
        causes = [error, error.__cause__, error.__context__]
        return " ".join(f"{cause!r} {cause}" for cause in causes if cause is not None)


def test_no_secret_is_logged_or_sent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    secret = "s3cr3t-in-a-file-0123456789"
    tokens = tmp_path / "tokens.toml"
    tokens.write_text(f"[[token]]\nname = 'file-name'\nrole = 'admin'\nvalue = '{secret}'\n", encoding="utf-8")
    tokens.chmod(0o600)
    environment = {"TOUCHLINE_SERVER_TOKENS": VARIABLE, "TOUCHLINE_AUTH__TOKENS_FILE": str(tokens)}
    everything = (*TOKENS.values(), secret, WRONG)
    told: list[str] = []
    with caplog.at_level(logging.DEBUG), ServerProcess(tmp_path, "--port", "0", "--log-level", "debug", **environment) as process:
        for token in everything:
            with ReplayClient(process.address, token=token, as_numpy=True) as client:
                told.append(repr(client) + str(vars(client)))
                verbs = (client.info, client.ready, client.sample, client.clear, lambda: client.add(EPISODE))
                told += [outcome(verb) for verb in verbs]
        log = process.log

    assert "tokens: file-name (admin), actor-name (actor), learner-name (learner), admin-name (admin)" in log
    assert f'tokens_file = "{tokens}"' in log
    assert "answered UNAUTHENTICATED" in log and "answered PERMISSION_DENIED" in log
    assert sum("AccessDeniedError" in text or "UnauthenticatedError" in text for text in told) > 5 and any(
        "tokens_file" in text for text in told
    )
    for token in everything:
        assert token not in log
        assert token not in caplog.text
        assert not any(token in text for text in told)


def test_server_reads_no_token_from_its_configuration(tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text("[auth]\ntokens = 'actor:a:s3cr3t-0123456789'\n", encoding="utf-8")

    with ServerProcess(tmp_path, "--config", "my.toml") as process:
        assert process.wait() == 2
        assert "auth.tokens (in my.toml): unknown key, expected one of tokens_file, allow_plaintext" in process.log
        assert "s3cr3t" not in process.log


# Addresses


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"TOUCHLINE_SERVER_TOKENS": VARIABLE}, "without tls.cert, expected TLS, because tokens would be sent unencrypted"),
        ({"TOUCHLINE_SERVER_TOKENS": "actor:a"}, "environment variable TOUCHLINE_SERVER_TOKENS: token 1: expected ROLE:NAME:VALUE"),
        ({"TOUCHLINE_AUTH__TOKENS_FILE": "none.toml"}, "auth.tokens_file: none.toml: No such file or directory"),
        ({"TOUCHLINE_TLS__CERT": "none.pem"}, "tls.key: '', expected a file"),
    ],
)
def test_server_with_an_unsafe_or_broken_security_configuration_does_not_start(
    tmp_path: Path, environment: dict[str, str], words: str
) -> None:
    with ServerProcess(tmp_path, "--host", "0.0.0.0", "--port", "0", **environment) as process:
        assert process.wait() == 2
        assert words in process.log.splitlines()[-1]
        assert "-token-0123456789" not in process.log


def test_server_on_a_public_address_warns_and_one_on_loopback_does_not(caplog: pytest.LogCaptureFixture) -> None:
    with ServerThread(make_config()):
        assert "any process that reaches the port" not in caplog.text
    with ServerThread(make_config(server={"host": "0.0.0.0", "port": 0})):
        assert (
            "listening on 0.0.0.0 without TLS and without tokens: any process that reaches the port can read, add and clear" in caplog.text
        )


# The health check


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    monkeypatch.chdir(tmp_path)
    return CliRunner()


@pytest.mark.parametrize("mutual", [False, True])
@pytest.mark.parametrize("host", ["replay.example.org", "*.example.org", "10.0.0.7"])
def test_healthcheck_asks_its_own_server_by_tls(
    authority: Authority, runner: CliRunner, monkeypatch: pytest.MonkeyPatch, host: str, mutual: bool
) -> None:
    pair = authority.issue("own", host)
    with tls_server(pair, client_ca=authority.cert if mutual else None) as server:
        monkeypatch.setenv("TOUCHLINE_SERVER__PORT", server.address.rpartition(":")[2])
        monkeypatch.setenv("TOUCHLINE_TLS__CERT", str(pair.cert))
        monkeypatch.setenv("TOUCHLINE_TLS__KEY", str(pair.key))
        if mutual:
            monkeypatch.setenv("TOUCHLINE_TLS__CLIENT_CA", str(authority.cert))

        result = runner.invoke(cli.app, ["healthcheck"])

    assert (result.exit_code, result.stderr) == (0, f"{server.address}: SERVING\n")


def test_healthcheck_does_not_trust_another_server_in_the_place_of_its_own(
    authority: Authority, pair: Pair, runner: CliRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    impostor = authority.issue("impostor", "localhost", "127.0.0.1")
    with tls_server(impostor) as server:
        monkeypatch.setenv("TOUCHLINE_SERVER__PORT", server.address.rpartition(":")[2])
        monkeypatch.setenv("TOUCHLINE_TLS__CERT", str(pair.cert))
        monkeypatch.setenv("TOUCHLINE_TLS__KEY", str(pair.key))

        result = runner.invoke(cli.app, ["healthcheck", "--timeout-s", "1"])

    assert result.exit_code == 1


def test_healthcheck_of_another_server_trusts_the_given_ca(authority: Authority, pair: Pair, runner: CliRunner) -> None:
    robot = authority.issue("probe")
    with tls_server(pair, client_ca=authority.cert) as server:
        command = ["healthcheck", "--address", server.address, "--tls-ca", str(authority.cert)]

        shown = runner.invoke(cli.app, [*command, "--tls-cert", str(robot.cert), "--tls-key", str(robot.key)])
        unshown = runner.invoke(cli.app, [*command, "--timeout-s", "1"])

    assert (shown.exit_code, shown.stderr) == (0, f"{server.address}: SERVING\n")
    assert unshown.exit_code == 1
