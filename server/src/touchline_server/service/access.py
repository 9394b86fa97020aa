"""Access: bearer tokens with roles, and the addresses at which a server without TLS may listen."""

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
from pathlib import Path
from typing import Any

from touchline_protos.types.metadata import TOKEN_METADATA_KEY
from touchline_server.config.addresses import is_loopback
from touchline_server.config.sections import check_table_name
from touchline_server.config.settings import Config
from touchline_server.config.source import ConfigError, why_unreadable
from touchline_server.errors import AccessDeniedError, UnauthenticatedError

TOKENS_VARIABLE = "TOUCHLINE_SERVER_TOKENS"
"""Environment variable with tokens ``ROLE:NAME:VALUE``, separated by commas or blanks; several roles are written ``actor+learner``."""

MIN_TOKEN_CHARS = 16
"""Minimum length of a token's value; a shorter one could be guessed."""

MAX_TOKENS = 1024
"""Maximum number of tokens, since every call is compared with all of them."""


class Role(enum.StrEnum):
    """What a token allows its owner to do."""

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
    "UpdatePriorities": frozenset({Role.LEARNER}),
    # Actors and learners wait for each other, and need the limits and the row convention. Neither answer contains an episode or a secret.
    "Ready": _BOTH,
    "Info": _BOTH,
    "ListTables": _BOTH,
    # Names every actor and learner, with addresses: more than an actor needs.
    "Status": frozenset({Role.LEARNER}),
    "Clear": frozenset(),
    "CreateTable": frozenset(),
    "SetTable": frozenset(),
    "DropTable": frozenset(),
}
"""Roles, besides admin, that may call each method of ``touchline.v1.Replay``. All other methods, and reflection, are for admins only."""

OPEN_SERVICE = "/grpc.health.v1.Health/"
"""Prefix of the methods that need no token: a supervisor that starts and restarts servers has none."""

_SERVICE = "/touchline.v1.Replay/"


@dataclass(frozen=True, slots=True)
class Token:
    """A token that the server accepts. Only a digest of its value is kept."""

    name: str
    """Name of its owner, for errors and logs."""
    roles: frozenset[Role]
    digest: bytes = field(repr=False)
    """SHA-256 digest of its value."""
    tables: frozenset[str] | None = None
    """Names of the tables that it is confined to, the default table's being empty; None: it may use every table."""


_OWN: tuple[tuple[str, Callable[[Token], object]], ...] = (("name", lambda token: token.name), ("value", lambda token: token.digest))
"""Attributes that must differ between any two tokens."""


class Access:
    """Decides whether a call is allowed. Thread-safe.

    Args:
        tokens: tokens that the server accepts.
    """

    def __init__(self, tokens: Iterable[Token]) -> None:
        self._tokens = tuple(tokens)
        self.confines = any(token.tables is not None for token in self._tokens)
        """Whether any token is confined to tables."""

    def check(self, method: str, metadata: Iterable[tuple[str, str | bytes]]) -> None:
        """Returns if the call is allowed.

        Args:
            method: full name of the method, ``/PACKAGE.SERVICE/METHOD``.
            metadata: the call's metadata.

        Raises:
            UnauthenticatedError: the call has no token, or a token that the server does not know.
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
            expected = " or ".join(sorted(allowed | {Role.ADMIN}))
            raise AccessDeniedError(f"the token {token.name!r} is for {_join(token.roles)}, expected one for {expected} to call {name}")

    def check_table(self, table: str, metadata: Iterable[tuple[str, str | bytes]]) -> frozenset[str] | None:
        """Returns if a call may use a table of this name, which need not exist: with the names of all that it may use, None for every one.

        Raises:
            AccessDeniedError: the call's token is confined to other tables.
        """
        token = self._token_of(metadata)
        if token.tables is not None and table not in token.tables:
            raise AccessDeniedError(f"the token {token.name!r} is for {_tables_text(token.tables)}, expected one for {_table_text(table)}")
        return token.tables

    def tables_of(self, metadata: Iterable[tuple[str, str | bytes]]) -> frozenset[str] | None:
        """Returns the names of the tables that a call may use; None: every table."""
        return self._token_of(metadata).tables

    def describe(self) -> str:
        """Returns the tokens' names, roles and tables, for the log."""
        return ", ".join(
            f"{token.name} ({_join(token.roles)}{'' if token.tables is None else f', {_tables_text(token.tables)}'})"
            for token in self._tokens
        )

    def _token_of(self, metadata: Iterable[tuple[str, str | bytes]]) -> Token:
        given = [value for key, value in metadata if key == TOKEN_METADATA_KEY]
        if not given:
            raise UnauthenticatedError("no token, expected the metadata 'authorization: Bearer TOKEN'")
        text = given[0] if isinstance(given[0], str) else given[0].decode("latin-1")
        scheme, _, value = text.partition(" ")
        digest = hashlib.sha256(value.strip().encode()).digest()
        # Every token is compared, each in the same time, so that the duration reveals nothing.
        matching = [token for token in self._tokens if hmac.compare_digest(token.digest, digest)]
        if len(given) > 1 or scheme.lower() != "bearer" or not matching:
            raise UnauthenticatedError("the token is not one of this server's, expected 'authorization: Bearer TOKEN' with one that is")
        return matching[0]


def read_access(config: Config, environment: Mapping[str, str] = os.environ) -> Access | None:
    """Returns the access rules; None if no tokens are configured, so that anyone may call everything.

    Raises:
        ConfigError: the file of tokens cannot be read, can be read by others, or is malformed, or the variable is malformed.
    """
    tokens = list(_read_file(Path(config.auth.tokens_file))) if config.auth.tokens_file else []
    variable = environment.get(TOKENS_VARIABLE, "").strip()
    if variable:
        tokens += _read_variable(variable)
    if not tokens:
        if config.auth.tokens_file:
            raise ConfigError(f"auth.tokens_file: {config.auth.tokens_file} contains no [[token]], expected at least one")
        return None
    if len(tokens) > MAX_TOKENS:
        raise ConfigError(f"auth: {len(tokens)} tokens, expected at most {MAX_TOKENS}")
    for what, of in _OWN:
        values = [of(token) for token in tokens]
        repeated = next((token.name for token, value in zip(tokens, values, strict=True) if values.count(value) > 1), None)
        if repeated is not None:
            raise ConfigError(f"auth: the token {repeated!r} and another have the same {what}, expected a different one for each")
    return Access(tokens)


def check_exposure(config: Config, access: Access | None) -> str | None:
    """Returns a warning if others can reach the server and read or change its data; None if they cannot.

    Raises:
        ConfigError: tokens would be sent unencrypted.
    """
    if config.server.unix_socket:
        return None
    return _exposure(config, access, key="server.host", host=config.server.host, may="read, add and clear episodes")


def check_http_exposure(config: Config, access: Access | None) -> str | None:
    """Returns a warning if others can reach the web page and read episodes; None if they cannot.

    Raises:
        ConfigError: tokens would be sent unencrypted.
    """
    return _exposure(config, access, key="http.host", host=config.http.host, may="see counts and episodes")


def _exposure(config: Config, access: Access | None, *, key: str, host: str, may: str) -> str | None:
    if is_loopback(host):
        return None
    if not config.tls.cert:
        if access is None:
            return (
                f"listening on {host} without TLS and without tokens: any process that reaches the port can {may}. "
                f"See tls.cert and auth.tokens_file, or {key} = '127.0.0.1'"
            )
        if not config.auth.allow_plaintext:
            raise ConfigError(
                f"{key}: {host!r} without tls.cert, expected TLS, because tokens would be sent unencrypted; set tls.cert and "
                "tls.key, listen on 127.0.0.1, or set auth.allow_plaintext = true if the network itself is private"
            )
        return f"listening on {host} without TLS: anyone who can read the network's traffic sees tokens and episodes (auth.allow_plaintext)"
    if access is None and not config.tls.client_ca:
        return (
            f"listening on {host} without tokens and client certificates: any process that reaches the port can {may}. "
            "See auth.tokens_file and tls.client_ca"
        )
    return None


def _read_file(path: Path) -> Iterator[Token]:
    where = f"auth.tokens_file: {path}"
    try:
        with path.open("rb") as file:
            # The mode of the open file: a check by name could be of another file than the one that is read.
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if mode & 0o077:
                raise ConfigError(f"{where} has mode {mode:04o}, expected a file that only its owner can read: chmod 600 {path}")
            tables = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"{where}: {why_unreadable(error)}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        # The parser's own message may quote a token, so only the position at its end is used.
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
    """Returns the token that an entry describes. No error quotes its value."""
    unknown = sorted(entry.keys() - {"name", "role", "tables", "value", "sha256"})
    if unknown:
        raise ConfigError(
            f"{where}: unknown key {unknown[0]!r}, expected name, role, value or sha256, and tables if it is confined to some"
        )
    name, role = entry.get("name"), entry.get("role")
    if not isinstance(name, str) or not re.fullmatch(r"[\w.@-]{1,64}", name):
        raise ConfigError(f"{where}: expected a name of 1 to 64 letters, digits, '.', '-', '_' and '@'")
    roles = [role] if isinstance(role, str) else role
    if not isinstance(roles, list) or not roles or not all(one in list(Role) for one in roles):
        raise ConfigError(f"{where} ({name}): expected a role, or several, of {', '.join(Role)}")
    digest, tables = _digest(entry, f"{where} ({name})"), _tables(entry, f"{where} ({name})")
    return Token(name, frozenset(Role(one) for one in roles), digest, tables)


def _tables(entry: dict[str, Any], where: str) -> frozenset[str] | None:
    names = entry.get("tables")
    if names is None:
        return None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{where}: tables: {names!r}, expected a list of names of tables; the default table's name is empty")
    for name in names:
        try:
            if name:
                check_table_name(name)
        except ValueError as error:
            raise ConfigError(f"{where}: tables: {name!r}, {error}") from None
    return frozenset(names)


def _table_text(name: str) -> str:
    return f"table {name!r}" if name else "the default table"


def _tables_text(names: frozenset[str]) -> str:
    return " and ".join(_table_text(name) for name in sorted(names))


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
        raise ConfigError(f"{where}: a value of {len(value)} characters, expected at least {MIN_TOKEN_CHARS} random ones")
    return hashlib.sha256(value.encode()).digest()


def _join(roles: Iterable[Role]) -> str:
    return " and ".join(sorted(roles))
