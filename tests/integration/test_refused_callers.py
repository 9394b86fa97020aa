"""Callers without the right token, and malformed metadata, in the server's log: who, from where, what, why, and nothing secret."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.raw_http2 import RawConnection
from support.service_calls import DEADLINE_S, SERVICE, Caller, ServerProcess, refused
from touchline_protos.v1 import replay_pb2 as pb
from touchline_server.errors import InvalidArgumentError, UnauthenticatedError
from touchline_server.service.refusal_log import MAX_CALLERS, REPEAT_S, RefusalLog, check_metadata

SECRETS = {"actor": "an-actors-token-of-many-characters", "admin": "an-admins-token-of-many-characters"}
TOKENS = {"TOUCHLINE_SERVER_TOKENS": f"actor:robots:{SECRETS['actor']} admin:ops:{SECRETS['admin']}"}


def refusals(process: ServerProcess) -> list[str]:
    return [line for line in process.log.splitlines() if "touchline_server.service.refusal_log" in line]


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


def test_refused_callers_leave_one_line_each(tmp_path: Path) -> None:
    with ServerProcess(tmp_path, **TOKENS) as process, Caller(process.address) as caller:
        for _ in range(50):
            refused(caller.counts)
        refused(caller.raw, "Info", b"", metadata=bearer("a-wrong-token-of-many-characters"))
        refused(caller.raw, "Clear", b"", metadata=bearer(SECRETS["actor"]))
        refused(caller.raw, "AddEpisode", b"\x00", metadata=bearer(SECRETS["actor"]))

        missing, wrong, role = refusals(process)

        for line, method in ((missing, "Info"), (wrong, "Info"), (role, "Clear")):
            assert "WARNING touchline_server.service.refusal_log: refused ipv4:127.0.0.1:" in line
            assert f", which called {SERVICE}{method}: " in line
        assert "no token" in missing
        assert "not one of this server's" in wrong
        assert "'robots' is for actor" in role
        assert not any(secret in process.log for secret in (*SECRETS.values(), "a-wrong-token"))


@pytest.mark.parametrize("value", [b"Bearer \xff\xfe-a-secret", b"\xc3\xbf-a-secret", b"Bearer a-secret\x7f"])
@pytest.mark.parametrize("key", [b"authorization", b"touchline-protocol", b"x-other"])
def test_metadata_that_is_no_text_is_refused_without_a_trace(tmp_path: Path, key: bytes, value: bytes) -> None:
    with ServerProcess(tmp_path) as process, RawConnection(process.address) as connection:
        call = connection.call(SERVICE + "Info", message=b"", metadata=[(key, value)])
        assert connection.wait_ended([call], limit_s=DEADLINE_S)

        with Caller(process.address) as caller:
            assert caller.counts() == pb.Counts()
        assert "Traceback" not in process.log
        assert "a-secret" not in process.log
        # gRPC's core rejects what HTTP/2 itself forbids.
        assert all(f"the metadata {key.decode()!r} is not printable ASCII" in line for line in refusals(process))


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_metadata_is_text_of_printable_ascii(value: str) -> None:
    good = value.isascii() and value.isprintable()
    try:
        check_metadata([("any-bin", value.encode()), ("user-agent", "grpc"), ("key", value)])
    except InvalidArgumentError as error:
        assert not good
        assert str(error) == "the metadata 'key' is not printable ASCII, expected that, or bytes under a key that ends in -bin"
    else:
        assert good


def test_lines_are_bounded_and_say_what_they_leave_out(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    now = [0.0]
    log = RefusalLog(lambda: now[0])
    error = UnauthenticatedError("no token")

    for _ in range(10):
        for host in range(2 * MAX_CALLERS):
            log.note(f"ipv4:10.0.{host // 256}.{host % 256}:{1000 + host}", "/a/B", error)
    assert len(caplog.records) == MAX_CALLERS
    now[0] = REPEAT_S + 1
    caplog.clear()
    log.note("ipv4:10.0.0.0:7", "/a/B", error)

    (record,) = caplog.records
    assert record.getMessage() == (
        "refused ipv4:10.0.0.0:7, which called /a/B: no token (9 more since the last such line) "
        f"({10 * MAX_CALLERS} calls of too many other callers were refused without a line)"
    )


def test_calls_that_are_let_in_leave_no_line(tmp_path: Path) -> None:
    with ServerProcess(tmp_path, **TOKENS) as process, Caller(process.address) as caller:
        for _ in range(3):
            caller.raw("Info", b"", metadata=bearer(SECRETS["admin"]))
        caller.channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=DEADLINE_S)

        assert refusals(process) == []
