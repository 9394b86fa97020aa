"""Checks of sampling: whether batches come through a ring, how long the first takes, and how many come a second."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from touchline._cli.doctor.findings import Finding, Level
from touchline._rpc.credentials import is_local
from touchline.client import ReplayClient
from touchline.errors import TouchlineError
from touchline.types import ServerInfo
from touchline_protos import Batch
from touchline_protos.log_lines import escape
from touchline_protos.shm.ring import shared_memory_id

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FIRST_BATCH_TIMEOUT_S = 10.0
"""Longest wait for the first batch."""

ADVICE_BY_WORDS = {
    "another /dev/shm": "In containers, share the IPC namespace (ipc: host or shareable), or mount one volume at /dev/shm in both.",
    "max_rings is 0": "Set ring.max_rings on the server to the number of learners on its host.",
    "rings are in use": "Close learners that are not needed, or raise ring.max_rings on the server.",
    "do not fit": "Raise ring.max_ring_bytes on the server, or ask for smaller batches.",
    "memory are available": "Free memory on this machine, or ask for smaller batches.",
    "cannot be used here": "Run the learner as the server's user, with the same /dev/shm.",
}
"""What to do, by words of the reason for which there is no ring on the server's host."""


def check_sampling(client: ReplayClient, info: ServerInfo, *, address: str, seconds: float | None) -> Iterator[Finding]:
    """Yields findings about a batch, the ring and the throughput.

    Draws do not count as "seen" for the law ``fresh_first``: there, ``step`` is used instead. They do count for a rate limit, so with one
    only a single slice is drawn unless ``seconds`` says otherwise.

    Args:
        client: client of the server, whose token may sample.
        info: the server's answer about the client's table.
        address: address of the server.
        seconds: duration of the measurement; None takes 2 s, and measures nothing if the table has a rate limit.
    """
    limited = info.rate is not None and seconds is None
    options: dict[str, Any] = {"batch_size": 1, "prefetch": 1} if limited else {}
    if tomllib.loads(info.config_toml)["sampling"]["law"] == "fresh_first":
        options["law"] = "step"
    started_s = time.perf_counter()
    try:
        with client.batches(timeout_s=FIRST_BATCH_TIMEOUT_S, as_numpy=True, **options) as stream:
            first = next(stream)
            yield _describe_first(first, time.perf_counter() - started_s)
            yield _describe_transport(stream.transport, stream.transport_reason, address)
            if limited:
                yield Finding("throughput", Level.NOTE, "not measured: batches count for the table's rate limit; --seconds 2 measures")
            elif seconds is None or seconds > 0:
                yield _measure(stream, 2.0 if seconds is None else seconds, stream.transport)
    except TouchlineError as error:
        yield Finding("batch", Level.FAILED, f"no batch: {escape(str(error))}", "See the text, and the server's log.")


def check_ring_unasked(address: str) -> Finding:
    """Reports what is known about a ring while nothing can be sampled."""
    if not is_local(address):
        return Finding("ring", Level.NOTE, "the address is another machine's: batches will come in messages")
    if not shared_memory_id():
        return Finding("ring", Level.NOTE, "this machine is not Linux on x86-64, or has no /dev/shm: batches will come in messages")
    return Finding("ring", Level.NOTE, "not known before something can be sampled: the server offers a ring with the first batch")


def _describe_first(batch: Batch, took_s: float) -> Finding:
    rows, size = np.shape(batch.action)[:2]
    text = f"first batch of {size} slices at horizon {rows} after {took_s * 1e3:.0f} ms, {size_of(batch) / 1e3:,.1f} kB"
    return Finding(
        "batch", Level.OK, text, figures={"first_batch_s": took_s, "slices": size, "horizon": rows, "size_bytes": size_of(batch)}
    )


def _describe_transport(transport: str, reason: str, address: str) -> Finding:
    figures = {"transport": transport, "reason": reason}
    if transport == "ring":
        return Finding("ring", Level.OK, "batches come through a ring in shared memory", figures=figures)
    if transport == "device":
        return Finding("ring", Level.OK, "batches are gathered here, from memory that the server shares", figures=figures)
    text = f"batches come in messages, not through a ring: {escape(reason)}"
    if not is_local(address) or not shared_memory_id():
        return Finding("ring", Level.NOTE, text, figures=figures)
    advice = next((advice for words, advice in ADVICE_BY_WORDS.items() if words in reason), "See docs/troubleshooting.md, Sampling.")
    return Finding("ring", Level.WARNING, text, advice, figures)


def _measure(stream: Iterator[Batch], seconds: float, transport: str) -> Finding:
    batches, size_bytes = 0, 0
    started_s = time.perf_counter()
    while (took_s := time.perf_counter() - started_s) < seconds or not batches:
        batch = next(stream)
        batches += 1
        size_bytes += size_of(batch)
    text = f"{batches / took_s:,.0f} batches/s, {size_bytes / took_s / 1e6:,.1f} MB/s ({transport}, for {took_s:.1f} s)"
    figures = {"batches_per_s": batches / took_s, "bytes_per_s": size_bytes / took_s, "seconds": took_s, "transport": transport}
    return Finding("throughput", Level.OK, text, figures=figures)


def size_of(batch: Batch) -> int:
    """Returns the bytes of a batch's arrays of steps."""
    return _size_of([batch.obs, batch.action, batch.reward, batch.done, *batch.extra.values()])


def _size_of(value: Any) -> int:
    if isinstance(value, dict):
        value = list(value.values())
    return sum(map(_size_of, value)) if isinstance(value, list) else np.asarray(value).nbytes
