"""The HTTP server: when it serves, where, and whom it answers."""

from __future__ import annotations

import logging
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from support.certificates import Authority
from support.pages import request
from support.service_calls import DEADLINE_S, ServerProcess, make_config
from touchline_server import Config, ConfigError
from touchline_server.http import exposure
from touchline_server.service.app import AddressInUseError, ServerThread

LEARNER, ACTOR = "learner-token-012345", "actor-token-01234567"
TOKENS = f"""
[[token]]
name = "trainer"
role = "learner"
value = "{LEARNER}"

[[token]]
name = "robot"
role = "actor"
value = "{ACTOR}"
"""


def config_of(**sections: dict[str, Any]) -> Config:
    return make_config(**{**sections, "http": {"port": 0, **sections.get("http", {})}})


def tokens_file(folder: Path) -> dict[str, Any]:
    file = folder / "tokens.toml"
    file.write_text(TOKENS, encoding="utf-8")
    file.chmod(0o600)
    return {"tokens_file": str(file)}


@pytest.fixture(scope="module")
def open_server() -> Iterator[str]:
    with ServerThread(config_of(), http=True) as server:
        yield server.http_address


@pytest.fixture(scope="module")
def server_with_tokens(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with ServerThread(config_of(auth=tokens_file(tmp_path_factory.mktemp("tokens"))), http=True) as server:
        yield server.http_address


# When it serves


def test_healthz_of_a_serving_server_is_200(open_server: str) -> None:
    answer = request(open_server, "/healthz")

    assert (answer.status, answer.text) == (200, "serving\n")


def test_stopped_server_ends_its_thread_and_frees_the_port() -> None:
    before = {thread for thread in threading.enumerate() if thread.name == "touchline-http"}
    with ServerThread(config_of(), http=True) as server:
        address = server.http_address
        assert request(address, "/healthz").status == 200

    assert {thread for thread in threading.enumerate() if thread.name == "touchline-http"} == before
    with pytest.raises(ConnectionRefusedError):
        request(address, "/healthz")


def test_server_thread_serves_no_page_unless_asked() -> None:
    with ServerThread(config_of()) as server:
        assert server.http_address == ""


@pytest.mark.parametrize("enabled", ["auto", "on"])
def test_port_in_use_is_a_log_line_or_an_error(enabled: str, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = config_of(http={"port": taken.getsockname()[1], "enabled": enabled})

        if enabled == "on":
            with (
                pytest.raises(AddressInUseError, match=r"Address already in use\); choose another http.port"),
                ServerThread(config, http=True),
            ):
                pass
        else:
            with caplog.at_level(logging.WARNING), ServerThread(config, http=True) as server:
                assert server.http_address == ""
            assert "no web page: cannot listen on 127.0.0.1" in caplog.text


@pytest.mark.parametrize("enabled", ["auto", "on"])
def test_missing_extra_is_a_log_line_or_an_error(enabled: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(exposure, "PACKAGES", ("starlette", "touchline_no_such_package"))
    config = config_of(http={"enabled": enabled})

    if enabled == "on":
        with pytest.raises(
            ConfigError, match=r"touchline_no_such_package cannot be imported; pip install starlette uvicorn prometheus-client"
        ):
            ServerThread(config, http=True)
    else:
        with caplog.at_level(logging.INFO), ServerThread(config, http=True) as server:
            assert server.http_address == ""
        assert "no web page: touchline_no_such_package cannot be imported" in caplog.text


@pytest.mark.parametrize(
    ("enabled", "tokens", "expected"), [("auto", False, False), ("auto", True, True), ("on", False, True), ("off", True, False)]
)
def test_beside_a_unix_socket_the_page_needs_tokens_or_a_decision(enabled: str, tokens: bool, expected: bool) -> None:
    config = config_of(server={"unix_socket": "/run/replay.sock"}, http={"enabled": enabled})

    assert (exposure.why_not(config, has_tokens=tokens) is None) is expected


def test_other_machines_without_tokens_are_a_warning_and_tokens_without_tls_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        ServerThread(config_of(http={"host": "0.0.0.0"}), http=True)
    assert "web page: listening on 0.0.0.0 without TLS and without tokens: any process that reaches the port can see" in caplog.text

    with pytest.raises(ConfigError, match=r"http.host: '0.0.0.0' without tls.cert, expected TLS"):
        ServerThread(config_of(http={"host": "0.0.0.0"}, auth=tokens_file(tmp_path)), http=True)


def closes(connection: socket.socket) -> bool:
    """Waits until the server closes a connection."""
    connection.settimeout(DEADLINE_S)
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def test_connection_without_a_request_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("touchline_server.http.connections.FIRST_REQUEST_S", 0.2)
    with ServerThread(config_of(), http=True) as server:
        host, _, port = server.http_address.partition(":")
        with socket.create_connection((host, int(port))) as silent, socket.create_connection((host, int(port))) as slow:
            slow.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n")

            assert closes(silent) and closes(slow)
        assert request(server.http_address, "/healthz").status == 200


def test_connection_beyond_the_most_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("touchline_server.http.connections.MAX_CONNECTIONS", 2)
    with ServerThread(config_of(), http=True) as server:
        host, _, port = server.http_address.partition(":")
        with ExitStack() as stack:
            first, second, third = (stack.enter_context(socket.create_connection((host, int(port)))) for _ in range(3))

            assert closes(third)
            for connection in (first, second):
                connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                assert connection.recv(12) == b"HTTP/1.1 200"


# Whom it answers


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8080", "127.0.0.1.evil.example", "", "[::1].evil.example", "evil.localhost.example"]
)
def test_foreign_name_on_loopback_is_refused(open_server: str, host: str) -> None:
    answer = request(open_server, "/healthz", headers={"Host": host})

    assert answer.status in (400, 421)
    assert b"serving" not in answer.body


@pytest.mark.parametrize("host", ["localhost", "localhost:8080", "127.0.0.1:1", "[::1]:8080", "replay:8080"])
def test_own_name_on_loopback_is_answered(open_server: str, host: str) -> None:
    assert request(open_server, "/healthz", headers={"Host": host}).status == 200


@pytest.mark.parametrize("path", ["/login", "/static/theme.js", "/nowhere"])
def test_every_answer_confines_the_page_to_its_server(open_server: str, path: str) -> None:
    headers = request(open_server, path).headers

    assert "default-src 'self'" in headers["content-security-policy"]
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert (headers["x-content-type-options"], headers["cross-origin-resource-policy"]) == ("nosniff", "same-origin")
    assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize(
    ("token", "status", "text"),
    [
        ("", 401, "not one of this server's"),
        ("wrong-token-01234567", 401, "not one of this server's"),
        (ACTOR, 403, "'robot' is for actor"),
    ],
)
def test_caller_without_a_fitting_token_gets_nothing(server_with_tokens: str, token: str, status: int, text: str) -> None:
    answer = request(server_with_tokens, "/api/anything", headers={"Authorization": f"Bearer {token}"})

    assert answer.status == status
    assert text in answer.json["error"]
    assert request(server_with_tokens, "/", headers={"Authorization": f"Bearer {token}"}).headers["location"] == "/login"


def test_caller_with_a_learners_token_passes(server_with_tokens: str) -> None:
    assert request(server_with_tokens, "/api/anything", headers={"Authorization": f"Bearer {LEARNER}"}).status == 404


def test_health_check_needs_no_token(server_with_tokens: str) -> None:
    assert request(server_with_tokens, "/healthz").status == 200


def log_in(address: str, token: str, **headers: str) -> Any:
    form = {"Content-Type": "application/x-www-form-urlencoded", **headers}
    return request(address, "/login", method="POST", headers=form, body=f"token={quote(token)}")


def test_login_sets_a_cookie_that_scripts_and_other_sites_cannot_use(server_with_tokens: str) -> None:
    answer = log_in(server_with_tokens, LEARNER)

    cookie = answer.headers["set-cookie"]
    assert (answer.status, answer.headers["location"]) == (303, "/")
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie and "Secure" not in cookie and "Max-Age" not in cookie
    assert request(server_with_tokens, "/api/anything", headers={"Cookie": cookie.partition(";")[0]}).status == 404


@pytest.mark.parametrize(("token", "reason"), [("wrong-token-01234567", "unknown"), (ACTOR, "role"), ("x" * 5000, "unknown")])
def test_login_with_another_token_is_refused(server_with_tokens: str, token: str, reason: str) -> None:
    answer = log_in(server_with_tokens, token)

    assert answer.headers["location"] == f"/login?refused={reason}"
    assert "set-cookie" not in answer.headers


def test_login_form_of_another_site_is_refused(server_with_tokens: str) -> None:
    assert log_in(server_with_tokens, LEARNER, Origin="http://evil.example").status == 403
    assert log_in(server_with_tokens, LEARNER, Origin=f"http://{server_with_tokens}").status == 303


def test_logout_deletes_the_cookie(server_with_tokens: str) -> None:
    answer = request(server_with_tokens, "/logout", method="POST")

    assert answer.headers["location"] == "/"
    assert 'touchline-token=""' in answer.headers["set-cookie"] and "Max-Age=0" in answer.headers["set-cookie"]


def test_page_by_tls_has_the_servers_certificate_and_a_secure_cookie(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pair = authority.issue("server", "127.0.0.1")
    trusting = ssl.create_default_context(cafile=str(authority.cert))
    config = config_of(tls={"cert": str(pair.cert), "key": str(pair.key)}, auth=tokens_file(tmp_path))

    with ServerThread(config, http=True) as server:
        assert request(server.http_address, "/healthz", tls=trusting).text == "serving\n"
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        answer = request(server.http_address, "/login", method="POST", headers=form, body=f"token={LEARNER}", tls=trusting)

    assert "Secure" in answer.headers["set-cookie"]


def test_page_by_mutual_tls_needs_the_clients_certificate(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pair, client = authority.issue("server", "127.0.0.1"), authority.issue("client")
    config = config_of(tls={"cert": str(pair.cert), "key": str(pair.key), "client_ca": str(authority.cert)})
    without = ssl.create_default_context(cafile=str(authority.cert))
    presenting = ssl.create_default_context(cafile=str(authority.cert))
    presenting.load_cert_chain(client.cert, client.key)

    with ServerThread(config, http=True) as server:
        assert request(server.http_address, "/healthz", tls=presenting).status == 200
        with pytest.raises((ssl.SSLError, ConnectionError)):
            request(server.http_address, "/healthz", tls=without)


def test_server_process_prints_the_pages_address_behind_its_own(tmp_path: Path) -> None:
    with ServerProcess(tmp_path, TOUCHLINE_HTTP__ENABLED="on", TOUCHLINE_HTTP__PORT="0") as server:
        assert request(server.page_address, "/healthz").text == "serving\n"
