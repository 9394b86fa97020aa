"""The results of ``make bench-gpu`` as Markdown and as a picture. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.bars import Bar, Sections, Verdict, judge, values
from benchmarks.plots import COLOURS, GRID, INK, MUTED, short
from benchmarks.statistics import Interval, median_interval, ratio_interval
from benchmarks.workloads import WORKLOADS

GPU_FILE, GPU_REPORT, GPU_PLOT = "gpu.json", "gpu.md", "gpu.png"

ROWS = {
    "tdmpc2": "TD-MPC2's construction on TorchRL, storage on the device, cache off",
    "tdmpc2-cached": "the same, cache on, never a write",
    "local": "Touchline's `ReplayBuffer.sample()`, columns on the device",
    "local-writes": "the same, one episode added before each batch",
    "limit": "the gather limit: draw, rows to the device, four `index_select`",
}

SERVED = {
    "stream cuda": "TCP stream, columns on the device",
    "stream cpu": "TCP stream, columns in host memory",
    "ring cuda": "shared-memory ring, columns on the device",
    "ring cpu": "shared-memory ring, columns in host memory",
    "device cuda": "gathered by the learner, columns on the device",
    "device cpu": "gathered by the learner, columns in host memory",
}

STEPS = {
    "step only": "only the step, on a batch that stays",
    "step device cuda": "gathered by the learner, server's columns on the device",
    "step device cpu": "gathered by the learner, server's columns in host memory",
    "ahead cuda": "ring, server's columns on the device",
    "by hand cuda": "ring, host batches, copied by the learner with `.to()`, server's columns on the device",
    "ahead cpu": "ring, server's columns in host memory",
    "by hand cpu": "ring, host batches, copied by the learner with `.to()`, server's columns in host memory",
}

UPDATED = {
    "fixed": "one batch that stays",
    "update device cuda": "gathered by the learner, server's columns on the device",
    "update device cpu": "gathered by the learner, server's columns in host memory",
    "update ring cuda": "ring, server's columns on the device",
}

BARS = (
    Bar("W1 served to a learner, columns on the device / official construction in process", "W1", "device cuda", "tdmpc2", 30, "5.7"),
    Bar("the same, W2", "W2", "device cuda", "tdmpc2", 25, "2.0"),
    Bar("W2 served, columns in host memory / copy over the bus", "W2", "device cpu", "to-device", 0.85, "0.11", metric="gb_per_s"),
    Bar("in-process `sample()`, W1 / official construction", "W1", "local", "tdmpc2", 25, "7.9"),
    Bar("W1, a 2 ms step with served batches / the step", "W1", "step only", "step device cuda", 1.06, "1.16", at_most=True),
    Bar("the same, W2", "W2", "step only", "step device cuda", 1.06, "1.17", at_most=True),
    Bar("compiled learner of TD-MPC2's shape, updates/s: served / one fixed batch", "updates", "update device cuda", "fixed", 0.97, "0.89"),
    Bar("W2 in process, an episode added before each batch / none", "W2", "local-writes", "local", 0.5, "0.086"),
)
"""Bars of the transport ``device``, with the ratios that were measured before it."""

FILLS = "make bench-gpu"
"""Command that fills the rows that are missing."""

RATIOS = (
    ("local", "tdmpc2", "in-process `sample()` / TD-MPC2's construction on the device, cache off"),
    ("local", "tdmpc2-cached", "in-process `sample()` / the same, cache on, never a write"),
    ("local", "limit", "in-process `sample()` / gather limit on the device"),
    ("device cuda", "ring cuda", "columns on the device, gathered by the learner / by the server, through the ring"),
    ("device cpu", "ring cpu", "columns in host memory, gathered by the learner / by the server, through the ring"),
    ("ring cuda", "ring cpu", "ring to the device, server's columns on the device / in host memory"),
    ("stream cuda", "stream cpu", "TCP stream to the device, server's columns on the device / in host memory"),
    ("ring cuda", "tdmpc2", "ring to the device, server's columns on the device / TD-MPC2's construction in process, cache off"),
)


PICTURE = {
    "tdmpc2": "TD-MPC2's buffer (TorchRL), on the device",
    "tdmpc2-cached": "— cache on, never a write",
    "stream cpu": "TCP stream, server's columns in host memory",
    "stream cuda": "TCP stream, server's columns on the device",
    "ring cpu": "ring, server's columns in host memory",
    "ring cuda": "ring, server's columns on the device",
    "device cpu": "gathered by the learner, server's columns in host memory",
    "device cuda": "gathered by the learner, server's columns on the device",
    "local": "Touchline, in process, on the device",
    "limit": "gather limit on the device",
}
"""Subjects of the picture, with their labels."""


def write_gpu_report(folder: Path) -> Path:
    """Writes ``gpu.md`` and its picture from the JSON file in a folder; returns the report's path."""
    results = json.loads((folder / GPU_FILE).read_text())
    sections: Sections = results["sections"]
    parts = [_head(results), _shown(results)]
    if any(set(sections[name]["slices"]) & set(PICTURE) for name in sections):
        _draw(sections, folder / GPU_PLOT)
        parts.append(f"![On the device]({GPU_PLOT})")
    for name in [name for name in sections if name in WORKLOADS]:
        parts += [write(sections, name) for write in (_in_process, _card, _served, _steps)]
    parts += [_updates(sections), _ratios(sections), _failures(results)]
    path = folder / GPU_REPORT
    path.write_text("\n\n".join(part for part in parts if part) + "\n")
    return path


def _head(results: Mapping[str, Any]) -> str:
    machine = [f"- {name}: {text}" for name, text in results["machine"].items()]
    return "\n".join(
        [
            "# On a CUDA device",
            "",
            "Written by `make bench-gpu`; what was tried and found is in [notes.md](notes.md). Another machine than that of",
            "[results.md](results.md): compare numbers only within this page.",
            "",
            *machine,
            f"- settings: {results['settings']}",
            *_tests(results),
            "",
            "Medians with intervals that hold the true median with 95 % probability, subjects taking turns, as in results.md. A slice ends",
            "when the device has done all that was queued. The rewards of every eighth batch, and every value of two batches a slice, were",
            "compared with what the store was given. Client and server are processes on one machine.",
        ]
    )


def _tests(results: Mapping[str, Any]) -> list[str]:
    tests = results.get("tests")
    if tests is None:
        return []
    outcomes = ", ".join(f"{count} {outcome}" for outcome, count in sorted(tests["outcomes"].items())) or "none ran"
    ended = "" if tests["status"] is not None else "; ended at their time limit"
    failed = [f"- failed: `{name}`" for name in tests["failed"]]
    return [f"- tests that need a device: {outcomes}, in {tests['took_s']:.0f} s{ended}", *failed]


def _shown(results: Mapping[str, Any]) -> str:
    verdicts = judge(results["sections"], BARS)
    missing = [verdict for verdict in verdicts if verdict.ratio is None]
    lines = ["## What the learner's own gather is to show", ""]
    if missing:
        lines += [
            f"**{len(missing)} of {len(verdicts)} rows have not been measured.** `{FILLS}`, on a machine with a CUDA device, fills them.",
            "All numbers on this page, those of the other rows included, are older: they were measured at commit",
            f"{results['machine'].get('commit', 'unknown')}.",
            "",
        ]
    lines += ["| | bar | before | measured | 95 % interval | |", "|---|---|---|---|---|---|", *map(_bar_row, verdicts)]
    return "\n".join(lines)


def _bar_row(verdict: Verdict) -> str:
    bar, ratio = verdict.bar, verdict.ratio
    measured = "— | —" if ratio is None else f"**{_ratio(ratio.median)}** | {_ratio(ratio.low)} to {_ratio(ratio.high)}"
    return f"| {bar.text} | {'at most' if bar.at_most else 'at least'} {bar.value:g} | {bar.prototypes} | {measured} | {verdict.word} |"


def _ratio(value: float) -> str:
    return f"{value:.3f}" if value < 2 else short(value)


def _updates(sections: Sections) -> str:
    section = sections.get("updates")
    if section is None or not section["slices"]:
        return ""
    fact = section.get("facts", {}).get("fixed", {})
    lines = [
        "## Updates of a compiled learner",
        "",
        'A learner of TD-MPC2\'s shape (`benchmarks/gpu/world_model.py`), W1, `torch.compile(mode="reduce-overhead")`,',
        f"{section['rounds']} rounds. An update is {fact.get('repeats', 1):g} gradient steps of {fact.get('update_s', 0) * 1e3:.2f} ms.",
        "",
        "| batches | updates/s | 95 % interval | over the batch that stays |",
        "|---|---|---|---|",
    ]
    fixed = values(sections, "updates", "fixed", "batches_per_s") or []
    for subject, text in UPDATED.items():
        rates = values(sections, "updates", subject, "batches_per_s")
        if rates:
            rate, part = median_interval(rates), ratio_interval(rates[: len(fixed)], fixed[: len(rates)])
            share = f"{part.median:.3f} ({part.low:.3f} to {part.high:.3f})"
            lines.append(f"| {text} | {short(rate.median)} | {short(rate.low)} to {short(rate.high)} | {share} |")
    return "\n".join(lines)


def _failures(results: Mapping[str, Any]) -> str:
    failed = dict(results.get("failures", {}))
    for name, section in results["sections"].items():
        failed |= {f"{name}: {subject}": text for subject, text in section.get("failures", {}).items()}
    if not failed:
        return ""
    lines = ["## What failed", ""]
    for name, text in failed.items():
        reason = text.strip().splitlines()[-1] if text.strip() else "no reason was given"
        lines.append(f"- **{name}**: {reason[:300]}")
    return "\n".join(lines)


def _in_process(sections: Sections, name: str) -> str:
    workload = WORKLOADS[name]
    lines = [
        f"## {workload.name}, {workload.title}: in process",
        "",
        f"{workload.rows:,} rows, {workload.batch_bytes / 1e6:.3g} MB a batch without provenance, {sections[name]['rounds']} rounds. "
        "GB/s: of batch bytes.",
        "",
        "| | batches/s | 95 % interval | GB/s | host's p50 ms | CPU µs a batch |",
        "|---|---|---|---|---|---|",
    ]
    for subject, text in ROWS.items():
        if subject in sections[name]["slices"]:
            rate, p50, cpu = (_of(sections, name, subject, key) for key in ("batches_per_s", "p50_s", "cpu_s"))
            moved = short(rate.median * workload.batch_bytes / 1e9)
            lines.append(
                f"| {text} | {short(rate.median)} | {short(rate.low)} to {short(rate.high)} | {moved} "
                f"| {p50.median * 1e3:.3f} | {cpu.median * 1e6:,.0f} |"
            )
    return "\n".join(lines)


def _card(sections: Sections, name: str) -> str:
    needed = ("copy", "kernels", "to-device", "to-host", "local")
    if not all(sections[name]["slices"].get(subject) for subject in needed):
        return ""
    copy, kernels = (values(sections, name, subject, "gb_per_s") for subject in ("copy", "kernels"))
    part, rate, gather = ratio_interval(kernels[: len(copy)], copy[: len(kernels)]), median_interval(copy), median_interval(kernels)
    device_s = _of(sections, name, "kernels", "device_s").median
    busy = _of(sections, name, "local", "batches_per_s").median * device_s
    up, down = (_of(sections, name, subject, "gb_per_s") for subject in ("to-device", "to-host"))
    lines = [
        f"- The card copies within its memory at {_span(rate)} GB/s (2 GiB, bytes read plus bytes written),",
        f"  pinned host memory to the device at {short(up.median)} GB/s and back at {short(down.median)}.",
        f"- The gather's four kernels by themselves take {device_s * 1e6:.1f} µs a batch: {short(gather.median)} GB/s counted the same",
        f"  way, each byte of the batch read once and written once, or {part.median:.3f} ({part.low:.3f} to {part.high:.3f}) of the copy.",
        f"  At `sample()`'s rate they take {busy:.0%} of the time: the rest is the host's, drawing and launching.",
    ]
    return "\n".join(lines)


def _served(sections: Sections, name: str) -> str:
    lines = [
        f"## {name}: served to a learner on the device",
        "",
        'A server in another process, a learner with `batches(device="cuda")`.',
        "",
        "| | batches/s | 95 % interval | GB/s | CPU µs a batch: learner | server |",
        "|---|---|---|---|---|---|",
    ]
    for subject, text in SERVED.items():
        if not sections[name]["slices"].get(subject):
            continue
        rate, own, server = (_of(sections, name, subject, key) for key in ("batches_per_s", "cpu_s", "server_cpu_s"))
        lines.append(
            f"| {text} | {short(rate.median)} | {short(rate.low)} to {short(rate.high)} "
            f"| {short(rate.median * WORKLOADS[name].batch_bytes / 1e9)} | {own.median * 1e6:,.0f} | {server.median * 1e6:,.0f} |"
        )
    return "\n".join(lines)


def _steps(sections: Sections, name: str) -> str:
    lines = [
        f"## {name}: beside a training step",
        "",
        "The step reads the observations and multiplies ten 4096 × 4096 bf16 matrices.",
        "",
        "| | ms a batch | 95 % interval | over the step by itself |",
        "|---|---|---|---|",
    ]
    step = values(sections, name, "step only", "batches_per_s") or []
    for subject, text in STEPS.items():
        rates = values(sections, name, subject, "batches_per_s")
        if not rates or not step:
            continue
        time_ms, over = median_interval([1e3 / rate for rate in rates]), ratio_interval(step[: len(rates)], rates[: len(step)])
        more = f"{over.median:.3f} ({over.low:.3f} to {over.high:.3f})"
        lines.append(f"| {text} | {time_ms.median:.3f} | {time_ms.low:.3f} to {time_ms.high:.3f} | {more} |")
    return "\n".join(lines)


def _ratios(sections: Sections) -> str:
    lines = ["## Ratios, round by round", "", "| | | median | 95 % interval |", "|---|---|---|---|"]
    for name in sections:
        for over, under, text in RATIOS:
            above, below = (values(sections, name, subject, "batches_per_s") for subject in (over, under))
            if above and below:
                ratio = ratio_interval(above[: len(below)], below[: len(above)])
                lines.append(f"| {name} | {text} | **{short(ratio.median)}** | {short(ratio.low)} to {short(ratio.high)} |")
    return "\n".join(lines)


def _draw(sections: Sections, path: Path) -> None:
    panels = {name: [subject for subject in PICTURE if subject in section["slices"]] for name, section in sections.items()}
    panels = {name: subjects for name, subjects in panels.items() if subjects}
    heights = [len(subjects) for subjects in panels.values()]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(9, 1.6 + 0.36 * sum(heights)), height_ratios=heights, layout="constrained", squeeze=False
    )
    for axis, (name, subjects) in zip(axes[:, 0], panels.items(), strict=True):
        for place, subject in enumerate(subjects):
            kind = (
                "theirs" if subject.startswith("tdmpc2") else "limit" if subject == "limit" else "faint" if "stream" in subject else "ours"
            )
            rate = _of(sections, name, subject, "batches_per_s")
            axis.barh(place, rate.median, height=0.66, color=COLOURS[kind])
            axis.plot([rate.low, rate.high], [place, place], color=INK, linewidth=1.2)
            axis.text(rate.high * 1.06, place, short(rate.median), va="center", color=INK, fontsize=9)
        axis.set_yticks(range(len(subjects)), [PICTURE[subject] for subject in subjects], fontsize=9, color=INK)
        axis.set_title(f"{name} — batches on the device", loc="left", color=INK, fontsize=11, fontweight="bold")
        _style(axis)
    axes[-1, 0].set_xlabel("batches per second (log scale); whiskers: 95 % interval of the median", color=MUTED, fontsize=9)
    figure.savefig(path, dpi=150, facecolor="white")
    plt.close(figure)


def _style(axis: Axes) -> None:
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xlim(axis.get_xlim()[0] * 0.7, axis.get_xlim()[1] * 2)
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.minorticks_off()
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color(GRID)
    axis.grid(True, axis="x", color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(length=0, labelcolor=INK)


def _span(found: Interval) -> str:
    return f"{short(found.median)} ({short(found.low)} to {short(found.high)})"


def _of(sections: Sections, section: str, subject: str, metric: str) -> Interval:
    return median_interval(values(sections, section, subject, metric) or [float("nan")])
