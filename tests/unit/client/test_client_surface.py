"""What the package shows: its names, its errors, what it refuses before any call, and what importing it loads."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from typing import Any

import grpc
import numpy as np
import pytest

import touchline
from touchline import InvalidArgumentError, ReplayClient, TouchlineError, errors
from touchline._actor.keys import Identity
from touchline._rpc.calls import ERROR_OF_REASON, ERROR_OF_STATUS
from touchline._rpc.channel import check_address
from touchline._rpc.convert import server_info_of
from touchline_protos.types.reasons import Reason
from touchline_protos.v1 import replay_pb2 as pb

NOWHERE = "127.0.0.1:1"


def test_export_list_is_frozen() -> None:
    assert touchline.__all__ == [
        "AccessDeniedError",
        "Batch",
        "BatchStream",
        "ClosedError",
        "ColumnInfo",
        "Counts",
        "DeadlineError",
        "EpisodeKey",
        "EpisodeResult",
        "EpisodeStream",
        "EpisodeWriter",
        "ForkError",
        "HeldCaller",
        "IncompatibleVersionError",
        "InvalidArgumentError",
        "InvalidEpisodeError",
        "KeyConflictError",
        "LoadError",
        "NotReadyError",
        "OverLimitError",
        "PriorityCounters",
        "RateInfo",
        "ReadyState",
        "ReplayClient",
        "ServerError",
        "ServerInfo",
        "ServerStatus",
        "SpoolError",
        "StatusWatch",
        "StoredEpisode",
        "TableInfo",
        "TlsConfig",
        "TlsError",
        "TooLargeError",
        "TouchlineError",
        "UnacknowledgedError",
        "UnauthenticatedError",
        "UnavailableError",
        "UnknownEpisodeError",
        "UnknownTableError",
        "WriterCounters",
        "__version__",
    ]
    assert all(hasattr(touchline, name) for name in touchline.__all__)


def test_import_loads_no_torch_no_tensordict_no_server() -> None:
    code = "import sys, touchline; print([m for m in ('torch', 'tensordict', 'touchline_server') if m in sys.modules])"

    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert found.stdout.strip() == "[]"


def test_import_turns_fork_support_on_unless_the_user_said_otherwise() -> None:
    code = "import os, touchline._rpc.fork as f; print(os.environ['GRPC_ENABLE_FORK_SUPPORT'], f.SUPPORTED)"
    plain = {name: value for name, value in os.environ.items() if name != "GRPC_ENABLE_FORK_SUPPORT"}

    found = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout.split()
        for env in (plain, plain | {"GRPC_ENABLE_FORK_SUPPORT": "0"})
    ]

    assert found == [["1", "True"], ["0", "False"]]


def test_every_error_class_is_exported_and_drawn_in_the_tree() -> None:
    classes = {
        name: kind
        for name, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, Exception) and kind.__module__ == errors.__name__
    }

    assert errors.__doc__ is not None
    for name, kind in classes.items():
        assert issubclass(kind, TouchlineError)
        assert name in touchline.__all__
        assert f" {name} " in f"{errors.__doc__} ".replace("\n", " ")


@pytest.mark.parametrize("code", list(grpc.StatusCode))
def test_every_status_code_is_mapped(code: grpc.StatusCode) -> None:
    assert issubclass(ERROR_OF_STATUS[code], TouchlineError)


def test_every_reason_of_the_contract_is_mapped() -> None:
    assert set(ERROR_OF_REASON) == set(Reason)


@pytest.mark.parametrize("address", ["localhost:50051", "10.0.0.7:1", "[::1]:50051", "unix:/run/replay.sock"])
def test_valid_address_is_kept(address: str) -> None:
    assert check_address(address) == address


@pytest.mark.parametrize(
    "address",
    ["", "localhost", "localhost:", ":50051", "host:0", "host:65536", "http://host:80", "unix:", "host:x", "::1:50051", 50051, None],
)
def test_invalid_address_is_refused(address: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=r"expected 'host:port', '\[ipv6\]:port' or 'unix:/path'"):
        ReplayClient(address)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"timeout_s": 0}, "timeout_s"),
        ({"timeout_s": float("nan")}, "timeout_s"),
        ({"timeout_s": float("inf")}, "timeout_s"),
        ({"timeout_s": None}, "timeout_s"),
        ({"actor": "x" * 129}, "actor"),
        ({"actor": 7}, "actor"),
        ({"client_id": ""}, "client_id"),
        ({"client_id": 7}, "client_id"),
        ({"client_id": "x" * 129}, "client_id"),
        ({"max_message_bytes": 10}, "max_message_bytes"),
    ],
)
def test_client_with_a_bad_argument_is_refused(arguments: dict[str, object], name: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"^{name}: .*expected"):
        ReplayClient(NOWHERE, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 2.5}, "batch_size"),
        ({"horizon": 0}, "horizon"),
        ({"horizon": 1 << 40}, "horizon"),
        ({"law": "uniform"}, "law"),
        ({"seed": 1 << 64}, "seed"),
        ({"wait_s": -1}, "wait_s"),
        ({"wait_s": float("inf")}, "wait_s"),
    ],
)
def test_sample_with_a_bad_argument_is_refused_without_a_call(arguments: dict[str, object], name: str) -> None:
    client = ReplayClient(NOWHERE)

    with pytest.raises(InvalidArgumentError, match=f"^{name}: "):
        client.sample(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"prefetch": 0}, "prefetch"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"timeout_s": float("inf")}, "timeout_s"),
        ({"device": "meta"}, "device"),
        ({"device": "nonsense"}, "device"),
        ({"reuse": True}, "reuse"),
        ({"reuse": True, "device": "cpu"}, "reuse"),
        ({"reuse": True, "as_numpy": True}, "reuse"),
    ],
)
def test_batches_with_a_bad_argument_is_refused_without_a_call(arguments: dict[str, object], name: str) -> None:
    client = ReplayClient(NOWHERE)

    with pytest.raises(InvalidArgumentError, match=f"^{name}: "):
        client.batches(**arguments)  # type: ignore[arg-type]


def test_add_with_something_other_than_a_key_is_refused_without_a_call() -> None:
    client = ReplayClient(NOWHERE)

    with pytest.raises(InvalidArgumentError, match=r"^key: \('me', 1, 0\), expected an EpisodeKey"):
        client.add({}, key=("me", 1, 0))  # type: ignore[arg-type]


def test_numpy_integers_are_whole_numbers() -> None:
    client = ReplayClient(NOWHERE)

    stream = client.batches(batch_size=np.int64(4), prefetch=np.int32(2))  # type: ignore[arg-type]

    stream.close()


def test_keys_of_one_client_differ_in_sequence_and_of_two_in_incarnation() -> None:
    one, other = Identity("robot"), Identity("robot")

    first, second, third = one.next_key(), one.next_key(), other.next_key()

    assert (first.client_id, first.sequence, second.sequence) == ("robot", 0, 1)
    assert first.incarnation == second.incarnation != third.incarnation
    assert 0 < first.incarnation < 1 << 63


def test_default_client_ids_differ() -> None:
    assert Identity().client_id != Identity().client_id


@pytest.mark.parametrize("config_toml", ["[server]\n[limits]\nmax_episode_bytes = 7\n", "[server]\nmax_episode_bytes = 7\n"])
def test_server_info_finds_the_episode_limit_of_present_and_earlier_servers(config_toml: str) -> None:
    info = server_info_of(pb.InfoResponse(config_toml=config_toml).SerializeToString())

    assert info.max_episode_bytes == 7
