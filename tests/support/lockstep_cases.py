"""Episodes of whole matches for tests: the agents are the second axis."""

from __future__ import annotations

import numpy as np

AGENTS = 3


def make_match(number: int, rows: int, *, agents: int = AGENTS, width: int = 4) -> dict[str, np.ndarray]:
    """Returns a match as a recorder stores it in lockstep.

    Every value identifies match, step and agent: ``number * 1000 + row + agent / 8``. Agent 0 dies half way.
    """
    value = number * 1000.0 + np.arange(rows)[:, None] + np.arange(agents) / 8
    columns = {
        "obs": np.repeat(value[:, :, None], width, axis=2).astype(np.float32),
        "action": np.stack([value, -value], axis=2).astype(np.float32),
        "reward": (value / 2).astype(np.float32),
        "done": np.zeros((rows, agents), np.float32),
        "alive": np.ones((rows, agents), np.bool_),
    }
    for name in ("action", "reward", "done"):
        columns[name][0] = np.nan
    columns["done"][rows // 2, 0] = 1.0
    columns["alive"][rows // 2 + 1 :, 0] = False
    return columns
