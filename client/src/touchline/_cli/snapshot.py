"""``touchline snapshot``: the durable stores of a server, and how to copy them."""

from __future__ import annotations

import shlex
import sys

from touchline._cli.options import Address, AsJson, Timeout
from touchline._cli.status_view import durability_text, table_name
from touchline._cli.terminal import EXIT_FAILED, exit_with, print_grid, print_json, print_line, report_errors
from touchline.client import ReplayClient

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def snapshot(address: Address = "127.0.0.1:50051", timeout_s: Timeout = 60.0, as_json: AsJson = False) -> None:
    """Show a server's durable stores, when each was copied last, and the command that copies them.

    A snapshot is made on the server's machine, where its disk is, by `touchline-server snapshot`; it works while the server runs. From
    another machine, `touchline export` writes the episodes to a data set. If the server requires tokens, the token must have the role
    learner or admin.

    \b
    Examples:
      touchline snapshot --address replay-host:50051
      touchline snapshot --json | jq '.stores[].last_snapshot_unix_s'

    \b
    Exit status:
      0    the stores are shown
      1    the server has none, is unreachable, or the token does not allow it
      2    the command line is wrong
      130  interrupted
    """
    with report_errors("interrupted"), ReplayClient(address, timeout_s=timeout_s) as client:
        tables = client.status().tables
        config = tomllib.loads(client.info(table=tables[0].table).config_toml) if tables else {}
    data_dir = config.get("storage", {}).get("data_dir", "")
    stores = [(table.table, table.durability) for table in tables if table.durability is not None]
    if not stores:
        exit_with(
            f"{address}: no table has a durable store, so there is nothing to copy; set storage.data_dir on the server, or write the "
            "episodes to a data set: touchline export FILE",
            EXIT_FAILED,
        )
    command = f"touchline-server snapshot --data-dir {shlex.quote(data_dir or 'DATA_DIR')} DIR"
    if as_json:
        found = [{"table": name, **durability.to_dict()} for name, durability in stores]
        print_json({"address": address, "data_dir": data_dir, "command": command, "stores": found})
        return
    width = max(len(table_name(name)) for name, _ in stores)
    for name, durability in stores:
        print_grid((width,), [(table_name(name), "bold"), (durability_text(durability), "")])
    print_line("")
    print_line("On the server's machine, also while the server runs:")
    print_line(f"  {command}")
