"""The server's certificates: what is wrong with them is said at its start."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import grpc
import pytest

from support.certificates import Authority
from touchline_server.config.sections import TlsConfig
from touchline_server.config.settings import ConfigError
from touchline_server.service.tls import open_channel, server_credentials


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def tls(cert: Path, key: Path, client_ca: Path | str = "") -> TlsConfig:
    return TlsConfig(cert=str(cert), key=str(key), client_ca=str(client_ca))


def test_no_certificate_is_no_tls() -> None:
    assert server_credentials(TlsConfig()) is None


def test_good_files_are_taken(authority: Authority) -> None:
    pair = authority.issue("server", "localhost")

    assert isinstance(server_credentials(tls(*pair)), grpc.ServerCredentials)
    assert isinstance(server_credentials(tls(*pair, authority.cert)), grpc.ServerCredentials)


def test_missing_file_is_named_with_its_key(authority: Authority, tmp_path: Path) -> None:
    pair, none = authority.issue("server"), tmp_path / "none.pem"

    for config, key in ((tls(none, pair.key), "cert"), (tls(pair.cert, none), "key"), (tls(*pair, none), "client_ca")):
        with pytest.raises(ConfigError, match=rf"tls\.{key}: .*none\.pem: No such file or directory"):
            server_credentials(config)


def test_file_that_is_no_certificate_or_key_is_named(authority: Authority, tmp_path: Path) -> None:
    pair, other = authority.issue("server"), tmp_path / "other.pem"
    other.write_bytes(b"not PEM at all")

    for config, words in (
        (tls(other, pair.key), r"tls\.cert: .*other\.pem: expected a certificate in PEM form"),
        (tls(pair.key, pair.key), r"tls\.cert: .*: expected a certificate in PEM form"),
        (tls(pair.cert, other), r"tls\.key: .*other\.pem: expected a private key in PEM form"),
        (tls(pair.cert, pair.cert), r"tls\.key: .*: expected a private key in PEM form"),
        (tls(*pair, other), r"tls\.client_ca: .*other\.pem: expected a certificate in PEM form"),
    ):
        with pytest.raises(ConfigError, match=words):
            server_credentials(config)


def test_expired_certificate_says_since_when(authority: Authority) -> None:
    pair = authority.issue("old", starts=timedelta(days=-3), ends=timedelta(days=-1))
    good = authority.issue("server")

    with pytest.raises(ConfigError, match=r"tls\.cert: .*old\.pem: CN=old expired on \d{4}-\d\d-\d\d \d\d:\d\d UTC; renew it"):
        server_credentials(tls(*pair))
    with pytest.raises(ConfigError, match=r"tls\.client_ca: .*old\.pem: CN=old expired on"):
        server_credentials(tls(*good, pair.cert))


def test_certificate_of_the_future_asks_for_the_clock(authority: Authority) -> None:
    pair = authority.issue("new", starts=timedelta(hours=1), ends=timedelta(hours=2))

    with pytest.raises(ConfigError, match=r"CN=new is not valid before .* UTC; is this machine's clock right\?"):
        server_credentials(tls(*pair))


def test_key_of_another_certificate_is_refused(authority: Authority) -> None:
    one, other = authority.issue("one"), authority.issue("other")

    with pytest.raises(ConfigError, match=r"tls\.key: .*other\.key is not the key of the certificate in .*one\.pem"):
        server_credentials(tls(one.cert, other.key))


def test_key_with_a_passphrase_is_refused(authority: Authority) -> None:
    pair = authority.issue("locked", passphrase=b"open sesame")

    with pytest.raises(ConfigError, match=r"tls\.key: .*locked\.key is encrypted, expected a key without a passphrase"):
        server_credentials(tls(*pair))


def test_channel_wants_all_that_goes_together(authority: Authority) -> None:
    pair = authority.issue("client")

    for ca, cert, key in ((None, *pair), (authority.cert, pair.cert, None), (authority.cert, None, pair.key)):
        with pytest.raises(ConfigError, match="expected together with"):
            open_channel("127.0.0.1:1", ca=ca, cert=cert, key=key, server_name=None)
