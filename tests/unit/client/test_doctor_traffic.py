"""What doctor says about waits, refusals and spools: for every cause and every reason, what to do."""

from __future__ import annotations

from typing import Any

import pytest

from touchline._cli.doctor.findings import Finding, Level
from touchline._cli.doctor.traffic import ADVICE_OF_REASON, MAX_REASONS, RECENT_S, advice_of, check_traffic
from touchline.types import ActorStatus, RefusalStatus, ServerStatus, TableStatus, Verdict, WaitCause, WaitStatus
from touchline_protos.types.reasons import Reason

NOW = 1e9
CAUSES = {
    Verdict.LEARNERS_WAIT: (WaitCause.DATA, WaitCause.RATE, WaitCause.SAMPLING),
    Verdict.ACTORS_WAIT: (WaitCause.BUDGET, WaitCause.THROTTLE, WaitCause.RATE, WaitCause.STORING),
}


class Snapshot:
    """A client whose server is as given."""

    def __init__(self, **parts: Any) -> None:
        self._status = ServerStatus(time_unix_s=NOW, **({"tables": (TableStatus(),)} | parts))

    def status(self, tables: list[str]) -> ServerStatus:
        return self._status


def findings(**parts: Any) -> list[Finding]:
    return list(check_traffic(Snapshot(**parts), ""))  # type: ignore[arg-type]


def refusal(reason: str, *, ago_s: float = 1.0, table: str | None = None, message: str = "text") -> RefusalStatus:
    return RefusalStatus(reason=reason, table=table, count=3, last_message=message, last_who="arm", last_unix_s=NOW - ago_s)


def test_advice_of_a_verdict_follows_what_that_side_waited_for_most() -> None:
    advice = set()
    for verdict, causes in CAUSES.items():
        learners = verdict is Verdict.LEARNERS_WAIT
        for most in causes:
            waits = [WaitStatus(learners=learners, cause=cause, waited_s=50.0 if cause is most else 1.0) for cause in causes]
            waits.append(WaitStatus(learners=not learners, cause=WaitCause.RATE, waited_s=99.0))
            advice.add(advice_of(TableStatus(verdict=verdict, waits=tuple(waits))))

    assert len(advice) == 7
    assert all(text.startswith(("Learners wait", "Actors wait")) for text in advice)


@pytest.mark.parametrize("verdict", [Verdict.IDLE, Verdict.BALANCED, Verdict.UNSPECIFIED])
def test_nothing_has_to_be_done_if_nobody_waits(verdict: Verdict) -> None:
    assert advice_of(TableStatus(verdict=verdict)) == ""


def test_every_reason_of_a_refusal_has_its_advice() -> None:
    assert set(ADVICE_OF_REASON) == set(Reason)
    for reason in Reason:
        (finding,) = findings(refusals=(refusal(reason.value),))
        assert (finding.check, finding.level, finding.advice) == ("refused", Level.NOTE, ADVICE_OF_REASON[reason])
        assert finding.text == f"3 refused as {reason}, the last one to arm: text"


def test_recent_refusals_of_the_table_are_shown_the_latest_first() -> None:
    shown = [refusal(reason.value, ago_s=10.0 * number) for number, reason in enumerate(list(Reason)[:7])]
    hidden = [
        refusal("not-ready", ago_s=RECENT_S + 1),
        refusal("invalid-episode", table="demos"),
        refusal("permission-denied", message="the token 'x' is for learner, expected one for admin to call SetTable"),
    ]

    found = [finding.figures["reason"] for finding in findings(refusals=(*hidden, *reversed(shown)))]

    assert found == [one.reason for one in shown[:MAX_REASONS]]


def test_reason_of_a_newer_server_is_shown_without_advice() -> None:
    assert [finding.advice for finding in findings(refusals=(refusal("too-blue"),))] == [""]


def test_spools_are_summed_and_the_fullest_is_named() -> None:
    actors = [ActorStatus(name=name, spool_episodes=number) for name, number in (("a", 2), ("b", 40), ("c", 0), ("d", None))]
    actors.append(ActorStatus(name="e", table="demos", spool_episodes=1000))

    (finding,) = findings(actors=tuple(actors))

    assert (finding.check, finding.figures) == ("spools", {"actors": 2, "episodes": 42})
    assert finding.text == "42 episodes wait in the spools of 2 actors, most at b: 40"
    assert "touchline spool show DIR" in finding.advice
