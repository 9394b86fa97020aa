"""The results as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from benchmarks.bars import Sections, Verdict, values
from benchmarks.statistics import Interval, median_interval

INK, MUTED, GRID = "#1f2933", "#6b7785", "#e3e8ee"
COLOURS = {"theirs": "#9aa5b1", "limit": "#c9b458", "ours": "#1f7a6d", "faint": "#8cc5bb"}

_PLAIN = StrMethodFormatter("{x:,.0f}")

LABELS = {
    "tdmpc2": "TD-MPC2's buffer (TorchRL), in process",
    "tdmpc2-writes": "— one episode added for each batch",
    "tdmpc2-cached": "— cache on, never a write",
    "tdmpc2-cached-writes": "— cache on, one episode added for each batch",
    "limit": "gather limit, in process",
    "limit-provenance": "gather limit with provenance",
    "local": "Touchline, in process",
    "local-writes": "— one episode added for each batch",
    "unary": "Touchline, a call for each batch",
    "stream": "Touchline, TCP stream",
    "ring": "Touchline, shared-memory ring",
    "stream-10k": "— 4 actors add 10 k steps/s",
    "ring-10k": "— 4 actors add 10 k steps/s",
    "stream-flat": "— 4 actors add flat out",
    "ring-flat": "— 4 actors add flat out",
    "reverb": "Reverb",
    "reverb-apart": "Reverb, columns apart",
    "reverb-10k": "Reverb — 4 writers add 10 k steps/s",
}
"""Names of subjects for readers."""


def draw_all(sections: Sections, verdicts: Sequence[Verdict], folder: Path) -> list[str]:
    """Draws everything that was measured into a folder; returns the files' names."""
    drawn = []
    for name, figure in (
        ("throughput.png", _throughput(sections)),
        ("ratios.png", _ratios(verdicts)),
        ("load.png", _load(sections)),
        ("sizes.png", _sizes(sections)),
    ):
        if figure is not None:
            figure.savefig(folder / name, dpi=150, facecolor="white")
            plt.close(figure)
            drawn.append(name)
    return drawn


def short(value: float) -> str:
    """Returns a number with as many digits as are worth reading."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def label(subject: str) -> str:
    """Returns a subject's name for readers."""
    return LABELS.get(subject, subject)


def _throughput(sections: Sections) -> Figure | None:
    order = ("tdmpc2", "tdmpc2-cached", "tdmpc2-cached-writes", "reverb-apart", "reverb", "unary", "stream", "ring", "local", "limit")
    panels = [(workload, found) for workload in ("W1", "W2") if (found := _bars(sections, workload, order))]
    if not panels:
        return None
    heights = [len(found) for _, found in panels]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(9, 1.6 + 0.36 * sum(heights)), height_ratios=heights, layout="constrained", squeeze=False
    )
    titles = {"W1": "W1 — state, 1 M rows, 293 kB a batch", "W2": "W2 — pixels, 100 k rows, 37.8 MB a batch"}
    for axis, (workload, found) in zip(axes[:, 0], panels, strict=True):
        _bar_panel(axis, found)
        axis.set_title(titles[workload], loc="left", color=INK, fontsize=11, fontweight="bold")
    text = "batches per second (log scale); whiskers: 95 % interval of the median"
    if any(subject.startswith("reverb") for _, found in panels for subject, _ in found):
        text += "; Reverb: of a run of its own, see the tables"
    axes[-1, 0].set_xlabel(text, color=MUTED, fontsize=9, loc="right")
    return figure


def _bars(sections: Sections, workload: str, order: Sequence[str]) -> list[tuple[str, Interval]]:
    found = []
    for subject in order:
        rates = values(sections, workload, subject, "batches_per_s") or values(sections, f"peers {workload}", subject, "batches_per_s")
        if rates:
            found.append((subject, median_interval(rates)))
    return found


def _bar_panel(axis: Axes, found: Sequence[tuple[str, Interval]]) -> None:
    for place, (subject, rate) in enumerate(found):
        kind = "theirs" if subject.startswith(("tdmpc2", "reverb")) else "limit" if subject == "limit" else "ours"
        axis.barh(place, rate.median, height=0.66, color=COLOURS[kind])
        axis.plot([rate.low, rate.high], [place, place], color=INK, linewidth=1.2)
        axis.text(rate.high * 1.06, place, short(rate.median), va="center", color=INK, fontsize=9)
    names = [LABELS.get(subject, subject) for subject, _ in found]
    names = [name.replace("— ", "TD-MPC2's buffer, ") for name in names]
    axis.set_yticks(range(len(found)), names, fontsize=9, color=INK)
    axis.invert_yaxis()
    axis.set_xscale("log")
    lowest, highest = min(rate.low for _, rate in found), max(rate.high for _, rate in found)
    axis.set_xlim(lowest * 0.5, highest * 2.2)
    axis.xaxis.set_major_formatter(_PLAIN)
    axis.minorticks_off()
    _clean(axis, "x")


def _ratios(verdicts: Sequence[Verdict]) -> Figure | None:
    measured = [verdict for verdict in verdicts if verdict.ratio is not None]
    if not measured:
        return None
    figure, axis = plt.subplots(figsize=(9, 1.2 + 0.42 * len(measured)), layout="constrained")
    for place, verdict in enumerate(measured):
        ratio, bar = verdict.ratio, verdict.bar
        assert ratio is not None
        # Above 1 is better than the bar for all of them, even if less is better.
        low, middle, high = (end / bar.value for end in (ratio.low, ratio.median, ratio.high))
        if bar.at_most:
            low, middle, high = 1 / high, 1 / middle, 1 / low
        colour = COLOURS["ours"] if verdict.word != "not met" else "#b4472f"
        axis.plot([low, high], [place, place], color=colour, linewidth=3, solid_capstyle="round", alpha=0.45)
        axis.plot(middle, place, "o", color=colour, markersize=7)
        axis.text(1.02, place, short(ratio.median), transform=axis.get_yaxis_transform(),
                  va="center", fontsize=9, color=INK)  # fmt: skip
    axis.axvline(1, color=INK, linewidth=1)
    texts = [v.bar.text.replace("`", "").removeprefix("a goal, not a bar: ") for v in measured]
    signs = ["≤" if v.bar.at_most else "≥" for v in measured]
    axis.set_yticks(
        range(len(measured)), [f"{t}  ({s} {v.bar.value:g})" for t, s, v in zip(texts, signs, measured, strict=True)], fontsize=8, color=INK
    )
    axis.set_ylim(len(measured) - 0.5, -0.5)
    axis.set_xscale("log")
    ticks = [tick for tick in (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4) if axis.get_xlim()[0] <= tick <= axis.get_xlim()[1]]
    axis.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
    axis.minorticks_off()
    text = "measured over its bar, right of the line is better; green: the 95 % interval reaches the bar; at the right the ratio itself"
    figure.supxlabel(text, color=MUTED, fontsize=9)
    _clean(axis, "x")
    return figure


def _load(sections: Sections) -> Figure | None:
    groups = [("alone", ""), ("10 k steps/s added", "-10k"), ("actors flat out", "-flat")]
    figure, axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
    width, drawn = 0.26, False
    for shift, (subject, colour, text) in enumerate(
        (("reverb", COLOURS["theirs"], "Reverb"), ("stream", COLOURS["faint"], "TCP stream"), ("ring", COLOURS["ours"], "ring"))
    ):
        for place, (_, suffix) in enumerate(groups):
            # Compare only what one run measured; without Reverb there is only the other run.
            rates = values(sections, "peers W1" if "peers W1" in sections else "W1", subject + suffix, "batches_per_s")
            if not rates:
                continue
            rate = median_interval(rates)
            at = place + (shift - 1) * width
            axis.bar(at, rate.median, width * 0.92, color=colour, label=text if not place else None)
            axis.plot([at, at], [rate.low, rate.high], color=INK, linewidth=1.2)
            axis.text(at, rate.high * 1.05, short(rate.median), ha="center", va="bottom", fontsize=8, color=INK)
            drawn = True
    if not drawn:
        plt.close(figure)
        return None
    axis.set_yscale("log")
    axis.set_ylim(top=axis.get_ylim()[1] * 1.6)
    axis.yaxis.set_major_formatter(_PLAIN)
    axis.minorticks_off()
    axis.set_xticks(range(len(groups)), [text for text, _ in groups], color=INK)
    axis.set_ylabel("batches per second (log scale)", color=MUTED, fontsize=9)
    axis.set_title("W1 — sampling while four actors add", loc="left", color=INK, fontsize=11, fontweight="bold")
    axis.legend(frameon=False, fontsize=9, loc="upper right", ncols=3)
    _clean(axis, "y")
    return figure


def _sizes(sections: Sections) -> Figure | None:
    sizes = (("10k", 1e4), ("100k", 1e5), ("1M", 1e6))
    styles = {"limit": ("limit", "--"), "local": ("ours", "-"), "ring": ("ours", "-"), "stream": ("faint", "-"), "tdmpc2": ("theirs", "-")}
    markers = {"limit": "", "local": "s", "ring": "o", "stream": "^", "tdmpc2": "D"}
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    drawn = False
    for subject, (colour, line) in styles.items():
        found = [(rows, values(sections, "sizes", f"{subject}@{text}", "batches_per_s")) for text, rows in sizes]
        points = [(rows, median_interval(rates)) for rows, rates in found if rates]
        if not points:
            continue
        drawn = True
        axis.plot([rows for rows, _ in points], [rate.median for _, rate in points], line, marker=markers[subject], markersize=6,
                  color=COLOURS[colour], linewidth=2, label=label(subject))  # fmt: skip
        for rows, rate in points:
            axis.plot([rows, rows], [rate.low, rate.high], color=COLOURS[colour], linewidth=1)
    if not drawn:
        plt.close(figure)
        return None
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(_PLAIN)
    axis.set_xticks([rows for _, rows in sizes], ["10 k", "100 k", "1 M"])
    axis.minorticks_off()
    axis.set_xlabel("rows stored", color=MUTED, fontsize=9)
    axis.set_ylabel("batches per second", color=MUTED, fontsize=9)
    axis.set_title("W1 — the store's size", loc="left", color=INK, fontsize=11, fontweight="bold")
    axis.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _clean(axis, "both")
    return figure


def _clean(axis: Axes, grid: str) -> None:
    for side in ("top", "right", "left" if grid == "x" else "bottom"):
        if side != "bottom" or grid == "y":
            axis.spines[side].set_visible(side == "bottom")
    for side in ("bottom", "left"):
        axis.spines[side].set_color(GRID)
    axis.grid(True, axis="both" if grid == "both" else "x" if grid == "x" else "y", color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(length=0, labelcolor=INK)
