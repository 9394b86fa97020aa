"""``touchline-server check``: verifies a durable store."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from touchline_server.cli.options import AsJson, ConfigPath, DataDir, TableName, resolve_data_dir, resolve_store
from touchline_server.cli.terminal import EXIT_FAILED, exit_with, print_findings, print_json, progress_bar, report_errors


def check(data_dir: DataDir = None, table: TableName = None, config: ConfigPath = None, as_json: AsJson = False) -> None:
    """Verify a durable store, of every table or of one.

    Checks SQLite's structures, the checksum of every episode, the ledger of keys, and the counts. Changes nothing, and works while a server
    is running on the store.

    \b
    Examples:
      touchline-server check --data-dir /data
      touchline-server check --config cfg/robots.toml
      touchline-server check --data-dir /data --table demos
      touchline-server check --data-dir /data --json

    \b
    Exit status:
      0    the store is undamaged
      1    something is damaged (stdout lists it), or the store cannot be read
      2    the configuration or the command line is wrong
      130  interrupted
    """
    from touchline_server.durability import maintenance
    from touchline_server.durability.table_list import stores_of

    reports = {}
    with report_errors(interrupted="interrupted; nothing was changed"):
        folder = resolve_data_dir(data_dir, config)
        stores = (stores_of(folder) or {"": folder}) if table is None else {table: resolve_store(folder, table)}
        for name, store in stores.items():
            with progress_bar(f"checking {store}") as progress:
                report = reports[name] = maintenance.check(store, progress)
            if not as_json:
                place = f"table {name!r}: " if name else ""
                print_findings(
                    [place + line for line in report.damage], f"{place}{report.episodes} episodes, {report.steps} steps are whole"
                )
    if as_json:
        print_json({"data_dir": str(folder), "tables": [{"table": name} | asdict(report) for name, report in reports.items()]})
    damaged = [(name, stores[name]) for name, report in reports.items() if report.damage]
    if damaged:
        exit_with("\n".join(_advice(folder, name, store) for name, store in damaged), EXIT_FAILED)


def _advice(folder: Path, name: str, store: Path) -> str:
    option = f" --table {name}" if name else ""
    return f"{store} is damaged; `touchline-server recover --data-dir {folder}{option}` keeps what is whole"
