"""The history of the web page: rates from totals, levels, two resolutions, and only the tables that a caller may see."""

from __future__ import annotations

from dataclasses import replace

from touchline_protos.types.counts import Counts
from touchline_protos.types.status import DeliveredStatus, FlowStatus, ServerStatus, TableStatus, Transport, WaitCause, WaitStatus
from touchline_server.http.history import COARSE_POINTS, FINE_POINTS, History


def table_of(name: str, second: float) -> TableStatus:
    """A table to which 30 rows a second come, and from which 2 batches of 8 rows a second go; one actor waits for half of the time."""
    delivered = (DeliveredStatus(Transport.RING, batches=int(2 * second), rows=int(16 * second)),)
    flow = FlowStatus(window_s=0.0, span_s=second, rows_in=int(30 * second), delivered=delivered)
    waits = (WaitStatus(learners=False, cause=WaitCause.RATE, total_s=second / 2),)
    return TableStatus(name, Counts(steps_stored=int(30 * second)), flows=(flow, replace(flow, window_s=60.0)), waits=waits)


def snapshot(second: float, *names: str) -> ServerStatus:
    return ServerStatus(tables=tuple(table_of(name, second) for name in names or ("",)), time_unix_s=1000.0 + second)


def history_of(seconds: range, *names: str) -> History:
    history = History()
    for second in seconds:
        history.add(snapshot(second, *names))
    return history


def test_rates_are_what_totals_grow_by_a_second() -> None:
    point = history_of(range(0, 20, 2)).newest(None)[""]

    assert (point["rows_in"], point["batches_ring"], point["batches_stream"], point["rows_out"]) == (30, 2, 0, 16)
    assert (point["actors_waiting"], point["learners_waiting"]) == (0.5, 0)
    assert (point["rows_stored"], point["replay_ratio"]) == (540, 16 / 30)


def test_first_point_has_levels_and_no_rates() -> None:
    history = history_of(range(5, 6))

    assert history.newest(None)[""]["rows_in"] is None
    assert history.newest(None)[""]["rows_stored"] == 150


def test_both_resolutions_are_bounded_and_end_now() -> None:
    history = history_of(range(3 * 3600))

    fine, coarse = history.to_dict(None, coarse=False), history.to_dict(None, coarse=True)

    assert len(fine["time_unix_s"]) == len(fine["tables"][""]["rows_in"]) == FINE_POINTS + 1
    assert len(coarse["time_unix_s"]) == COARSE_POINTS + 1
    assert fine["time_unix_s"][-1] == 1000 + 3 * 3600 - 1
    assert {b - a for a, b in zip(coarse["time_unix_s"], coarse["time_unix_s"][1:], strict=False)} == {10}
    assert set(coarse["tables"][""]["rows_in"][1:]) == {30}


def test_same_moment_is_added_once() -> None:
    history = history_of(range(3))
    history.add(snapshot(2))

    assert len(history.to_dict(None, coarse=False)["time_unix_s"]) == 3


def test_table_that_was_dropped_and_created_again_has_no_negative_rate() -> None:
    history = history_of(range(100, 103))
    history.add(ServerStatus(tables=(table_of("", 1),), time_unix_s=2000.0))

    assert history.newest(None)[""]["rows_in"] is None


def test_table_that_is_new_has_null_before() -> None:
    history = history_of(range(3))
    history.add(snapshot(3, "", "demos"))
    history.add(snapshot(4, "", "demos"))

    assert history.to_dict(None, coarse=False)["tables"]["demos"]["rows_in"] == [None, None, None, None, 30]


def test_caller_sees_only_the_tables_of_the_token() -> None:
    history = history_of(range(3), "", "demos")

    assert set(history.newest(frozenset({"demos"}))) == {"demos"}
    assert set(history.to_dict(frozenset({"demos"}), coarse=True)["tables"]) == {"demos"}
