"""Status on a real server: what it reports is what real clients did, and each verdict is provoked."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.service_calls import DEADLINE_S, SERVICE, Caller, eventually, make_config, refused
from touchline import EpisodeWriter, ReplayClient
from touchline.errors import (
    AccessDeniedError,
    InvalidArgumentError,
    InvalidEpisodeError,
    NotReadyError,
    UnauthenticatedError,
    UnavailableError,
    UnknownTableError,
)
from touchline.types import FlowStatus, ServerStatus, ServingState, TableStatus, Transport, Verdict, WaitCause, WaitStatus
from touchline_protos.codec.status import status_of_message, status_to_message
from touchline_protos.v1 import replay_pb2 as pb
from touchline_server.durability import restore as restoring
from touchline_server.service import ingest
from touchline_server.service.app import ServerThread
from touchline_server.tables.table import Table

TABLES = {"demos": {}, "online": {}}
BATCH, HORIZON = 8, 3
ROW_BYTES = 4 * (4 + 2 + 1)


def episode(rows: int = 20, *, reward: float = 1.0) -> dict[str, np.ndarray]:
    """An episode whose return is reward * (rows - 1); row 0's reward is undefined."""
    columns = {name: np.ones((rows, size), np.float32) for name, size in (("obs", 4), ("action", 2))}
    columns["reward"] = np.full(rows, reward, np.float32)
    columns["action"][0] = columns["reward"][0] = np.nan
    return columns


@pytest.fixture
def server() -> Iterator[ServerThread]:
    with ServerThread(make_config(tables=TABLES)) as running:
        yield running


@pytest.fixture
def client(server: ServerThread) -> Iterator[ReplayClient]:
    with ReplayClient(server.address, actor="left-foot", as_numpy=True) as made:
        yield made


def table_of(status: ServerStatus, name: str = "") -> TableStatus:
    return next(table for table in status.tables if table.table == name)


def since_start(status: ServerStatus, name: str = "") -> FlowStatus:
    return next(flow for flow in table_of(status, name).flows if flow.window_s == 0)


def delivered(flow: FlowStatus) -> dict[Transport, tuple[int, int, int]]:
    return {one.transport: (one.batches, one.slices, one.rows) for one in flow.delivered}


def until(client: ReplayClient, condition: Callable[[ServerStatus], bool]) -> ServerStatus:
    """Returns the first status that meets a condition."""
    last: list[ServerStatus] = []

    def holds() -> bool:
        last[:] = [client.status()]
        return condition(last[0])

    eventually(holds, lambda: f"status: {last}", every_s=0.05)
    return last[0]


# What was done


def test_status_of_adds_by_table_and_actor_is_what_was_added(client: ReplayClient) -> None:
    for version in range(3):
        client.add(episode(20, reward=version), policy_version=version)
    client.add(episode(5), actor="right-foot")
    client.load([episode(6), episode(7)], table="demos", actor="curator")

    status = client.status(newest_episodes=2)

    flow, demos = since_start(status), since_start(status, "demos")
    assert (flow.episodes_in, flow.rows_in, flow.bytes_in) == (4, 65, 65 * ROW_BYTES)
    assert (demos.episodes_in, demos.rows_in, demos.bytes_in) == (2, 13, 13 * ROW_BYTES)
    actors = {(one.table, one.name): one for one in status.actors}
    assert set(actors) == {("", "left-foot"), ("", "right-foot"), ("demos", "curator")}
    left = actors["", "left-foot"]
    assert (left.episodes, left.rows, left.mean_rows, left.mean_reward_sum, left.policy_version) == (3, 60, 20.0, 19.0, 2)
    assert left.address.startswith("127.0.0.1:")
    assert left.client_version.startswith("touchline/")
    assert 0 <= left.last_episode_age_s < DEADLINE_S
    newest = table_of(status).newest
    assert [(one.episode_id, one.actor, one.rows, one.reward_sum) for one in newest] == [
        (3, "right-foot", 5, 4.0),
        (2, "left-foot", 20, 38.0),
    ]
    assert (table_of(status).newest_policy_version, table_of(status).mean_stored_policy_version) == (2, 0.75)


def test_status_of_batches_by_transport_is_what_learners_took(client: ReplayClient) -> None:
    client.add(episode(50))
    client.add(episode(50), table="demos")
    for _ in range(3):
        client.sample()
    for ring, count, mix in ((True, 40, None), (False, 12, None), (False, 4, {"": 0.5, "demos": 0.5})):
        with client.batches(ring=ring, prefetch=4, **({"mix": mix} if mix else {})) as batches:
            for _ in range(count):
                next(batches)
            transport = batches.transport
            assert transport == ("ring" if ring else "stream")

    # A ring's last batches are counted by its thread, which ends a moment after the stream.
    status = until(
        client,
        lambda status: len(status.learners) == 1 and delivered(since_start(status)).get(Transport.RING, (0,))[0] >= 40,
    )

    of_default, of_demos = delivered(since_start(status)), delivered(since_start(status, "demos"))
    assert of_default[Transport.UNARY] == (3, 3 * BATCH, 3 * BATCH * (HORIZON + 1))
    # What was taken is exact on a ring; a stream's frames count once they are written, ahead of their use.
    assert of_default[Transport.RING] == (40, 40 * BATCH, 40 * BATCH * (HORIZON + 1))
    batches_sent, slices, rows = of_default[Transport.STREAM]
    mixed = of_demos[Transport.STREAM]
    assert mixed[0] >= 4
    assert mixed[1] == mixed[0] * BATCH // 2
    assert batches_sent - mixed[0] >= 12
    assert slices == (batches_sent - mixed[0]) * BATCH + mixed[1]
    assert rows == slices * (HORIZON + 1)


def test_status_of_learners_is_who_is_connected(client: ReplayClient) -> None:
    client.add(episode(50))
    with client.batches(batch_size=4, horizon=2) as by_ring, client.batches(ring=False) as by_stream:
        for _ in range(20):
            next(by_ring), next(by_stream)

        status = until(client, lambda status: sum(one.batches for one in status.learners) >= 39)

        learners = {one.transport: one for one in status.learners}
        assert set(learners) == {Transport.RING, Transport.STREAM}
        ring, stream = learners[Transport.RING], learners[Transport.STREAM]
        assert (ring.tables, ring.batch_size, ring.horizon) == (("",), 4, 2)
        assert (stream.batch_size, stream.horizon) == (BATCH, HORIZON)
        assert ring.pending_bytes > 0 and status.server.ring_bytes > 0
        # The learner counts its own waits: each batch that it took is in one bucket.
        assert ring.wait.count == 20 == sum(ring.wait.buckets)
        assert stream.wait.count == stream.batches
        assert status.server.streams == 3  # with this call
        assert status.server.connections == 1
    until(client, lambda status: not status.learners)


def test_status_says_why_a_learner_has_no_ring() -> None:
    with ServerThread(make_config(ring={"max_rings": 0})) as server, ReplayClient(server.address, as_numpy=True) as client:
        client.add(episode())
        with client.batches() as batches:
            next(batches)
            (learner,) = client.status().learners

    assert (learner.transport, learner.ring_refused) == (Transport.STREAM, "ring.max_rings is 0: rings are turned off")


def test_refusals_are_counted_by_reason_and_table_with_the_last_message(client: ReplayClient) -> None:
    client.add(episode())
    wrong = episode() | {"reward": np.ones((20, 2), np.float32)}
    for table in ("", "demos"):
        client.add(episode(), table=table)
        with pytest.raises(InvalidEpisodeError):
            client.add(wrong, table=table, actor="clumsy")
    with pytest.raises(InvalidEpisodeError):
        client.add(wrong, actor="clumsy")
    with pytest.raises(UnknownTableError):
        client.counts(table="nowhere")

    status = client.status()

    found = {(one.reason, one.table): (one.count, one.last_who) for one in status.refusals}
    assert found["invalid-episode", ""] == (2, "clumsy")
    assert found["invalid-episode", "demos"] == (1, "clumsy")
    assert found["unknown-table", None][0] == 1
    assert next(one for one in status.refusals if one.table == "").last_message.startswith("reward: shape (2,)")
    assert {one.table: one.refused for one in status.actors if one.name == "clumsy"} == {"": 2, "demos": 1}
    methods = {one.method: (one.latency.count, one.failed) for one in status.server.methods}
    assert methods["AddEpisode"] == (6, 3)


def test_duplicates_are_counted_by_actor(client: ReplayClient) -> None:
    key = client.next_key()
    for _ in range(3):
        client.add(episode(), key=key)

    (actor,) = client.status().actors

    assert (actor.episodes, actor.duplicates) == (1, 2)


def test_actors_beyond_the_named_ones_are_summed(server: ServerThread, client: ReplayClient) -> None:
    for number in range(150):
        client.add(episode(5), actor=f"actor {number}")

    actors = client.status().actors

    named, others = actors[:-1], actors[-1]
    assert [one.name for one in named] == [f"actor {number}" for number in range(149, 21, -1)]
    assert (others.others, others.episodes, others.rows, others.mean_reward_sum) == (22, 22, 110, 4.0)


def test_actor_with_a_spool_reports_its_backlog(client: ReplayClient, tmp_path: Path) -> None:
    with EpisodeWriter(client, spool_dir=tmp_path) as writer:
        for row in range(6):
            filled = {} if not row else {"action": np.ones(2, np.float32), "reward": np.float32(1)}
            writer.append({"obs": np.ones(4, np.float32)} | filled)
        writer.end_episode()
        writer.flush(timeout_s=DEADLINE_S)

    (actor,) = client.status().actors

    assert actor.episodes == 1
    assert actor.spool_episodes == 0
    assert actor.spool_bytes is not None and actor.spool_bytes > 0


def test_table_that_comes_and_goes_has_a_status_while_it_exists(client: ReplayClient) -> None:
    client.create_table("new")
    client.add(episode(), table="new")

    status = client.status()
    client.drop_table("new")

    assert since_start(status, "new").rows_in == 20
    assert [(one.table, one.episodes) for one in status.actors] == [("new", 1)]
    after = client.status()
    assert "new" not in {table.table for table in after.tables}
    assert after.actors == ()


# Verdicts


def test_verdict_is_idle_then_balanced(client: ReplayClient) -> None:
    idle = table_of(client.status())
    client.add(episode())
    client.sample()

    balanced = table_of(client.status())

    assert (idle.verdict, balanced.verdict) == (Verdict.IDLE, Verdict.BALANCED)
    assert balanced.verdict_text.startswith("In the last minute learners waited")


@pytest.mark.parametrize(
    ("keys", "rows", "cause", "words"),
    [
        ({}, 0, WaitCause.DATA, "mostly for something to sample"),
        ({"rate": {"min_steps": 1000}}, 20, WaitCause.RATE, "mostly for the rate limit, which waits for actors to add"),
    ],
)
def test_verdict_is_that_learners_wait(keys: dict[str, Any], rows: int, cause: WaitCause, words: str) -> None:
    with ServerThread(make_config(**keys)) as server, ReplayClient(server.address, as_numpy=True) as client:
        if rows:
            client.add(episode(rows))
        with ThreadPoolExecutor(1) as pool, client.batches(ring=False) as batches:
            waiting = pool.submit(next, batches, None)
            status = until(client, lambda status: table_of(status).verdict == Verdict.LEARNERS_WAIT)
            table = table_of(status)
            batches.close()
            waiting.result(DEADLINE_S)

    assert words in table.verdict_text
    wait = next(one for one in table.waits if one.learners and one.cause == cause)
    assert (wait.waiting, table.learners_waited_s) == (1, pytest.approx(sum(one.waited_s for one in table.waits if one.learners)))
    assert status.learners[0].waits_share > 0.1


def test_verdict_is_that_actors_wait_for_the_rate_limit() -> None:
    rate = {"samples_per_insert": 1.0, "tolerance": 10.0}
    with ServerThread(make_config(rate=rate)) as server, ReplayClient(server.address, as_numpy=True) as client:
        client.add(episode(20))
        client.add(episode(20))
        with ThreadPoolExecutor(1) as pool:
            held = pool.submit(client.add, episode(20))
            table = table_of(until(client, lambda status: table_of(status).verdict == Verdict.ACTORS_WAIT))
            while not held.done():
                with suppress(NotReadyError):  # taken too often already
                    client.sample(batch_size=1)
            held.result(DEADLINE_S)

    assert "mostly for the rate limit, which waits for learners to sample" in table.verdict_text
    assert table.rate is not None and table.rate.adds_held == 1
    assert next(one for one in table.waits if one.cause == WaitCause.RATE and not one.learners).waiting == 1


def test_add_that_waits_for_another_one_counts_while_it_waits(client: ReplayClient, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, submit = threading.Event(), Table.submit

    def submit_later(table: Table, one: Any) -> Any:
        assert go_on.wait(DEADLINE_S)
        return submit(table, one)

    def storing(status: ServerStatus) -> WaitStatus:
        return next((wait for wait in table_of(status).waits if wait.cause is WaitCause.STORING), WaitStatus())

    monkeypatch.setattr(ingest, "MAX_INLINE_BYTES", 0)
    monkeypatch.setattr(Table, "submit", submit_later)
    with ThreadPoolExecutor(1) as pool:
        adding = pool.submit(client.add, episode())
        try:
            first = storing(until(client, lambda status: storing(status).waiting == 1))
            later = storing(until(client, lambda status: storing(status).total_s >= first.total_s + 0.2))
        finally:
            go_on.set()
        adding.result(DEADLINE_S)
    over = client.status()

    assert later.waiting == 1
    assert storing(over).waiting == 0
    assert storing(over).total_s >= later.total_s
    assert [one.name for one in over.actors] == ["left-foot"]
    assert over.actors[0].waited_s == pytest.approx(storing(over).total_s, abs=0.1)


def test_verdict_is_that_the_store_is_full(tmp_path: Path) -> None:
    config = make_config(storage={"device": "cpu", "data_dir": str(tmp_path)})
    with ServerThread(config) as server, ReplayClient(server.address) as client:
        client.add(episode())
        committer = server.buffer.registry.default.committer
        assert committer is not None
        committer.database_journal.note_full(1 << 60)  # more than will be free
        table = table_of(client.status())

    assert table.verdict == Verdict.STORE_FULL
    assert table.verdict_text.startswith("Adding is refused: storage.data_dir is on a disk that is full")
    assert table.durability is not None and table.durability.state == "full"


# The durable store


@pytest.mark.parametrize("durability", ["sync", "batch", "memory"])
def test_status_of_a_durable_store_and_after_a_restart(durability: str, tmp_path: Path) -> None:
    config = make_config(storage={"device": "cpu", "data_dir": str(tmp_path), "durability": durability})
    with ServerThread(config) as server, ReplayClient(server.address, actor="x") as client:
        for _ in range(3):
            client.add(episode())
        status = until(client, lambda status: (table_of(status).durability or pytest.fail()).pending_episodes == 0)
        (actor,) = status.actors
    with ServerThread(config) as server, ReplayClient(server.address) as client:
        restarted = client.status(newest_episodes=1)

    before = table_of(status).durability
    assert before is not None and (before.mode, before.state, before.restored) == (durability, "ok", True)
    assert before.file_bytes > 3 * 20 * ROW_BYTES and before.disk_free_bytes > 0
    assert before.sync.count >= (3 if durability == "sync" else 1) and before.sync.sum_s > 0
    assert (actor.episodes, since_start(status).rows_in) == (3, 60)
    after, flow = table_of(restarted), since_start(restarted)
    assert (after.counts.steps_added, flow.rows_in, flow.bytes_in, restarted.actors) == (60, 0, 0, ())
    assert after.durability is not None and (after.durability.restored_rows, after.durability.restore_rows) == (60, 60)
    assert (after.oldest_stored_s, after.newest[0].age_s) == (-1.0, -1.0)


def test_status_is_answered_while_the_store_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(storage={"device": "cpu", "data_dir": str(tmp_path)}, server={"unix_socket": str(tmp_path / "s")})
    with ServerThread(config) as server, ReplayClient(server.address) as client:
        client.add(episode())
    reading, go_on = threading.Event(), threading.Event()
    restore = restoring.restore

    def slow(*arguments: Any, **options: Any) -> Any:
        reading.set()
        assert go_on.wait(DEADLINE_S)
        return restore(*arguments, **options)

    monkeypatch.setattr(restoring, "restore", slow)
    server = ServerThread(config)
    with ThreadPoolExecutor(1) as pool, ReplayClient(f"unix:{tmp_path / 's'}") as client:
        starting = pool.submit(server.__enter__)
        assert reading.wait(DEADLINE_S)
        try:
            status = client.status()
        finally:
            go_on.set()
            starting.result(DEADLINE_S)
        after = client.status()
        server.__exit__(None, None, None)

    assert status.server.state == ServingState.RESTORING
    assert table_of(status).durability is not None and not table_of(status).durability.restored
    assert table_of(status).verdict == Verdict.UNSPECIFIED
    assert (after.server.state, table_of(after).counts.steps_stored) == (ServingState.SERVING, 20)


# Watching


def test_watch_shows_draining_and_goes_on_after_a_restart(tmp_path: Path) -> None:
    config = make_config(server={"unix_socket": str(tmp_path / "s")})
    seen: list[ServingState] = []
    with ReplayClient(f"unix:{tmp_path / 's'}") as client, client.watch_status(0.5) as watch:
        with ServerThread(config):
            seen.append(next(watch).server.state)
        with pytest.raises(UnavailableError):
            while True:
                seen.append(next(watch).server.state)
        with ServerThread(config):
            eventually(lambda: _shows(watch), "the watch after a restart", every_s=0.05)
            watch.close()
        assert list(watch) == []

    assert seen[0] == ServingState.SERVING
    assert seen[-1] == ServingState.DRAINING


def _shows(watch: Any) -> bool:
    try:
        return bool(next(watch).server.state == ServingState.SERVING)
    except UnavailableError:
        return False


def test_status_under_load_counts_every_add(server: ServerThread, client: ReplayClient) -> None:
    with ThreadPoolExecutor(4) as pool, client.watch_status(0.5) as watch:
        adding = [pool.submit(lambda: [client.add(episode(5)) for _ in range(50)]) for _ in range(4)]
        rows = [since_start(next(watch)).rows_in for _ in range(2)]
        for one in adding:
            one.result(DEADLINE_S)
        total = client.status()

    assert rows == sorted(rows)
    assert since_start(total).rows_in == 4 * 50 * 5
    assert [(one.episodes, one.rows) for one in total.actors] == [(200, 1000)]


# Who may ask, and for what

TOKENS = """
[[token]]
name = "curator"
role = "learner"
tables = ["demos"]
value = "curator-token-012345"

[[token]]
name = "robot"
role = "actor"
value = "robot-token-01234567"

[[token]]
name = "ops"
role = "admin"
value = "ops-token-0123456789"
"""


def test_token_sees_what_its_role_and_tables_allow(tmp_path: Path) -> None:
    file = tmp_path / "tokens.toml"
    file.write_text(TOKENS, encoding="utf-8")
    file.chmod(0o600)
    with ServerThread(make_config(auth={"tokens_file": str(file)}, tables=TABLES)) as server:

        def client_of(token: str) -> ReplayClient:
            return ReplayClient(server.address, token=token, as_numpy=True)

        with (
            client_of("robot-token-01234567") as robot,
            client_of("curator-token-012345") as curator,
            client_of("ops-token-0123456789") as ops,
        ):
            for table in ("", "demos"):
                robot.add(episode(), table=table, actor=f"of {table}")
            with ops.batches(mix={"": 0.5, "demos": 0.5}) as mixed, ops.batches(table="") as own:
                next(mixed), next(own)
                with pytest.raises(AccessDeniedError, match="expected one for admin or learner to call Status"):
                    robot.status()
                with pytest.raises(AccessDeniedError, match="expected one for the default table"):
                    curator.status(tables=[""])
                confined, whole = curator.status(), ops.status()
                chosen = ops.status(tables=["online"])
            with ReplayClient(server.address, token="") as stranger, pytest.raises(UnauthenticatedError):
                stranger.status()
            after = ops.status()

    assert [table.table for table in confined.tables] == ["demos"]
    assert [one.name for one in confined.actors] == ["of demos"]
    assert [one.tables for one in confined.learners] == [("demos",)]
    assert confined.refusals == ()  # they name callers, of any table
    assert [table.table for table in whole.tables] == ["", "demos", "online"]
    assert len(whole.learners) == 2 and {one.name for one in whole.actors} == {"of ", "of demos"}
    assert [table.table for table in chosen.tables] == ["online"]
    counted = {one.reason: one.count for one in after.refusals}
    assert (counted["permission-denied"], counted["unauthenticated"]) == (2, 1)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"interval_s": 0.49}, "interval_s: 0.49, expected 0 for one snapshot, or 0.5 to 3600 seconds"),
        ({"interval_s": float("nan")}, "interval_s: nan, expected"),
        ({"interval_s": -1.0}, "interval_s: -1, expected"),
        ({"interval_s": 3601.0}, "interval_s: 3601, expected"),
        ({"newest_episodes": 65}, "newest_episodes: 65, expected 0 to 64"),
        ({"newest_episodes": -1}, "newest_episodes: -1, expected 0 to 64"),
        ({"tables": ["", "nowhere"]}, "table: 'nowhere' does not exist"),
    ],
)
def test_bad_request_is_refused_with_what_was_expected(server: ServerThread, fields: dict[str, Any], text: str) -> None:
    with Caller(server.address) as caller:
        call = caller.channel.unary_stream(SERVICE + "Status")

        refusal = refused(lambda: list(call(pb.StatusRequest(**fields).SerializeToString(), timeout=DEADLINE_S)))

    assert refusal.code.name == ("NOT_FOUND" if "tables" in fields else "INVALID_ARGUMENT")
    assert text in refusal.details


@pytest.mark.parametrize(
    ("ask", "text"),
    [
        (lambda client: client.status(newest_episodes=65), "newest_episodes: 65, expected 0 to 64"),
        (lambda client: client.status(tables="demos"), r"expected names of tables: \['demos'\]"),
        (lambda client: client.status(tables=[]), "expected at least one, or None for all"),
        (lambda client: client.watch_status(0.4), "interval_s: 0.4, expected a number from 0.5 to 3600"),
    ],
)
def test_client_refuses_bad_arguments_before_any_call(ask: Callable[[ReplayClient], Any], text: str) -> None:
    with ReplayClient("127.0.0.1:1") as client, pytest.raises(InvalidArgumentError, match=text):
        ask(client)


def test_server_without_metrics_serves_and_reports_what_is_stored() -> None:
    with ServerThread(make_config(metrics={"enabled": False})) as server, ReplayClient(server.address, as_numpy=True) as client:
        client.add(episode())
        client.sample()
        for ring in (True, False):
            with client.batches(ring=ring) as batches:
                next(batches)
        with pytest.raises(InvalidEpisodeError):
            client.add({"obs": np.ones((3, 9), np.float32)} | {"action": np.ones((3, 2), np.float32), "reward": np.ones(3, np.float32)})
        status = client.status(newest_episodes=1)

    (table,) = status.tables
    assert (table.counts.steps_stored, table.newest[0].reward_sum, status.server.state) == (20, 19.0, ServingState.SERVING)
    assert (table.flows, table.verdict, status.actors, status.learners, status.refusals) == ((), Verdict.UNSPECIFIED, (), (), ())


def test_snapshot_over_the_wire_is_the_servers_own(client: ReplayClient) -> None:
    client.add(episode())
    client.sample()

    status = client.status(newest_episodes=1)

    assert status_of_message(status_to_message(status)) == status
