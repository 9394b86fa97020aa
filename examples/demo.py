"""The demo: a replay server, two actors that play robot soccer into it, and a learner that trains a world model from it.

    python examples/demo.py --seconds 90

Everything is a process of its own and talks over gRPC, as it would on several machines. Afterwards the counts of both ends are
compared: every episode that was played must be acknowledged, and stored or evicted; and the model must predict the rewards of
held-out matches better than their mean does. With --lockstep a match is one episode of all four players, and the model one of the whole
team. Exit status 0 if so, 1 if not or if something failed, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    from rich.console import Console
    from rich.table import Table

    from display import Display, Snapshot, open_display
    from plots import draw
except ImportError as error:
    raise SystemExit(
        f"The demo needs rich and matplotlib ({error}). Install them with: pip install -r examples/requirements.txt"
    ) from error
from processes import Child, ChildError, Children
from touchline import Counts, ReplayClient, TouchlineError

EXAMPLES = Path(__file__).resolve().parent
CONFIG = EXAMPLES.parent / "cfg" / "demo.toml"
START_TIMEOUT_S = 120.0
SERVER_VARIABLES = {"TOUCHLINE_HTTP__PORT": "0"}
"""The page takes a free port: another server may have the usual one."""
LOCKSTEP_VARIABLES = {"TOUCHLINE_CONFIG__BUFFER_SIZE": "7500", "TOUCHLINE_CONFIG__MIN_HISTORY": "500"}
"""A quarter of the configuration's: in lockstep the four players of a step are one row."""
TICK_S = 0.5
RATE_WINDOW_S = 8.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """Reports of both ends at the end."""

    played: dict[str, int]
    """Sums of the actors' own totals."""
    counts: Counts
    """The server's counts."""
    held_out: dict[str, Any] | None
    """The learner's last score."""

    @property
    def nothing_lost(self) -> bool:
        """Played = acknowledged = stored + evicted, for episodes and for steps."""
        counts, played = self.counts, self.played
        episodes = played["episodes_played"] == played["episodes_acknowledged"] == counts.episodes_stored + counts.episodes_evicted
        steps = played["steps_played"] == played["steps_acknowledged"] == counts.steps_stored + counts.steps_evicted
        return episodes and steps and played["episodes_played"] > 0

    @property
    def beats_the_mean(self) -> bool:
        """The held-out reward error, over all steps ahead, is below that of the mean."""
        return self.held_out is not None and sum(self.held_out["error"]) < sum(self.held_out["error_of_mean"])


class Demo:
    """One run; its files go to `folder`."""

    def __init__(self, folder: Path, *, seconds: float, match_seconds: float, lockstep: bool, console: Console) -> None:
        self._folder, self._seconds, self._match_seconds, self._lockstep, self._console = folder, seconds, match_seconds, lockstep, console
        self._metrics = folder / "learner.jsonl"
        self._metrics.unlink(missing_ok=True)
        self._arrivals: list[tuple[float, int]] = []
        self._actors: list[Child] = []

    def run(self) -> Outcome:
        """Plays and learns, stops everything cleanly and returns the outcome.

        Raises:
            ChildError, TouchlineError: a process failed, or the server does not answer.
        """
        with Children(self._folder) as children:
            self._console.print("starting the server ...")
            server_command = (sys.executable, "-m", "touchline_server", "serve", "--config", str(CONFIG), "--port", "0")
            server = children.start("server", *server_command, variables=SERVER_VARIABLES | (LOCKSTEP_VARIABLES if self._lockstep else {}))
            address = server.wait_for_line("listening on ", timeout_s=START_TIMEOUT_S)
            self._console.print(f"the server listens on {address}; two actors and a learner join it", highlight=False)
            page = server.find_line("web page on ")
            if page is not None:
                self._console.print(f"watch it on {page}, or with: touchline top {address}", highlight=False)
            for number in range(2):
                self._actors.append(self._start_actor(children, address, number))
            learner = children.start(
                "learner", sys.executable, str(EXAMPLES / "learner.py"), "--address", address, "--metrics", str(self._metrics)
            )
            with ReplayClient(address) as client:
                with open_display(self._console) as display:
                    self._watch(children, client, display)
                for actor in self._actors:
                    actor.ask_to_stop()
                for actor in self._actors:  # each sends the episodes that it has played, and exits once they are acknowledged
                    actor.stop()
                counts = client.counts()
            learner.stop()
            server.stop()
        reports = read_lines(self._metrics)
        return Outcome(self._played(), counts, reports[-1]["held_out"] if reports else None)

    def draw(self, outcome: Outcome) -> Path:
        """Draws the run and returns the picture's path."""
        path = self._folder / "demo.png"
        counts = outcome.counts
        played = [line for actor in self._actors for line in read_lines(actor.stdout) if "match" in line]
        matches = [match for match in played if not match["cut"]]  # the demo's end cut the last one's return short
        caption = f"{counts.episodes_added:,} episodes, {counts.steps_added:,} steps, {self._seconds:.0f} seconds"
        began = self._arrivals[0][0]
        draw(path, began=began, learner=read_lines(self._metrics), matches=matches, arrivals=self._arrivals, caption=caption)
        return path

    def _start_actor(self, children: Children, address: str, number: int) -> Child:
        return children.start(
            f"actor-{number}",
            *(sys.executable, str(EXAMPLES / "actor.py"), "--address", address),
            *("--actor-name", f"actor-{number}", "--seed", str(number), "--match-seconds", str(self._match_seconds)),
            *(("--lockstep",) if self._lockstep else ()),
        )

    def _watch(self, children: Children, client: ReplayClient, display: Display) -> None:
        began = time.time()
        while time.time() - began < self._seconds:
            counts = client.counts()
            self._arrivals.append((time.time(), counts.steps_added))
            display.show(self._snapshot(counts, time.time() - began))
            children.check()
            time.sleep(TICK_S)

    def _snapshot(self, counts: Counts, elapsed_s: float) -> Snapshot:
        newest = self._arrivals[-1]
        oldest = next(arrival for arrival in self._arrivals if arrival[0] >= newest[0] - RATE_WINDOW_S)
        rate = (newest[1] - oldest[1]) / max(newest[0] - oldest[0], TICK_S)
        report = (read_lines(self._metrics) or [{}])[-1]
        return Snapshot(
            phase="playing" if report else "gathering history",
            elapsed_s=elapsed_s,
            total_s=self._seconds,
            counts=counts,
            steps_per_s=rate,
            updates=report.get("updates"),
            batches_per_s=report.get("batches_per_s"),
            loss=report.get("total"),
            held_out=error_share(report.get("held_out")),
        )

    def _played(self) -> dict[str, int]:
        totals = [read_lines(actor.stdout)[-1] for actor in self._actors]
        return {name: sum(total[name] for total in totals) for name in totals[0]}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the objects of a file of JSON lines, but not a last line that is still being written; empty if there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def error_share(held_out: dict[str, Any] | None, step: slice = slice(None)) -> float | None:
    """Returns the held-out error as a share of the error of predicting the mean, over some of the steps ahead."""
    return None if held_out is None else sum(held_out["error"][step]) / sum(held_out["error_of_mean"][step])


def summarize(outcome: Outcome, console: Console) -> None:
    """Prints the checks and their results."""
    played, counts = outcome.played, outcome.counts
    table = Table(title="Outcome of the played episodes and steps", title_justify="left", title_style="bold")
    for heading in ("", "played", "acknowledged", "stored", "evicted"):
        table.add_column(heading, justify="left" if not heading else "right")
    for kind, stored, evicted in (
        ("episodes", counts.episodes_stored, counts.episodes_evicted),
        ("steps", counts.steps_stored, counts.steps_evicted),
    ):
        numbers = (played[f"{kind}_played"], played[f"{kind}_acknowledged"], stored, evicted)
        table.add_row(kind, *(f"{number:,}" for number in numbers))
    console.print(table)
    verdict = "[green]holds[/]" if outcome.nothing_lost else "[bold red]does NOT hold[/]"
    console.print(f"played = acknowledged = stored + evicted: {verdict}\n")

    held_out = outcome.held_out
    if held_out is None:
        console.print("[bold red]No score on held-out matches:[/] there was too little time to play and to learn.", soft_wrap=True)
        return
    verdict = "[green]beats[/]" if outcome.beats_the_mean else "[bold red]does NOT beat[/]"
    console.print(
        f"The world model {verdict} predicting the mean reward on {held_out['slices']:,} slices of held-out matches:", soft_wrap=True
    )
    for step in (1, len(held_out["error"])):
        ahead = slice(step - 1, step)
        console.print(
            f"  {step} step{'s'[: step - 1]} ahead: squared error {held_out['error'][step - 1]:.5f}, of the mean "
            f"{held_out['error_of_mean'][step - 1]:.5f} ({error_share(held_out, ahead):.0%})",
            highlight=False,
            soft_wrap=True,
        )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_seconds = float(os.environ.get("DEMO_SECONDS", "90"))
    parser.add_argument("--seconds", type=float, default=default_seconds, help="time of play in seconds (default: $DEMO_SECONDS, else 90)")
    parser.add_argument("--match-seconds", type=float, default=10.0, help="time limit of a match, in the simulation's time")
    parser.add_argument("--lockstep", action="store_true", help="record each match as one episode of all players, and train a team model")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder of logs and picture (default: demo-output)")
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    console = Console()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C: the children are stopped
    args.output.mkdir(parents=True, exist_ok=True)
    demo = Demo(args.output, seconds=args.seconds, match_seconds=args.match_seconds, lockstep=args.lockstep, console=console)
    try:
        outcome = demo.run()
    except (ChildError, TouchlineError) as error:
        console.print(f"The demo failed: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("interrupted; everything is stopped")
        return 130
    summarize(outcome, console)
    console.print(f"picture: {demo.draw(outcome)}", highlight=False, soft_wrap=True)
    return 0 if outcome.nothing_lost and outcome.beats_the_mean else 1


if __name__ == "__main__":
    sys.exit(main())
