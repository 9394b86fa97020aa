"""Mixed batches on every path: the same, exact, and each slice what its provenance says."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from support.store_cases import STRIDE, as_bits, check_traced, traced
from touchline import IncompatibleVersionError, InvalidArgumentError, ReplayClient
from touchline import TouchlineError as ClientError
from touchline_protos import Batch
from touchline_protos.shm.ring import shared_memory_id
from touchline_server import Config, ReplayBuffer, ReplayError
from touchline_server.selectors.options import LawOptions
from touchline_server.service.app import ServerThread
from touchline_server.tables.mix_sampler import MixSpec

PATHS = ["in process", "unary", "stream", "ring", "device"]
HORIZON = 3
BATCH = 10
MIX = {"online": 1, "demos": 3}  # 2.5 and 7.5 of 10: the tie goes to the first
SPLIT = (3, 7)
DEMOS = 5_000
"""Number of the first episode of the table demos; those of online begin at 0."""


@dataclass
class Subject:
    """Tables behind one of the paths."""

    buffer: ReplayBuffer
    path: str
    client: ReplayClient | None

    def add(self, table: str, numbers: Any, length: Callable[[int], int] = lambda number: 5 + 7 * number % 40) -> None:
        for number in numbers:
            self.buffer.tables[table].add_episode(traced(number, length(number), actor=f"{table}-{number % 3}"))

    def fill(self) -> None:
        self.add("online", range(30))
        self.add("demos", range(DEMOS, DEMOS + 20))

    def batches(self, *, seed: int | None = None, mix: Any = MIX, **options: Any) -> Iterator[Batch]:
        """Yields batches of numpy arrays. With a seed: the unary path has only the first."""
        if self.client is None:
            rule = options.pop("when_empty", "wait")
            arguments = {name: options.pop(name, None) for name in ("batch_size", "horizon", "law")} | {"options": LawOptions(**options)}
            sampler = self.buffer._mix_sampler(MixSpec.of(mix, rule), seed, **arguments)
            while True:
                yield self.buffer._take(sampler)
        elif self.path == "unary":
            while True:
                yield self.client.sample(seed=seed, mix=mix, as_numpy=True, **options)
        else:
            with self.client.batches(seed=seed, mix=mix, transport=self.path, as_numpy=True, timeout_s=20, **options) as stream:
                for batch in stream:
                    assert (stream.transport, stream.transport_reason) == (
                        self.path,
                        stream.transport_reason if self.path == "stream" else "",
                    )
                    yield batch


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
                tables={"online": {}, "demos": {"law": "step"}, **tables},
            )
            buffer = ReplayBuffer(config)
            if path == "in process":
                return Subject(buffer, path, None)
            server = stack.enter_context(ServerThread(config, buffer))
            return Subject(buffer, path, stack.enter_context(ReplayClient(server.address)))

        yield open_subject


def take(batches: Iterator[Batch], count: int) -> list[Batch]:
    return [next(batches) for _ in range(count)]


def assert_exact(batch: Batch, *, split: tuple[int, ...] = SPLIT, names: tuple[str, ...] = ("online", "demos")) -> None:
    """Asserts the numbers, the order and the origin of a batch's slices."""
    assert batch.table_names == names
    assert batch.table is not None
    assert np.asarray(batch.table).tolist() == [position for position, count in enumerate(split) for _ in range(count)]
    check_traced(batch, horizon=HORIZON)
    for table, number, actor in zip(batch.table, batch.policy_version, batch.actor, strict=True):
        name = names[int(table)]
        assert (int(number) >= DEMOS) == (name == "demos")
        assert batch.actor_names[int(actor)] == f"{name}-{int(number) % 3}"


def assert_same(one: Batch, other: Batch) -> None:
    names = ("action", "reward", "done", "episode_id", "start", "actor", "policy_version", "probability", "table")
    for left, right in [
        *((getattr(one, name), getattr(other, name)) for name in names),
        *((one.obs[name], other.obs[name]) for name in one.obs),
        *((one.extra[name], other.extra[name]) for name in one.extra),
    ]:
        assert as_bits(left) == as_bits(right)


def test_mix_is_exact_and_the_same_seed_gives_the_batches_of_in_process(path: str, opened: Callable[..., Subject]) -> None:
    subject, reference = opened(path), opened("in process")
    for side in (subject, reference):
        side.fill()

    count = 1 if path == "unary" else 40
    for one, other in zip(take(subject.batches(seed=7), count), take(reference.batches(seed=7), count), strict=True):
        assert_exact(one)
        assert_same(one, other)
    assert as_bits(one.obs["state"]) != as_bits(next(subject.batches(seed=8)).obs["state"])


def test_mix_above_the_chunk_size_is_the_same(path: str, opened: Callable[..., Subject]) -> None:
    subject, reference = opened(path), opened("in process")
    for side in (subject, reference):
        side.fill()
    options = {"batch_size": 20_001, "mix": {"demos": 1, "online": 1, "": 0}}

    [one], [other] = (take(side.batches(seed=5, **options), 1) for side in (subject, reference))

    assert_exact(one, split=(10_001, 10_000, 0), names=("demos", "online", ""))
    assert_same(one, other)


def test_each_table_draws_by_its_own_law(path: str, opened: Callable[..., Subject]) -> None:
    subject = opened(path, online={"seed": 3})
    lengths = [4, 5, 9, 40, 120]
    for table, first in (("online", 0), ("demos", DEMOS)):
        subject.add(table, range(first, first + 5), lambda number: lengths[number % DEMOS])
    starts = np.array(lengths) - HORIZON

    drawn = take(subject.batches(batch_size=400), 50)

    for position, expected in ((0, np.full(5, 0.2)), (1, starts / starts.sum())):
        numbers = np.concatenate([batch.policy_version[np.asarray(batch.table) == position] for batch in drawn]) % DEMOS
        found = np.bincount(numbers, minlength=5)
        statistic = float(((found - expected * len(numbers)) ** 2 / (expected * len(numbers))).sum())
        assert statistic < 23.5  # chi-square, 4 degrees of freedom, p = 0.0001; the seed is fixed
    for batch in drawn[:5]:
        number = np.asarray(batch.policy_version) % DEMOS
        by_episode, by_step = 0.2 / starts[number], np.full(len(number), 1 / starts.sum())
        assert np.allclose(batch.probability, np.where(np.asarray(batch.table) == 0, by_episode, by_step))


def test_law_of_the_request_holds_for_every_table(path: str, opened: Callable[..., Subject]) -> None:
    subject = opened(path)
    subject.fill()

    batch = next(subject.batches(law="step"))

    assert len(set(np.asarray(batch.probability)[:3].tolist())) == 1
    assert len(set(np.asarray(batch.probability)[3:].tolist())) == 1


def test_parameters_of_a_law_are_for_the_tables_that_have_it(path: str, opened: Callable[..., Subject]) -> None:
    subject = opened(path, online={"law": "recent", "recent_steps": 500}, demos={"law": "prioritized", "priority_alpha": 1.0, "seed": 2})
    subject.fill()
    demos = subject.buffer.tables["demos"]
    batch = demos.sample(law="episode", batch_size=64)
    demos.update_priorities((batch.episode_id, batch.start), np.random.default_rng(1).uniform(1, 9, (HORIZON, 64)).astype(np.float32))

    batch = next(subject.batches(recent_steps=20, beta=1.0, batch_size=400))
    chosen = np.asarray(batch.table) == 1
    weight, found = np.asarray(batch.weight), (np.asarray(batch.probability) ** -1)[chosen]

    newest = [(number, 5 + 7 * number % 40) for number in range(30)][-1]
    assert set(np.asarray(batch.policy_version)[~chosen].tolist()) <= {28, 29} and newest[1] < 20
    assert np.allclose(weight[chosen], found / found.max(), rtol=1e-5) and weight[chosen].min() < 0.5
    assert (weight[~chosen] == 1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recent_steps": 30}, "recent_steps: 30 under the laws 'episode', 'step' of the mix, expected it only under 'recent'"),
        ({"beta": 0.5}, "beta: 0.5 under the laws 'episode', 'step' of the mix, expected it only under 'prioritized'"),
        ({"law": "recent", "recent_steps": 2}, "recent_steps: 2, expected at least 4"),
        ({"law": "recent"}, "law: 'recent' with neither of recent_steps and recent_half_life"),
    ],
)
def test_parameters_that_no_law_of_the_mix_takes_are_refused(
    path: str, options: dict[str, Any], message: str, opened: Callable[..., Subject]
) -> None:
    subject = opened(path)
    subject.fill()

    with pytest.raises((ReplayError, ClientError)) as caught:
        next(subject.batches(**options))

    assert message in str(caught.value)


def test_others_take_over_the_share_of_an_empty_table_until_it_has_something(path: str, opened: Callable[..., Subject]) -> None:
    subject = opened(path)
    subject.add("online", range(30))

    batches = subject.batches(when_empty="others")
    assert_exact(next(batches), split=(10, 0))
    subject.add("demos", range(DEMOS, DEMOS + 20))
    for batch in take(batches, 40)[-1:]:  # those made ahead come first
        assert_exact(batch)
    subject.buffer.tables["online"].clear()
    for batch in take(batches, 40)[-1:]:
        assert_exact(batch, split=(0, 10))


def test_mix_waits_for_an_empty_table(path: str, opened: Callable[..., Subject]) -> None:
    subject = opened(path)
    subject.add("online", range(30))
    if subject.client is None:
        with pytest.raises(ReplayError, match="table 'demos': 0 steps in 0 episodes are stored"):
            next(subject.batches())
        return
    if path == "unary":
        with pytest.raises(ClientError, match="table 'demos': 0 steps in 0 episodes are stored"):
            next(subject.batches())
    found: list[Batch] = []
    options = {"wait_s": 20} if path == "unary" else {}
    learner = threading.Thread(target=lambda: found.append(next(subject.batches(**options))))

    learner.start()
    subject.add("demos", range(DEMOS, DEMOS + 20))
    learner.join()

    assert_exact(found[0])


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ({"online": 1, "expert": 1}, "table: 'expert' does not exist, expected"),
        ({"online": -1, "demos": 1}, "mix: share -1 of table 'online', expected a finite number of at least 0"),
        ({"online": 0, "demos": 0}, "mix: shares that sum to 0"),
        ([("online", 1), ("online", 1)], "mix: table 'online' twice"),
        ({}, "mix: no tables"),
    ],
)
def test_bad_mix_is_refused_by_name(path: str, mix: Any, message: str, opened: Callable[..., Subject]) -> None:
    subject = opened(path)
    subject.fill()

    with pytest.raises((ReplayError, ClientError)) as caught:
        next(subject.batches(mix=mix))

    assert message in str(caught.value)


def plain(length: int = 8, **changes: np.ndarray) -> dict[str, np.ndarray]:
    columns = {
        "obs": np.zeros((length, 3), np.float32),
        "action": np.zeros((length, 2), np.float32),
        "reward": np.zeros(length, np.float32),
    }
    return {**columns, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"obs": np.zeros((8, 4), np.float32)},
            "obs: shape (4,) a step in table 'demos', (3,) in table 'online', expected the same in a mix",
        ),
        ({"action": np.zeros((8, 2))}, "action: dtype float64 in table 'demos', float32 in table 'online', expected the same in a mix"),
        ({"done": np.zeros(8, bool)}, "done: missing in table 'online', bool () in table 'demos', expected the same columns in a mix"),
    ],
)
def test_tables_that_do_not_fit_are_refused_by_the_column(
    path: str, changes: dict[str, np.ndarray], message: str, opened: Callable[..., Subject]
) -> None:
    subject = opened(path)
    subject.buffer.tables["online"].add(plain())
    subject.buffer.tables["demos"].add(plain(**changes))

    with pytest.raises((ReplayError, ClientError)) as caught:
        next(subject.batches())

    assert message in str(caught.value)


def test_tables_of_two_row_conventions_are_refused(path: str, opened: Callable[..., Subject]) -> None:
    subject = opened(path, demos={"row_convention": "outgoing"})

    with pytest.raises((ReplayError, ClientError), match="row_convention: 'incoming' in table 'online', 'outgoing' in table 'demos'"):
        next(subject.batches())


def test_columns_may_stand_in_another_order(path: str, opened: Callable[..., Subject]) -> None:
    subject = opened(path)
    subject.buffer.tables["online"].add(plain(a=np.zeros(8), b=np.ones(8)))
    subject.buffer.tables["demos"].add(dict(reversed(plain(b=np.full(8, 3.0), a=np.full(8, 2.0)).items())))

    batch = next(subject.batches())

    assert np.array_equal(batch.extra["a"][0], [0] * 3 + [2] * 7)
    assert np.array_equal(batch.extra["b"][0], [1] * 3 + [3] * 7)


def test_schema_that_changes_later_is_refused_by_the_column(path: str, opened: Callable[..., Subject]) -> None:
    subject = opened(path)
    for table in ("online", "demos"):
        subject.buffer.tables[table].add(plain())
    batches = subject.batches()
    next(batches)

    subject.buffer.tables["demos"].clear()
    subject.buffer.tables["demos"].add(plain(obs=np.zeros((8, 4), np.float32)))

    with pytest.raises((ReplayError, ClientError), match=r"obs: shape \(4,\) a step in table 'demos', \(3,\) in table 'online'"):
        for _ in range(200):  # batches drawn before may still arrive
            next(batches)


def test_rows_stay_true_while_tables_are_added_to_evicted_and_cleared(path: str, opened: Callable[..., Subject]) -> None:
    subject = opened(path, online={"buffer_size": 150}, demos={"buffer_size": 150})
    rng = np.random.default_rng(3)
    ended = threading.Event()
    changed = threading.Semaphore(0)

    def write() -> None:
        number = 0
        while not ended.is_set():
            table, first = (("online", 0), ("demos", DEMOS))[int(rng.integers(2))]
            if rng.random() < 0.03:
                subject.buffer.tables[table].clear()
            subject.add(table, [first + number], lambda _: int(rng.integers(2, 60)))
            number = (number + 1) % 4_000
            changed.release()

    subject.fill()
    writer = threading.Thread(target=write)
    writer.start()
    try:
        batches = subject.batches(when_empty="others", batch_size=64)
        splits = set()
        for _ in range(400):
            changed.acquire()
            try:
                batch = next(batches)
            except (ReplayError, ClientError) as error:  # both tables were without a long enough episode, or were cleared a moment ago
                assert "episodes" in str(error) or "cleared" in str(error)
                batches = subject.batches(when_empty="others", batch_size=64)
                continue
            split = tuple(np.bincount(np.asarray(batch.table), minlength=2).tolist())
            splits.add(split)
            assert_exact(batch, split=split)
    finally:
        ended.set()
        writer.join()

    assert (16, 48) in splits
    assert splits <= {(16, 48), (64, 0), (0, 64)}
    assert np.asarray(batch.extra["stamp"]).max() < (DEMOS + 4_000) * STRIDE


def test_client_checks_a_mix_itself(opened: Callable[..., Subject]) -> None:
    subject = opened("unary")
    client = subject.client
    assert client is not None

    for options, message in (
        ({"mix": MIX, "table": "online"}, "table: 'online' and mix, expected one of them"),
        ({"mix": {"online": float("nan")}}, "mix: share nan of table 'online'"),
        ({"mix": MIX, "when_empty": "skip"}, "when_empty: 'skip', expected 'wait' or 'others'"),
        ({"when_empty": "others"}, "when_empty: 'others' without a mix"),
        ({"mix": {"a\nb": 1}}, "table: a control character"),
    ):
        with pytest.raises(InvalidArgumentError) as caught:
            client.sample(**options)  # type: ignore[arg-type]
        assert message in str(caught.value)


def test_server_of_protocol_1_0_is_never_sent_a_mix(opened: Callable[..., Subject], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("touchline_server.service.convert.PROTOCOL_VERSION", "1.0")
    subject = opened("unary")
    subject.fill()
    assert subject.client is not None

    for draw in (lambda: subject.client.sample(mix=MIX), lambda: next(subject.client.batches(mix=MIX))):
        with pytest.raises(IncompatibleVersionError, match=r"the server speaks 1\.0, mix= needs 1\.1: update it"):
            draw()
