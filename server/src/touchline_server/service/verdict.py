"""The verdict on a table: who waits for whom, in a word and a sentence."""

from __future__ import annotations

from collections.abc import Sequence

from touchline_protos.types.status import Verdict, WaitCause, WaitStatus

NOTABLE_SHARE = 0.1
"""Share of the last minute for which the callers of a side have to wait, each on average, for a verdict."""

LEAST_SPAN_S = 5.0
"""Time as part of which waits count at least: of a server that has just started, a single call would be a large share."""

_LEARNERS_FOR = {
    WaitCause.DATA: "something to sample",
    WaitCause.RATE: "the rate limit, which waits for actors to add",
    WaitCause.SAMPLING: "the server to make batches",
}
_ACTORS_FOR = {
    WaitCause.BUDGET: "free bytes of limits.max_receive_bytes",
    WaitCause.RATE: "the rate limit, which waits for learners to sample",
    WaitCause.THROTTLE: "their turn while learners wait (server.sample_share)",
    WaitCause.STORING: "the table and its disk",
}


def verdict_of(
    waits: Sequence[WaitStatus], *, span_s: float, actors: int, learners: int, moved: bool, full: str = ""
) -> tuple[Verdict, str]:
    """Returns the verdict, and a sentence that says who waited for how long and for what.

    Args:
        waits: the waits of the last minute.
        span_s: length of the last minute, less after the start.
        actors: actors that were active in it.
        learners: learners that are connected.
        moved: whether anything was added, sampled or refused in it.
        full: why the durable store takes nothing; empty if it does.
    """
    if full:
        return Verdict.STORE_FULL, f"Adding is refused: {full}"
    learned, acted = _waited(waits, learners=True), _waited(waits, learners=False)
    span_s = max(span_s, LEAST_SPAN_S)
    learner_share = learned / (span_s * learners) if learners else 0.0
    actor_share = acted / (span_s * actors) if actors else 0.0
    if learner_share >= max(NOTABLE_SHARE, actor_share):
        return Verdict.LEARNERS_WAIT, _sentence("learner", learners, learned, learner_share, _cause(waits, True), _LEARNERS_FOR)
    if actor_share >= NOTABLE_SHARE:
        return Verdict.ACTORS_WAIT, _sentence("actor", actors, acted, actor_share, _cause(waits, False), _ACTORS_FOR)
    if not moved:
        return Verdict.IDLE, "Nothing was added or sampled in the last minute."
    return Verdict.BALANCED, f"In the last minute learners waited {learned:.1f} s and actors {acted:.1f} s."


def _waited(waits: Sequence[WaitStatus], *, learners: bool) -> float:
    return sum(wait.waited_s for wait in waits if wait.learners is learners)


def _cause(waits: Sequence[WaitStatus], learners: bool) -> WaitCause:
    """Returns what a side waited for longest."""
    return max((wait for wait in waits if wait.learners is learners), key=lambda wait: wait.waited_s).cause


def _sentence(who: str, callers: int, waited_s: float, share: float, cause: WaitCause, words: dict[WaitCause, str]) -> str:
    subject = f"The {who}" if callers == 1 else f"{callers} {who}s"
    return f"{subject} waited {waited_s:.1f} s in the last minute ({share:.0%} of the time), mostly for {words[cause]}."
