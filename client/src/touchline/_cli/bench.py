"""``touchline bench``: how fast a server adds and samples, in a table of its own."""

from __future__ import annotations

import enum
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import typer

from touchline._cli.doctor.sampling import size_of
from touchline._cli.options import SERVER, AsJson
from touchline._cli.terminal import (
    check_reachable,
    pluralize,
    print_error,
    print_json,
    print_line,
    print_table,
    report_errors,
)
from touchline.client import ReplayClient
from touchline.errors import AccessDeniedError, TouchlineError
from touchline_protos import Batch
from touchline_protos.log_lines import escape

PREFIX = "bench-"
"""First letters of the names of the tables that the command makes."""
EPISODES_KEPT = 100
"""Episodes that fit in such a table; further ones evict."""
EPISODES_A_LOAD = 50
MEASURED, SHAPE = "What to measure", "Shape of the data"


class TransportName(str, enum.Enum):
    """The values of ``--transport``."""

    RING = "ring"
    STREAM = "stream"
    UNARY = "unary"


@dataclass(frozen=True, slots=True)
class Measurement:
    """How fast one thing went."""

    what: str
    """``add``, ``load`` or ``sample``."""
    transport: str
    """Way of the data: ``unary``, ``stream`` or ``ring``."""
    unit: str
    """Unit of ``count``: ``episodes`` or ``batches``."""
    count: int = 0
    """Amount done."""
    seconds: float = 0.0
    """Time that it took."""
    per_s: float = 0.0
    """Units a second."""
    rows_per_s: float = 0.0
    """Rows a second: steps added, or rows in the slices."""
    bytes_per_s: float = 0.0
    """Payload a second."""
    p50_s: float | None = None
    """Median time of one call, or of the wait for one batch."""
    p99_s: float | None = None
    """99th percentile of these times."""
    note: str = ""
    """Why it was not measured; empty if it was."""


def bench(
    address: Annotated[
        str, typer.Argument(metavar="HOST:PORT|unix:/PATH", envvar="TOUCHLINE_ADDRESS", help="Address of the server.", show_envvar=True)
    ] = "127.0.0.1:50051",
    seconds: Annotated[
        float, typer.Option(metavar="SECONDS", help="Duration of each measurement.", min=0.05, max=3600, rich_help_panel=MEASURED)
    ] = 3.0,
    transport: Annotated[
        list[TransportName] | None,
        typer.Option(help="Sample only by this transport. Repeatable.", show_choices=True, rich_help_panel=MEASURED),
    ] = None,
    table: Annotated[
        str,
        typer.Option(
            "--table",
            metavar="NAME",
            help="Sample this existing table, and add nothing. Draws count for its rate limit and for the law fresh_first.",
            rich_help_panel=MEASURED,
        ),
    ] = "",
    batch_size: Annotated[int, typer.Option(metavar="B", help="Slices in a batch.", min=1, rich_help_panel=SHAPE)] = 256,
    horizon: Annotated[int, typer.Option(metavar="H", help="Transitions in a slice.", min=1, rich_help_panel=SHAPE)] = 3,
    rows: Annotated[int, typer.Option(metavar="N", help="Rows of an episode.", min=2, max=100_000, rich_help_panel=SHAPE)] = 201,
    obs: Annotated[
        int, typer.Option(metavar="N", help="Numbers (float32) in an observation.", min=1, max=100_000, rich_help_panel=SHAPE)
    ] = 64,
    timeout_s: Annotated[
        float, typer.Option(metavar="SECONDS", help="How long one call waits for an unreachable server.", min=0.1, rich_help_panel=SERVER)
    ] = 60.0,
    as_json: AsJson = False,
) -> None:
    """Measure how fast a server adds and samples, from this machine.

    Makes a table of its own, in memory, named bench-..., adds random episodes to it one by one and in bulk, samples it by each transport,
    and drops it at the end, also after Ctrl-C. No other table is touched; a training that runs meanwhile shares the server's CPU with it.
    If the server requires tokens, the token must have the role admin; with --table, learner is enough.

    \b
    Examples:
      touchline bench replay-host:50051
      touchline bench replay-host:50051 --seconds 10 --transport ring --batch-size 512
      touchline bench replay-host:50051 --table demos --json

    \b
    Exit status:
      0    measured
      1    the server is unreachable, or the token does not allow it
      2    the command line is wrong
      130  interrupted; the table is dropped
    """
    measured: list[Measurement] = []
    with report_errors("interrupted"):
        check_reachable(address, table=table)
        with ReplayClient(address, timeout_s=timeout_s, as_numpy=True) as client, _bench_table(client, table, rows=rows) as name:
            if not table:
                episodes = make_episodes(rows, obs, convention=client.info(table=name).row_convention)
                measured += [_measure_add(client, name, episodes, seconds), _measure_load(client, name, episodes, seconds)]
            for way in transport or list(TransportName):
                options = {"table": name, "batch_size": batch_size, "horizon": horizon}
                measured.append(_measure_sampling(client, way, options, seconds))
    if as_json:
        document = {"address": address, "table": table or None, "batch_size": batch_size, "horizon": horizon}
        print_json(document | {"measurements": measured})
        return
    _print_measured(measured)
    print_line(
        f"{address}: batches of {batch_size} slices at horizon {horizon}, {seconds:g} s each" + ("" if table else f"; {_shape(rows, obs)}")
    )


@contextmanager
def _bench_table(client: ReplayClient, table: str, *, rows: int) -> Iterator[str]:
    """Yields the name of a table to use: the given one, or one that is made and dropped again."""
    if table:
        yield table
        return
    left = [name for name in client.tables() if name.startswith(PREFIX)]
    if left:
        print_error(f"tables of an earlier bench are still there, or it still runs: {', '.join(left)}; touchline table drop NAME")
    name = PREFIX + secrets.token_hex(4)
    unlimited = {"samples_per_insert": 0, "tolerance": 0, "min_steps": 0}
    try:
        client.create_table(name, buffer_size=rows * EPISODES_KEPT, durability="none", law="episode", pad="none", rate=unlimited)
    except AccessDeniedError as error:
        raise AccessDeniedError(f"{error}; --table NAME samples an existing table") from error
    try:
        yield name
    finally:
        try:
            client.drop_table(name)
        except TouchlineError as error:
            print_error(f"the table could not be dropped ({escape(str(error))}); do it with: touchline table drop {name}")


def make_episodes(rows: int, obs: int, *, convention: str) -> list[dict[str, np.ndarray]]:
    """Returns episodes of random values, with NaN in the row that has no action under a row convention."""
    rng = np.random.default_rng(0)
    undefined = 0 if convention == "incoming" else -1
    episodes = []
    for _ in range(EPISODES_A_LOAD):
        episode = {
            "obs": rng.standard_normal((rows, obs), dtype=np.float32),
            "action": rng.standard_normal((rows, 6), dtype=np.float32),
            "reward": rng.standard_normal(rows, dtype=np.float32),
        }
        episode["action"][undefined] = episode["reward"][undefined] = np.nan
        episodes.append(episode)
    return episodes


def _measure_add(client: ReplayClient, table: str, episodes: list[dict[str, np.ndarray]], seconds: float) -> Measurement:
    added = 0

    def add() -> None:
        nonlocal added
        client.add(episodes[added % len(episodes)], table=table, actor="bench")
        added += 1

    took_s = _repeat(add, seconds)
    return _of_episodes("add", took_s, len(took_s), episodes)


def _measure_load(client: ReplayClient, table: str, episodes: list[dict[str, np.ndarray]], seconds: float) -> Measurement:
    took_s = _repeat(lambda: client.load(episodes, table=table, actor="bench"), seconds)
    return _of_episodes("load", took_s, len(took_s) * len(episodes), episodes)


def _of_episodes(what: str, took_s: list[float], count: int, episodes: list[dict[str, np.ndarray]]) -> Measurement:
    rows, size_bytes = len(episodes[0]["reward"]), sum(column.nbytes for column in episodes[0].values())
    return _summarize(what, "unary" if what == "add" else "stream", "episodes", took_s, count=count, rows=rows, size_bytes=size_bytes)


def _measure_sampling(client: ReplayClient, way: TransportName, options: dict[str, Any], seconds: float) -> Measurement:
    if way is TransportName.UNARY:
        return _sample(lambda: client.sample(**options), way, seconds)
    with client.batches(ring=way is TransportName.RING, timeout_s=client.timeout_s, **options) as stream:
        next(stream)
        if stream.transport != way.value:
            return Measurement("sample", way.value, "batches", note=f"not possible: {stream.transport_reason}")
        return _sample(lambda: next(stream), way, seconds)


def _sample(take: Callable[[], Batch], way: TransportName, seconds: float) -> Measurement:
    batch = take()
    horizon, slices = np.shape(batch.action)[:2]
    size_bytes, rows = size_of(batch), (horizon + 1) * slices
    took_s = _repeat(take, seconds)
    return _summarize("sample", way.value, "batches", took_s, count=len(took_s), rows=rows, size_bytes=size_bytes)


def _repeat(call: Callable[[], object], seconds: float) -> list[float]:
    """Repeats a call for a time, at least once, and returns how long each took."""
    took_s: list[float] = []
    started_s = now_s = time.perf_counter()
    while now_s - started_s < seconds or not took_s:
        call()
        before_s, now_s = now_s, time.perf_counter()
        took_s.append(now_s - before_s)
    return took_s


def _summarize(what: str, transport: str, unit: str, took_s: list[float], *, count: int, rows: int, size_bytes: int) -> Measurement:
    """Returns a measurement of units of ``rows`` rows and ``size_bytes`` bytes each."""
    total_s = sum(took_s)
    p50_s, p99_s = (float(value) for value in np.percentile(took_s, (50, 99)))
    per_s = count / total_s
    return Measurement(what, transport, unit, count, total_s, per_s, per_s * rows, per_s * size_bytes, p50_s, p99_s)


def _print_measured(measured: list[Measurement]) -> None:
    rows = []
    for one in measured:
        if one.note:
            rows.append((one.what, one.transport, "-", "-", "-", "-", "-", escape(one.note)))
            continue
        p50_s, p99_s = one.p50_s or 0.0, one.p99_s or 0.0
        rates = (f"{one.per_s:,.0f} {one.unit}", f"{one.rows_per_s:,.0f}", f"{one.bytes_per_s / 1e6:,.1f}")
        rows.append((one.what, one.transport, *rates, f"{p50_s * 1e3:.2f}", f"{p99_s * 1e3:.2f}", ""))
    print_table(("<WHAT", "<TRANSPORT", "A SECOND", "ROWS/S", "MB/S", "P50 MS", "P99 MS", "<"), rows)


def _shape(rows: int, obs: int) -> str:
    return f"episodes of {pluralize(rows, 'row')} with {pluralize(obs, 'number')} in an observation"
