"""The rate limit itself: what it grants, in which order, what it says, and that no caller waits forever."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from touchline_server.limiters.place import BatchesPlace, InsertPlace
from touchline_server.limiters.samples_per_insert import Rate, SamplesPerInsert
from touchline_server.limiters.waiting import LOG_AFTER_S, RETURN_S

CAPACITY = 1_000


class World:
    """A table reduced to its number of steps, with a clock, the limiter, and whether it has notified."""

    def __init__(self, rate: Rate) -> None:
        self.stored = 0
        self.now = 0.0
        self.notified = 0
        self.limiter = SamplesPerInsert(rate, is_filled=self.is_filled, notify=self.note, clock=lambda: self.now)

    def is_filled(self, min_steps: int) -> bool:
        return self.stored > 0 and self.stored >= min(min_steps, CAPACITY)

    def note(self) -> None:
        self.notified += 1

    def add(self, steps: int) -> bool:
        granted = self.limiter.reserve_insert(steps)
        if granted:
            self.publish(steps)
        return granted

    def publish(self, steps: int) -> None:
        self.stored = min(self.stored + steps, CAPACITY)
        self.limiter.inserted(steps)

    def sample(self, slices: int) -> bool:
        granted = self.limiter.reserve_batches(1, slices)
        if granted:
            self.limiter.delivered(1, slices)
        return bool(granted)

    def clear(self) -> None:
        self.stored = 0
        self.limiter.cleared()


def filled(rate: Rate) -> World:
    world = World(rate)
    assert world.add(max(rate.min_steps, 1))
    assert world.limiter.reserve_batches(0, 1) == 0  # notes that it is filled
    return world


def test_without_a_rate_everything_is_granted_and_nothing_counted() -> None:
    world = World(Rate())
    assert all(world.add(10) and world.sample(10**6) for _ in range(10))

    assert not world.limiter.active
    assert world.limiter.status().steps_added == world.limiter.status().slices_delivered == world.notified == 0


def test_adds_pass_and_batches_wait_until_min_steps_are_stored() -> None:
    world = World(Rate(8, 100, min_steps=50))
    for _ in range(4):
        assert world.add(10)
        assert not world.sample(1)
    assert "rate.min_steps = 50 steps that can be sampled have to be stored first; actors have to add" in world.limiter.explain_batches()

    assert world.add(10)
    assert world.sample(1)
    status = world.limiter.status()
    assert (status.steps_added, status.slices_delivered, status.owed_slices) == (0, 1, -1)


def test_both_sides_stay_within_the_band() -> None:
    world = filled(Rate(8, 100))
    added = sum(world.add(1) for _ in range(100))
    assert added == 12  # 12 x 8 = 96 slices; 13 would be 104
    taken = sum(world.sample(4) for _ in range(100))
    assert taken * 4 == 96 + 100

    status = world.limiter.status()
    assert (status.steps_added, status.slices_delivered, status.owed_slices) == (12, 196, -100)
    assert "196 slices were delivered for 12 steps added, expected 8 slices per step within 100 slices; actors have to add" in (
        world.limiter.explain_batches()
    )


def test_min_steps_alone_only_holds_learners_back() -> None:
    world = World(Rate(min_steps=20))
    assert world.add(19) and not world.sample(10**6)

    assert world.add(500) and all(world.sample(10**6) for _ in range(10))


def test_episode_or_batch_above_the_tolerance_is_granted_once_its_side_is_due() -> None:
    world = filled(Rate(8, 10))
    assert world.add(100) and not world.add(1)
    assert world.sample(1_000) and not world.sample(1)
    assert world.limiter.status().owed_slices == -200
    assert "learners have to take 0 slices" in world.limiter.explain_adds()

    assert world.add(100)
    assert world.sample(1_000)


def test_reservations_count_until_they_are_cancelled() -> None:
    world = filled(Rate(8, 100))
    limiter = world.limiter
    assert limiter.reserve_insert(10) and not limiter.reserve_insert(10)
    assert limiter.reserve_batches(20, 10) == 10, "steps that are not published yet allow no batch"
    assert limiter.reserve_batches(1, 10) == 0

    limiter.cancel_insert(10)
    limiter.cancel_batches(10, 10)
    assert limiter.reserve_insert(10)
    assert limiter.reserve_batches(20, 10) == 10


def test_batches_made_ahead_do_not_allow_adds() -> None:
    world = filled(Rate(8, 100))
    assert world.add(12)
    assert world.limiter.reserve_batches(50, 4) == 49

    assert not world.add(1)
    world.limiter.delivered(1, 4)
    world.limiter.delivered(1, 4)
    assert world.add(1)


def test_batches_ready_for_a_learner_that_stopped_do_not_block_the_others() -> None:
    world = filled(Rate(8, 100))
    stopped, starving = BatchesPlace(world.limiter, "stopped"), BatchesPlace(world.limiter, "starving")
    assert world.add(12)
    assert stopped.reserve(50, 4, waits=True) == 49
    assert not starving.reserve(1, 4, waits=True)

    assert world.add(2), "the starving learner's"
    assert starving.reserve(1, 4, waits=True) == 1
    assert not world.add(1)


def test_learners_that_wait_take_turns_of_one_batch() -> None:
    world = filled(Rate(8, 16))
    assert world.sample(16)
    places = [BatchesPlace(world.limiter, name) for name in "abc"]
    assert not any(place.reserve(5, 8, waits=True) for place in places)
    got = [0, 0, 0]
    for _ in range(30):
        before = world.notified
        assert world.add(1)
        assert world.notified > before
        for number, place in enumerate(places):
            granted = place.reserve(5, 8, waits=True)
            assert granted <= 1
            got[number] += granted
            if granted:
                world.limiter.delivered(granted, 8)
    assert got == [10, 10, 10]


def test_large_episode_is_not_overtaken() -> None:
    world = filled(Rate(1, 100))
    assert world.add(90)
    large, small = InsertPlace(world.limiter), InsertPlace(world.limiter)
    assert not large.reserve(50, who="large")
    assert not small.reserve(1, who="small")
    assert not world.add(1)

    assert world.sample(40)
    assert not small.reserve(1, who="small")
    assert large.reserve(50, who="large")
    assert not small.reserve(1, who="small")
    large.leave()
    world.publish(50)
    assert world.sample(1)
    assert small.reserve(1, who="small")


def test_change_of_the_limit_wakes_and_keeps_what_is_owed_within_the_new_tolerance() -> None:
    world = filled(Rate(8, 100))
    assert world.add(12) and not world.add(1)
    before = world.notified
    world.limiter.change(Rate(4, 50))
    assert world.notified > before
    assert world.limiter.status().owed_slices == 50
    assert world.limiter.status().steps_added == 12

    world.limiter.change(Rate())
    assert world.add(10**6) and world.sample(10**6)
    world.limiter.delivered(1, 8)  # of a reservation before
    world.limiter.change(Rate(8, 100))
    assert world.limiter.status().owed_slices == world.limiter.status().slices_delivered == 0


def test_after_a_clear_it_fills_again() -> None:
    world = filled(Rate(8, 100, min_steps=10))
    assert world.add(12) and not world.add(1)
    world.clear()

    assert world.add(5) and not world.sample(1)
    assert world.add(5) and world.sample(1)


def test_last_minute() -> None:
    world = filled(Rate(8, 10_000))
    assert world.add(10)
    for _ in range(300):
        world.now += 0.5
        assert world.add(1) and world.sample(6)
    status = world.limiter.status()
    assert (status.steps_added, status.slices_delivered) == (310, 1800)
    assert status.recent_steps_added == pytest.approx(120, abs=2)
    assert status.recent_slices_delivered == 6 * status.recent_steps_added
    world.now += 61
    assert world.limiter.status().recent_steps_added == 0


def test_held_callers_are_counted_across_attempts_and_forgotten_when_they_stay_away() -> None:
    world = filled(Rate(8, 100))
    assert world.add(12)
    for _ in range(4):
        place = InsertPlace(world.limiter)
        assert not place.reserve(1, who="left-3")
        world.now += 5
        place.leave()
    (held,) = world.limiter.status().adds_held
    assert held == ("left-3", 20.0)

    world.now += RETURN_S + 1
    assert not world.limiter.status().adds_held


def test_holding_somebody_for_long_is_logged_once_with_who_and_why(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    world = filled(Rate(8, 100))
    assert world.add(12)
    place = InsertPlace(world.limiter)
    for _ in range(20):
        assert not place.reserve(1, who="left-3")
        world.limiter.log_held()
        world.now += 5
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    assert lines[0].startswith(f"the rate limit has held back adds of left-3 for {LOG_AFTER_S:.0f} s: 0 slices were delivered for 12 steps")
    assert "learners have to take 96 slices" in lines[0]

    caplog.clear()
    assert world.sample(96 + 100)
    assert place.reserve(1, who="left-3")
    world.limiter.log_held()
    world.publish(1)
    learner = BatchesPlace(world.limiter, "ipv4:10.0.0.7:1")
    assert not learner.reserve(1, 64, waits=True)
    world.now += LOG_AFTER_S
    world.limiter.log_held()
    assert "has held back batches for ipv4:10.0.0.7:1 for 30 s" in caplog.text and "actors have to add steps" in caplog.text


# Progress


class Actor:
    """Adds one episode at a time; asks again only when it was notified."""

    def __init__(self, world: World, steps: int, number: int) -> None:
        self.world, self.steps, self.name = world, steps, f"actor-{number}"
        self.place = InsertPlace(world.limiter)
        self.asked_at: int | None = None
        self.published = 0
        self.reserved = False

    def move(self) -> bool:
        """Does one thing; returns whether it could."""
        if self.reserved:
            self.reserved = False
            self.world.publish(self.steps)
            self.published += 1
            return True
        if self.asked_at == self.world.notified:
            return False
        self.asked_at = self.world.notified
        if self.place.reserve(self.steps, who=self.name):
            self.reserved, self.asked_at = True, None
            return True
        return False

    def end(self) -> None:
        self.place.leave()
        if self.reserved:
            self.world.limiter.cancel_insert(self.steps)
            self.reserved = False


class Learner:
    """Takes batches, of which up to ``ahead`` are made in advance; asks again only when it was notified, unless it has some."""

    def __init__(self, world: World, slices: int, ahead: int, number: int) -> None:
        self.world, self.slices, self.ahead = world, slices, ahead
        self.place = BatchesPlace(world.limiter, f"learner-{number}")
        self.ready = 0
        self.taken = 0
        self.stopped = False
        self.asked_at: int | None = None

    def move(self) -> bool:
        moved = self._fill()
        if self.ready and not self.stopped:
            self.ready -= 1
            self.taken += 1
            self.world.limiter.delivered(1, self.slices)
            moved = True
        return moved

    def _fill(self) -> bool:
        starves = not self.ready
        if self.ready == self.ahead or (starves and self.asked_at == self.world.notified):
            return False
        if not self.world.stored:
            self.place.leave()
            return False
        self.asked_at = self.world.notified if starves else None
        granted = self.place.reserve(self.ahead - self.ready, self.slices, waits=starves)
        if granted:
            self.ready += granted
            self.asked_at = None
        return granted > 0

    def end(self) -> None:
        self.place.leave()
        self.world.limiter.cancel_batches(self.ready, self.slices)
        self.ready = 0


RATES = st.builds(
    Rate,
    samples_per_insert=st.sampled_from([0.0, 0.1, 1.0, 8.0]),
    tolerance=st.sampled_from([1.0, 10.0, 64.0, 500.0]),
    min_steps=st.sampled_from([0, 1, 30, CAPACITY]),
)

EVENTS = st.lists(
    st.tuples(st.sampled_from(["move", "move", "move", "stop", "go", "leave", "clear", "rate", "wait"]), st.integers(0, 99), RATES),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(
    rate=RATES,
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    learners=st.lists(st.tuples(st.sampled_from([1, 4, 64]), st.integers(1, 16)), min_size=1, max_size=3),
    events=EVENTS,
)
def test_some_caller_can_always_move(
    rate: Rate, lengths: list[int], learners: list[tuple[int, int]], events: list[tuple[str, int, Any]]
) -> None:
    world = World(rate)
    actors = [Actor(world, steps, number) for number, steps in enumerate(lengths)]
    takers = [Learner(world, slices, ahead, number) for number, (slices, ahead) in enumerate(learners)]
    everyone: list[Actor | Learner] = [*actors, *takers]
    for kind, number, changed in events:
        one = everyone[number % len(everyone)]
        taker = takers[number % len(takers)]
        actions: dict[str, Callable[[], object]] = {
            "move": one.move,
            "stop": lambda taker=taker: setattr(taker, "stopped", True),
            "go": lambda taker=taker: setattr(taker, "stopped", False),
            "leave": one.end,
            "clear": world.clear,
            "rate": lambda changed=changed: world.limiter.change(changed),
            "wait": lambda: setattr(world, "now", world.now + 7),
        }
        actions[kind]()
        if kind == "clear":
            for learner in takers:
                learner.place.leave()
    # At least one learner goes on: the others may stay away for good, with what they were given.
    takers[0].stopped = False

    least = 3
    published, taken = [actor.published for actor in actors], takers[0].taken
    for _ in range(20_000):
        notified = world.notified
        moved = [one.move() for one in everyone]
        assert any(moved) or world.notified > notified, f"no caller can move: {world.limiter.status()}"
        acted = all(actor.published >= before + least for actor, before in zip(actors, published, strict=True))
        if acted and takers[0].taken >= taken + least:
            break
    else:
        raise AssertionError(f"a caller waits forever: {world.limiter.status()}")


@settings(max_examples=200, deadline=None)
@given(
    spi=st.sampled_from([0.5, 1.0, 8.0]),
    tolerance=st.integers(1, 500),
    steps=st.integers(1, 40),
    slices=st.integers(1, 64),
    ahead=st.integers(1, 16),
    schedule=st.lists(st.booleans(), max_size=300),
)
def test_what_is_owed_stays_within_the_tolerance_and_one_episode_or_batch(
    spi: float, tolerance: int, steps: int, slices: int, ahead: int, schedule: list[bool]
) -> None:
    world = filled(Rate(spi, tolerance))
    actor, learner = Actor(world, steps, 0), Learner(world, slices, ahead, 0)
    for acts in schedule:
        (actor if acts else learner).move()
        owed = world.limiter.status().owed_slices
        assert -max(tolerance, slices) <= owed <= max(tolerance, steps * spi)
