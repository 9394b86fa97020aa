"""Batches that learners gather by themselves, between real processes: what either side does when the other dies, stops or lies."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from integration.test_ring_processes import HARMING, SERVER, add_episodes, folder, running
from support.service_calls import eventually
from touchline import Batch, ReplayClient
from touchline._learner.host_gather import HostGatherer, HostMethod
from touchline._learner.row_offer import RowOffer
from touchline_protos.codec import Episode
from touchline_protos.shm.ring import RingError, shared_memory_id
from touchline_server import Config
from touchline_server.service.app import ServerThread
from touchline_server.service.ring_returns import RingReturns
from touchline_server.store.pinned_draw import PinnedDraw

pytestmark = [pytest.mark.skipif(not shared_memory_id(), reason="rings need Linux on x86-64"), pytest.mark.usefixtures("folder")]

__all__ = ["folder"]

WIDTH = 50
"""Numbers in an observation: enough for a reader to see an overwritten half of a row."""


def config(*, max_hold_s: float = 1.0, rows: int = 1_000, **ring: object) -> Config:
    return Config(
        config={"buffer_size": rows, "batch_size": 32, "horizon": 3, "min_history": 10},
        storage={"device": "cpu", "share_columns": "on"},
        server={"port": 0},
        ring={"max_hold_s": max_hold_s, **ring},
    )


def traced(number: int, length: int) -> Episode:
    """An episode, each of whose numbers says which episode and step it is of."""
    stamps = number * 1_000 + np.arange(length, dtype=np.int64)
    obs = np.repeat(stamps[:, None], WIDTH, axis=1)
    actions = np.zeros((length, 1), np.float32)
    return Episode({"obs": obs, "action": actions, "reward": np.zeros(length, np.float32)}, policy_version=number)


def add_traced(server: ServerThread, first: int, episodes: int) -> None:
    for number in range(first, first + episodes):
        server.buffer.add_episode(traced(number, 30 + number % 20))


SHARING = {"TOUCHLINE_STORAGE__SHARE_COLUMNS": "on", "TOUCHLINE_CONFIG__BATCH_SIZE": "8", "TOUCHLINE_CONFIG__MIN_HISTORY": "0"}
"""Environment of a server whose columns are shared."""

CHECKING = """
    import sys
    import numpy as np
    from touchline import ReplayClient
    from touchline._learner.row_ring import RowBatches

    take, rings = RowBatches.take, []

    def counted(self):
        if self not in rings:
            rings.append(self)
        return take(self)

    RowBatches.take = counted
    batches = ReplayClient(sys.argv[1]).batches(as_numpy=True, transport="device", timeout_s=60)

    def check():
        batch = next(batches)
        expected = batch.policy_version * 1_000 + batch.start + np.arange(4)[:, None]
        assert (batch.obs == expected[:, :, None]).all(), "torn"

    for _ in range(20):
        check()
    print(batches.transport, flush=True)
    for line in sys.stdin:
        for _ in range(int(line)):
            check()
        print(sum(ring.discarded for ring in rings), flush=True)
"""
"""A learner that checks every number of its batches: as many as each line asks for, which it answers with the batches discarded so far."""


@contextmanager
def checking(server: ServerThread) -> Iterator[subprocess.Popen[str]]:
    with running(CHECKING, server.address, stdin=subprocess.PIPE) as learner:
        assert learner.stdout is not None and learner.stdout.readline() == "device\n"
        yield learner


def ask(learner: subprocess.Popen[str], batches: int) -> int:
    """Makes the learner check batches; returns how many it has discarded so far."""
    assert learner.stdin is not None and learner.stdout is not None
    learner.stdin.write(f"{batches}\n")
    learner.stdin.flush()
    return int(learner.stdout.readline())


def test_killed_learner_frees_the_rows_that_it_held() -> None:
    with ServerThread(config(max_hold_s=3_600)) as server:
        add_traced(server, 0, 20)
        with checking(server) as learner:
            learner.kill()
            learner.wait()

            add_traced(server, 20, 100)  # four times round: this would wait for an hour

        assert server.buffer.counts().episodes_added == 120


def test_stopped_learner_delays_adding_for_a_limited_time_and_loses_what_was_overwritten(caplog: pytest.LogCaptureFixture) -> None:
    with ServerThread(config(max_hold_s=0.1)) as server:
        add_traced(server, 0, 20)
        with checking(server) as learner:
            learner.send_signal(signal.SIGSTOP)
            add_traced(server, 20, 100)
            learner.send_signal(signal.SIGCONT)

            discarded = ask(learner, 500)

    assert discarded >= 3  # every slot that was ready
    assert [record.levelname for record in caplog.records if "took back the rows of" in record.getMessage()] == ["WARNING"]


def test_rows_are_whole_while_others_are_added_as_fast_as_possible() -> None:
    batches = 100_000 if os.environ.get("FAULT_LONG") else 2_000
    ended = threading.Event()

    def write() -> None:
        number = 20
        while not ended.is_set():
            server.buffer.add_episode(traced(number, 10 + number % 40))
            number += 1

    # Rows are taken back immediately, so that the learner often comes too late.
    with ServerThread(config(max_hold_s=0.0, rows=200)) as server:
        add_traced(server, 0, 20)
        with checking(server) as learner:
            writer = threading.Thread(target=write)
            writer.start()
            try:
                discarded = ask(learner, batches)
            finally:
                ended.set()
                writer.join()

    assert discarded > 0


def test_killed_server_ends_the_stream_which_goes_on_with_the_next_one(tmp_path: Path) -> None:
    environment = os.environ | SHARING
    with running(SERVER, env=environment, cwd=tmp_path) as first:
        assert first.stdout is not None
        address = first.stdout.readline().split()[-1]
        client = ReplayClient(address)
        add_episodes(client)
        batches = client.batches(as_numpy=True, transport="device", timeout_s=60)
        held = next(batches)
        assert batches.transport == "device"
        kept = held.obs.copy()
        first.kill()
        first.wait()
    again = SERVER.replace('"0"', f'"{address.rpartition(":")[2]}"')
    with running(again, env=environment, cwd=tmp_path) as second, client, batches:
        assert second.stdout is not None and second.stdout.readline()
        add_episodes(client, 1)

        # What was ready when the first server died may come; then only what the second one has.
        eventually(lambda: not next(batches).obs.any(), "batches of the second server")

        assert batches.transport == "device"
    assert (held.obs == kept).all()


def test_cleared_table_with_batches_out_opens_the_stream_again() -> None:
    with ServerThread(config()) as server, ReplayClient(server.address) as client:
        add_traced(server, 0, 20)
        with client.batches(as_numpy=True, transport="device", timeout_s=60) as batches:
            assert next(batches).policy_version.max() < 20
            client.clear()
            add_traced(server, 100, 20)

            eventually(lambda: next(batches).policy_version.min() >= 100, "batches of the new episodes")

            assert batches.transport == "device"

            def transports() -> list[str]:
                return [learner.transport for learner in client.status().learners if learner.batches]

            eventually(lambda: transports() == ["device"], "the server counts them")


def mapped_columns() -> int:
    """Number of mappings of columns in this process that can only be read: those of its learners, not those of its servers."""
    return sum("r--s" in line and "touchline-columns" in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_closed_stream_keeps_no_columns_mapped() -> None:
    with ServerThread(config()) as server, ReplayClient(server.address) as client:
        add_traced(server, 0, 20)
        before = mapped_columns()
        batches = client.batches(as_numpy=True, transport="device", timeout_s=60)
        batch = next(batches)
        during = mapped_columns()

        batches.close()

        assert (before, during, mapped_columns()) == (0, 1, 0)
        check_rows(batch)


def check_rows(batch: Batch) -> None:
    expected = batch.policy_version * 1_000 + batch.start + np.arange(len(batch.obs))[:, None]
    assert (batch.obs == expected[:, :, None]).all()


def test_draw_goes_with_its_last_slot_without_a_collection() -> None:
    """It refers to the columns: a table that was cleared would keep its memory until the next collection of cycles."""
    with ServerThread(config()) as server, ReplayClient(server.address) as client:
        add_traced(server, 0, 20)
        held: list[Any] = []
        hold = PinnedDraw.hold

        def remember(pinned: PinnedDraw, on_revoke: Callable[[], None]) -> None:
            held.append(weakref.ref(pinned.draw.start))
            hold(pinned, on_revoke)

        with pytest.MonkeyPatch.context() as patch, collector_off():
            patch.setattr(PinnedDraw, "hold", remember)
            with client.batches(as_numpy=True, transport="device", timeout_s=60) as batches:
                for _ in range(100):
                    next(batches)
                eventually(lambda: len(held) > 3 and held[0]() is None and held[1]() is None, "draws are freed")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_rows_are_unpinned_even_if_the_last_priorities_cannot_be_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(returns: RingReturns) -> None:
        raise MemoryError

    with ServerThread(config(max_hold_s=60).override(sampling={"law": "prioritized"})) as server, ReplayClient(server.address) as client:
        add_traced(server, 0, 20)
        epochs = server.buffer.store._ring.epochs
        with client.batches(as_numpy=True, transport="device", timeout_s=60) as batches:
            next(batches)
            assert epochs._held
            monkeypatch.setattr(RingReturns, "end", fail)

        eventually(lambda: not epochs._held, "no row is pinned")


@contextmanager
def collector_off() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def way_of(client: ReplayClient, transport: str = "device") -> tuple[str, str]:
    with client.batches(as_numpy=True, transport=transport) as batches:
        for _ in range(20):
            next(batches)
        return batches.transport, batches.transport_reason


def test_learner_of_another_user_gets_messages_and_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("touchline_protos.shm.sealed_memory.os.getuid", lambda: 4_000_000)
    with ServerThread(config()) as server, ReplayClient(server.address) as client:
        add_traced(server, 0, 5)

        transport, reason = way_of(client)

    assert transport == "stream" and "not a socket of this user (4000000)" in reason


def test_learner_with_other_shared_memory_gets_messages_and_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("touchline._learner.stream_session.shared_memory_id", lambda: "another host:1")
    with ServerThread(config()) as server, ReplayClient(server.address) as client:
        add_traced(server, 0, 5)

        transport, reason = way_of(client)

    assert transport == "stream" and "another host" in reason


def test_learner_that_cannot_gather_gets_a_ring_and_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: HostMethod, offer: RowOffer) -> HostGatherer:
        raise RingError("no hands")

    monkeypatch.setattr(HostMethod, "gatherer", refuse)
    with ServerThread(config()) as server, ReplayClient(server.address) as client:
        add_traced(server, 0, 5)

        assert way_of(client) == ("ring", "the server's columns cannot be used here: no hands")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"storage": {"share_columns": "off"}}, "storage.share_columns is off"), ({"ring": {"device": False}}, "ring.device is false")],
)
def test_server_that_shares_no_columns_gives_a_ring_and_the_reason(changes: dict[str, Any], reason: str) -> None:
    with ServerThread(config().override(**changes)) as server, ReplayClient(server.address) as client:
        add_traced(server, 0, 5)

        transport, found = way_of(client)
        assert transport == "ring" and reason in found
        assert way_of(client, "ring") == ("ring", "")


FORBIDDEN = """
    import mmap

    def forbidden():
        count = 0
        for path in (columns, os.open(f"/proc/self/fd/{columns}", os.O_RDWR)):
            for attempt in (
                lambda: mmap.mmap(path, whole, prot=mmap.PROT_READ | mmap.PROT_WRITE),
                lambda: os.pwrite(path, b"x", 0),
                lambda: os.ftruncate(path, 0),
                lambda: os.posix_fallocate(path, whole, 4096),
            ):
                try:
                    attempt()
                except (OSError, ValueError):
                    count += 1
        return count
"""


def test_learner_that_overwrites_all_shared_words_harms_only_itself(folder: Path) -> None:
    kept = "[file] = receive(path, sizes)\n        return [os.dup(file)]"
    assert kept in HARMING
    both = ["global columns, whole", "file, columns = receive(path, sizes)", "whole = sizes[1]", "return [os.dup(file), os.dup(columns)]"]
    harming = HARMING.replace(kept, "\n        ".join(both))
    harming = harming.replace("batches(as_numpy=True)", 'batches(as_numpy=True, transport="device")')
    harming = harming.replace('print("done", flush=True)', 'print("done", forbidden(), flush=True)')
    environment = os.environ | SHARING
    with running(SERVER, env=environment, cwd=folder) as process:
        assert process.stdout is not None
        with ReplayClient(process.stdout.readline().split()[-1]) as client:
            add_episodes(client)
            with client.batches(as_numpy=True, transport="device") as other:
                next(other)
                with running(FORBIDDEN + harming, client.address, stdin=subprocess.PIPE) as learner:
                    assert learner.stdout is not None
                    assert [learner.stdout.readline() for _ in range(3)] == ["device\n", "8\n", "done 8\n"]
                    add_episodes(client, 60)  # the table goes round under the rows that it claims to hold
                assert (other.transport, process.poll()) == ("device", None)
                for _ in range(500):
                    batch = next(other)
                    assert (batch.obs[0, :, 0] == batch.episode_id).all() or batch.episode_id.max() >= 5
            assert client.num_eps == 65
