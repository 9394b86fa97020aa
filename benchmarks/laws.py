"""Draws ``docs/images/laws.png``: which starts each law draws from the same eight episodes. ``python -m benchmarks.laws`` writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from touchline_protos.codec import Episode
from touchline_server import Config, ReplayBuffer

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "images" / "laws.png"

LENGTHS = (40, 12, 30, 8, 60, 20, 35, 15)
TASKS = (0, 0, 0, 0, 0, 1, 1, 1)
HORIZON = 3
SLICES = 200_000
HIGH_PRIORITIES = (45, 110)
"""Steps, counted over all episodes, with the highest priorities."""

PANELS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("episode", {"law": "episode"}),
    ("step", {"law": "step"}),
    ("recent, recent_steps=60", {"law": "recent", "recent_steps": 60}),
    ("recent, recent_half_life=40", {"law": "recent", "recent_half_life": 40.0}),
    ("prioritized", {"law": "prioritized"}),
    ("task", {"law": "task"}),
    ('step, pad="end"', {"law": "step", "pad": "end"}),
)


def filled_buffer() -> ReplayBuffer:
    """Returns a buffer with the eight episodes, oldest first."""
    config = Config(
        config={"buffer_size": sum(LENGTHS), "batch_size": 256, "horizon": HORIZON, "min_history": 0},
        storage={"device": "cpu"},
        sampling={"seed": 0},
        limits={"max_batch_size": SLICES},
    )
    buffer = ReplayBuffer(config)
    for task, length in zip(TASKS, LENGTHS, strict=True):
        zeros = np.zeros((length, 1), np.float32)
        action = zeros.copy()
        action[0] = np.nan  # no action led to the first row
        columns = {"obs": zeros, "action": action, "reward": zeros[:, 0], "task": np.full(length, task)}
        buffer.add_episode(Episode(columns))
    return buffer


def set_priorities(buffer: ReplayBuffer) -> None:
    """Sets a low priority for all transitions, and a high one for two."""
    first_steps = np.cumsum(LENGTHS) - LENGTHS
    for episode, (first, length) in enumerate(zip(first_steps, LENGTHS, strict=True)):
        priorities = np.full((length - 1, 1), 0.05)
        for step in HIGH_PRIORITIES:
            if first < step < first + length:
                priorities[step - first - 1] = 1.0
        buffer.update_priorities((np.array([episode]), np.array([0])), priorities)


def draw_panel(axes: plt.Axes, title: str, steps: np.ndarray, chance: np.ndarray) -> None:
    """Draws one histogram of starts, [slices] int64, and the probabilities that the slices carry."""
    total = sum(LENGTHS)
    counts = np.bincount(steps, minlength=total) / len(steps)
    expected = np.full(total, np.nan)
    expected[steps] = chance
    axes.bar(np.arange(total), counts, width=1.0, color="#4c78a8")
    axes.step(np.arange(total), expected, where="mid", color="#e45756", linewidth=1)
    for border in np.cumsum(LENGTHS)[:-1]:
        axes.axvline(border - 0.5, color="0.8", linewidth=0.6, zorder=0)
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xlim(-1, total)
    axes.set_ylim(bottom=0)
    axes.tick_params(labelsize=7)


def main() -> None:
    """Draws from a real buffer by every law, and writes the picture."""
    buffer = filled_buffer()
    first_steps = np.cumsum(LENGTHS) - LENGTHS
    figure, panels = plt.subplots(len(PANELS) + 1, 1, figsize=(8, 11), sharex=True, layout="constrained")
    buffer.sample(law="prioritized")
    set_priorities(buffer)
    for axes, (title, request) in zip(panels, PANELS, strict=False):
        batch = buffer.sample(batch_size=SLICES, **request)
        draw_panel(axes, title, first_steps[batch.episode_id.numpy()] + batch.start.numpy(), batch.probability.numpy())
    starts = sum(length - HORIZON for length in LENGTHS)
    fresh = buffer.sample(batch_size=starts, law="fresh_first")
    order = np.arange(1, starts + 1)
    panels[-1].scatter(first_steps[fresh.episode_id.numpy()] + fresh.start.numpy(), order, s=4, color="#4c78a8")
    for border in np.cumsum(LENGTHS)[:-1]:
        panels[-1].axvline(border - 0.5, color="0.8", linewidth=0.6, zorder=0)
    panels[-1].set_title("fresh_first: number of the draw", fontsize=9, loc="left")
    panels[-1].tick_params(labelsize=7)
    panels[-1].set_xlabel("step at which the slice begins, oldest episode first", fontsize=8)
    figure.savefig(PICTURE, dpi=110)
    print(f"{PICTURE}: written")


if __name__ == "__main__":
    main()
