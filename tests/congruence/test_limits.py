"""Rate limits on every path of a batch: the same batches as without a limit, and the same slices counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from support.service_calls import eventually
from support.store_cases import as_bits, traced
from touchline import ReplayClient
from touchline import TouchlineError as ClientError
from touchline_protos import Batch
from touchline_protos.shm.ring import shared_memory_id
from touchline_server import Config, ReplayBuffer, ReplayError
from touchline_server.selectors.options import LawOptions
from touchline_server.service.app import ServerThread
from touchline_server.tables.mix_sampler import MixSpec
from touchline_server.tables.sampler import TableSampler

PATHS = ["in process", "unary", "stream", "ring", "device"]
HORIZON = 3
BATCH = 10
WIDE = {"samples_per_insert": 8.0, "tolerance": 1e6}
"""A limit that never binds, and counts."""


@dataclass
class Subject:
    """Tables behind one of the paths."""

    buffer: ReplayBuffer
    path: str
    client: ReplayClient | None

    def add(self, table: str, number: int, length: int) -> None:
        episode = traced(number, length, actor=f"arm-{number % 3}")
        episode.columns["task"] = np.full(length, number % 4, np.int64)
        self.buffer.tables[table].add_episode(episode)

    def fill(self, *tables: str) -> None:
        for table in tables:
            for number in range(25):
                self.add(table, number, 5 + 7 * number % 40)

    def batches(self, *, seed: int | None = None, table: str | None = None, mix: dict[str, float] | None = None, **request: Any) -> Any:
        """Yields batches of numpy arrays; the next one only when it is asked for. With a seed: the unary path has only the first."""
        if self.client is None:
            options = {name: request.pop(name) for name in ("recent_steps", "recent_half_life") if name in request}
            given = request | {"options": LawOptions(**options)}
            one = self.buffer.tables[table or ""]
            sampler = (
                self.buffer._mix_sampler(MixSpec.of(mix), seed, **given)
                if mix is not None
                else TableSampler(one.table, one.table.spec(**given), one.table.seeds.stream(seed))
            )
            while True:
                yield self.buffer._take(sampler)
        elif self.path == "unary":
            while True:
                yield self.client.sample(seed=seed, table=table, mix=mix, as_numpy=True, **request)
        else:
            options = {"transport": self.path, "as_numpy": True, "timeout_s": 30}
            with self.client.batches(seed=seed, table=table, mix=mix, **options, **request) as stream:
                for batch in stream:
                    assert stream.transport == self.path
                    yield batch

    def counted(self, table: str) -> tuple[int, int]:
        """Returns the steps and the slices that a table's limit has counted."""
        status = self.buffer.tables[table].table.rate.status()
        return status.steps_added, status.slices_delivered


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> str:
    if request.param in ("ring", "device") and not shared_memory_id():
        pytest.skip("rings need Linux on x86-64")
    return str(request.param)


@pytest.fixture
def opened() -> Iterator[Callable[..., Subject]]:
    with ExitStack() as stack:

        def open_subject(path: str, **tables: dict[str, Any]) -> Subject:
            config = Config(
                config={"buffer_size": 2_000, "batch_size": BATCH, "horizon": HORIZON, "min_history": 0},
                storage={"device": "cpu", "share_columns": "on" if path == "device" else "off"},
                server={"port": 0},
                tables=tables,
            )
            buffer = ReplayBuffer(config)
            if path == "in process":
                return Subject(buffer, path, None)
            server = stack.enter_context(ServerThread(config, buffer))
            return Subject(buffer, path, stack.enter_context(ReplayClient(server.address)))

        yield open_subject


REQUESTS: list[dict[str, Any]] = [
    {"law": "episode"},
    {"law": "step", "pad": "end"},
    {"law": "recent", "recent_steps": 60},
    {"law": "recent", "recent_half_life": 25.0},
    {"law": "prioritized"},
    {"law": "fresh_first"},
    {"law": "task"},
]


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda request: "-".join(map(str, request.values())))
def test_limit_changes_no_batch_of_any_law_and_counts_its_slices(
    path: str, request_: dict[str, Any], opened: Callable[..., Subject]
) -> None:
    subject, reference = opened(path, limited={"rate": WIDE}), opened("in process", free={})
    subject.fill("limited")
    reference.fill("free")

    count = 1 if path == "unary" else 10
    found, expected = subject.batches(seed=7, table="limited", **request_), reference.batches(seed=7, table="free", **request_)
    for _ in range(count):
        assert_same(next(found), next(expected))

    # The first episode only fills the table. A stream may have written more frames than were read.
    assert subject.counted("limited")[0] == sum(5 + 7 * number % 40 for number in range(1, 25))
    if path == "stream":
        # A frame is counted once it is written, and may be read before that.
        eventually(lambda: subject.counted("limited")[1] >= count * BATCH, "what was read is counted")
        assert subject.counted("limited")[1] % BATCH == 0
    else:
        eventually(lambda: subject.counted("limited")[1] == count * BATCH, "what was taken is counted")


def test_limits_change_no_batch_of_a_mix_and_count_each_tables_part(path: str, opened: Callable[..., Subject]) -> None:
    subject = opened(path, a={"rate": WIDE}, b={"law": "step", "rate": WIDE})
    reference = opened("in process", a={}, b={"law": "step"})
    for side in (subject, reference):
        side.fill("a", "b")

    count = 1 if path == "unary" else 10
    mix = {"a": 1.0, "b": 3.0}
    found, expected = subject.batches(seed=7, mix=mix), reference.batches(seed=7, mix=mix)
    for _ in range(count):
        assert_same(next(found), next(expected))

    if path == "stream":
        eventually(lambda: subject.counted("a")[1] >= 3 * count, "the part of a is counted")
    else:
        eventually(lambda: subject.counted("a")[1] == 3 * count, "the part of a is counted")
    delivered = subject.counted("a")[1] // 3
    eventually(lambda: subject.counted("b")[1] == 7 * delivered, "the part of b is counted")


def test_exactly_what_is_due_is_delivered_and_counted(path: str, opened: Callable[..., Subject]) -> None:
    subject = opened(path, limited={"rate": {"samples_per_insert": 1.0, "tolerance": 2 * BATCH}})
    subject.add("limited", 0, 20)
    batches = subject.batches(table="limited")
    for _ in range(2):  # the tolerance
        next(batches)
    assert_held(subject, "limited", 2 * BATCH, {"table": "limited"})

    subject.add("limited", 1, BATCH)
    next(batches)
    assert_held(subject, "limited", 3 * BATCH, {"table": "limited"})
    subject.add("limited", 2, BATCH // 2)  # half a batch is not due
    assert_held(subject, "limited", 3 * BATCH, {"table": "limited"})
    subject.add("limited", 3, BATCH // 2)
    next(batches)

    assert_held(subject, "limited", 4 * BATCH, {"table": "limited"})
    assert subject.counted("limited")[0] == 2 * BATCH


def test_mix_delivers_what_the_tightest_limit_allows(path: str, opened: Callable[..., Subject]) -> None:
    rates = {"a": {"samples_per_insert": 1.0, "tolerance": BATCH}, "b": {"samples_per_insert": 1.0, "tolerance": 3 * BATCH}}
    subject = opened(path, **{name: {"rate": rate} for name, rate in rates.items()})
    for table in rates:
        subject.add(table, 0, 20)

    mix = {"a": 1.0, "b": 3.0}
    batches = subject.batches(mix=mix)
    for _ in range(3):  # of a 10 // 3, of b 30 // 7 would be due
        next(batches)
    assert_held(subject, "a", 9, {"mix": mix})
    assert subject.counted("b")[1] == 21
    subject.add("b", 1, 20)
    assert_held(subject, "a", 9, {"mix": mix})
    subject.add("a", 1, 3)
    next(batches)

    assert_held(subject, "a", 12, {"mix": mix})
    assert subject.counted("b")[1] == 28


def assert_held(subject: Subject, table: str, slices: int, request: dict[str, Any]) -> None:
    """Asserts that no batch is due, and how many slices were counted until then."""
    if subject.path in ("in process", "unary"):
        with pytest.raises((ReplayError, ClientError), match="the rate limit holds batches back"):
            next(subject.batches(**request))
    else:
        limiter = subject.buffer.tables[table].table.rate
        eventually(lambda: bool(limiter.status().batches_held), "the stream waits for the limit", every_s=0.001)
        eventually(lambda: subject.counted(table)[1] >= slices, "what was taken is counted", every_s=0.001)
    assert subject.counted(table)[1] == slices


def assert_same(one: Batch, other: Batch) -> None:
    names = (
        "action",
        "reward",
        "done",
        "task",
        "episode_id",
        "start",
        "actor",
        "policy_version",
        "probability",
        "weight",
        "valid",
        "table",
    )
    for name in names:
        left, right = getattr(one, name), getattr(other, name)
        assert (left is None) == (right is None), name
        assert left is None or as_bits(left) == as_bits(right), name
    for name in one.obs:
        assert as_bits(one.obs[name]) == as_bits(other.obs[name])
