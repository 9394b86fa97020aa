"""Tokens: how they are read, what is refused, and who may call what. No message may hold a token."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from touchline_protos.v1 import replay_pb2 as pb
from touchline_server.config.settings import Config, ConfigError
from touchline_server.errors import AccessDeniedError, UnauthenticatedError
from touchline_server.service.access import ROLES_OF, Access, check_exposure, is_loopback, read_access

ACTOR, LEARNER, ADMIN, PLAYER = "actor-token-0123456", "learner-token-01234", "admin-token-0123456", "player-token-012345"
FILE = f"""
[[token]]
name = "robots"
role = "actor"
value = "{ACTOR}"
[[token]]
name = "gpu"
role = "learner"
sha256 = "{hashlib.sha256(LEARNER.encode()).hexdigest().upper()}"
[[token]]
name = "ops"
role = "admin"
value = "{ADMIN}"
[[token]]
name = "player"
role = ["actor", "learner"]
value = "{PLAYER}"
"""
SERVICE = "/touchline.v1.Replay/"
METHODS = [method.name for method in pb.DESCRIPTOR.services_by_name["Replay"].methods]


def write(folder: Path, text: str, mode: int = 0o600) -> Config:
    file = folder / "tokens.toml"
    file.write_text(text, encoding="utf-8")
    file.chmod(mode)
    return Config(auth={"tokens_file": str(file)})


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("user-agent", "test"), ("authorization", f"Bearer {token}"))


@pytest.fixture
def access(tmp_path: Path) -> Access:
    read = read_access(write(tmp_path, FILE), {})
    assert read is not None
    return read


# Who may call what


def may_call(access: Access, token: str) -> set[str]:
    allowed = set()
    for method in METHODS:
        try:
            access.check(SERVICE + method, bearer(token))
        except AccessDeniedError:
            continue
        allowed.add(method)
    return allowed


def test_every_method_of_the_service_has_its_roles() -> None:
    assert set(ROLES_OF) == set(METHODS)


def test_roles_may_call_what_is_theirs(access: Access) -> None:
    both = {"Ready", "Info", "ListTables"}
    actors, learners = {"AddEpisode", "LoadEpisodes", *both}, {"Sample", "SampleStream", "GetEpisodes", "UpdatePriorities", "Status", *both}

    assert may_call(access, ACTOR) == actors
    assert may_call(access, LEARNER) == learners
    assert may_call(access, PLAYER) == actors | learners
    assert may_call(access, ADMIN) == set(METHODS)


def test_what_is_not_the_service_is_an_admins_but_health_is_open(access: Access) -> None:
    reflection = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"

    access.check("/grpc.health.v1.Health/Check", ())
    access.check(reflection, bearer(ADMIN))
    for method in (reflection, SERVICE + "MethodOfTomorrow", "/other.Replay/AddEpisode", "/grpc.health.v1.Healthy/Check"):
        with pytest.raises(AccessDeniedError, match="the token 'player' is for actor and learner, expected one for admin"):
            access.check(method, bearer(PLAYER))


@pytest.mark.parametrize(
    "metadata",
    [
        (),
        (("authorization", ""),),
        (("authorization", ACTOR),),
        (("authorization", f"Basic {ACTOR}"),),
        (("authorization", f"Bearer {ACTOR}x"),),
        (("authorization", f"Bearer {ACTOR[:-1]}"),),
        (("authorization", f"Bearer {ACTOR.upper()}"),),
        (("authorization", "Bearer " + hashlib.sha256(LEARNER.encode()).hexdigest()),),
        (("authorization", "Bearer ⚽"),),
        (("authorization", b"Bearer \xff"),),
        (("Authorization", f"Bearer {ACTOR}"),),  # HTTP/2 allows only lower case
        (*bearer(ACTOR), *bearer(ADMIN)),
    ],
)
def test_call_without_a_token_of_the_server_is_unauthenticated(access: Access, metadata: tuple[tuple[str, str]]) -> None:
    with pytest.raises(UnauthenticatedError) as caught:
        access.check(SERVICE + "AddEpisode", metadata)

    assert ACTOR not in str(caught.value)


@pytest.mark.parametrize("value", [f"bearer {ACTOR}", f"BEARER  {ACTOR} "])
def test_scheme_may_be_in_any_case(access: Access, value: str) -> None:
    access.check(SERVICE + "AddEpisode", (("authorization", value),))


def test_every_token_is_compared_each_time(access: Access, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return one == other

    monkeypatch.setattr("touchline_server.service.access.hmac.compare_digest", compare)

    for token in (ACTOR, PLAYER):
        access.check(SERVICE + "Ready", bearer(token))
    with pytest.raises(UnauthenticatedError):
        access.check(SERVICE + "Ready", bearer("x" * 20))

    assert len(compared) == 3 * 4
    assert {len(digest) for pair in compared for digest in pair} == {32}


def test_nothing_that_is_shown_holds_a_token(access: Access) -> None:
    shown = access.describe() + repr(access) + repr(vars(access))

    assert access.describe() == "robots (actor), gpu (learner), ops (admin), player (actor and learner)"
    for token in (ACTOR, LEARNER, ADMIN, PLAYER):
        assert token not in shown
        assert hashlib.sha256(token.encode()).hexdigest() not in shown


# Where tokens come from


def test_no_tokens_mean_no_login() -> None:
    assert read_access(Config(), {}) is None
    assert read_access(Config(), {"TOUCHLINE_SERVER_TOKENS": "  "}) is None


def test_tokens_of_the_environment_and_of_the_file_add_up(tmp_path: Path) -> None:
    both = read_access(
        write(tmp_path, FILE), {"TOUCHLINE_SERVER_TOKENS": " actor+learner:me:my:own:token:012345,\n admin:you:another-token-0123 "}
    )

    assert both is not None
    assert both.describe().endswith("player (actor and learner), me (actor and learner), you (admin)")
    both.check(SERVICE + "Sample", bearer("my:own:token:012345"))
    both.check(SERVICE + "Clear", bearer("another-token-0123"))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o644, 0o660, 0o666, 0o777])
def test_file_that_others_may_read_or_write_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(ConfigError, match=rf"has mode 0{mode:o}, expected a file that only its owner can read: chmod 600"):
        read_access(write(tmp_path, FILE, mode), {})


SECRET = "s3cr3t-0123456789"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", r"contains no \[\[token\]\], expected at least one"),
        (f"[[token]\nvalue = '{SECRET}'", r"not valid TOML \(at line 1, column 8\)"),
        (f"[[token]]\nvalue = '{SECRET}", "not valid TOML"),
        (f"value = '{SECRET}'", r"expected \[\[token\]\] tables and nothing else"),
        (f"token = ['{SECRET}']", r"expected \[\[token\]\] tables and nothing else"),
        (f"[[token]]\nrole = 'actor'\nvalue = '{SECRET}'", "token 1: expected a name of 1 to 64 letters"),
        (f"[[token]]\nname = 'a b'\nrole = 'actor'\nvalue = '{SECRET}'", "token 1: expected a name of 1 to 64 letters"),
        (f"[[token]]\nname = 'a'\nvalue = '{SECRET}'", r"token 1 \(a\): expected a role, or several, of actor, learner, admin"),
        (f"[[token]]\nname = 'a'\nrole = 'root'\nvalue = '{SECRET}'", r"token 1 \(a\): expected a role, or several"),
        (f"[[token]]\nname = 'a'\nrole = []\nvalue = '{SECRET}'", r"token 1 \(a\): expected a role, or several"),
        (f"[[token]]\nname = 'a'\nrole = 'actor'\nvalue = '{SECRET}'\nuntil = 1", "token 1: unknown key 'until'"),
        ("[[token]]\nname = 'a'\nrole = 'actor'", r"token 1 \(a\): expected either value or sha256"),
        (f"[[token]]\nname = 'a'\nrole = 'actor'\nvalue = '{SECRET}'\nsha256 = '{'0' * 64}'", "expected either value or sha256"),
        (f"[[token]]\nname = 'a'\nrole = 'actor'\nsha256 = '{SECRET}'", "expected a sha256 of 64 hexadecimal digits"),
        ("[[token]]\nname = 'a'\nrole = 'actor'\nvalue = 'fifteen-letters'", "a value of 15 characters, expected at least 16"),
        (f"[[token]]\nname = 'a'\nrole = 'actor'\nvalue = '{SECRET} '", "printable ASCII characters without blanks"),
        ("[[token]]\nname = 'a'\nrole = 'actor'\nvalue = 12345678901234567", "printable ASCII characters without blanks"),
    ],
)
def test_file_that_cannot_be_used_is_refused_and_not_quoted(tmp_path: Path, text: str, words: str) -> None:
    config = write(tmp_path, text)

    with pytest.raises(ConfigError, match=words) as caught:
        read_access(config, {})

    assert f"auth.tokens_file: {tmp_path}" in str(caught.value)
    assert SECRET not in str(caught.value)
    assert (caught.value.__cause__ is None and caught.value.__suppress_context__) or caught.value.__context__ is None


def test_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"auth\.tokens_file: .*none\.toml: No such file or directory"):
        read_access(Config(auth={"tokens_file": str(tmp_path / "none.toml")}), {})


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        (f"actor:a:{SECRET}", f"actor:a:{SECRET}-other", "the token 'a' and another have the same name"),
        (f"actor:a:{SECRET}", f"admin:b:{SECRET}", "the token 'a' and another have the same value"),
    ],
)
def test_indistinguishable_tokens_are_refused(one: str, other: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        read_access(Config(), {"TOUCHLINE_SERVER_TOKENS": f"{one} {other}"})

    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "text", [SECRET, f"actor:{SECRET}", f"root:a:{SECRET}", f"actor::{SECRET}", "actor:a:short", f"actor:a:{SECRET},x"]
)
def test_variable_that_cannot_be_used_is_refused_and_not_quoted(text: str) -> None:
    with pytest.raises(ConfigError, match="environment variable TOUCHLINE_SERVER_TOKENS: token") as caught:
        read_access(Config(), {"TOUCHLINE_SERVER_TOKENS": text})

    assert SECRET not in str(caught.value)


# Where a server may listen


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.8.9.10", True),
        ("::1", True),
        ("[::1]", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("[::]", False),
        ("10.0.0.7", False),
        ("localhost.example.org", False),
        ("replay", False),
    ],
)
def test_loopback_addresses_are_recognised(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


TOKENS = {"TOUCHLINE_SERVER_TOKENS": f"actor:a:{SECRET}"}
TLS = {"cert": "cert.pem", "key": "key.pem"}


@pytest.mark.parametrize(
    ("tables", "environment", "warning"),
    [
        ({}, {}, None),
        ({}, TOKENS, None),
        ({"server": {"host": "0.0.0.0", "unix_socket": "/run/replay.sock"}}, TOKENS, None),
        ({"server": {"host": "0.0.0.0"}}, {}, "without TLS and without tokens: any process that reaches the port can read, add and clear"),
        (
            {"server": {"host": "0.0.0.0"}, "auth": {"allow_plaintext": True}},
            TOKENS,
            "anyone who can read the network's traffic sees tokens",
        ),
        ({"server": {"host": "0.0.0.0"}, "tls": TLS}, {}, "without tokens and client certificates: any process that reaches the port"),
        ({"server": {"host": "0.0.0.0"}, "tls": TLS}, TOKENS, None),
        ({"server": {"host": "0.0.0.0"}, "tls": TLS | {"client_ca": "ca.pem"}}, {}, None),
    ],
)
def test_unprotected_server_on_a_public_address_warns(
    tables: dict[str, dict[str, object]], environment: dict[str, str], warning: str | None
) -> None:
    config = Config(**tables)

    found = check_exposure(config, read_access(config, environment))

    assert (found is None) == (warning is None)
    assert warning is None or (found is not None and warning in found and found.startswith("listening on 0.0.0.0 "))


def test_unencrypted_tokens_from_other_machines_are_refused() -> None:
    config = Config(server={"host": "10.0.0.7"})

    with pytest.raises(ConfigError, match=r"server\.host: '10\.0\.0\.7' without tls\.cert, expected TLS, because tokens would be sent"):
        check_exposure(config, read_access(config, TOKENS))


@pytest.mark.parametrize(
    ("tls", "words"),
    [
        ({"cert": "cert.pem"}, "tls.key: '', expected a file"),
        ({"key": "key.pem"}, "tls.cert: '', expected a file"),
        ({"client_ca": "ca.pem"}, r"tls.client_ca: set without tls.cert"),
    ],
)
def test_half_of_tls_is_refused(tls: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Config(tls=tls)
