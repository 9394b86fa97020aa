"""One suite for every path of a batch: in process, unary, stream, ring, device. All must agree."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from support.lockstep_cases import AGENTS, make_match
from support.store_cases import chi_square, chi_square_limit, count_cells, sample_with
from touchline import InvalidArgumentError as ClientInvalidArgumentError
from touchline import InvalidEpisodeError as ClientInvalidEpisodeError
from touchline import NotReadyError as ClientNotReadyError
from touchline import ReplayClient
from touchline_protos import Batch
from touchline_protos.shm.ring import shared_memory_id
from touchline_server import Config, InvalidArgumentError, InvalidEpisodeError, NotReadyError, ReplayBuffer
from touchline_server.service.app import ServerThread

HORIZON = 3
BATCH = 16
PATHS = ["in process", "unary", "stream", "ring", "device"]
TABLE = "demos"
TABLE_PATHS = [*PATHS, *(f"{path}, table" for path in PATHS)]
"""The paths to the default table, and those to a second table of the same configuration."""


@dataclass
class Subject:
    """A buffer behind one of the paths."""

    buffer: ReplayBuffer
    verbs: Any
    draw: Callable[[int | None, int], list[Batch]]
    """Draws n batches with a seed."""
    transport: str


def make_config(**changes: Any) -> Config:
    tables: dict[str, dict[str, Any]] = {
        "config": {"buffer_size": 2_000, "batch_size": BATCH, "horizon": HORIZON, "min_history": 100},
        "storage": {"device": "cpu"},
        "server": {"port": 0},
    }
    for table, keys in changes.items():
        tables[table] = tables.get(table, {}) | keys
    return Config(**tables)


def open_subject(path: str, stack: ExitStack, config: Config) -> Subject:
    path, _, second = path.partition(", ")
    table = TABLE if second else ""
    if path == "device":
        config = config.override(storage={"share_columns": "on"})
    every = ReplayBuffer(config.override(tables={TABLE: {}}) if second else config)
    buffer = every.tables[table]
    if path == "in process":

        def draw_here(seed: int | None, n: int) -> list[Batch]:
            if seed is None:
                return [buffer.sample() for _ in range(n)]
            rng = buffer.seeds.stream(seed)
            return [sample_with(buffer, rng) for _ in range(n)]

        return Subject(buffer, buffer, draw_here, "")
    server = stack.enter_context(ServerThread(config, every))
    client = stack.enter_context(ReplayClient(server.address, table=table))
    if path == "unary":

        def draw_unary(seed: int | None, n: int) -> list[Batch]:
            # On this path each seed makes one draw: the first batch of the other paths.
            return [client.sample(seed=seed) for _ in range(n)]

        return Subject(buffer, client, draw_unary, "")
    if path != "stream" and not shared_memory_id():
        pytest.skip("rings need Linux on x86-64")

    def draw_stream(seed: int | None, n: int) -> list[Batch]:
        with client.batches(seed=seed, transport=path, prefetch=6) as batches:
            drawn = [next(batches) for _ in range(n)]
            assert batches.transport == path
            return drawn

    return Subject(buffer, client, draw_stream, path)


@pytest.fixture(params=TABLE_PATHS)
def path(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def make_episode(number: int, length: int, *, width: int = 5) -> TensorDict:
    """An episode in which every value identifies its episode, step and column."""
    rows = number * 1000.0 + torch.arange(length, dtype=torch.float32)
    return TensorDict(
        {
            "obs": {
                "state": rows[:, None] + torch.arange(width) / 64,
                "rgb": (torch.arange(length)[:, None, None] + number).expand(length, 2, 3).to(torch.uint8).contiguous(),
            },
            "action": torch.stack([rows, -rows], dim=1).to(torch.bfloat16),
            "reward": rows / 2,
            "done": torch.arange(length) == length - 1,
            "task": torch.full((length,), number % 4, dtype=torch.int64),
            "value": rows.to(torch.float64),
        },
        [length],
    )


def fill(subject: Subject, numbers: range = range(30)) -> None:
    for number in numbers:
        subject.verbs.add(make_episode(number, 5 + (7 * number) % 60), actor=f"actor-{number % 3}", policy_version=number)


def as_numpy(value: Any) -> np.ndarray:
    tensor = value if isinstance(value, torch.Tensor) else torch.as_tensor(value)
    return tensor.float().numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def assert_equal(left: Batch, right: Batch) -> None:
    assert left.obs.keys() == right.obs.keys()
    pairs = [(left.obs[name], right.obs[name]) for name in left.obs]
    pairs += [(left.extra[name], right.extra[name]) for name in left.extra | right.extra]
    names = ("action", "reward", "done", "task", "episode_id", "start", "actor", "policy_version", "probability")
    pairs += [(getattr(left, name), getattr(right, name)) for name in names]
    for name in ("weight", "valid"):
        assert (getattr(left, name) is None) == (getattr(right, name) is None)
        if getattr(left, name) is not None:
            pairs.append((getattr(left, name), getattr(right, name)))
    for one, other in pairs:
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert np.array_equal(as_numpy(one), as_numpy(other))


def assert_true_to_provenance(batch: Batch) -> None:
    """Asserts that every value of the batch is that of the episode and step that its provenance names."""
    first = batch.episode_id * 1000.0 + batch.start
    rows = first[None] + torch.arange(HORIZON + 1)[:, None]
    assert torch.equal(batch.obs["state"][..., 0], rows.float())
    assert torch.equal(batch.reward[..., 0], rows[1:].float() / 2)
    assert torch.equal(batch.extra["value"], rows.double())
    assert torch.equal(batch.task, batch.episode_id % 4)
    assert torch.equal(batch.policy_version, batch.episode_id)
    assert [batch.actor_names[int(number)] for number in batch.actor] == [f"actor-{int(number) % 3}" for number in batch.episode_id]


def test_same_seed_gives_the_same_batch_as_in_process(path: str, stack: ExitStack) -> None:
    config = make_config()
    subject, reference = open_subject(path, stack, config), open_subject("in process", stack, config)
    fill(subject)
    fill(reference)
    count = 1 if path.startswith("unary") else 25  # several frames of several batches

    for one, other in zip(subject.draw(7, count), reference.draw(7, count), strict=True):
        assert_equal(one, other)
        assert_true_to_provenance(one)


def test_batch_above_the_chunk_size_is_the_same(path: str, stack: ExitStack) -> None:
    config = make_config(config={"batch_size": 200, "buffer_size": 400})
    subject, reference = open_subject(path, stack, config), open_subject("in process", stack, config)
    for side in (subject, reference):
        for number in range(3):
            side.verbs.add(make_episode(number, 50, width=3_000))  # 9.6 MB a batch

    count = 1 if path.startswith("unary") else 3
    for one, other in zip(subject.draw(3, count), reference.draw(3, count), strict=True):
        assert_equal(one, other)


def test_batch_unpacks_with_the_shapes_of_td_mpc2(path: str, stack: ExitStack) -> None:
    subject = open_subject(path, stack, make_config())
    fill(subject)

    obs, action, reward, done = subject.draw(None, 1)[0]

    assert obs["state"].shape == (HORIZON + 1, BATCH, 5)
    assert obs["rgb"].shape == (HORIZON + 1, BATCH, 2, 3)
    assert action.shape == (HORIZON, BATCH, 2)
    assert reward.shape == done.shape == (HORIZON, BATCH, 1)
    assert all(tensor.is_contiguous() for tensor in (*obs.values(), action, reward, done))


def test_held_batches_and_rows_stay_as_they_are_while_thousands_are_drawn(path: str, stack: ExitStack) -> None:
    subject = open_subject(path, stack, make_config())
    fill(subject)
    held, rows, expected = [], [], []

    for batch in draw_many(subject, stack, 3_000):
        assert_true_to_provenance(batch)
        if len(expected) < 40:
            if len(expected) % 2:
                held.append(batch)
                expected.append(batch.obs["state"].clone())
            else:
                rows.append(batch.obs["state"][0])
                expected.append(batch.obs["state"][0].clone())

    for number, before in enumerate(expected):
        now = held[number // 2].obs["state"] if number % 2 else rows[number // 2]
        assert torch.equal(now, before)
    for batch in held:
        assert_true_to_provenance(batch)


def draw_many(subject: Subject, stack: ExitStack, count: int, **request: Any) -> Iterator[Batch]:
    """Yields batches one by one, holding only those that the caller keeps."""
    if not subject.transport:
        for _ in range(count):
            yield subject.verbs.sample(**request)
        return
    stream = stack.enter_context(subject.verbs.batches(transport=subject.transport, prefetch=6, **request))
    for _ in range(count):
        yield next(stream)


def test_writing_into_a_batch_changes_no_other_and_not_the_store(path: str, stack: ExitStack) -> None:
    subject = open_subject(path, stack, make_config())
    fill(subject)

    for batch in draw_many(subject, stack, 200):
        assert_true_to_provenance(batch)
        for tensor in (batch.obs["state"], batch.action, batch.reward, batch.extra["value"]):
            tensor.fill_(-1)


def test_counts_and_verbs_agree(path: str, stack: ExitStack) -> None:
    config = make_config(config={"buffer_size": 200, "min_history": 50})
    subject, reference = open_subject(path, stack, config), open_subject("in process", stack, config)
    for side in (subject, reference):
        assert not side.verbs.ready()
        fill(side)
        side.verbs.add(make_episode(99, HORIZON))
        assert side.verbs.load(dict(torch.stack([make_episode(5, 9), make_episode(6, 9)]).items())) > 0

    assert subject.verbs.counts() == reference.verbs.counts()
    assert subject.verbs.num_eps == reference.verbs.num_eps
    assert subject.verbs.size == reference.verbs.size
    assert subject.verbs.capacity == reference.verbs.capacity == 200
    assert subject.verbs.ready() and reference.verbs.ready()
    assert subject.verbs.clear() == reference.verbs.clear()
    assert not subject.verbs.ready()


def test_refusals_agree_to_the_word(path: str, stack: ExitStack) -> None:
    config = make_config()
    subject, reference = open_subject(path, stack, config), open_subject("in process", stack, config)
    words = []
    for side, kind in ((subject, ClientInvalidEpisodeError), (reference, InvalidEpisodeError)):
        fill(side)
        bad = make_episode(1, 20)
        bad["obs", "state"][3, 1] = float("nan")
        with pytest.raises((kind, InvalidEpisodeError)) as caught:
            side.verbs.add(bad)
        words.append(str(caught.value))
        assert side.buffer.counts().episodes_refused == 1

    assert words[0] == words[1]
    assert words[0].startswith("obs.state: a value that is not finite in row 3")


def test_sampling_an_empty_buffer_raises_not_ready(path: str, stack: ExitStack) -> None:
    subject = open_subject(path, stack, make_config())

    with pytest.raises((NotReadyError, ClientNotReadyError), match="0 steps in 0 episodes"):
        if subject.transport:
            next(subject.verbs.batches(transport=subject.transport, timeout_s=0.2))
        else:
            subject.verbs.sample()


@pytest.mark.parametrize("stored", [0, 4])
def test_horizon_longer_than_every_episode_is_not_ready_with_the_counts(path: str, stored: int, stack: ExitStack) -> None:
    subject = open_subject(path, stack, make_config())
    for number in range(stored):
        subject.verbs.add(make_episode(number, 101 - number))
    longest = 101 if stored else 0
    in_process = rf"{stored} episodes are stored, none of the episodes has the 201 steps that horizon 200 needs, the longest has {longest}"
    remote = rf"{stored} episodes, 0 of them with the 201 steps that horizon 200 needs, the longest has {longest}"

    with pytest.raises((NotReadyError, ClientNotReadyError), match=f"{in_process}|{remote}") as caught:
        if subject.transport:
            next(subject.verbs.batches(horizon=200, transport=subject.transport, timeout_s=0.2))
        else:
            subject.verbs.sample(horizon=200)

    if isinstance(caught.value, ClientNotReadyError):
        assert caught.value.counts is not None and caught.value.counts.episodes_stored == stored


@pytest.mark.parametrize("law", ["episode", "step"])
def test_law_holds_on_every_path(path: str, law: str, stack: ExitStack) -> None:
    config = make_config(sampling={"law": law, "seed": 11}, config={"batch_size": 200})
    subject = open_subject(path, stack, config)
    lengths = [4, 5, 9, 40, 120]
    for number, length in enumerate(lengths):
        subject.verbs.add(make_episode(number, length), actor=f"actor-{number % 3}", policy_version=number)
    starts = np.array(lengths) - HORIZON
    share = np.full(len(lengths), 1 / len(lengths)) if law == "episode" else starts / starts.sum()

    drawn = np.concatenate([batch.episode_id.numpy() for batch in draw_many(subject, stack, 100)])

    expected = share * len(drawn)
    statistic = float(((np.bincount(drawn, minlength=len(lengths)) - expected) ** 2 / expected).sum())
    assert statistic < 23.5  # chi-square, 4 degrees of freedom, p = 0.0001; the seed is fixed


LAWS = [
    {"law": "recent", "recent_steps": 60},
    {"law": "recent", "recent_half_life": 25.0},
    {"law": "fresh_first"},
    {"law": "task"},
]
"""Laws with what a request says of them."""


def law_id(request: dict[str, Any]) -> str:
    return "-".join(map(str, request.values()))


def play_with_turnover(subject: Subject, request: dict[str, Any]) -> dict[int, int]:
    """Uses the law, then lets its episodes be evicted, cleared and evicted again; returns the length of each that is stored."""
    verbs, stored = subject.verbs, {}
    for number in range(40):
        length = 5 + (7 * number) % 30
        verbs.add(make_episode(number, length), actor=f"actor-{number % 3}", policy_version=number)
        stored[number] = length
        if number in (9, 22):
            subject.buffer.sample(**request)
        if number == 20:
            verbs.clear()
            stored.clear()
        while sum(stored.values()) > subject.buffer.capacity:
            del stored[min(stored)]
    return stored


def expected_law(request: dict[str, Any], stored: dict[int, int]) -> dict[tuple[int, int], float]:
    """Returns the probability of each start by the definition of the law."""
    rows = [(number, step) for number, length in stored.items() for step in range(length)]
    starts = {cell: len(rows) - 1 - at for at, cell in enumerate(rows) if cell[1] < stored[cell[0]] - HORIZON}  # by age
    if request["law"] == "recent":
        half_life, steps = request.get("recent_half_life"), request.get("recent_steps", len(rows))
        weight = {cell: 0.5 ** (age / half_life) if half_life else float(age < steps) for cell, age in starts.items()}
    else:
        tasks = [number % 4 for number in stored]
        alike = {number: 1.0 if request["law"] == "fresh_first" else 1 / tasks.count(number % 4) for number in stored}
        weight = {(number, step): alike[number] / (stored[number] - HORIZON) for number, step in starts}
    total = sum(weight.values())
    return {cell: value / total for cell, value in weight.items() if value}


@pytest.mark.parametrize("request_", LAWS, ids=law_id)
def test_law_after_evictions_clears_and_wrapping_fits_its_definition(path: str, request_: dict[str, Any], stack: ExitStack) -> None:
    subject = open_subject(path, stack, make_config(sampling={"seed": 11}, config={"batch_size": 500, "buffer_size": 200}))
    stored = play_with_turnover(subject, request_)
    law = expected_law(request_, stored)
    drawn: list[tuple[int, int]] = []
    chances: list[float] = []

    for batch in draw_many(subject, stack, 40, **request_):
        assert_true_to_provenance(batch)
        drawn += zip(batch.episode_id.tolist(), batch.start.tolist(), strict=True)
        chances += batch.probability.tolist()

    if request_["law"] == "fresh_first":
        fresh = sum(1 for chance in chances if chance == 1)
        assert drawn[:fresh] == sorted(law, reverse=True)[-fresh:]  # all that were not drawn while episodes came
        drawn, chances = drawn[fresh:], chances[fresh:]
    np.testing.assert_allclose(chances, [law[cell] for cell in drawn], rtol=1e-9)
    common = {cell: chance for cell, chance in law.items() if chance * len(drawn) >= 5}
    counts = count_cells([cell for cell in drawn if cell in common], list(common))
    assert chi_square(counts, np.array(list(common.values())) * len(drawn)) < chi_square_limit(len(common))


@pytest.mark.parametrize("request_", [*LAWS, {"law": "step"}, {"law": "prioritized"}, {"law": "episode"}], ids=law_id)
@pytest.mark.parametrize("pad", ["none", "end"])
def test_law_with_a_seed_gives_the_same_batches_as_in_process(path: str, request_: dict[str, Any], pad: str, stack: ExitStack) -> None:
    config = make_config(config={"buffer_size": 300})
    subject, reference = open_subject(path, stack, config), open_subject("in process", stack, config)
    for side in (subject, reference):
        fill(side, range(25))
        side.verbs.add(make_episode(25, 2), actor="actor-1", policy_version=25)
    request = {**request_, "pad": pad}
    count = 9 if subject.transport else 1

    source = draw_many(subject, stack, count, seed=5, **request)
    rng = reference.buffer.seeds.stream(5)
    for batch in source:
        assert_equal(batch, sample_with(reference.buffer, rng, **request))
        assert (batch.valid is None) == (pad == "none")
        if pad == "end":
            assert_padded(batch)


def assert_padded(batch: Batch) -> None:
    """Asserts that rows beyond an episode's end repeat its last one, and that ``valid`` says so."""
    length = torch.tensor([2 if number == 25 else 5 + (7 * number) % 60 for number in batch.episode_id.tolist()])
    rows = torch.minimum(batch.start[None] + torch.arange(HORIZON + 1)[:, None], length - 1)
    assert torch.equal(torch.as_tensor(batch.extra["value"]), (batch.episode_id * 1000.0 + rows).double())
    assert torch.equal(batch.valid[..., 0], batch.start[None] + torch.arange(1, HORIZON + 1)[:, None] < length)
    assert batch.valid.shape == (HORIZON, BATCH, 1)


def test_padded_batch_in_chunks_is_the_same(path: str, stack: ExitStack) -> None:
    config = make_config(config={"batch_size": 200, "buffer_size": 400})
    subject, reference = open_subject(path, stack, config), open_subject("in process", stack, config)
    for side in (subject, reference):
        for number in range(3):
            side.verbs.add(make_episode(number, 3 + 20 * number, width=3_000))

    rng = reference.buffer.seeds.stream(3)
    for batch in draw_many(subject, stack, 3 if subject.transport else 1, seed=3, pad="end"):
        assert_equal(batch, sample_with(reference.buffer, rng, pad="end"))


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        ({"law": "recent"}, "law: 'recent' with neither of recent_steps and recent_half_life, expected one of them"),
        ({"law": "recent", "recent_steps": 3}, "recent_steps: 3, expected at least 4"),
        ({"law": "step", "recent_steps": 30}, "recent_steps: 30 under the law 'step', expected it only under 'recent'"),
        ({"law": "recent", "recent_half_life": 0.0}, "recent_half_life: 0.0, expected"),
        ({"pad": "start"}, "pad: 'start', expected 'none' or 'end'"),
        ({"law": "task"}, "law: 'task', expected a table with a column task of integers, one in each row"),
    ],
)
def test_bad_law_is_refused_by_name(path: str, request_: dict[str, Any], text: str, stack: ExitStack) -> None:
    subject = open_subject(path, stack, make_config())
    subject.verbs.add({"obs": np.zeros((10, 2), np.float32), "action": np.zeros((10, 1)), "reward": np.zeros(10)})

    with pytest.raises((InvalidArgumentError, ClientInvalidArgumentError)) as caught:
        next(draw_many(subject, stack, 1, **request_))

    assert text in str(caught.value)


def test_info_says_how_many_episodes_are_too_short(path: str, stack: ExitStack) -> None:
    subject = open_subject(path, stack, make_config())
    for length in (2, 3, 9):
        subject.verbs.add(make_episode(0, length))

    assert subject.buffer.table.episodes_not_sampled() == 2
    if not path.startswith("in process"):
        assert subject.verbs.info().episodes_not_sampled == 2


def test_cleared_table_with_another_schema_goes_on(path: str, stack: ExitStack) -> None:
    subject = open_subject(path, stack, make_config())
    fill(subject)
    source = draw_many(subject, stack, 10_000)
    next(source)

    subject.verbs.clear()
    for number in range(5):
        subject.verbs.add({"obs": np.full((10, 2), number, np.float32), "action": np.zeros((10, 1)), "reward": np.zeros(10)})

    for _ in range(200):  # batches drawn before may still arrive
        batch = next(source)
        if not isinstance(batch.obs, dict):
            break
    assert batch.obs.shape == (HORIZON + 1, BATCH, 2)
    assert (batch.obs[0, :, 0] == batch.episode_id - 30).all()


def assert_slices_of(batch: Batch, *, matches: dict[int, dict[str, np.ndarray]], width: int = 4) -> None:
    """Asserts that each slice has the rows of the match that its provenance names, bit for bit."""
    size = len(batch.start)
    assert batch.obs.shape == (HORIZON + 1, size, AGENTS, width)
    assert batch.action.shape == (HORIZON, size, AGENTS, 2)
    assert batch.reward.shape == batch.done.shape == (HORIZON, size, AGENTS)
    assert batch.extra["alive"].shape == (HORIZON + 1, size, AGENTS)
    for column, (number, start) in enumerate(zip(batch.episode_id.tolist(), batch.start.tolist(), strict=True)):
        rows = slice(start, start + HORIZON + 1)
        match = {name: values[rows] for name, values in matches[number].items()}
        assert np.array_equal(np.asarray(batch.obs[:, column]), match["obs"])
        assert np.array_equal(np.asarray(batch.extra["alive"][:, column]), match["alive"])
        for name in ("action", "reward", "done"):
            assert np.array_equal(np.asarray(getattr(batch, name)[:, column]), match[name][1:])


@pytest.mark.parametrize("width", [4, 4_000])  # a batch that shares a frame, and one in chunks
def test_lockstep_batch_is_the_same_on_every_path(path: str, width: int, stack: ExitStack) -> None:
    config = make_config()
    subject, reference = open_subject(path, stack, config), open_subject("in process", stack, config)
    matches = {number: make_match(number, 5 + 7 * number, width=width) for number in range(5)}
    for side in (subject, reference):
        for match in matches.values():
            side.verbs.add(match)
    count = 1 if path.startswith("unary") else 6

    for one, other in zip(subject.draw(5, count), reference.draw(5, count), strict=True):
        assert len(one.start) == BATCH
        assert_slices_of(one, matches=matches, width=width)
        for name in ("obs", "action", "reward", "done", "episode_id", "start"):
            assert np.array_equal(np.asarray(getattr(one, name)), np.asarray(getattr(other, name)))


def test_done_of_the_whole_match_keeps_its_shape_and_a_missing_one_has_the_rewards(path: str, stack: ExitStack) -> None:
    for done in (True, False):
        subject = open_subject(path, stack, make_config())
        match = make_match(1, 30)
        match["done"] = (np.arange(30) == 29).astype(np.float32)
        if not done:
            del match["done"]
        subject.verbs.add(match)

        batch = subject.draw(1, 1)[0]

        assert batch.reward.shape == (HORIZON, BATCH, AGENTS)
        assert batch.done.shape == ((HORIZON, BATCH, 1) if done else (HORIZON, BATCH, AGENTS))
        ends = np.asarray(batch.start) + HORIZON == 29
        assert np.array_equal(np.asarray(batch.done)[-1].any(axis=-1), ends if done else np.zeros(BATCH, bool))


def test_single_agent_after_matches_is_refused_with_both_shapes(path: str, stack: ExitStack) -> None:
    subject = open_subject(path, stack, make_config())
    subject.verbs.add(make_match(0, 10))

    with pytest.raises(Exception, match=r"reward: shape \(\) a step, expected \(3,\) as in the first episode") as caught:
        subject.verbs.add(make_match(0, 10) | {"reward": np.zeros(10, np.float32)})
    assert type(caught.value).__name__ == "InvalidEpisodeError"
