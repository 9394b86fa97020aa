"""``touchline-server check``: verifies a durable store."""

from __future__ import annotations

from touchline_server.cli.options import ConfigPath, DataDir, resolve_data_dir
from touchline_server.cli.terminal import EXIT_FAILED, exit_with, print_findings, progress_bar, report_errors


def check(data_dir: DataDir = None, config: ConfigPath = None) -> None:
    """Verify a durable store.

    Checks SQLite's structures, the checksum of every episode, the ledger of keys, and the counts. Changes nothing, and works while a server
    is running on the store.

    \b
    Examples:
      touchline-server check --data-dir /data
      touchline-server check --config cfg/robots.toml

    \b
    Exit status:
      0    the store is undamaged
      1    something is damaged (stdout lists it), or the store cannot be read
      2    the configuration or the command line is wrong
      130  interrupted
    """
    from touchline_server.durability import maintenance

    with report_errors(interrupted="interrupted; nothing was changed"):
        folder = resolve_data_dir(data_dir, config)
        with progress_bar(f"checking {folder}") as progress:
            report = maintenance.check(folder, progress)
    print_findings(report.damage, f"{report.episodes} episodes, {report.steps} steps are whole")
    if report.damage:
        exit_with(f"{folder} is damaged; `touchline-server recover --data-dir {folder}` keeps what is whole", EXIT_FAILED)
