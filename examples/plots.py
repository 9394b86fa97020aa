"""The demo's picture: losses, error on held-out matches, throughput and return per episode."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray

matplotlib.use("Agg")  # draws into files, needs no screen
from matplotlib import pyplot
from matplotlib.axes import Axes

BLUE, ORANGE, GREEN, GREY = "#2563eb", "#ea580c", "#059669", "#6b7280"
STYLE: dict[str, Any] = {
    "font.size": 10.0,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9ca3af",
    "axes.labelcolor": "#374151",
    "xtick.color": "#374151",
    "ytick.color": "#374151",
    "axes.grid": True,
    "grid.color": "#e5e7eb",
    "lines.linewidth": 1.8,
    "legend.frameon": False,
}
RATE_WINDOW_S = 15.0
"""Time over which steps a second are averaged, since whole episodes arrive in bursts."""
MEDIAN_MATCHES = 7


def draw(
    path: Path,
    *,
    began: float,
    learner: Sequence[dict[str, Any]],
    matches: Sequence[dict[str, Any]],
    arrivals: Sequence[tuple[float, int]],
    caption: str,
) -> None:
    """Writes the picture as a PNG.

    Args:
        path: path of the file.
        began: time when play began; all times are in seconds since the epoch.
        learner: reports of the learner, as in its metrics file.
        matches: the actors' reports of matches.
        arrivals: pairs of a time and the number of steps added to the server until then.
        caption: a line below the title.
    """
    with pyplot.style.context(STYLE):
        figure, axes = pyplot.subplots(2, 2, figsize=(11.0, 7.0), dpi=130, layout="constrained", sharex=True)
        figure.suptitle(f"Robot soccer into a replay server, and a world model out of it\n{caption}", fontsize=12.5)
        _draw_losses(axes[0, 0], began, learner)
        _draw_held_out(axes[0, 1], began, learner)
        _draw_throughput(axes[1, 0], began, learner, arrivals)
        _draw_returns(axes[1, 1], began, matches)
        for axis in axes[1]:
            axis.set_xlabel("seconds of play")
        axes[0, 0].set_xlim(left=0.0)
        figure.savefig(path)
        pyplot.close(figure)


def _draw_losses(axis: Axes, began: float, learner: Sequence[dict[str, Any]]) -> None:
    reports = [report for report in learner if "total" in report]
    times = [report["time"] - began for report in reports]
    axis.plot(times, [report["reward"] for report in reports], color=BLUE, label="reward")
    axis.plot(times, [report["consistency"] for report in reports], color=ORANGE, label="latent consistency")
    axis.set_title("Training losses")
    if reports:
        axis.set_yscale("log")
        axis.legend()


def _draw_held_out(axis: Axes, began: float, learner: Sequence[dict[str, Any]]) -> None:
    reports = [report for report in learner if report["held_out"]]
    times = [report["time"] - began for report in reports]
    ratios = np.array([np.divide(report["held_out"]["error"], report["held_out"]["error_of_mean"]) for report in reports])
    if reports:
        axis.plot(times, ratios[:, 0], color=BLUE, label="1 step ahead")
        axis.plot(times, ratios[:, -1], color=GREEN, label=f"{ratios.shape[1]} steps ahead")
    axis.axhline(1.0, color=GREY, linestyle="--", linewidth=1.2, label="predicting the mean")
    axis.set_ylim(0.0, 1.25)
    axis.set_title("Squared reward error on held-out matches")
    axis.set_ylabel("share of predicting the mean")
    axis.legend(loc="center right")


def _draw_throughput(axis: Axes, began: float, learner: Sequence[dict[str, Any]], arrivals: Sequence[tuple[float, int]]) -> None:
    times = np.array([time - began for time, _ in arrivals])
    steps = np.array([count for _, count in arrivals], dtype=np.float64)
    since = np.maximum(times - RATE_WINDOW_S, 0.0)
    rates = (steps - np.interp(since, times, steps)) / np.maximum(times - since, 1e-9)
    settled = times >= 1.0
    axis.fill_between(times[settled], rates[settled], color=GREEN, alpha=0.15, linewidth=0)
    axis.plot(times[settled], rates[settled], color=GREEN)
    axis.set_ylim(bottom=0.0)
    axis.set_title("Throughput")
    axis.set_ylabel("steps in, per second", color=GREEN)
    batches = axis.twinx()
    batches.plot([report["time"] - began for report in learner], [report["batches_per_s"] for report in learner], color=BLUE)
    batches.set_ylim(bottom=0.0)
    batches.set_ylabel("batches out, per second", color=BLUE)
    batches.grid(visible=False)


def _draw_returns(axis: Axes, began: float, matches: Sequence[dict[str, Any]]) -> None:
    ordered = sorted(matches, key=lambda report: report["time"])
    times = np.array([report["time"] - began for report in ordered])
    returns = np.array([report["returns"] for report in ordered])
    if ordered:
        players = returns.shape[1]
        axis.scatter(np.repeat(times, players), returns, s=14, color=BLUE, alpha=0.4, linewidths=0, label="a player's episode")
        axis.plot(times, _running_median(returns), color=ORANGE, label=f"median of {MEDIAN_MATCHES} matches")
        axis.legend(loc="upper left")
    axis.set_title("Return per episode")


def _running_median(returns: NDArray[np.float64]) -> NDArray[np.float64]:
    half = MEDIAN_MATCHES // 2
    return np.array([np.median(returns[max(0, i - half) : i + half + 1]) for i in range(len(returns))])
