"""Robot soccer for replay: dm_control's 2 against 2 BoxHead match, its stored form, and a policy that plays it.

`touchline.recorders.DmEnvRecorder` around a match gives four episodes, one a player, or in lockstep one of all players. Rows follow
TD-MPC2's convention: an episode of T transitions has T + 1 rows; row 0 holds the reset observation, its action, reward and done are NaN;
row t holds the observation that the action in row t led to.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

os.environ.setdefault("MUJOCO_GL", "disabled")  # no rendering, and so no graphics libraries; read when dm_control is imported

try:
    import dm_env
    from dm_control.locomotion import soccer
except ImportError as error:
    raise SystemExit(f"Robot soccer needs dm_control ({error}). Install it with: pip install -r examples/requirements.txt") from error

Array = NDArray[np.float32]
Row = dict[str, np.ndarray]

PLAYERS = 4
ACTIONS = 3
"""A BoxHead's controls, each in [-1, 1]: roll (negative is forward), steer (negative is to the left), kick."""

GOAL_REWARD = 5.0
REWARDED_SPEEDS = {"stats_vel_to_ball": 0.05, "stats_vel_ball_to_goal": 0.05}
"""Reward of a step: 5 for a goal (-5 for one against), 0.05 for each m/s of the player to the ball and of the ball to the opponents' goal.

Goals by themselves are too rare to learn from; these two shaping terms are among those of Liu et al. 2019, "Emergent Coordination Through
Competition" (the paper of this environment).
"""


def make_match(*, seed: int, match_seconds: float) -> Any:
    """Returns a dm_control environment whose pitch, kick-offs and physics follow `seed`; a goal or `match_seconds` ends a match."""
    return soccer.load(
        team_size=PLAYERS // 2,
        time_limit=match_seconds,
        random_state=seed,
        enable_field_box=True,  # the ball bounces off the borders, without throw-ins
        terminate_on_goal=True,
        walker_type=soccer.WalkerType.BOXHEAD,
    )


def flat_observation(observation: Mapping[str, np.ndarray]) -> Array:
    """Returns one player's observation as a flat float32 vector, its keys in alphabetical order.

    Of the game's statistics (`stats_*`) it has only the two speeds that the reward is made of. The sensors measure the same, but in turning
    frames; with the speeds themselves the next reward depends on what the players do, and is learnt within a minute.
    """
    keys = sorted(key for key in observation if not key.startswith("stats_") or key in REWARDED_SPEEDS)
    return np.concatenate([np.ravel(observation[key]) for key in keys]).astype(np.float32)


def shaped_reward(goal: float, observation: Mapping[str, np.ndarray]) -> float:
    """Returns one player's reward for a step that led to `observation`; `goal` is +1, -1 or 0."""
    return GOAL_REWARD * goal + sum(weight * float(observation[speed][0]) for speed, weight in REWARDED_SPEEDS.items())


class NoisyChaser:
    """A policy that runs about at random, smoothly, with a pull to the ball, so that something happens.

    The noise is AR(1), a discrete Ornstein-Uhlenbeck process: it keeps its direction for about `memory_steps`. How much of the action
    is noise differs from match to match, so that there are good and bad matches to learn from. Not thread-safe.
    """

    def __init__(self, *, seed: int | Sequence[int], memory_steps: float = 20.0, pull: tuple[float, float] = (0.2, 1.0)) -> None:
        self._rng = np.random.default_rng(seed)
        self._keep = float(np.exp(-1.0 / memory_steps))
        self._pull_range = pull
        self.reset()

    def reset(self) -> None:
        """Starts a match with fresh noise and a new share of it."""
        self._noise = self._rng.normal(size=ACTIONS)
        self._pull = self._rng.uniform(*self._pull_range)

    def __call__(self, observation: Mapping[str, np.ndarray]) -> Array:
        """Returns the action, [3] float32 in [-1, 1], for one player's observation."""
        self._noise = self._keep * self._noise + np.sqrt(1.0 - self._keep**2) * self._rng.normal(size=ACTIONS)
        ahead, left, _ = observation["ball_ego_position"][0]
        angle = np.arctan2(left, ahead)
        turning = observation["sensors_gyro"][0, 2]
        chase = np.array([-np.cos(angle), 0.3 * turning - angle, 0.0])
        return np.clip(self._pull * chase + (1.0 - self._pull) * self._noise, -1.0, 1.0).astype(np.float32)


class MatchRows:
    """Turns a recorder's rows into stored rows: pass it to a recorder as `transform`, and set `match` before each match.

    A row is obs [obs_size], action [3], reward [] and done [], float32, and match [], int32, so that a learner can tell which episodes
    share a match. `done` means terminated: 1 in the last row of a match that a goal ended; the time limit is a truncation and leaves it 0.
    """

    def __init__(self, match: int = 0) -> None:
        self.match = match

    def __call__(self, row: Mapping[str, Any]) -> Row:
        """Returns the row of one player; `row` has its observation as a dict, and the goals as its reward."""
        stored = {"obs": flat_observation(row["obs"]), "match": np.asarray(self.match, dtype=np.int32)}
        if "action" in row:
            reward = shaped_reward(float(row["reward"]), row["obs"])
            stored |= {"action": row["action"].astype(np.float32), "reward": np.asarray(reward, dtype=np.float32), "done": row["done"]}
        return stored


class TeamRows(MatchRows):
    """Turns rows of all players, as a recorder makes them in lockstep, into stored rows.

    They are those of `MatchRows` with an axis of players: obs [4, obs_size], action [4, 3], reward [4], done [4]; match [] is the same for
    all, and alive [4] is always true, as no player ever leaves the pitch.
    """

    def __call__(self, row: Mapping[str, Any]) -> Row:
        """Returns the row of all players; `row` has a dict of their observations, and the goals of each as its rewards."""
        rows = []
        for player in range(PLAYERS):
            own = {name: value[player] for name, value in row.items() if name != "obs"}
            own["obs"] = {name: values[player] for name, values in row["obs"].items()}
            rows.append(super().__call__(own))
        match = rows[0]["match"]
        return {name: np.stack([each[name] for each in rows]) for name in rows[0]} | {"match": match, "alive": row["alive"]}


def play_match(match: dm_env.Environment, policies: Sequence[NoisyChaser]) -> Iterator[dm_env.TimeStep]:
    """Plays one match.

    Args:
        match: environment made by `make_match`, or a recorder around it.
        policies: policy of each player.

    Yields:
        The result of the reset, then of each step: lists of four observations and rewards, +1, -1 or 0 for a goal.
    """
    for policy in policies:
        policy.reset()
    step = match.reset()
    yield step
    while not step.last():
        step = match.step([policy(observation) for policy, observation in zip(policies, step.observation, strict=True)])
        yield step
