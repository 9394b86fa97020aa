"""The results as Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.bars import Sections, Verdict, judge, values
from benchmarks.plots import draw_all, short
from benchmarks.statistics import Interval, median_interval, ratio_interval
from benchmarks.workloads import WORKLOADS

OWN_FILE, PEERS_FILE, REPORT_FILE = "results.json", "peers.json", "results.md"

ROWS = {
    "tdmpc2": "TD-MPC2's buffer on TorchRL, in process, cache off",
    "tdmpc2-writes": "the same, one episode added before each batch",
    "tdmpc2-cached": "the same, cache on, never a write",
    "tdmpc2-cached-writes": "the same, cache on, one episode added before each batch",
    "limit": "the gather limit, in process",
    "limit-provenance": "the same with provenance",
    "local": "Touchline's `ReplayBuffer.sample()`, in process",
    "local-writes": "the same, one episode added before each batch",
    "unary": "Touchline, a call for each batch",
    "stream": "Touchline, TCP stream",
    "stream-10k": "the same, four actors add 10 k steps/s",
    "stream-flat": "the same, four actors add flat out",
    "ring": "Touchline, shared-memory ring",
    "ring-10k": "the same, four actors add 10 k steps/s",
    "ring-flat": "the same, four actors add flat out",
    "reverb": "Reverb, as tuned below",
    "reverb-10k": "the same, four writers add 10 k steps/s",
    "reverb-flat": "the same, four writers add flat out",
    "reverb-apart": "Reverb, the best with separate columns, unloaded",
}


def write_report(folder: Path) -> Path:
    """Writes ``results.md`` and the plots from the JSON files in a folder; returns the report's path."""
    own, peers = _read(folder / OWN_FILE), _read(folder / PEERS_FILE)
    sections: Sections = {**own.get("sections", {}), **peers.get("sections", {})}
    verdicts = judge(sections)
    plots = draw_all(sections, verdicts, folder)
    parts = [_head(own, peers), _bars_table(verdicts), _picture(plots, "ratios.png", "Each ratio over its bar")]
    parts += [_picture(plots, "throughput.png", "Batches per second")]
    parts += [_workload_table(sections, name) for name in ("W1", "W2", "peers W1", "peers W2")]
    parts += [_picture(plots, "load.png", "Sampling under load"), _inserts_table(sections), _costs(sections, own.get("memory", {}))]
    parts += [_sizes_table(sections), _picture(plots, "sizes.png", "The store's size"), _laws_table(sections), _sweeps(peers)]
    path = folder / REPORT_FILE
    path.write_text("\n\n".join(part for part in parts if part) + "\n")
    return path


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _head(own: Mapping[str, Any], peers: Mapping[str, Any]) -> str:
    lines = [
        "# Benchmark results",
        "",
        "Written by `make bench` and `make bench-peers`; what was tried and found is in [notes.md](notes.md).",
    ]
    for title, run in (("`make bench`", own), ("`make bench-peers`", peers)):
        if not run:
            lines += ["", f"There are no results of {title} here."]
            continue
        lines += ["", f"**{title}**", "", *(f"- {name}: {text}" for name, text in run["machine"].items())]
        lines += [f"- settings: {run['settings']}"]
    lines += [
        "",
        "Medians with intervals that hold the true median with 95 % probability (order statistics; fewer than six rounds reach less).",
        "Ratios are taken round by round within one run, then the median. Subjects take turns, in another order each round. Every subject",
        "has one thread for numerics and the same settings of the C library's memory allocation. Every batch's rewards, and every value of",
        "two batches a slice, were compared with what the store was given: a wrong one would have ended the run.",
    ]
    return "\n".join(lines)


def _bars_table(verdicts: Sequence[Verdict]) -> str:
    lines = ["## What had to be shown", "", "| | bar | measured | 95 % interval | | prototypes reached |", "|---|---|---|---|---|---|"]
    for verdict in verdicts:
        bar, ratio = verdict.bar, verdict.ratio
        sign = "at most" if bar.at_most else "at least"
        measured = f"**{short(ratio.median)}** | {short(ratio.low)} to {short(ratio.high)}" if ratio else "— | —"
        lines.append(f"| {bar.text} | {sign} {bar.value:g} | {measured} | {verdict.word} | {bar.prototypes} |")
    lines += ["", "*Met*: the 95 % interval reaches the bar, the median itself perhaps not. *Clearly met*: all of the interval does."]
    return "\n".join(lines)


def _workload_table(sections: Sections, section: str) -> str:
    slices = sections.get(section, {}).get("slices", {})
    subjects = [subject for subject in ROWS if subject in slices and "batches_per_s" in slices[subject][0]]
    if not subjects:
        return ""
    workload = WORKLOADS[section.removeprefix("peers ")]
    title = f"{workload.name}, {workload.title}" + (", beside Reverb" if section.startswith("peers") else "")
    lines = [
        f"## {title}",
        "",
        f"{workload.batch_bytes / 1e6:.3g} MB a batch without provenance, {sections[section]['rounds']} rounds.",
        "",
        "| | batches/s | 95 % interval | p50 ms | p99 ms | CPU µs a batch: learner | server | steps/s added |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for subject in subjects:
        found = {key: _of(sections, section, subject, key) for key in slices[subject][0]}
        rate = found["batches_per_s"]
        server = found["server_cpu_s"].median
        added = found.get("insert_steps_per_s")
        lines.append(
            f"| {ROWS[subject]} | {short(rate.median)} | {short(rate.low)} to {short(rate.high)} "
            f"| {found['p50_s'].median * 1e3:.3f} | {found['p99_s'].median * 1e3:.2f} | {found['cpu_s'].median * 1e6:,.0f} "
            f"| {f'{server * 1e6:,.0f}' if server else '—'} | {short(added.median) if added else '—'} |"
        )
    lines += [
        "",
        "Under load the server's CPU includes that of adding. The time of a batch is from asking to having it; if several come in one",
        "message, the median is that of taking one that has already arrived.",
    ]
    return "\n".join(lines)


def _inserts_table(sections: Sections) -> str:
    lines = []
    for section in ("W1", "W2", "peers W1", "peers W2"):
        for subject, found in sections.get(section, {}).get("slices", {}).items():
            if "steps_per_s" in found[0]:
                rate = _of(sections, section, subject, "steps_per_s")
                own, server = (_of(sections, section, subject, key).median * 1e6 for key in ("cpu_s", "server_cpu_s"))
                theirs = subject.startswith("reverb")
                ours = "Touchline, a call for each episode" if subject.startswith("add-") else "Touchline"
                who, actors = ("Reverb's best writer", "4") if theirs else (ours, subject.rpartition("-")[2])
                lines.append(
                    f"| {section} | {who} | {actors} | {short(rate.median)} | {short(rate.low)} to {short(rate.high)} "
                    f"| {own:.2f} | {server:.2f} |"
                )
    if not lines:
        return ""
    head = ["## Inserts, flat out, without sampling", "", "| | | actors | steps/s | 95 % interval | CPU µs a step: actor | server |"]
    return "\n".join([*head, "|---|---|---|---|---|---|---|", *lines])


def _costs(sections: Sections, memory: Mapping[str, Mapping[str, float]]) -> str:
    lines = ["## What else it costs", ""]
    with_it = values(sections, "W1", "limit-provenance", "batches_per_s")
    without = values(sections, "W1", "limit", "batches_per_s")
    if with_it and without:
        cost = ratio_interval(without, with_it)
        lines.append(
            f"- Provenance (episode, start, actor, policy version, probability of each slice): a gather takes {short(cost.median)} times "
            f"as long ({short(cost.low)} to {short(cost.high)}) and a W1 batch has 10,240 bytes more, 3.5 %."
        )
    draws = {text: values(sections, "W1", f"draw-{text}", "draw_s") for text in ("small", "large")}
    if draws["small"] and draws["large"]:
        small, large = (median_interval(draws[text] or [0.0]).median * 1e6 for text in ("small", "large"))
        lines.append(f"- Drawing and pinning the rows of a batch: {small:.1f} µs at 10 k rows, {large:.1f} µs at 1 M rows.")
    for name, grown in memory.items():
        raw = WORKLOADS[name.split()[0]].row_bytes
        more = grown["resident_bytes"] / grown["rows"] - raw
        lines.append(f"- Memory, {name.partition(' ')[2]}, {name.split()[0]}: {more:+.1f} bytes a stored row over the raw {raw:,}.")
    return "\n".join(lines) if len(lines) > 2 else ""


def _sizes_table(sections: Sections) -> str:
    if "sizes" not in sections:
        return ""
    lines = ["## W1 at three sizes of the store, batches/s", "", "| | 10 k rows | 100 k | 1 M |", "|---|---|---|---|"]
    for subject in ("tdmpc2", "limit", "local", "stream", "ring"):
        rates = [_of(sections, "sizes", f"{subject}@{size}", "batches_per_s").median for size in ("10k", "100k", "1M")]
        lines.append(f"| {ROWS[subject]} | " + " | ".join(short(rate) for rate in rates) + " |")
    return "\n".join(lines)


def _laws_table(sections: Sections) -> str:
    if "W3" not in sections:
        return ""
    lines = ["## W3, unequal episodes of 20 to 1000 rows and a task, batches/s", "", "| | episode law | step law |", "|---|---|---|"]
    for subject in ("tdmpc2", "limit", "local", "stream", "ring"):
        rates = [values(sections, "W3", f"{subject} {law}", "batches_per_s") for law in ("episode", "step")]
        lines.append(f"| {ROWS[subject]} | " + " | ".join(short(median_interval(rate).median) if rate else "—" for rate in rates) + " |")
    return "\n".join(lines)


def _sweeps(peers: Mapping[str, Any]) -> str:
    lines: list[str] = []
    for workload, trials in peers.get("sweeps", {}).items():
        lines += [
            f"## Tuning Reverb on {workload}",
            "",
            "| chunk length | columns | sampler | workers | in flight | batches/s | steps/s inserted |",
        ]
        lines.append("|---|---|---|---|---|---|---|")
        best = max(trials, key=lambda trial: trial["batches_per_s"])
        for trial in trials:
            rate = short(trial["batches_per_s"])
            steps = short(trial["steps_per_s"]) if "steps_per_s" in trial else "—"
            cells = [str(trial[key]) for key in ("chunk_length", "columns", "sampler", "workers", "in_flight")]
            lines.append("| " + " | ".join([*cells, f"**{rate}**" if trial is best else rate, steps]) + " |")
        lines.append("")
    return "\n".join(lines).rstrip()


def _picture(plots: Sequence[str], name: str, text: str) -> str:
    return f"![{text}]({name})" if name in plots else ""


def _of(sections: Sections, section: str, subject: str, metric: str) -> Interval:
    return median_interval(values(sections, section, subject, metric) or [float("nan")])
