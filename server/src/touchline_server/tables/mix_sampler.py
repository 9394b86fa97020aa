"""Batches that are mixed from several tables, an exact number of slices from each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from touchline_protos.codec import BatchLayout
from touchline_protos.types.batch import OPTIONAL_PROVENANCE
from touchline_protos.types.dtypes import dtype_name
from touchline_protos.types.mix import check_mix, check_when_empty, split_batch
from touchline_server.errors import InvalidArgumentError, NotReadyError, SchemaChangedError
from touchline_server.limiters.place import BatchesPlace
from touchline_server.selectors.draw import Draw
from touchline_server.selectors.options import NO_OPTIONS, LawOptions, check_taken
from touchline_server.store.batch_draw import BatchDraw
from touchline_server.store.gather import GatherPlan
from touchline_server.store.joined_rows import JoinedTables
from touchline_server.store.pinned_draw import DrawnPart, PinnedDraw, locate, pad_draw
from touchline_server.store.schema import Schema
from touchline_server.store.subscriptions import Subscriptions
from touchline_server.tables.ranks import RankShare
from touchline_server.tables.sampler import GatherSource, Reserved, Split
from touchline_server.tables.table import SampleSpec, Table


class MixSpec(NamedTuple):
    """A request's mix: checked."""

    names: tuple[str, ...]
    """Names of the tables, in the order of the mix."""
    shares: tuple[float, ...]
    """Share of each table; only their proportions count."""
    when_empty: str
    """``wait`` for a table without anything to sample, or give its share to the ``others``."""

    @classmethod
    def of(cls, mix: object, when_empty: str = "wait") -> MixSpec:
        """Returns a request's mix.

        Args:
            mix: share of each table by its name; see :data:`touchline_protos.types.mix.Mix`.
            when_empty: ``wait`` or ``others``.

        Raises:
            InvalidArgumentError: the mix is not one; see :func:`touchline_protos.types.mix.check_mix`.
        """
        try:
            pairs = check_mix(mix)  # type: ignore[arg-type]
            return cls(tuple(name for name, _ in pairs), tuple(share for _, share in pairs), check_when_empty(when_empty))
        except ValueError as error:
            raise InvalidArgumentError(str(error)) from None


class _Format(NamedTuple):
    """How the batches of a mix look: by the columns of the first table that has any."""

    name: str
    """The table's name."""
    schema: Schema
    plan: GatherPlan
    layout: BatchLayout


class MixSampler:
    """Batches that are mixed from several tables; see :class:`Sampler`.

    The slices of a batch stand table by table, in the order of the mix. Each table draws by its own law, from random numbers of its own.
    In the batches, the number of an actor is its number in its table, times the number of tables, plus the table's position in the mix: so
    actors of different tables never have the same one.

    Args:
        mix: the mix.
        tables: tables of the mix, in its order.
        rng: the stream's random numbers; each table's are spawned from them.
        batch_size: B, slices in a batch; None takes the first table's, as for ``horizon``.
        horizon: H, transitions in a slice.
        law: the law of every table; None takes each table's own.
        options: the request's parameters of laws; each table gets those that its law takes.
        pad: ``"none"`` or ``"end"``, whether slices are padded; None takes each table's own.
        learner: name of the learner, for the rate limits.
        share: the learner's share of a job's batches, if it is a rank of one; ``rng`` is the job's then.

    Raises:
        InvalidArgumentError: an argument is out of range, or the columns of two tables do not fit each other.
    """

    def __init__(
        self,
        mix: MixSpec,
        tables: Sequence[Table],
        rng: np.random.Generator,
        *,
        batch_size: int | None = None,
        horizon: int | None = None,
        law: str | None = None,
        options: LawOptions = NO_OPTIONS,
        pad: str | None = None,
        learner: str = "",
        share: RankShare | None = None,
    ) -> None:
        self._mix = mix
        self._share = share
        self.table_names = mix.names
        """Names of the tables, in the order of the mix."""
        self._tables = tuple(tables)
        self._places = [BatchesPlace(table.limiter, learner) for table in tables]
        laws = [law or table.config.sampling.law for table in tables]
        check_taken(options, laws)
        self._specs: list[SampleSpec] = []
        for table, its_law in zip(tables, laws, strict=True):
            spec = table.spec(batch_size=batch_size, horizon=horizon, law=its_law, options=options.of_law(its_law), pad=pad)
            batch_size, horizon = spec.batch_size, spec.horizon  # what the request leaves out is the first table's
            self._specs.append(spec)
        self.batch_size, self.horizon = self._specs[0].batch_size, self._specs[0].horizon
        optional = {"table"}.union(*(spec.optional for spec in self._specs))
        self._optional = tuple(name for name, _ in OPTIONAL_PROVENANCE if name in optional)
        self._rngs = rng.spawn(len(tables))
        self._splits: dict[tuple[bool, ...], Split] = {}
        self._whole_split = self._split_of([True] * len(tables))
        self._format: _Format | None = None
        self._joined: JoinedTables | None = None
        self._numbers = [np.empty(0, np.int64) for _ in tables]
        self._schemas: list[Schema | None] = [None] * len(tables)
        """Each table's schema that is known to fit the format."""
        fault = _misfit(self._tables)
        if fault is not None:
            raise InvalidArgumentError(fault)

    @property
    def remembers_slices(self) -> bool:
        """Whether priorities can come back by the number of a batch: every table must draw by a law with priorities, and not for a rank."""
        return self._share is None and all(spec.has_priorities for spec in self._specs)

    def check_not_dropped(self) -> None:
        """See :class:`Sampler`."""
        for table in self._tables:
            table.check_not_dropped()

    def can_sample(self) -> bool:
        """Returns whether a batch can be drawn now: from every table, or from one at least if the others take over its share."""
        self.check_not_dropped()
        return self._split() is not None

    def explain_not_ready(self) -> str:
        """Returns for each table that the mix waits for what it lacks."""
        split = self._split()
        reasons = []
        for position, (table, share, count) in enumerate(zip(self._tables, self._mix.shares, split or self._mix.shares, strict=True)):
            if split is None and share and not self._is_ready(position):
                reasons.append(f"table {table.name!r}: {table.store.fill(self._specs[position].reach).explain_not_ready()}")
            elif split is not None and count and table.limiter.active:
                reasons.append(f"table {table.name!r}: the rate limit holds batches back: {table.limiter.explain_batches()}")
        return "; ".join(reasons) or "a table of the mix had nothing to sample a moment ago"

    def layout(self) -> BatchLayout | None:
        """Returns how a batch looks; None while no table has a schema. It stays the same as long as this object is used."""
        found = self._find_format()
        return None if found is None else found.layout

    def source(self) -> GatherSource | None:
        """Returns what batches are gathered from at present; None while no table has a schema."""
        found = self._find_format()
        return None if found is None else GatherSource(found.plan, found.layout, tuple(table.store.columns for table in self._tables))

    def fits_inline(self, *, batches: int = 1) -> bool:
        """Returns whether an event loop may gather batches by itself: as if each table provided all slices."""
        for table, spec in zip(self._tables, self._specs, strict=True):
            if table.store.columns is not None and not table.fits_inline(spec, batches=batches):
                return False
        return True

    def reserve(self, batches: int, *, waits: bool) -> Reserved | None:
        """Reserves batches with the rate limit of each table; as many as all of them allow. None if a table has nothing to sample.

        It waits in the queue of one table at a time, the first that allows none, so that mixes cannot wait for each other in a circle.
        """
        split = self._split()
        if split is None:
            return None
        granted = batches
        asked: list[tuple[Table, int]] = []
        for table, place, count in zip(self._tables, self._places, split, strict=True):
            if not count:
                place.leave()
                continue
            allowed = place.reserve(granted, count, waits=waits)
            for other, its_count in asked:
                if allowed < granted:
                    other.limiter.cancel_batches(granted - allowed, its_count)
            granted = allowed
            if not granted:
                for other_place in self._places:
                    if other_place is not place:
                        other_place.leave()
                return None
            asked.append((table, count))
        return Reserved(granted, split)

    def leave(self) -> None:
        """Leaves the queues of the rate limits; see :class:`Sampler`."""
        for place in self._places:
            place.leave()

    def delivered(self, batches: int, split: Split) -> None:
        """Reports that reserved batches were delivered, to each table the slices that it provided."""
        for table, count in zip(self._tables, split, strict=True):
            if count:
                table.limiter.delivered(batches, count)

    def cancel(self, batches: int, split: Split) -> None:
        """Reports that reserved batches will not be delivered."""
        for table, count in zip(self._tables, split, strict=True):
            if count and batches:
                table.limiter.cancel_batches(batches, count)

    def draw(self, reserved: Reserved) -> BatchDraw:
        """Draws reserved batches, and pins them until the end of a ``with`` block.

        Raises:
            NotReadyError: a table has nothing to sample any more.
            SchemaChangedError: a table has other columns now.
        """
        found = self._find_format()
        if found is None:
            raise NotReadyError(self.explain_not_ready())
        pinned: list[PinnedDraw] = []
        parts: list[DrawnPart] = []
        begin = 0
        try:
            for position, count in enumerate(reserved.split):
                if count:
                    part = self._draw_part(position, count, reserved.batches)
                    pinned.append(part)
                    self._check_fits(position, part.columns.schema, found)
                    draw = self._mark(part.draw, position)
                    parts.append(locate(draw, part.columns, batches=reserved.batches, horizon=self.horizon, begin=begin))
                    begin += count
            if self._share is not None:
                self._share.advance(reserved.batches)
            return BatchDraw(pinned, parts, found.plan, found.layout, self._join(parts))
        except BaseException:
            for part in pinned:
                part.release()
            raise

    def has_actor(self, number: int) -> bool:
        """Returns whether the name of an actor's number is still known."""
        number, position = divmod(number, len(self._tables))
        return number in self._tables[position].store.actors

    def actor_count(self) -> int:
        """Returns the number of actors whose names are known."""
        return sum(len(table.store.actors) for table in self._tables)

    def actor_names(self, numbers: Iterable[int]) -> dict[int, str]:
        """Returns the names of actors by their numbers in these batches."""
        tables = len(self._tables)
        return {number: self._tables[number % tables].store.actor_name(number // tables) for number in sorted(numbers)}

    @property
    def changes(self) -> tuple[Subscriptions, ...]:
        """Changes of each of the tables."""
        return tuple(table.subscriptions for table in self._tables)

    def _split(self) -> Split | None:
        """Returns the split of a batch that is drawn now; None if there can be none."""
        ready = [self._is_ready(position) for position in range(len(self._tables))]
        if all(ready):
            return self._whole_split
        split = self._split_of([True] * len(ready) if self._mix.when_empty == "wait" else ready)
        return split if all(has or not count for has, count in zip(ready, split, strict=True)) and any(split) else None

    def _split_of(self, taking_part: Sequence[bool]) -> Split:
        """Returns the split of a batch among some of the tables; nothing from any if their shares are 0."""
        key = tuple(taking_part)
        split = self._splits.get(key)
        if split is None:
            shares = [share if takes else 0.0 for share, takes in zip(self._mix.shares, key, strict=True)]
            split = self._splits[key] = split_batch(shares, self.batch_size) if any(shares) else (0,) * len(shares)
        return split

    def _is_ready(self, position: int) -> bool:
        table = self._tables[position]
        table.check_not_dropped()
        return table.store.can_sample(self._specs[position].reach)

    def _draw_part(self, position: int, count: int, batches: int) -> PinnedDraw:
        _, horizon, law, options, pad = self._specs[position]
        store, rng = self._tables[position].store, self._rngs[position]
        if self._share is not None:
            return self._share.draw(position, store, self._specs[position], rng, count=count, batches=batches)
        return store.draw(count, horizon, law, rng, batches=batches, options=options, pad=pad)

    def _mark(self, draw: Draw, position: int) -> Draw:
        """Returns a table's draw with the fields of the mix's: its position, actors' numbers of the mix, and what other laws add."""
        slices = len(draw.start)
        if self._specs[position].pad:
            draw = pad_draw(draw, self.horizon)
        weight, valid = draw.weight, draw.valid
        if weight is None and "weight" in self._optional:
            weight = np.ones(slices, np.float32)
        if valid is None and "valid" in self._optional:
            valid = np.ones((self.horizon, slices, 1), np.bool_)
        actor = draw.actor * len(self._tables)
        return Draw(
            first_row=draw.first_row,
            episode_id=draw.episode_id,
            start=draw.start,
            actor=np.add(actor, position, out=actor),
            policy_version=draw.policy_version,
            probability=draw.probability,
            weight=weight,
            table=self._table_numbers(position, slices),
            valid=valid,
            length=draw.length,
            drawn=draw.drawn,
        )

    def _join(self, parts: Sequence[DrawnPart]) -> JoinedTables | None:
        """Returns the tables of a draw as one; None if there is one, or they have to be gathered one by one."""
        if len(parts) < 2:
            return None
        key = JoinedTables.key_of(parts)
        if key is None:
            return None
        if self._joined is None or self._joined.key != key:
            self._joined = JoinedTables(parts)
        return self._joined

    def _table_numbers(self, position: int, slices: int) -> np.ndarray:
        """Returns [slices] int64, all of them the position of a table."""
        if len(self._numbers[position]) < slices:
            self._numbers[position] = np.full(slices, position, np.int64)
        return self._numbers[position][:slices]

    def _find_format(self) -> _Format | None:
        """Returns how the batches look; None while no table has a schema.

        Raises:
            SchemaChangedError: the columns of two tables do not fit each other.
        """
        if self._format is None:
            for table in self._tables:
                schema = table.store.schema
                if schema is not None:
                    fault = _misfit(self._tables)
                    if fault is not None:
                        raise SchemaChangedError(fault)
                    plan = table.plan(schema, self.horizon)
                    generations = tuple(table.store.store_generation for table in self._tables)
                    # The laws' fields are those of the whole batch, whatever the table's own law adds.
                    layout = plan.layout(self.batch_size, self._optional, store_generations=generations)
                    self._format = _Format(table.name, schema, plan, layout)
                    break
        return self._format

    def _check_fits(self, position: int, schema: Schema, expected: _Format) -> None:
        """Raises SchemaChangedError unless a table's columns fit those that the plan was made for."""
        if self._schemas[position] is not schema:
            if _difference(expected.name, expected.schema, self._tables[position].name, schema) is not None:
                raise SchemaChangedError(_misfit(self._tables) or "a table of the mix has other columns now; open the stream again")
            self._schemas[position] = schema


def _misfit(tables: Sequence[Table]) -> str | None:
    """Returns in what the columns of two tables do not fit each other, beginning with the column's name; None if all fit.

    Tables without a schema, which have not got an episode yet, fit.
    """
    conventions = {table.config.sampling.row_convention: table for table in tables}
    if len(conventions) > 1:
        (one, table), (other, second) = sorted(conventions.items())[:2]
        return f"row_convention: {one!r} in table {table.name!r}, {other!r} in table {second.name!r}, expected the same in a mix"
    reference: tuple[Table, Schema] | None = None
    for table in tables:
        schema = table.store.schema
        if schema is None:
            continue
        if reference is None:
            reference = table, schema
            continue
        fault = _difference(reference[0].name, reference[1], table.name, schema)
        if fault is not None:
            return fault
    return None


def _difference(name: str, schema: Schema, other_name: str, other: Schema) -> str | None:
    """Returns how the schemas of two tables differ, whatever the order of their columns; None if they do not."""
    columns = {spec.name: spec for spec in schema.columns}
    others = {spec.name: spec for spec in other.columns}
    for column in [*columns, *others]:
        for one, two, there, missing in ((columns, others, name, other_name), (others, columns, other_name, name)):
            if column in one and column not in two:
                return f"{column}: missing in table {missing!r}, {one[column]} in table {there!r}, expected the same columns in a mix"
        spec, its = columns[column], others[column]
        if spec.dtype != its.dtype:
            found = f"dtype {dtype_name(its.dtype)} in table {other_name!r}, {dtype_name(spec.dtype)} in table {name!r}"
            return f"{column}: {found}, expected the same in a mix"
        if spec.shape != its.shape:
            return f"{column}: shape {its.shape} a step in table {other_name!r}, {spec.shape} in table {name!r}, expected the same in a mix"
    return None
