"""The screen of ``touchline top`` and the text of ``touchline status``, made from snapshots as a server sends them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from touchline import Counts, UnavailableError
from touchline._cli import connection_table
from touchline._cli.amounts import count_text, duration_text, share_text, size_text
from touchline._cli.connection_table import COLUMNS
from touchline._cli.status import print_status
from touchline._cli.status_view import connections_of
from touchline._cli.top_screen import TopScreen
from touchline.types import (
    ActorStatus,
    DeliveredStatus,
    DurabilityStatus,
    FlowStatus,
    LatencyStatus,
    LearnerStatus,
    RefusalStatus,
    ServerState,
    ServerStatus,
    ServingState,
    TableStatus,
    Transport,
    Verdict,
)


@dataclass
class Feed:
    """What the screen asks of a feed."""

    status: ServerStatus | None
    error: Exception | None = None
    changed_s: float = field(default_factory=time.monotonic)
    interval_s: float = 1.0

    def set_interval(self, interval_s: float) -> None:
        self.interval_s = interval_s


def make_status(actors: int = 3, learners: int = 2) -> ServerStatus:
    """Returns a snapshot of a busy server; the highest-numbered actor has the largest spool."""
    minute = FlowStatus(
        window_s=60,
        span_s=30,
        episodes_in=60,
        rows_in=6_000,
        bytes_in=6_000_000,
        delivered=(DeliveredStatus(Transport.RING, batches=3_000, slices=768_000, rows=3_072_000, bytes=900_000_000),),
    )
    table = TableStatus(
        table="demos",
        counts=Counts(steps_stored=50_000, episodes_stored=500, steps_added=60_000, episodes_added=600),
        capacity=100_000,
        size_bytes=50_000_000,
        device="cpu",
        verdict=Verdict.LEARNERS_WAIT,
        verdict_text="learners waited 12 s in the last minute, for data",
        flows=(minute, replace(minute, window_s=0, span_s=3_600)),
        seconds_until_full=250,
        oldest_stored_s=900,
        median_stored_s=400,
        mean_sampled_s=380,
        newest_policy_version=40,
        mean_stored_policy_version=31.5,
        mean_sampled_policy_version=33.0,
        episodes_not_sampled=7,
        durability=DurabilityStatus(
            mode="batch", state="ok", sync=LatencyStatus(9, 0.1, 0.002, 0.009), file_bytes=10**8, disk_free_bytes=10**11, restored=True
        ),
    )
    return ServerStatus(
        server=ServerState(
            version="0.2.0", state=ServingState.SERVING, uptime_s=7_200, memory_bytes=10**9, receive_limit_bytes=100, receive_bytes=3
        ),
        tables=(table, TableStatus(table="", verdict=Verdict.IDLE)),
        actors=tuple(
            ActorStatus(
                table="demos", name=f"striker-{number}", episodes=number, rows_per_s=100 - number, waited_s=40, spool_bytes=number * 1_000
            )
            for number in range(actors)
        ),
        learners=tuple(
            LearnerStatus(
                learner_id=number + 1,
                transport=Transport.STREAM,
                ring_refused="another host",
                tables=("demos",),
                batches_per_s=5,
                wait=LatencyStatus(3, 1, 0.1, 0.2),
            )
            for number in range(learners)
        ),
        refusals=(RefusalStatus("invalid-episode", "demos", 3, "obs: a value that is not finite\x1b[2J", "striker-1", 1_000),),
        time_unix_s=1_060,
    )


def draw(screen: TopScreen, feed: Feed, width: int = 100, height: int = 40) -> list[str]:
    """Returns the lines of the screen."""
    console = Console(width=width, height=height)
    with console.capture() as capture:
        console.print(screen.draw(feed, console))
    return [line.rstrip() for line in capture.get().splitlines()]


def press(screen: TopScreen, feed: Feed, keys: str) -> None:
    for key in keys:
        screen.press(key, feed)


def names(lines: Sequence[str]) -> list[str]:
    """Returns the names of the connections on a screen, in their order."""
    return [line.split()[1] for line in lines if line.split()[:1] in (["actor"], ["learner"])]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ("", ["striker-2", "striker-1", "striker-0", "#1", "#2"]),
        ("r", ["striker-0", "#1", "#2", "striker-1", "striker-2"]),
        ("2", ["#1", "#2", "striker-0", "striker-1", "striker-2"]),
        (">>", ["striker-0", "striker-1", "striker-2", "#1", "#2"]),
        ("a", ["striker-2", "striker-1", "striker-0"]),
        ("aa<", ["#1", "#2", "striker-0", "striker-1", "striker-2"]),
        ("l", ["#1", "#2"]),
        ("xyz", ["striker-2", "striker-1", "striker-0", "#1", "#2"]),
    ],
)
def test_keys_sort_and_choose(keys: str, expected: list[str]) -> None:
    screen, feed = TopScreen("host:1"), Feed(make_status())

    press(screen, feed, keys)

    assert names(draw(screen, feed)) == expected


def test_pause_holds_a_snapshot_and_intervals_change() -> None:
    screen, feed = TopScreen("host:1"), Feed(make_status())
    press(screen, feed, "p")
    feed.status = make_status(actors=1)

    assert "PAUSED: space goes on" in draw(screen, feed) and len(names(draw(screen, feed))) == 5
    press(screen, feed, " ")
    assert len(names(draw(screen, feed))) == 3
    press(screen, feed, "++")
    assert feed.interval_s == 5
    press(screen, feed, "-----")
    assert feed.interval_s == 0.5
    press(screen, feed, "q")
    assert screen.ended


def test_screen_says_who_waits_what_is_refused_and_that_the_server_is_away() -> None:
    screen, feed = TopScreen("host:1"), Feed(make_status(), UnavailableError("host:1: connection refused"), time.monotonic() - 65)

    text = "\n".join(draw(screen, feed, width=200))

    assert "demos: learners waited 12 s in the last minute, for data" in text
    assert r"refused: 3 x invalid-episode, table demos; the last one 60 s ago, striker-1: obs: a value that is not finite\x1b[2J" in text
    assert "NO ANSWER, this is of 65 s ago: host:1: connection refused" in text
    assert "stream, another host" not in text and "stream: another host" in text
    assert "\x1b[2J" not in text


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(60, 220),
    height=st.integers(20, 60),
    actors=st.sampled_from([0, 1, 30, 400]),
    tables=st.sampled_from([1, 2, 40]),
    keys=st.text(st.sampled_from("<>rnNalh123456789"), max_size=8),
)
def test_screen_always_fits(width: int, height: int, actors: int, tables: int, keys: str) -> None:
    screen, feed = TopScreen("replay-host:50051"), Feed(make_status(actors))
    feed.status = replace(make_status(actors), tables=(make_status().tables * tables)[:tables])
    press(screen, feed, keys)

    lines = draw(screen, feed, width, height)

    assert max(map(len, lines)) <= width
    assert len(lines) <= height, "\n".join(lines)
    assert lines[-1].startswith("sorted by ")


def test_pages_show_every_connection_once() -> None:
    screen, feed = TopScreen("host:1"), Feed(make_status(actors=50, learners=0))
    seen = []
    for _ in range(9):
        seen += [name for name in names(draw(screen, feed, height=24)) if name not in seen]
        press(screen, feed, "n")

    assert sorted(seen) == sorted(f"striker-{number}" for number in range(50))


def test_status_as_text_has_everything(capsys: pytest.CaptureFixture[str]) -> None:
    print_status(make_status(actors=20), "host:1")

    text = capsys.readouterr().out
    for words in (
        "touchline-server 0.2.0 at host:1: serving, up 2.0 h",
        "receiving 3% of its budget",
        "demos      learners wait: learners waited 12 s in the last minute, for data",
        "500 episodes, 50,000 of 100,000 steps (50%, full in 4.2 min), 50 MB on cpu",
        "200 rows/s, 2 episodes/s, 200 kB/s; 6,000 rows since the start",
        "100 batches/s, 30 MB/s by ring; 3,000 since the start",
        "512 rows sampled per row added",
        "policy version 40, behind it on average: stored 8.5, sampled 7.0",
        "batch, ok, 0 episodes not yet on disk, fsync 2 ms (p99 9 ms), 100 MB, 100 GB free, last snapshot never",
        "7 episodes are never sampled as configured",
        "(default)  idle",
        "and 10 more: touchline top, or --json",
        "3 x invalid-episode, table demos; the last one 60 s ago",
    ):
        assert words in text, text
    assert "\x1b" not in text


def test_every_column_sorts_every_row() -> None:
    rows = connections_of(make_status())

    for column in range(len(COLUMNS)):
        forward, backward = (connection_table.sort(rows, column, reverse=reverse) for reverse in (False, True))
        assert sorted(map(repr, forward)) == sorted(map(repr, backward)) == sorted(map(repr, rows))


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        *(
            (count_text, value, text)
            for value, text in ((0, "0"), (0.25, "0.25"), (9_999, "9,999"), (12_345, "12.3k"), (4_560_000, "4.56M"))
        ),
        *((size_text, value, text) for value, text in ((0, "0 B"), (1_000, "1 kB"), (123_456, "123 kB"), (4.56e9, "4.56 GB"))),
        *(
            (duration_text, value, text)
            for value, text in ((0, "0 s"), (0.00035, "0.35 ms"), (0.0000099, "9.9 us"), (1.5, "1.5 s"), (300, "5.0 min"), (2e5, "2.3 d"))
        ),
        *((share_text, value, text) for value, text in ((0, "0%"), (0.001, "<1%"), (0.345, "34%"), (1, "100%"))),
    ],
)
def test_amounts_are_short(function: object, value: float, text: str) -> None:
    assert callable(function) and function(value) == text
