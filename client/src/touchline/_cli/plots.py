"""Plots of an episode's columns, drawn with characters."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotext
from rich.console import Console
from rich.text import Text

MAX_LINES = 4
"""Maximum number of lines in one plot: dimensions of a column."""
HEIGHT = 11
"""Height of a plot, in lines of text."""
MAX_WIDTH = 120
"""Maximum width of a plot, in characters."""
COLORS = ("blue+", "orange", "green+", "magenta+")

Line = tuple[str, np.ndarray]
"""Name of a line and its values, one for each row of the episode; those that are not finite are left out."""


def lines_of(name: str, values: np.ndarray) -> list[Line]:
    """Returns the lines of a column's first dimensions.

    Args:
        name: name of the column.
        values: [T+1, ...], numbers or bools.
    """
    flat = np.asarray(values, np.float64).reshape(len(values), -1)
    if flat.shape[1] == 1:
        return [(name, flat[:, 0])]
    return [(f"{name}[{position}]", flat[:, position]) for position in range(min(flat.shape[1], MAX_LINES))]


def print_plot(title: str, lines: Sequence[Line]) -> None:
    """Prints a plot of lines over the rows of an episode; a line without a finite value is left out."""
    console = Console()
    drawn = [(name, rows, values[rows]) for name, values in lines for rows in [np.flatnonzero(np.isfinite(values))] if len(rows)]
    if not drawn:
        console.print(Text(f"{title}: no finite value"), soft_wrap=True)
        return
    # Without colours, lines are told apart by the digit of their dimension.
    colored = console.color_system is not None and not console.no_color
    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plotsize(min(console.width, MAX_WIDTH), HEIGHT)
    plotext.title(title)
    plotext.yfrequency(4)
    for number, (name, rows, values) in enumerate(drawn):
        marker = "braille" if colored or len(drawn) == 1 else str(number)
        color = COLORS[number % len(COLORS)] if colored else None
        plotext.plot(rows.tolist(), values.tolist(), label=name if len(drawn) > 1 else None, marker=marker, color=color)
    for line in plotext.build().splitlines():
        console.print(Text.from_ansi(line), soft_wrap=True)
