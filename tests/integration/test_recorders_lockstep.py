"""Recorders in lockstep: whole matches in which agents die, leave, arrive and come back, compared with the records of each agent."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pettingzoo
import pytest
from gymnasium import spaces
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pettingzoo.test.example_envs import generated_agents_parallel_v0

os.environ.setdefault("MUJOCO_GL", "disabled")  # read when dm_control is imported
os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # read when pygame is imported

from dm_control import suite
from dm_control.locomotion import soccer

from support.recorder_cases import serve
from touchline import InvalidArgumentError, InvalidEpisodeError, ReplayClient
from touchline.recorders import DmEnvRecorder, PettingZooRecorder

try:
    from pettingzoo.butterfly import knights_archers_zombies_v11 as knights_archers_zombies

    MANY_ZOMBIES = {"spawn_delay": 4, "max_zombies": 40}
except ImportError:  # older versions of PettingZoo
    from pettingzoo.butterfly import knights_archers_zombies_v10 as knights_archers_zombies

    MANY_ZOMBIES = {"spawn_rate": 4, "max_zombies": 40}

Columns = dict[str, np.ndarray]
AGENTS = ["a", "b", "c"]
EVENTS = ["terminated", "truncated", "vanished"]


@dataclass(frozen=True)
class Servers:
    """A server for the agents' own episodes, and one for the matches of the same play: they have different columns."""

    alone: ReplayClient
    team: ReplayClient

    def clear(self) -> None:
        self.alone.clear()
        self.team.clear()

    def matches(self) -> list[Columns]:
        return [episode.columns for episode in self.team.episodes()]

    def lives(self, agent: Any) -> list[Columns]:
        """Returns the episodes of one agent."""
        return [episode.columns for episode in self.alone.episodes(actor=f"play/{agent}")]


@pytest.fixture(scope="module")
def shared() -> Iterator[Servers]:
    with (
        serve() as one,
        serve() as other,
        ReplayClient(one.address, actor="play") as alone,
        ReplayClient(other.address, actor="play") as team,
    ):
        yield Servers(alone, team)


@pytest.fixture
def servers(shared: Servers) -> Servers:
    shared.clear()
    return shared


def lives_of(matches: list[Columns], index: int) -> list[Columns]:
    """Returns an agent's episodes out of matches: the runs of steps in which it took part, each with the row before it."""
    lives = []
    for match in matches:
        alive = match["alive"][:, index].copy()
        alive[0] = False  # row 0 is no step
        borders = np.flatnonzero(np.diff(np.concatenate([alive, [False]]).astype(int), prepend=0))
        for begin, end in borders.reshape(-1, 2):
            rows = {name: column[begin - 1 : end, index].copy() for name, column in match.items() if name != "alive"}
            for name in ("action", "reward", "done"):
                rows[name][0] = np.nan if rows[name].dtype.kind == "f" else 0  # the first row of an agent's own episode
            lives.append(rows)
    return lives


def assert_same_play(servers: Servers, agents: list[Any]) -> None:
    """Asserts that the matches hold each agent's own episodes, step by step and bit for bit, and zeros for everything else."""
    matches = servers.matches()
    for index, agent in enumerate(agents):
        found, expected = lives_of(matches, index), servers.lives(agent)
        assert len(found) == len(expected), agent
        for one, other in zip(found, expected, strict=True):
            assert one.keys() == other.keys()
            for name in one:
                assert one[name].dtype == other[name].dtype, name
                assert np.array_equal(one[name], other[name], equal_nan=one[name].dtype.kind == "f"), name
    for match in matches:
        absent = ~match["alive"][1:]
        for name in ("action", "reward", "done"):
            assert not match[name][1:][absent].any(), name
            if match[name].dtype.kind == "f":
                assert np.isnan(match[name][0]).all(), name
        assert match["alive"].dtype == np.bool_ and match["reward"].dtype == match["done"].dtype == np.float32


def both(env: Any, servers: Servers, **options: Any) -> PettingZooRecorder:
    """Wraps an environment in both recorders."""
    return PettingZooRecorder(PettingZooRecorder(env, servers.alone), servers.team, lockstep=True, **options)


# Real environments


def test_knights_and_archers_that_die_are_masked_and_come_back(servers: Servers) -> None:
    deaths: list[dict[Any, int]] = []

    with both(knights_archers_zombies.parallel_env(max_cycles=400, **MANY_ZOMBIES), servers) as env:
        agents = list(env.possible_agents)
        for number, agent in enumerate(agents):
            env.action_space(agent).seed(number)
        for seed in (5, 6, 7):
            env.reset(seed=seed)
            deaths.append({})
            step = 0
            while env.agents:
                step += 1
                _, _, terminated, _, _ = env.step({agent: env.action_space(agent).sample() for agent in env.agents})
                deaths[-1] |= {agent: step for agent, died in terminated.items() if died}

    assert env.recording.agents == tuple(agents)
    matches = servers.matches()
    assert len(matches) == 3
    assert any(len(set(steps.values())) > 1 for steps in deaths)  # some died before the others
    assert_same_play(servers, agents)
    for match, steps in zip(matches, deaths, strict=True):
        assert match["obs"].shape[1:] == (4, *env.observation_space(agents[0]).shape) and match["action"].shape[1:] == (4,)
        assert match["alive"][0].all()  # all are back at the start
        for index, agent in enumerate(agents):
            died = steps.get(agent, len(match["done"]) - 1)
            assert np.flatnonzero(match["done"][1:, index]).tolist() == ([died - 1] if agent in steps else [])
            assert match["alive"][: died + 1, index].all() and not match["alive"][died + 1 :, index].any()
            assert not match["obs"][died + 1 :, index].any()


def test_soccer_match_is_one_episode(servers: Servers) -> None:
    match = soccer.load(team_size=2, time_limit=0.5, random_state=3, enable_field_box=True, walker_type=soccer.WalkerType.BOXHEAD)
    rng = np.random.default_rng(2)

    with DmEnvRecorder(DmEnvRecorder(match, servers.alone), servers.team, lockstep=True) as env:
        step = env.reset()
        lasts = 0
        while lasts < 3:
            actions = [rng.uniform(-1, 1, 3) for _ in range(4)]
            if lasts == 1 and not step.last() and env.physics.time() > 0.2:
                env.task.should_terminate_episode = lambda physics: True  # as after a goal
                env.task.get_discount = lambda physics: np.zeros((), np.float32)
            step = env.step(None if step.last() else actions)  # the action of a step that resets may be anything
            if step.last():
                lasts += 1

    matches = servers.matches()
    assert [bool(match["done"][-1].all()) for match in matches] == [False, True, True]
    assert not any(match["done"][1:-1].any() for match in matches)
    assert env.recording.agents == (0, 1, 2, 3)
    assert all(match["alive"].all() for match in matches)
    assert matches[0]["obs.ball_ego_position"].shape[1] == 4
    assert_same_play(servers, [0, 1, 2, 3])
    assert {episode.actor for episode in servers.team.episodes(columns=["reward"])} == {"play"}


# Any play


class Schedule(pettingzoo.ParallelEnv[str, Any, Any]):
    """A play in which every agent is present as a schedule says: each match has a set of present agents a row.

    Observations are [match, row, agent], all at least 1. An agent that is not present at the next row is terminated or truncated in it,
    with a last observation, or it vanishes.
    """

    def __init__(self, matches: list[list[set[str]]], ends: list[str]) -> None:
        self.metadata = {"name": "schedule"}
        self.possible_agents = list(AGENTS)
        self.agents: list[str] = []
        self._matches, self._ends = matches, ends
        self._match = self._row = self._ended = 0
        self.observed: dict[tuple[int, int], set[str]] = {}

    def observation_space(self, agent: str) -> Any:
        return spaces.Dict(where=spaces.Box(0, np.inf, (3,), np.float32), who=spaces.Discrete(9))

    def action_space(self, agent: str) -> Any:
        return spaces.Box(-1, 1, (2,), np.float32)

    def _observe(self, agents: set[str]) -> dict[str, Any]:
        self.observed[self._match, self._row] = agents
        who = {agent: AGENTS.index(agent) + 1 for agent in sorted(agents)}
        row = self._row + 1
        return {agent: {"where": np.array([self._match, row, index], np.float32), "who": index} for agent, index in who.items()}

    def reset(self, seed: int | None = None, options: Any = None) -> Any:
        self._match, self._row = self._match + 1, 0
        self.agents = sorted(self._matches[self._match - 1][0])
        return self._observe(set(self.agents)), {agent: {} for agent in self.agents}

    def step(self, actions: dict[str, Any]) -> Any:
        self._row += 1
        rows = self._matches[self._match - 1]
        before, after = set(self.agents), rows[self._row] if self._row < len(rows) else set()
        ends = {agent: self._ends[(self._ended + number) % len(self._ends)] for number, agent in enumerate(sorted(before - after))}
        self._ended += len(ends)
        stepped = {agent for agent in before if ends.get(agent) != "vanished"}
        self.agents = sorted(after)
        return (
            self._observe(stepped | after),
            {agent: float(self._row * 10 + AGENTS.index(agent)) for agent in stepped},
            {agent: ends.get(agent) == "terminated" for agent in stepped},
            {agent: ends.get(agent) == "truncated" for agent in stepped},
            {agent: {} for agent in stepped | after},
        )


PRESENT = st.sets(st.sampled_from(AGENTS))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    matches=st.lists(st.lists(PRESENT, min_size=1, max_size=9), min_size=1, max_size=3),
    ends=st.lists(st.sampled_from(EVENTS), min_size=1, max_size=5),
    seed=st.integers(0, 1 << 16),
)
def test_lockstep_record_equals_the_records_of_each_agent(
    shared: Servers, matches: list[list[set[str]]], ends: list[str], seed: int
) -> None:
    shared.clear()
    rng = np.random.default_rng(seed)
    schedule = Schedule(matches, ends)

    with both(schedule, shared) as env:
        for rows in matches:
            env.reset()
            for _ in rows:
                env.step({agent: rng.uniform(-1, 1, 2) for agent in env.agents})

    assert_same_play(shared, AGENTS)
    for match in shared.matches():
        number = int(match["obs.where"][0].max(axis=0)[0])
        for row, (where, who) in enumerate(zip(match["obs.where"], match["obs.who"], strict=True)):
            at = int(where.max(axis=0)[1]) - 1
            observed = schedule.observed[number, at]
            assert {AGENTS[index] for index in np.flatnonzero(who)} == observed, (row, at)
            assert (where.any(axis=1) == (who > 0)).all()


def test_batches_have_the_agents_of_one_step(servers: Servers) -> None:
    schedule = Schedule([[{"a", "b", "c"}] * 4 + [{"a", "c"}] * 4 + [{"a"}] * 4], ["terminated"])
    with PettingZooRecorder(schedule, servers.team, lockstep=True) as env:
        env.reset()
        for _ in range(12):
            env.step({agent: np.zeros(2, np.float32) for agent in env.agents})

    batch = servers.team.sample(batch_size=64, horizon=2, seed=1)

    where, alive, done = np.asarray(batch.obs["where"]), np.asarray(batch.extra["alive"]), np.asarray(batch.done)
    assert where.shape == (3, 64, 3, 3) and alive.shape == (3, 64, 3) and done.shape == (2, 64, 3)
    rows = np.asarray(batch.start)[None] + np.arange(3)[:, None]
    assert np.array_equal(where[..., 0, 1], rows + 1)  # agent a is there until the end
    assert np.array_equal(alive, rows[..., None] <= np.array([12, 4, 8]))
    assert np.array_equal(done, rows[1:, ..., None] == np.array([12, 4, 8]))
    assert not where[~alive].any()


# Borders of episodes


def test_reset_in_the_middle_truncates_the_match(servers: Servers) -> None:
    env = both(Schedule([[{"a", "b"}] * 9] * 2, ["terminated"]), servers)
    for steps in (3, 5):
        env.reset()
        for _ in range(steps):
            env.step({agent: np.ones(2, np.float32) for agent in env.agents})
    env.close()

    matches = servers.matches()
    assert [len(match["done"]) for match in matches] == [4, 6]
    assert not any(match["done"][1:].any() for match in matches)
    assert_same_play(servers, AGENTS)


def test_match_is_sent_as_soon_as_its_last_agent_is_gone(servers: Servers) -> None:
    with PettingZooRecorder(Schedule([[{"a", "b"}] * 3 + [{"b"}] * 2], ["terminated"]), servers.team, lockstep=True) as env:
        env.reset()
        while env.agents:
            env.step({agent: np.ones(2, np.float32) for agent in env.agents})
        env.recording.flush(timeout_s=30.0)

        assert [len(match["done"]) for match in servers.matches()] == [6]


def test_match_ends_when_no_chosen_agent_is_left(servers: Servers) -> None:
    schedule = Schedule([[{"a", "b", "c"}] * 3 + [{"a", "b"}] * 2 + [{"b"}] * 4 + [{"b", "c"}] * 3], ["terminated"])
    with both(schedule, servers, agents={"c", "a"}) as env:
        env.reset()
        for _ in range(12):
            env.step({agent: np.ones(2, np.float32) for agent in env.agents})

    assert env.recording.agents == ("a", "c")  # the order of possible_agents, whatever that of the argument
    first, second = servers.matches()
    assert len(first["done"]) == 6 and len(second["done"]) == 4
    assert first["done"][1:].sum(axis=0).tolist() == [1, 1] and second["alive"].tolist() == [[False, True]] * 4
    assert_same_play(servers, ["a", "c"])


def test_max_steps_cuts_a_match_into_pieces_that_overlap_by_a_row(servers: Servers) -> None:
    schedule = Schedule([[{"a", "b"}] * 5 + [{"a"}] * 5], ["terminated"])
    with PettingZooRecorder(schedule, servers.team, lockstep=True, max_steps=4) as env:
        env.reset()
        for _ in range(10):
            env.step({agent: np.ones(2, np.float32) for agent in env.agents})

    pieces = servers.matches()
    assert [len(piece["done"]) for piece in pieces] == [5, 5, 3]
    for one, other in itertools.pairwise(pieces):
        assert np.array_equal(one["obs.where"][-1], other["obs.where"][0]) and np.array_equal(one["alive"][-1], other["alive"][0])


def test_transform_gets_rows_and_infos_of_all_agents(servers: Servers) -> None:
    def flat(row: dict[str, Any], info: dict[Any, Any]) -> dict[str, Any]:
        return row | {"obs": row["obs"]["where"].reshape(len(AGENTS), -1), "present": np.int64(len(info))}

    with PettingZooRecorder(Schedule([[{"a", "b"}] * 2 + [{"b"}] * 3], ["truncated"]), servers.team, lockstep=True, transform=flat) as env:
        env.reset()
        for _ in range(5):
            env.step({agent: np.ones(2, np.float32) for agent in env.agents})

    (match,) = servers.matches()
    assert match["present"].tolist() == [2, 2, 2, 1, 1, 1]
    assert match["obs"].shape == (6, 3, 3)


def test_order_of_the_agents_is_logged(servers: Servers, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "touchline"):
        PettingZooRecorder(Schedule([[set()]], EVENTS), servers.team, lockstep=True).close()

    assert "actor 'play': agents in lockstep: 0 a, 1 b, 2 c" in caplog.text


# Refusals


class Uneven(Schedule):
    """Agent ``b`` has spaces of its own."""

    other: tuple[Any, Any] = (None, None)

    def observation_space(self, agent: str) -> Any:
        return (self.other[0] if agent == "b" else None) or super().observation_space(agent)

    def action_space(self, agent: str) -> Any:
        return (self.other[1] if agent == "b" else None) or super().action_space(agent)


WHERE = spaces.Box(0, np.inf, (3,), np.float32)


@pytest.mark.parametrize(
    ("observation", "action", "message"),
    [
        (
            spaces.Dict(where=spaces.Box(0, 1, (4,), np.float32), who=spaces.Discrete(9)),
            None,
            r"obs\.where of agent 'b' is float32 \(4,\), ",
        ),
        (spaces.Dict(where=WHERE, who=spaces.Discrete(8)), None, r"obs\.who of agent 'b' is Discrete\(8\), expected Discrete\(9\) as of"),
        (spaces.Dict(where=WHERE), None, "obs.who of agent 'b' is missing, expected Discrete"),
        (
            spaces.Dict(where=WHERE, who=spaces.Discrete(9), x=WHERE),
            None,
            "obs.x of agent 'b' is float32 .*, expected missing as of agent 'a'",
        ),
        (None, spaces.Box(-1, 1, (2,), np.float64), r"action of agent 'b' is float64 \(2,\), expected float32 \(2,\) as of agent 'a'"),
        (None, spaces.Discrete(2), r"action of agent 'b' is Discrete\(2\), expected float32"),
    ],
)
def test_agents_with_different_spaces_are_refused_by_name(servers: Servers, observation: Any, action: Any, message: str) -> None:
    env = Uneven([[set(AGENTS)] * 3], EVENTS)
    env.other = observation, action

    with pytest.raises(InvalidArgumentError, match=rf"^lockstep: {message}.*\(agents=\[\.\.\.\]\), or record without lockstep$"):
        PettingZooRecorder(env, servers.team, lockstep=True)
    with PettingZooRecorder(env, servers.team, lockstep=True, agents=["a", "c"]) as recorder:
        recorder.reset()
        recorder.step({agent: np.zeros(2, np.float32) for agent in AGENTS})
    assert len(servers.matches()) == 1


def test_bounds_of_floats_may_differ(servers: Servers) -> None:
    env = Uneven([[set(AGENTS)] * 3], EVENTS)
    env.other = None, spaces.Box(-2, 2, (2,), np.float32)

    PettingZooRecorder(env, servers.team, lockstep=True).close()


def test_spaces_that_differ_from_a_reset_on_are_refused_there(servers: Servers) -> None:
    env = Uneven([[set(AGENTS)] * 3] * 2, EVENTS)
    with PettingZooRecorder(env, servers.team, lockstep=True) as recorder:
        recorder.reset()
        recorder.step({agent: np.zeros(2, np.float32) for agent in AGENTS})
        env.other = None, spaces.Discrete(3)
        with pytest.raises(InvalidArgumentError, match="lockstep: action of agent 'b' is Discrete"):
            recorder.reset()

    assert [len(match["done"]) for match in servers.matches()] == [2]


def test_agents_that_are_not_known_beforehand_are_refused(servers: Servers) -> None:
    env = Schedule([[set(AGENTS)]], EVENTS)

    with pytest.raises(InvalidArgumentError, match=r"agents: 'z', expected some of the possible_agents \['a', 'b', 'c'\]"):
        PettingZooRecorder(env, servers.team, lockstep=True, agents=["a", "z"])
    with pytest.raises(InvalidArgumentError, match=r"agents: none, expected some of the possible_agents"):
        PettingZooRecorder(env, servers.team, lockstep=True, agents=[])
    with pytest.raises(InvalidArgumentError, match=r"lockstep: (the environment has no possible_agents|obs of agent)"):
        PettingZooRecorder(generated_agents_parallel_v0.parallel_env(), servers.team, lockstep=True)


def test_agent_that_is_not_among_the_possible_ones_ends_the_record(servers: Servers) -> None:
    class Stranger(Schedule):
        def step(self, actions: Any) -> Any:
            observations, *rest = super().step(actions)
            if self._match == 1 and self._row == 3:
                observations["stranger"] = observations["a"]
            return (observations, *rest)

    with PettingZooRecorder(Stranger([[{"a", "b"}] * 6] * 2, ["terminated"]), servers.team, lockstep=True) as env:
        for match in range(2):
            env.reset()
            for step in range(1, 7):
                actions = {agent: np.zeros(2, np.float32) for agent in env.agents}
                if (match, step) == (0, 3):
                    with pytest.raises(InvalidEpisodeError, match="lockstep: agent 'stranger', expected the possible_agents"):
                        env.step(actions)
                else:
                    env.step(actions)

    assert [len(match["done"]) for match in servers.matches()] == [3, 7]


BAD = {
    "an observation of another shape": (lambda a: a[0]["b"].update(where=np.zeros(4, np.float32)), r"obs\.where: float32 \(\d,\) of agent"),
    "an observation that does not fit": (lambda a: a[0]["b"].update(where=np.full(3, 0.1)), "obs.where: 0.1, which is"),
    "rewards of several": (lambda a: a[1].update(b=np.zeros(2, np.float32)), r"reward: shape \(2,\) of agent 'b', expected one value"),
    "no reward": (lambda a: a[1].pop("b"), "reward: the environment returned none for agent 'b'"),
    "no observation": (lambda a: a[0].pop("b"), "obs: the environment returned none for agent 'b'"),
    "flags of several": (lambda a: a[2].update(b=np.zeros(2, bool)), r"terminated: shape \(2,\), expected one value"),
}


@pytest.mark.parametrize("bad", BAD)
def test_value_that_cannot_be_stored_ends_the_record_before_its_row(servers: Servers, bad: str) -> None:
    change, message = BAD[bad]

    class Faulty(Schedule):
        def step(self, actions: Any) -> Any:
            answer = super().step(actions)
            if self._match == 1 and self._row == 3:
                change(answer)
            return answer

    with PettingZooRecorder(Faulty([[set(AGENTS)] * 6] * 2, ["terminated"]), servers.team, lockstep=True) as env:
        for match in range(2):
            env.reset()
            for step in range(1, 7):
                actions = {agent: np.zeros(2, np.float32) for agent in env.agents}
                if (match, step) == (0, 3):
                    with pytest.raises(InvalidEpisodeError, match=f"^{message}"):
                        env.step(actions)
                else:
                    env.step(actions)

    assert [len(match["done"]) for match in servers.matches()] == [3, 7]


def test_bad_action_is_refused_before_the_step(servers: Servers) -> None:
    schedule = Schedule([[{"a", "b"}] * 4], ["terminated"])
    with PettingZooRecorder(schedule, servers.team, lockstep=True) as env:
        env.reset()
        with pytest.raises(InvalidEpisodeError, match=r"action: shape \(3,\) of agent 'b', expected \(2,\)"):
            env.step({"a": np.zeros(2), "b": np.zeros(3)})
        for _ in range(4):
            env.step({agent: np.zeros(2) for agent in env.agents})
    with PettingZooRecorder(Schedule([[{"a", "b"}] * 4], ["terminated"]), servers.team, lockstep=True) as env:
        env.reset()
        with pytest.raises(InvalidEpisodeError, match="action: none for agent 'b'"):
            env.step({"a": np.zeros(2)})

    assert [len(match["done"]) for match in servers.matches()] == [5]


def test_single_player_of_dm_env_is_refused(servers: Servers) -> None:
    with pytest.raises(InvalidArgumentError, match="lockstep: the environment has one player, expected lists of specs; record without"):
        DmEnvRecorder(suite.load("cartpole", "swingup"), servers.team, lockstep=True)


def test_players_with_different_specs_are_refused_by_name(servers: Servers) -> None:
    match = soccer.load(team_size=1, time_limit=0.5, random_state=3, walker_type=soccer.WalkerType.BOXHEAD)
    specs = match.observation_spec()
    del specs[1]["body_height"]
    match.observation_spec = lambda: specs

    with pytest.raises(InvalidArgumentError, match=r"lockstep: obs\.body_height of agent 1 is missing, .*: record without lockstep$"):
        DmEnvRecorder(match, servers.team, lockstep=True)


def test_agent_alone_has_an_axis_of_one(servers: Servers) -> None:
    with PettingZooRecorder(Schedule([[{"a"}] * 4], ["terminated"]), servers.team, lockstep=True, agents=["a"]) as env:
        env.reset()
        for _ in range(4):
            env.step({"a": np.zeros(2, np.float32)})

    (match,) = servers.matches()
    assert match["action"].shape == (5, 1, 2) and match["reward"].shape == match["alive"].shape == (5, 1)
