"""``touchline episodes``: list a table's stored episodes, and show one with plots."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import typer

from touchline._cli.grouped_help import GroupedCommand
from touchline._cli.options import COLUMNS, EPISODES, Address, AsJson, TableName, Timeout
from touchline._cli.terminal import (
    EXIT_FAILED,
    check_reachable,
    describe_place,
    exit_with,
    pluralize,
    print_json,
    print_line,
    print_table,
    report_errors,
)
from touchline.client import ReplayClient
from touchline_protos.codec import StoredEpisode

MAX_PLOTS = 8
"""Maximum number of plots, unless columns are named."""
LISTED = 20
"""Number of episodes that are listed by default."""

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _root() -> None:
    """List the stored episodes of a table, or show one with plots.

    \b
    Examples:
      touchline episodes list --address replay-host:50051
      touchline episodes list --actor striker --newest 50
      touchline episodes show 4711 --column reward --column obs
    """


@app.command("list", cls=GroupedCommand)
def list_episodes(
    address: Address = "127.0.0.1:50051",
    timeout_s: Timeout = 60.0,
    table: TableName = "",
    newest: Annotated[
        int, typer.Option(metavar="N", help="Only the newest N of the episodes that match.", min=1, rich_help_panel=EPISODES)
    ] = LISTED,
    first: Annotated[
        int | None,
        typer.Option(metavar="ID", help="Only episodes with this id or a higher one.", min=0, rich_help_panel=EPISODES),
    ] = None,
    last: Annotated[
        int | None, typer.Option(metavar="ID", help="Only episodes with this id or a lower one.", min=0, rich_help_panel=EPISODES)
    ] = None,
    actor: Annotated[str | None, typer.Option(metavar="NAME", help="Only episodes of this actor.", rich_help_panel=EPISODES)] = None,
    as_json: AsJson = False,
) -> None:
    """List stored episodes, newest first: id, actor, rows, return, and version of the policy.

    The return is the sum of the rewards, over all agents of a match in lockstep. Reads only the column reward. If the server requires
    tokens, the token must have the role learner or admin.

    \b
    Examples:
      touchline episodes list --address replay-host:50051
      touchline episodes list --table demos --actor striker --newest 100
      touchline episodes list --json | jq '.episodes[] | select(.return > 10) | .id'

    \b
    Exit status:
      0    the episodes are listed, even if none matches
      1    the server is unreachable, or the token does not allow it
      2    the command line is wrong
      130  interrupted
    """
    with report_errors("interrupted"):
        check_reachable(address, table=table)
        with ReplayClient(address, table=table, timeout_s=timeout_s) as client:
            info = client.info()
            columns = ["reward"] if info.columns else None
            with client.episodes(newest=newest, first=first, last=last, actor=actor, columns=columns) as stored:
                found = [_summary(episode, info.row_convention) for episode in stored][::-1]
    if as_json:
        print_json({"address": address, "table": table, "episodes": found})
        return
    rows = [
        (str(one["id"]), one["actor"] or "-", f"{one['rows']:,}", _number(one["return"]), str(one["policy_version"] or "-"))
        for one in found
    ]
    print_table(("ID", "<ACTOR", "ROWS", "RETURN", "POLICY"), rows)
    print_line(f"{describe_place(address, table)}: {pluralize(len(found), 'episode')} listed")


@app.command(cls=GroupedCommand)
def show(
    episode_id: Annotated[int | None, typer.Argument(metavar="[ID]", help="Id of the episode. Default: the newest one.", min=0)] = None,
    address: Address = "127.0.0.1:50051",
    timeout_s: Timeout = 60.0,
    table: TableName = "",
    column: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN", help="Plot only this column (obs includes obs.*). Repeatable.", rich_help_panel=COLUMNS),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show one episode: its columns with their ranges, and plots of them; images are named with their shape.

    A plot has the first four dimensions of a column. `touchline export` writes whole episodes. If the server requires tokens, the token
    must have the role learner or admin.

    \b
    Examples:
      touchline episodes show --address replay-host:50051
      touchline episodes show 4711 --column reward --column action

    \b
    Exit status:
      0    the episode is shown
      1    it is not stored, nothing is, the server is unreachable, or the token does not allow it
      2    the command line is wrong
      130  interrupted
    """
    with report_errors("interrupted"):
        check_reachable(address, table=table)
        selection: dict[str, Any] = {"newest": 1} if episode_id is None else {"ids": [episode_id]}
        with ReplayClient(address, table=table, timeout_s=timeout_s) as client, client.episodes(**selection, columns=column) as stored:
            episode = next(iter(stored), None)
            convention = client.info().row_convention
    if episode is None:
        exit_with(f"{describe_place(address, table)}: no episode is stored; touchline doctor says what to do", EXIT_FAILED)
    summary = _summary(episode, convention)
    columns = [_describe(name, values) for name, values in episode.columns.items()]
    if as_json:
        print_json({"address": address, "table": table, **summary, "columns": columns})
        return
    facts = [pluralize(episode.length, "row"), f"actor {episode.actor or '-'}", f"policy version {episode.policy_version or '-'}"]
    if "reward" in episode.columns:
        facts.append(f"return {_number(summary['return'])}")
    print_line(f"episode {episode.id}: {', '.join(facts)}, {episode.size_bytes / 1e3:,.1f} kB{' in these columns' if column else ''}")
    rows = [(one["name"], one["dtype"], str(one["shape"]), *(_number(one[key]) for key in ("min", "mean", "max"))) for one in columns]
    print_table(("<COLUMN", "<DTYPE", "<A ROW", "MIN", "MEAN", "MAX"), rows)
    _print_plots(episode, columns, limit=None if column else MAX_PLOTS)


def _print_plots(episode: StoredEpisode, columns: list[dict[str, Any]], *, limit: int | None) -> None:
    from touchline._cli.plots import MAX_LINES, lines_of, print_plot

    constant = [one for one in columns if one["size"] == 1 and one["min"] == one["max"]]
    plotted = [one for one in columns if not one["image"] and one["size"] and one not in constant]
    for one in plotted[:limit]:
        more = f", the first {MAX_LINES} of {one['size']:,} dimensions" if one["size"] > MAX_LINES else ""
        print_plot(one["name"] + more, lines_of(one["name"], episode.columns[one["name"]]))
    for one in constant:
        print_line(f"{one['name']}: {_number(one['min'])} in every row")
    for one in columns:
        if one["image"]:
            print_line(f"{one['name']}: an image of {' x '.join(map(str, one['shape']))} in each row; the server's web page shows them")
    if limit is not None and len(plotted) > limit:
        print_line(f"{len(plotted) - limit} more columns: --column NAME plots them")


def _summary(episode: StoredEpisode, row_convention: str) -> dict[str, Any]:
    """Returns what a list says of an episode; the return leaves out the row that has no action under the row convention."""
    reward = episode.columns.get("reward")
    total = None
    if reward is not None:
        total = float(np.sum(np.asarray(reward[1:] if row_convention == "incoming" else reward[:-1], np.float64)))
    return {
        "id": episode.id,
        "actor": episode.actor,
        "rows": episode.length,
        "return": total,
        "policy_version": episode.policy_version,
    }


def _describe(name: str, values: np.ndarray) -> dict[str, Any]:
    """Returns a column's name, dtype, shape of a row, range, and whether a row is an image."""
    shape = list(values.shape[1:])
    image = len(shape) >= 2 and values.dtype == np.uint8
    numbers = np.asarray(values, np.float64)
    finite = numbers[np.isfinite(numbers)]
    ranges = {"min": float(finite.min()), "mean": float(finite.mean()), "max": float(finite.max())} if finite.size else {}
    size = int(np.prod(shape))
    return {"name": name, "dtype": values.dtype.name, "shape": shape, "size": size, "image": image} | (
        {"min": None, "mean": None, "max": None} | ranges
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.4g}" if abs(value) < 1e5 else f"{value:,.0f}"
