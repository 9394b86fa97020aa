"""What a client shows to a server: from its arguments, from the environment, and never in plain text or in a log."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest

from support.certificates import Authority
from support.client_faults import ScriptedServer, answering
from touchline import InvalidArgumentError, ReplayClient, TlsConfig
from touchline._rpc.credentials import Credentials, is_local
from touchline_protos.v1 import replay_pb2 as pb

SECRET = "s3cr3t-0123456789"
READY = answering(pb.ReadyResponse().SerializeToString())


def credentials(address: str = "127.0.0.1:1", *, environment: dict[str, str] | None = None, **options: object) -> Credentials:
    return Credentials(address, environment=environment or {}, **options)  # type: ignore[arg-type]


def test_client_without_credentials_uses_no_tls_and_no_token() -> None:
    plain = credentials("replay:50051")

    assert plain.metadata == ()
    assert repr(plain) == "Credentials(tls=None, token=none)"


def test_token_of_the_environment_is_the_default() -> None:
    environment = {"TOUCHLINE_TOKEN": SECRET}

    assert credentials(environment=environment).metadata == (("authorization", f"Bearer {SECRET}"),)
    assert credentials(environment=environment, token="another").metadata == (("authorization", "Bearer another"),)
    assert credentials(environment=environment, token="").metadata == ()


@pytest.mark.parametrize("token", ["two words", "line\n", "⚽" * 20, "tab\t"])
def test_token_that_no_header_carries_is_refused_and_not_quoted(token: str) -> None:
    with pytest.raises(InvalidArgumentError, match="token: has a character that no header can carry") as caught:
        ReplayClient("127.0.0.1:1", token=token)

    assert token not in str(caught.value)


@pytest.mark.parametrize("address", ["10.0.0.7:50051", "replay:50051", "[2001:db8::1]:50051", "127.0.0.1.example.org:50051"])
def test_token_is_not_sent_to_another_machine_in_plain_text(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidArgumentError, match=r"token: would be sent to .* in plain text, expected TLS") as caught:
        ReplayClient(address, token=SECRET)
    monkeypatch.setenv("TOUCHLINE_TOKEN", SECRET)
    with pytest.raises(InvalidArgumentError, match="in plain text"):
        ReplayClient(address)

    assert SECRET not in str(caught.value)
    ReplayClient(address, token="").close()
    ReplayClient(address, allow_plaintext=True).close()
    monkeypatch.setenv("TOUCHLINE_ALLOW_PLAINTEXT", "1")
    ReplayClient(address).close()
    with pytest.raises(InvalidArgumentError, match="in plain text"):
        ReplayClient(address, allow_plaintext=False)


@pytest.mark.parametrize("address", ["localhost:1", "127.0.0.1:1", "127.9.9.9:1", "[::1]:1", "unix:/run/replay.sock"])
def test_token_to_this_machine_needs_no_tls(address: str) -> None:
    assert is_local(address)
    assert credentials(address, token=SECRET).metadata


def test_token_goes_with_every_call_and_shows_nowhere() -> None:
    with ScriptedServer(Ready=READY) as server, ReplayClient(server.address, token=SECRET) as client:
        client.ready()
        client.ready()

        shown = repr(client) + repr(client._channel) + repr(client._rpc) + repr(client._channel.credentials)

    assert [metadata["authorization"] for _, metadata in server.calls] == [f"Bearer {SECRET}"] * 2
    assert SECRET not in shown
    assert "token=given" in shown


def test_tls_of_the_environment_is_the_default(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pair = authority.issue("client")
    environment = {
        "TOUCHLINE_TLS_CA": str(authority.cert),
        "TOUCHLINE_TLS_CERT": str(pair.cert),
        "TOUCHLINE_TLS_KEY": str(pair.key),
        "TOUCHLINE_TLS_SERVER_NAME": "replay.example.org",
        "TOUCHLINE_TOKEN": SECRET,
    }

    made = credentials("10.0.0.7:50051", environment=environment)

    expected = TlsConfig(str(authority.cert), str(pair.cert), str(pair.key), "replay.example.org")
    assert repr(made) == f"Credentials(tls={expected!r}, token=given)"
    assert "tls=None" in repr(credentials(environment=environment, tls=False))


@pytest.mark.parametrize("variable", ["TOUCHLINE_TLS_CERT", "TOUCHLINE_TLS_KEY", "TOUCHLINE_TLS_SERVER_NAME"])
def test_tls_of_the_environment_without_its_ca_is_refused(variable: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"^{variable}: set without TOUCHLINE_TLS_CA, which turns TLS on"):
        credentials(environment={variable: "x"})

    assert "tls=None" in repr(credentials(environment={variable: "x"}, tls=False))


def test_file_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pair = authority.issue("client")
    other = tmp_path / "other.pem"
    other.write_bytes(b"\x30\x82")

    for tls, words in (
        (TlsConfig(tmp_path / "none.pem"), r"tls\.ca: .*none\.pem: No such file or directory"),
        (TlsConfig(other), r"tls\.ca: .*other\.pem: expected a file in PEM form"),
        (TlsConfig(authority.cert, pair.cert), r"tls\.key: None, expected a file: cert and key are used together"),
        (TlsConfig(authority.cert, None, pair.key), r"tls\.cert: None, expected a file"),
    ):
        with pytest.raises(InvalidArgumentError, match=words):
            ReplayClient("127.0.0.1:1", tls=tls)


def test_channel_without_tls_is_an_insecure_one() -> None:
    with credentials().open("127.0.0.1:1", []) as channel:
        assert isinstance(channel, grpc.Channel)
