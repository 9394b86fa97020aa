"""Tokens that are confined to tables, and the health of adding to each table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from support.failing_disk import Fault, failing_disk
from support.service_calls import DEADLINE_S, Caller, eventually, make_config, make_episode, refused
from touchline_protos.codec import encode_add_episode, encode_load
from touchline_protos.types.metadata import HEALTH_DETAIL_METADATA_KEY
from touchline_protos.v1 import replay_pb2 as pb
from touchline_server.service.app import ServerThread

TOKENS = """
[[token]]
name = "curator"
role = ["actor", "learner", "admin"]
tables = ["demos", "expert"]
value = "curator-token-012345"

[[token]]
name = "robot"
role = "actor"
tables = [""]
value = "robot-token-01234567"

[[token]]
name = "ops"
role = "admin"
value = "ops-token-0123456789"
"""


class Authenticated(Caller):
    """A caller with a token."""

    def __init__(self, address: str, token: str) -> None:
        super().__init__(address)
        metadata = (("authorization", f"Bearer {token}"),)

        class WithToken(grpc.UnaryUnaryClientInterceptor, grpc.StreamUnaryClientInterceptor, grpc.StreamStreamClientInterceptor):
            def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
                return continuation(details._replace(metadata=metadata), request)

            intercept_stream_unary = intercept_stream_stream = intercept_unary_unary

        self.channel = grpc.intercept_channel(self.channel, WithToken())
        self.stub = type(self.stub)(self.channel)


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    file = tmp_path / "tokens.toml"
    file.write_text(TOKENS, encoding="utf-8")
    file.chmod(0o600)
    with ServerThread(make_config(auth={"tokens_file": str(file)}, tables={"demos": {}, "online": {}})) as server:
        yield server.address


VERBS: dict[str, Callable[[Caller, str], Any]] = {
    "add": lambda caller, table: caller.add(encode_add_episode(make_episode(), table=table)),
    "load": lambda caller, table: caller.load(encode_load(make_episode(), table=table)),
    "sample": lambda caller, table: caller.sample(table=table),
    "stream": lambda caller, table: caller.stream().open(credits=1, table=table).read(1),
    "ready": lambda caller, table: caller.stub.Ready(pb.ReadyRequest(table=table), timeout=DEADLINE_S),
    "info": lambda caller, table: caller.stub.Info(pb.InfoRequest(table=table), timeout=DEADLINE_S),
    "clear": lambda caller, table: caller.stub.Clear(pb.ClearRequest(table=table), timeout=DEADLINE_S),
    "create": lambda caller, table: caller.stub.CreateTable(pb.CreateTableRequest(table=table), timeout=DEADLINE_S),
    "set": lambda caller, table: caller.stub.SetTable(pb.SetTableRequest(table=table, config_toml="rate = {}"), timeout=DEADLINE_S),
    "drop": lambda caller, table: caller.stub.DropTable(pb.DropTableRequest(table=table), timeout=DEADLINE_S),
}


@pytest.mark.parametrize("table", ["", "online", "nowhere"])
@pytest.mark.parametrize("verb", VERBS)
def test_confined_token_is_refused_for_every_other_table_whether_it_exists_or_not(verb: str, table: str, address: str) -> None:
    with Authenticated(address, "curator-token-012345") as curator, Authenticated(address, "ops-token-0123456789") as ops:
        ops.add(encode_add_episode(make_episode(), table="online"))
        refusal = refused(VERBS[verb], curator, table)
        left = {found.table: found.counts.episodes_added for found in ops.stub.ListTables(pb.ListTablesRequest()).tables}

    assert (refusal.code.name, refusal.reason) == ("PERMISSION_DENIED", "permission-denied")
    expected = f"table {table!r}" if table else "the default table"
    assert refusal.details == f"the token 'curator' is for table 'demos' and table 'expert', expected one for {expected}"
    assert left == {"": 0, "demos": 0, "online": 1}


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in ("create", "drop")])
def test_confined_token_may_use_its_tables(verb: str, address: str) -> None:
    with Authenticated(address, "curator-token-012345") as curator:
        VERBS["add"](curator, "demos")

        assert VERBS[verb](curator, "demos") is not None


def test_confined_token_sees_its_tables_only(address: str) -> None:
    with Authenticated(address, "curator-token-012345") as curator, Authenticated(address, "robot-token-01234567") as robot:
        missing = refused(VERBS["info"], curator, "expert")
        VERBS["create"](curator, "expert")
        listed = [table.table for table in curator.stub.ListTables(pb.ListTablesRequest()).tables]
        info = VERBS["info"](curator, "demos")
        VERBS["drop"](curator, "expert")
        of_the_robot = [table.table for table in robot.stub.ListTables(pb.ListTablesRequest()).tables]

    assert (missing.reason, missing.details) == ("unknown-table", "table: 'expert' does not exist, expected 'demos'")
    assert listed == [table.table for table in info.tables] == ["demos", "expert"]
    assert of_the_robot == [""]
    assert "online" not in info.config_toml


# Health


def test_health_of_adding_is_that_of_each_table_and_of_all(tmp_path: Path) -> None:
    config = make_config(storage={"device": "cpu", "data_dir": str(tmp_path), "durability": "sync"}, tables={"demos": {}, "online": {}})
    adding = "touchline.v1.Replay/AddEpisode"
    with failing_disk() as disk, ServerThread(config) as server, Caller(server.address) as caller:
        health = health_pb2_grpc.HealthStub(caller.channel)

        def state(name: str) -> tuple[str, str]:
            answer, call = health.Check.with_call(health_pb2.HealthCheckRequest(service=name), timeout=DEADLINE_S)
            detail = dict(call.trailing_metadata() or ()).get(HEALTH_DETAIL_METADATA_KEY, "")
            return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status), detail

        before = [state(name)[0] for name in ("", adding, f"{adding}/demos", f"{adding}/online")]
        disk.fail(Fault("sync", "-wal"))
        assert refused(VERBS["add"], caller, "demos").reason == "storage-failed"
        disk.mend()
        eventually(lambda: state(f"{adding}/demos")[0] == "NOT_SERVING", "health follows", every_s=0.01)
        after = {name: state(name) for name in ("", adding, f"{adding}/demos", f"{adding}/online")}
        VERBS["add"](caller, "online")
        VERBS["drop"](caller, "demos")
        eventually(lambda: state(adding)[0] == "SERVING", "health follows the drop", every_s=0.01)
        gone = refused(state, f"{adding}/demos")
        VERBS["create"](caller, "expert")
        eventually(lambda: state(f"{adding}/expert")[0] == "SERVING", "health follows the creation", every_s=0.01)

    assert before == ["SERVING"] * 4
    assert [after[name][0] for name in ("", adding, f"{adding}/online", f"{adding}/demos")] == [
        *("SERVING", "NOT_SERVING", "SERVING", "NOT_SERVING")
    ]
    assert after[adding][1].startswith("adding is refused: table 'demos': ")
    assert gone.code is grpc.StatusCode.NOT_FOUND
