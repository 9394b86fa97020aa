"""``python -m benchmarks``: runs the benchmarks and writes ``docs/benchmarks/``."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks import machine
from benchmarks.bars import judge
from benchmarks.compare import RUNS, compare, table
from benchmarks.gpu.report import GPU_FILE, write_gpu_report
from benchmarks.peers import suite as peers_suite
from benchmarks.prioritized import PRIORITIZED_FILE, SUBJECTS_A_ROUND, write_prioritized_report
from benchmarks.prioritized import measure as measure_prioritized
from benchmarks.processes import ProcessGroup
from benchmarks.protocol import MALLOC_TUNING, REPOSITORY
from benchmarks.report import OWN_FILE, PEERS_FILE, write_report
from benchmarks.rounds import Section
from benchmarks.suite import QUICK, SECTIONS, Effort, Findings

SEED = 20_260_101
"""Seed of the order of the subjects in each round."""

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)
console = Console(stderr=True)

Output = Annotated[Path, typer.Option(help="Folder for the results.")]
Quick = Annotated[bool, typer.Option("--quick", help="Small stores and few rounds: shows that it works, and no figure to be quoted.")]
Rounds = Annotated[int | None, typer.Option(min=1, help="Rounds of the sections with the headline ratios.")]
Only = Annotated[str, typer.Option(help="Sections, with commas between them.")]
ALL_SECTIONS = ",".join(SECTIONS)
DefaultMalloc = Annotated[bool, typer.Option("--default-malloc", help="Leave the C library's memory allocation as it is, for all sides.")]

DOCS = REPOSITORY / "docs" / "benchmarks"


@app.command()
def run(
    output: Output = DOCS, quick: Quick = False, rounds: Rounds = None, only: Only = ALL_SECTIONS, default_malloc: DefaultMalloc = False
) -> None:
    """Measures Touchline against TD-MPC2's buffer and the gather limit."""
    effort = _effort(quick, rounds)
    chosen = [name for name in SECTIONS if name in only.split(",")]
    findings = Findings()
    described = machine.describe()
    begin = time.monotonic()
    with _progress() as progress:
        for name in chosen:
            task = progress.add_task(f"{name}: filling stores", total=None)
            with ProcessGroup(tuned=not default_malloc) as processes:
                SECTIONS[name](processes, effort, findings, _runner(progress, task))
    _write(output, OWN_FILE, described, _settings(effort, quick, default_malloc, begin), findings)


@app.command()
def peers(
    output: Output = DOCS, quick: Quick = False, rounds: Rounds = None, only: Only = "W1,W2", default_malloc: DefaultMalloc = False
) -> None:
    """Measures Touchline against Reverb, which is tuned first; needs the environment of ``make bench-peers``."""
    effort = _effort(quick, rounds)
    findings = Findings()
    described = machine.describe() | {"reverb": peers_suite.versions()}
    sweeps: dict[str, Any] = {}
    begin = time.monotonic()
    with _progress() as progress:
        for name in [name for name in ("W1", "W2") if name in only.split(",")]:
            task = progress.add_task(f"{name}: tuning Reverb", total=None)

            def tell(text: str, task: Any = task) -> None:
                progress.update(task, description=text)

            with ProcessGroup(tuned=not default_malloc) as processes:
                sweeps[name] = peers_suite.run(name, processes, effort, findings, _runner(progress, task), tell)
    _write(output, PEERS_FILE, described, _settings(effort, quick, default_malloc, begin), findings, sweeps=sweeps)


@app.command()
def gpu(
    output: Annotated[Path | None, typer.Option(help="Folder for the results. [default: docs/benchmarks]")] = None,
    quick: Quick = False,
    rounds: Rounds = None,
    only: Annotated[str, typer.Option(help="Parts, with commas between them.")] = "tests,W1,W2,updates",
    minutes: Annotated[float, typer.Option(min=0.1, help="Length of the whole, at most; what is measured by then counts.")] = 7.5,
    device: Annotated[str, typer.Option(help="cuda, or cpu with --dry-run.")] = "cuda",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Run every part once on tiny stores, to see that it is complete.")] = False,
    default_malloc: DefaultMalloc = False,
) -> None:
    """Runs the tests that need a CUDA device, and measures store and learner on it; writes a report of its own."""
    from benchmarks.gpu import session

    if (device != "cuda") != dry_run:
        raise typer.BadParameter("--dry-run goes with --device cpu, and the other way round")
    output = output or (REPOSITORY / "build" / "dry-run" if dry_run else DOCS)
    effort = session.DRY if dry_run else _effort(quick, rounds)
    described = (machine.describe_device() if device == "cuda" else {"device": "none: a dry run on the CPU"}) | machine.describe()
    settings = _settings(replace(effort, seconds=min(effort.seconds, session.SLICE_S)), quick or dry_run, default_malloc)
    parts = only.split(",")
    run = session.Session(effort, minutes * 60, parts, SEED, device=device, tuned=not default_malloc, tell=_tell)
    results = run.run(output, {"machine": described, "settings": settings})
    console.print(f"wrote {GPU_FILE} after {results['took_s'] / 60:.1f} minutes; report: {write_gpu_report(output).name}")
    if results["failures"] or any(section["failures"] for section in results["sections"].values()):
        raise typer.Exit(1)


@app.command("compare")
def compare_trees(
    old: Annotated[Path, typer.Argument(help="Another checkout of the project, such as one that `git worktree add` made.")],
    only: Annotated[str, typer.Option(help="What to measure, with commas between.")] = ",".join(RUNS),
    blocks: Annotated[int, typer.Option(min=1, help="How often both sides are started and filled anew.")] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="Slices of each side in a block.")] = 8,
    seconds: Annotated[float, typer.Option(min=0.05, help="Length of a slice.")] = 0.4,
) -> None:
    """Measures another checkout and this one, in turns, and prints new / old with 95 % intervals."""
    chosen = [name.strip() for name in only.split(",")]
    with _progress() as progress:
        task = progress.add_task("filling stores", total=blocks * (1 + rounds * len(chosen) * 2))
        found = compare(
            old,
            only=chosen,
            blocks=blocks,
            rounds=rounds,
            seconds=seconds,
            seed=SEED,
            advance=lambda text: progress.update(task, description=text, advance=1),
        )
    for line in table(found):
        print(line)


@app.command()
def prioritized(
    output: Output = DOCS,
    quick: Quick = False,
    rounds: Rounds = None,
    torchrl_python: Annotated[
        Path | None, typer.Option(help="Interpreter for TorchRL's sampler, whose trees need a matching torch.")
    ] = None,
) -> None:
    """Measures the law prioritized: over the ring, against TorchRL's sampler, and by the size of the store."""
    effort = _effort(quick, rounds)
    described = machine.describe()
    begin = time.monotonic()
    with _progress() as progress:
        task = progress.add_task("filling stores", total=1 + effort.rounds * SUBJECTS_A_ROUND)
        found = measure_prioritized(
            rows=1_000_000 // effort.shrink,
            rounds=effort.rounds,
            seconds=effort.seconds,
            seed=SEED,
            torchrl_python=torchrl_python,
            advance=lambda text: progress.update(task, description=text, advance=1),
        )
    output.mkdir(parents=True, exist_ok=True)
    results = {"machine": described, "settings": _settings(effort, quick, False, begin)} | found
    (output / PRIORITIZED_FILE).write_text(json.dumps(results, indent=1) + "\n")
    console.print(f"wrote {write_prioritized_report(output).name}")


@app.command()
def report(output: Output = DOCS) -> None:
    """Regenerates the reports and the plots from the JSON files."""
    console.print(f"wrote {write_report(output).name}")
    if (output / GPU_FILE).exists():
        console.print(f"wrote {write_gpu_report(output).name}")
    if (output / PRIORITIZED_FILE).exists():
        console.print(f"wrote {write_prioritized_report(output).name}")


def _effort(quick: bool, rounds: int | None) -> Effort:
    effort = QUICK if quick else Effort()
    return effort if rounds is None else Effort(rounds, effort.side_rounds, effort.seconds, effort.shrink)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description:<34}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def _tell(text: str) -> None:
    console.print(text, markup=False, highlight=False)


def _runner(progress: Progress, task: Any) -> Any:
    def run_section(section: Section) -> None:
        progress.reset(task, total=section.steps, description=section.name)

        def advance(text: str) -> None:
            progress.update(task, description=text, completed=advance.done)  # type: ignore[attr-defined]
            advance.done += 1  # type: ignore[attr-defined]

        advance.done = 0  # type: ignore[attr-defined]
        section.run(seed=SEED, advance=advance)
        progress.update(task, description=section.name, completed=section.steps)

    return run_section


def _settings(effort: Effort, quick: bool, default_malloc: bool, begin: float | None = None) -> str:
    kind = "a QUICK run on small stores, whose numbers mean nothing; " if quick else ""
    tuning = "as the C library has it" if default_malloc else ", ".join(f"{name}={value}" for name, value in MALLOC_TUNING.items())
    rounds = f"{effort.rounds} rounds ({effort.side_rounds} in side sections) of {effort.seconds} s a slice"
    took = "" if begin is None else f"; took {(time.monotonic() - begin) / 60:.1f} minutes"
    return f"{kind}{rounds}; order seed {SEED}; memory allocation: {tuning}{took}"


def _write(output: Path, name: str, described: dict[str, str], settings: str, findings: Findings, **more: Any) -> None:
    output.mkdir(parents=True, exist_ok=True)
    results = {"machine": described, "settings": settings, "sections": findings.sections, "memory": findings.memory, **more}
    (output / name).write_text(json.dumps(results, indent=1) + "\n")
    write_report(output)
    for verdict in judge(findings.sections):
        if verdict.ratio is not None:
            ratio = verdict.ratio
            figures = f"{ratio.median:8.2f}  [{ratio.low:.2f}, {ratio.high:.2f}]  bar {verdict.bar.value:g}"
            console.print(f"{figures}  {verdict.word:<12} {verdict.bar.text}", highlight=False)
    console.print(f"wrote {name} and the report to {output.name}/")


if __name__ == "__main__":
    app()
