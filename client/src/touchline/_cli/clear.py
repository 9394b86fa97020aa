"""``touchline clear``: empty a table of a server."""

from __future__ import annotations

from typing import Annotated

import typer

from touchline._cli.options import Address, AsJson, TableName, Timeout
from touchline._cli.terminal import (
    check_reachable,
    confirm,
    describe_place,
    pluralize,
    print_columns,
    print_json,
    print_line,
    report_errors,
)
from touchline.client import ReplayClient


def clear(
    address: Address = "127.0.0.1:50051",
    timeout_s: Timeout = 60.0,
    table: TableName = "",
    yes: Annotated[bool, typer.Option("--yes", help="Clear without asking for confirmation.")] = False,
    as_json: AsJson = False,
) -> None:
    """Empty a table of a server.

    Removes every episode, and the columns, which the next episode defines anew. Prints what would be removed and asks first. With a
    data_dir, the episodes are removed from the disk as well; a snapshot taken before keeps them. Keys are remembered: an episode that
    was stored before is not stored again. If the server requires tokens, the token must have the role admin.

    \b
    Examples:
      touchline clear --address replay-host:50051
      touchline clear --table demos --yes

    \b
    Exit status:
      0    the table is empty, or was
      1    nothing was cleared: the answer was no, the server is unreachable, or the token does not allow it
      2    the command line is wrong, or there is no terminal to ask on and --yes is missing
      130  interrupted
    """
    place = describe_place(address, table)
    with report_errors("interrupted; if you had already confirmed, the table may have been cleared"):
        check_reachable(address, table=table)
        with ReplayClient(address, table=table, timeout_s=timeout_s) as client:
            before = client.info()
            counts, empty = before.counts, not before.counts.episodes_stored and not before.columns
            if not as_json:
                stored = pluralize(counts.episodes_stored, "episode"), pluralize(counts.steps_stored, "step")
                print_line(f"{place}: {', '.join(stored)}")
                print_columns(before.columns)
            if not empty and not yes:
                confirm("Remove all of it? This cannot be undone.", failed="nothing was cleared", hint="--yes clears without asking")
            after = counts if empty else client.clear()
    removed = after.episodes_evicted - counts.episodes_evicted
    if as_json:
        steps_removed = after.steps_evicted - counts.steps_evicted
        print_json({"address": address, "table": table, "episodes_removed": removed, "steps_removed": steps_removed, "counts": after})
        return
    if empty:
        return
    print_line(f"{place}: cleared, {pluralize(removed, 'episode')} removed; the next episode defines the columns anew")
