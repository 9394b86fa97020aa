"""Who may call what: bearer tokens with roles, and where a server without TLS may listen."""

from __future__ import annotations

import enum
import hashlib
import hmac
import os
import re
import stat
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from touchline_protos.types.metadata import TOKEN_METADATA_KEY
from touchline_server.config.settings import Config
from touchline_server.config.source import ConfigError, why_unreadable
from touchline_server.errors import AccessDeniedError, UnauthenticatedError

TOKENS_VARIABLE = "TOUCHLINE_SERVER_TOKENS"
"""Environment variable with tokens, ``ROLE:NAME:VALUE`` each, between commas or blanks; several roles as ``actor+learner``."""

MIN_TOKEN_CHARS = 16
"""Shorter ones could be guessed."""

MAX_TOKENS = 1024
"""Every call is compared with all of them."""


class Role(enum.StrEnum):
    """What a token is for."""

    ACTOR = "actor"
    LEARNER = "learner"
    ADMIN = "admin"


_BOTH = frozenset({Role.ACTOR, Role.LEARNER})

ROLES_OF: dict[str, frozenset[Role]] = {
    "AddEpisode": frozenset({Role.ACTOR}),
    "LoadEpisodes": frozenset({Role.ACTOR}),
    "Sample": frozenset({Role.LEARNER}),
    "SampleStream": frozenset({Role.LEARNER}),
    "GetEpisodes": frozenset({Role.LEARNER}),
    # Both wait for the other and need the limits and the row convention; neither answer holds an episode or a secret.
    "Ready": _BOTH,
    "Info": _BOTH,
    "Clear": frozenset(),
}
"""Who, beside an admin, may call a method of ``touchline.v1.Replay``. Every other one, and reflection, is an admin's."""

OPEN_SERVICE = "/grpc.health.v1.Health/"
"""Whoever starts and restarts servers asks it, and has no token."""

_SERVICE = "/touchline.v1.Replay/"


@dataclass(frozen=True, slots=True)
class Token:
    """A token that the server takes. Of its value there is a digest alone."""

    name: str
    """Says whose it is, in errors and logs."""
    roles: frozenset[Role]
    digest: bytes = field(repr=False)
    """SHA-256 of its value."""


_OWN: tuple[tuple[str, Callable[[Token], object]], ...] = (("name", lambda token: token.name), ("value", lambda token: token.digest))
"""What no two tokens have in common."""


class Access:
    """Decides whether a call may come in. Safe to use from any thread.

    Args:
        tokens: those that are taken.
    """

    def __init__(self, tokens: Iterable[Token]) -> None:
        self._tokens = tuple(tokens)

    def check(self, method: str, metadata: Iterable[tuple[str, str | bytes]]) -> None:
        """Returns if the call may come in.

        Args:
            method: its full name.
            metadata: that it carries.

        Raises:
            UnauthenticatedError: no token, or none of the server's.
            AccessDeniedError: the token's roles do not include the method.
        """
        if method.startswith(OPEN_SERVICE):
            return
        token = self._token_of(metadata)
        if Role.ADMIN in token.roles:
            return
        name = method.removeprefix(_SERVICE)
        allowed = ROLES_OF.get(name, frozenset()) if method.startswith(_SERVICE) else frozenset()
        if not token.roles & allowed:
            wanted = " or ".join(sorted(allowed | {Role.ADMIN}))
            raise AccessDeniedError(f"the token {token.name!r} is for {_join(token.roles)}, expected one for {wanted} to call {name}")

    def describe(self) -> str:
        """Returns names and roles, for the log."""
        return ", ".join(f"{token.name} ({_join(token.roles)})" for token in self._tokens)

    def _token_of(self, metadata: Iterable[tuple[str, str | bytes]]) -> Token:
        given = [value for key, value in metadata if key == TOKEN_METADATA_KEY]
        if not given:
            raise UnauthenticatedError("no token, expected the metadata 'authorization: Bearer TOKEN'")
        text = given[0] if isinstance(given[0], str) else given[0].decode("latin-1")
        scheme, _, value = text.partition(" ")
        digest = hashlib.sha256(value.strip().encode()).digest()
        # All are looked at, and each for as long as any other, so that the time tells nothing.
        matching = [token for token in self._tokens if hmac.compare_digest(token.digest, digest)]
        if len(given) > 1 or scheme.lower() != "bearer" or not matching:
            raise UnauthenticatedError("the token is none of this server's, expected 'authorization: Bearer TOKEN' with one that is")
        return matching[0]


def read_access(config: Config, environment: Mapping[str, str] = os.environ) -> Access | None:
    """Returns who may call what; None where no tokens are configured and so everybody may call everything.

    Raises:
        ConfigError: the file of tokens cannot be read, may be read by others, or holds something else; likewise the variable.
    """
    tokens = list(_read_file(Path(config.auth.tokens_file))) if config.auth.tokens_file else []
    variable = environment.get(TOKENS_VARIABLE, "").strip()
    if variable:
        tokens += _read_variable(variable)
    if not tokens:
        if config.auth.tokens_file:
            raise ConfigError(f"auth.tokens_file: {config.auth.tokens_file} holds no [[token]], expected at least one")
        return None
    if len(tokens) > MAX_TOKENS:
        raise ConfigError(f"auth: {len(tokens)} tokens, expected at most {MAX_TOKENS}")
    for what, of in _OWN:
        values = [of(token) for token in tokens]
        repeated = next((token.name for token, value in zip(tokens, values, strict=True) if values.count(value) > 1), None)
        if repeated is not None:
            raise ConfigError(f"auth: the token {repeated!r} and another have the same {what}, expected one of its own for each")
    return Access(tokens)


def check_exposure(config: Config, access: Access | None) -> str | None:
    """Returns what to warn of: that others can reach the server and read or change what passes; None where they cannot.

    Raises:
        ConfigError: tokens would travel in the clear.
    """
    server = config.server
    if server.unix_socket or is_loopback(server.host):
        return None
    if not config.tls.cert:
        if access is None:
            return (
                f"listening on {server.host} without TLS and without tokens: whoever reaches the port can read, add and clear episodes. "
                "See tls.cert and auth.tokens_file, or server.host = '127.0.0.1'"
            )
        if not config.auth.allow_plaintext:
            raise ConfigError(
                f"server.host: {server.host!r} without tls.cert, expected TLS, because tokens would travel in the clear; set tls.cert and "
                "tls.key, listen on 127.0.0.1, or set auth.allow_plaintext = true where the network itself is private"
            )
        return f"listening on {server.host} without TLS: whoever listens on the network sees tokens and episodes (auth.allow_plaintext)"
    if access is None and not config.tls.client_ca:
        return (
            f"listening on {server.host} without tokens and client certificates: whoever reaches the port can read, add and clear "
            "episodes. See auth.tokens_file and tls.client_ca"
        )
    return None


def is_loopback(host: str) -> bool:
    """Returns whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _read_file(path: Path) -> Iterator[Token]:
    where = f"auth.tokens_file: {path}"
    try:
        with path.open("rb") as file:
            # Of the open file: nobody can put another in its place meanwhile.
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if mode & 0o077:
                raise ConfigError(f"{where} has mode {mode:04o}, expected that nobody else may read it: chmod 600 {path}")
            tables = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"{where}: {why_unreadable(error)}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        # Without the parser's own words, which may quote a token; the position is at their end.
        at = re.search(r"\(at [^)]*\)$", str(error))
        raise ConfigError(f"{where}: not valid TOML{' ' + at[0] if at else ''}") from None
    entries = tables.pop("token", [])
    if tables or not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(f"{where}: expected [[token]] tables and nothing else")
    for number, entry in enumerate(entries, 1):
        yield _token(entry, f"{where}: token {number}")


def _read_variable(text: str) -> Iterator[Token]:
    for number, item in enumerate(re.split(r"[,\s]+", text.strip(", \t\n")), 1):
        where = f"environment variable {TOKENS_VARIABLE}: token {number}"
        if item.count(":") < 2:
            raise ConfigError(f"{where}: expected ROLE:NAME:VALUE")
        roles, name, value = item.split(":", 2)
        yield _token({"role": roles.split("+"), "name": name, "value": value}, where)


def _token(entry: dict[str, Any], where: str) -> Token:
    """Returns a token. No message quotes its value."""
    unknown = sorted(entry.keys() - {"name", "role", "value", "sha256"})
    if unknown:
        raise ConfigError(f"{where}: unknown key {unknown[0]!r}, expected name, role, and value or sha256")
    name, role = entry.get("name"), entry.get("role")
    if not isinstance(name, str) or not re.fullmatch(r"[\w.@-]{1,64}", name):
        raise ConfigError(f"{where}: expected a name of 1 to 64 letters, digits, '.', '-', '_' and '@'")
    roles = [role] if isinstance(role, str) else role
    if not isinstance(roles, list) or not roles or not all(one in list(Role) for one in roles):
        raise ConfigError(f"{where} ({name}): expected a role, or several, of {', '.join(Role)}")
    return Token(name, frozenset(Role(one) for one in roles), _digest(entry, f"{where} ({name})"))


def _digest(entry: dict[str, Any], where: str) -> bytes:
    value, digest = entry.get("value"), entry.get("sha256")
    if (value is None) == (digest is None):
        raise ConfigError(f"{where}: expected either value or sha256")
    if digest is not None:
        if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-fA-F]{64}", digest):
            raise ConfigError(f"{where}: expected a sha256 of 64 hexadecimal digits")
        return bytes.fromhex(digest)
    if not isinstance(value, str) or not re.fullmatch(r"[!-~]*", value):
        raise ConfigError(f"{where}: expected a value of printable ASCII characters without blanks")
    if len(value) < MIN_TOKEN_CHARS:
        raise ConfigError(f"{where}: a value of {len(value)} characters, expected at least {MIN_TOKEN_CHARS}, made at random")
    return hashlib.sha256(value.encode()).digest()


def _join(roles: Iterable[Role]) -> str:
    return " and ".join(sorted(roles))
