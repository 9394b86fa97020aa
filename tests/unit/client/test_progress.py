"""The progress that a command shows, on a terminal and elsewhere."""

from __future__ import annotations

import io

from rich.console import Console

from touchline._cli.progress import ProgressDisplay, format_progress


class Clock:
    """A clock that stands still until the test advances it."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_format_progress_says_how_much_and_how_fast() -> None:
    assert format_progress(1200, 5000, unit="episodes", size_bytes=0, seconds=0.0) == "1,200 of 5,000 episodes"
    assert format_progress(1200, 5000, unit="episodes", size_bytes=60_000_000, seconds=4.0) == (
        "1,200 of 5,000 episodes, 300 episodes/s, 15.0 MB/s"
    )
    assert format_progress(50_000_000, 200_000_000, unit="bytes", size_bytes=50_000_000, seconds=0.5) == "50 of 200 MB, 100.0 MB/s"


def test_display_without_a_terminal_prints_a_line_every_few_seconds() -> None:
    output, clock = io.StringIO(), Clock()
    with ProgressDisplay(Console(file=output, force_terminal=False, width=40), clock) as display:
        for done in range(13):
            display.show("load [red]demos.npz", done, 12, unit="episodes", size_bytes=done * 1_000_000)
            clock.now_s += 1

    assert output.getvalue().splitlines() == [
        "load [red]demos.npz: 5 of 12 episodes, 1 episodes/s, 1.0 MB/s",
        "load [red]demos.npz: 10 of 12 episodes, 1 episodes/s, 1.0 MB/s",
    ]


def test_display_on_a_terminal_draws_a_bar_and_removes_it() -> None:
    output, clock = io.StringIO(), Clock()
    with ProgressDisplay(Console(file=output, force_terminal=True, width=100, color_system=None), clock) as display:
        display.show("load demos.npz", 0, 8, unit="episodes", size_bytes=0)
        clock.now_s += 2
        display.show("load demos.npz", 4, 8, unit="episodes", size_bytes=6_000_000)
        display.hide()
        after = output.getvalue()
        output.write("a line of its own\n")

    assert "load demos.npz" in after and "4 of 8 episodes, 2 episodes/s, 3.0 MB/s" in after
    assert after.endswith("\x1b[1A\x1b[2K")  # up, and the line erased
    assert output.getvalue().endswith("a line of its own\n")


def test_display_starts_again_with_another_label() -> None:
    output, clock = io.StringIO(), Clock()
    with ProgressDisplay(Console(file=output, force_terminal=False), clock) as display:
        display.show("fingerprint", 1, 2, unit="bytes", size_bytes=1)
        clock.now_s += 100
        display.show("load", 0, 2, unit="episodes", size_bytes=0)
        clock.now_s += 10
        display.show("load", 1, 2, unit="episodes", size_bytes=10_000_000)

    assert output.getvalue() == "load: 1 of 2 episodes, 0 episodes/s, 1.0 MB/s\n"
