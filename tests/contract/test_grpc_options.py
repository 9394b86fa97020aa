"""Every gRPC option that the sources set is one that the installed core knows: gRPC accepts unknown ones silently."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc._cython import cygrpc

from support.service_calls import make_config
from support.serving import HAS_SERVER, ServerThread
from touchline import ReplayClient

ROOT = Path(__file__).parents[2]
CLIENT = ("protos/src", "client/src")
PARTS = (*CLIENT, "server/src", "tests", "benchmarks") if HAS_SERVER else CLIENT  # the others are not in the oldest versions
SOURCES = sorted(path for part in PARTS for path in (ROOT / part).rglob("*.py"))
CORE = Path(cygrpc.__file__).read_bytes()


def options_of(source: str) -> Iterator[str]:
    """Yields the names of the options in a module: the first element of every pair that starts with a ``grpc.`` text."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Tuple) and len(node.elts) == 2 and isinstance(node.elts[0], ast.Constant):
            name = node.elts[0].value
            if isinstance(name, str) and name.startswith("grpc.") and name.islower():  # names of services have capitals
                yield name


def is_known(name: str) -> bool:
    """Returns whether the core has an option of exactly this name, not only one with this prefix."""
    return name.startswith("grpc.") and name.encode() + b"\0" in CORE


def test_options_of_all_sources_are_known_to_the_core() -> None:
    found = {name: path for path in SOURCES for name in options_of(path.read_text(encoding="utf-8"))}

    assert {"grpc.keepalive_time_ms", "grpc.ssl_target_name_override"} <= found.keys()
    assert not HAS_SERVER or "grpc.http2.min_ping_interval_without_data_ms" in found
    assert {name: str(path.relative_to(ROOT)) for name, path in found.items() if not is_known(name)} == {}


def test_options_that_server_and_client_come_to_set_are_known_to_the_core(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []

    def noting(make: Callable[..., Any]) -> Callable[..., Any]:
        def made(*arguments: Any, options: Iterable[tuple[str, Any]] = (), **others: Any) -> Any:
            given.extend(name for name, _ in options)
            return make(*arguments, options=options, **others)

        return made

    monkeypatch.setattr(grpc.aio, "server", noting(grpc.aio.server))
    monkeypatch.setattr(grpc, "insecure_channel", noting(grpc.insecure_channel))
    with ServerThread(make_config()) as server, ReplayClient(server.address) as client:
        client.info()

    assert {"grpc.use_local_subchannel_pool", *(["grpc.max_concurrent_streams"] if HAS_SERVER else [])} <= set(given)  # one of each side
    assert [name for name in given if not is_known(name)] == []


@pytest.mark.parametrize(
    "name",
    [
        "grpc.http2.min_recv_ping_interval_without_data_ms",  # the server once set only this one, and closed its clients' connections
        "grpc.keepalive_time",
        "grpc.keepalive_time_msec",
        "keepalive_time_ms",
        "grpc.max_recieve_message_length",
    ],
)
def test_option_misspelled_is_not_known(name: str) -> None:
    assert not is_known(name)
    assert list(options_of(f"options = [({name!r}, 5_000)]")) == [name] * name.startswith("grpc.")
