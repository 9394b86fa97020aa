"""Who adds episodes: a bounded number of actors, those that were active last."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from touchline_protos.types.metadata import CLIENT_METADATA_KEY, SPOOL_METADATA_KEY
from touchline_protos.types.status import MAX_NAMED, ActorStatus
from touchline_server.metrics.waits import WaitSum
from touchline_server.metrics.windows import Window

MAX_ACTORS = 4096
"""Actors of a table that are kept; beyond it, the one that was silent for longest joins the others."""

IDLE_S = 3600.0
"""Time after which an actor that does nothing is forgotten."""

MAX_VERSION_CHARS = 100
"""Characters of a client's version that are kept."""

Metadata = Sequence[tuple[str, str | bytes]]


class Played(NamedTuple):
    """What a snapshot says of an episode, taken while its columns are there."""

    actor: str
    rows: int
    policy_version: int
    reward_sum: float | None
    """Sum of the rewards; None if it is not finite."""


class Actor:
    """One actor's counts. One thread at a time."""

    __slots__ = (
        "_window",
        "address",
        "duplicates",
        "episodes",
        "finite",
        "metadata",
        "policy_version",
        "refused",
        "reward_sum",
        "rows",
        "seen_at",
        "stored_at",
        "waits",
    )

    def __init__(self) -> None:
        self.episodes = self.rows = self.duplicates = self.refused = self.policy_version = 0
        self.finite = 0
        """Episodes with a finite return."""
        self.reward_sum = 0.0
        """Sum of their returns."""
        self.seen_at = 0.0
        """When it was last heard of."""
        self.stored_at: float | None = None
        """When its last episode was stored."""
        self.address = ""
        self.metadata: Metadata = ()
        """Metadata of its last call. They are read only for a snapshot."""
        self.waits = WaitSum()
        self._window = Window(60.0, marks=12)

    def stored(self, played: Played, now: float) -> None:
        """Counts an episode."""
        self.episodes += 1
        self.rows += played.rows
        self.policy_version = played.policy_version
        if played.reward_sum is not None:
            self.finite += 1
            self.reward_sum += played.reward_sum
        self.stored_at = now

    def tick(self, now: float) -> None:
        """Marks the present, from which the last minute is counted."""
        if self._window.is_due(now):
            self._window.mark(now, self._totals(now))

    def take(self, other: Actor, now: float) -> None:
        """Adds the counts of another actor, which is kept no more."""
        for name in ("episodes", "rows", "duplicates", "refused", "finite", "reward_sum"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.seen_at = now

    def recent(self, now: float) -> tuple[float, float, float]:
        """Returns the length of the last minute so far, and the rows stored and the seconds waited in it."""
        span_s, (rows, waited_s) = self._window.recent(now, self._totals(now))
        return span_s, rows, waited_s

    def _totals(self, now: float) -> tuple[float, float]:
        return self.rows, self.waits.total_s(now)


class Actors:
    """The actors of one table. One thread at a time."""

    def __init__(self, table: str) -> None:
        self._table = table
        self._actors: OrderedDict[str, Actor] = OrderedDict()
        """Actors by name; the one that was silent for longest is first."""
        self._folded = Actor()
        self._folded_count = 0

    def __len__(self) -> int:
        return len(self._actors)

    def of(self, name: str, now: float) -> Actor:
        """Returns an actor, which is active now."""
        actor = self._actors.get(name)
        if actor is None:
            actor = self._actors[name] = Actor()
            actor.tick(now)
            if len(self._actors) > MAX_ACTORS:
                self._folded.take(self._actors.popitem(last=False)[1], now)
                self._folded_count += 1
        else:
            self._actors.move_to_end(name)
        actor.seen_at = now
        return actor

    def tick(self, now: float) -> None:
        """Marks the present for all, and forgets those that were silent for long."""
        while self._actors:
            oldest = next(iter(self._actors.values()))
            if now - oldest.seen_at <= IDLE_S or oldest.waits.waiting:
                break
            self._actors.popitem(last=False)
        if self._folded_count and now - self._folded.seen_at > IDLE_S:
            self._folded, self._folded_count = Actor(), 0
        for actor in self._actors.values():
            actor.tick(now)

    def active(self, now: float) -> int:
        """Returns the number of actors that stored something, or waited, in the last minute."""
        return sum(actor.waits.waiting > 0 or now - actor.seen_at <= 60.0 for actor in self._actors.values())

    def status(self, now: float, address_of: Callable[[str], str] = str) -> Iterator[ActorStatus]:
        """Yields the actors that were active last, and then one entry for all others, if there are any.

        Args:
            now: the present, by the metrics' clock.
            address_of: function that returns the address to show of an actor's.
        """
        latest = list(reversed(self._actors.items()))
        for name, actor in latest[:MAX_NAMED]:
            yield self._one(name, actor, now, address_of(actor.address))
        others = [actor for _, actor in latest[MAX_NAMED:]]
        count = len(others) + self._folded_count
        if count:
            yield self._sum([*others, self._folded], count, now)

    def _one(self, name: str, actor: Actor, now: float, address: str) -> ActorStatus:
        span_s, rows, waited_s = actor.recent(now)
        spool = _spool(_value(actor.metadata, SPOOL_METADATA_KEY))
        return ActorStatus(
            table=self._table,
            name=name,
            address=address,
            client_version=client_version(actor.metadata),
            last_episode_age_s=max(now - actor.stored_at, 0.0) if actor.stored_at is not None else -1.0,
            episodes=actor.episodes,
            rows=actor.rows,
            rows_per_s=rows / span_s if span_s else 0.0,
            mean_rows=actor.rows / actor.episodes if actor.episodes else 0.0,
            mean_reward_sum=actor.reward_sum / actor.finite if actor.finite else None,
            policy_version=actor.policy_version,
            duplicates=actor.duplicates,
            refused=actor.refused,
            waited_s=waited_s,
            spool_episodes=spool[0] if spool is not None else None,
            spool_bytes=spool[1] if spool is not None else None,
        )

    def _sum(self, actors: list[Actor], count: int, now: float) -> ActorStatus:
        total, rows_per_s, waited_s = Actor(), 0.0, 0.0
        for actor in actors:
            total.take(actor, now)
            span_s, rows, waited = actor.recent(now)
            rows_per_s += rows / span_s if span_s else 0.0
            waited_s += waited
        stored = [now - actor.stored_at for actor in actors if actor.stored_at is not None]
        return ActorStatus(
            table=self._table,
            name="others",
            last_episode_age_s=min(stored, default=-1.0),
            episodes=total.episodes,
            rows=total.rows,
            rows_per_s=rows_per_s,
            mean_rows=total.rows / total.episodes if total.episodes else 0.0,
            mean_reward_sum=total.reward_sum / total.finite if total.finite else None,
            duplicates=total.duplicates,
            refused=total.refused,
            waited_s=waited_s,
            others=count,
        )


def client_version(metadata: Metadata) -> str:
    """Returns the version of the client that a call's metadata name; empty if they do not."""
    return _value(metadata, CLIENT_METADATA_KEY)[:MAX_VERSION_CHARS]


def _value(metadata: Iterable[tuple[str, str | bytes]], key: str) -> str:
    value = next((value for name, value in metadata if name == key), "")
    return value if isinstance(value, str) else ""


def _spool(text: str) -> tuple[int, int] | None:
    """Returns what a client says of its spool; None if it says nothing that can be read."""
    numbers = text.split(",")
    if len(numbers) != 2 or not all(number.isascii() and number.isdigit() and len(number) <= 18 for number in numbers):
        return None
    return int(numbers[0]), int(numbers[1])
