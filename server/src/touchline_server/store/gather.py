"""From drawn slices to a batch: phase two. Which steps of which column go where, by the row convention, and the one gather.

Row conventions (a slice has steps 0..H):
    incoming (TD-MPC2): row t holds the observation that the action in row t led to, so action, reward and done are those of steps 1..H.
    outgoing: row t holds the observation and the action taken from it, so they are those of steps 0..H-1.

A gather fills the bodies of batches, memory that the caller owns (a message, a slot of a ring, tensors), from one part for each table that
provides slices. So a batch may come from several tables of equal schema, each of which fills a range of the slices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from touchline_protos.codec import BatchLayout, Piece
from touchline_server.store.columns import Columns, Take
from touchline_server.store.gather_threads import GatherThreads, Job, pieces_of
from touchline_server.store.joined_rows import JoinedTables
from touchline_server.store.output_tensor import OutputTensor, group_order
from touchline_server.store.pinned_draw import DrawnPart, DrawnSlices
from touchline_server.store.schema import Schema

if TYPE_CHECKING:
    import torch

    from touchline_server.store.device_gather import DeviceGathers

Body = Mapping[str, np.ndarray]
"""A batch's tensors and provenance by the names and shapes of ``BatchLayout.specs``: writable, on the host."""

MAX_INLINE_BYTES = 1 << 21
MAX_INLINE_ROWS = 1 << 14
"""Batches of together this many bytes and rows are gathered in an event loop: it takes a millisecond or two. Handing work to a thread
costs as much as a small batch, and the two then share the interpreter lock."""

MAX_LAYOUTS = 64
"""Layouts that a plan keeps, one for each batch size in use."""

BULK_STEP_BYTES = 1 << 13
"""Steps of a part of a batch below this size are gathered for several batches together: a call costs as much as copying some kilobytes."""


class SpacedBodies:
    """Bodies of one layout that lie at equal distances in one memory: the slots of a ring.

    Args:
        layout: the layout.
        memory: a writable buffer; the arrays keep it alive.
        offset_bytes: position of the first body.
        spacing_bytes: distance from each body to the next one.
        count: number of bodies.
    """

    def __init__(self, layout: BatchLayout, memory: Any, *, offset_bytes: int, spacing_bytes: int, count: int) -> None:
        self.together: Body = {
            name: np.ndarray((count, *first.shape), first.dtype, memory, offset_bytes + at, (spacing_bytes, *first.strides))
            for (name, first), at in zip(layout.body_views(bytearray(layout.body_bytes)).items(), layout.offsets, strict=True)
        }
        """The tensors of all bodies, with a leading dimension for the body."""
        self.body_bytes = layout.body_bytes
        """Size of a body."""
        self.each: list[Body] = [{name: array[number] for name, array in self.together.items()} for number in range(count)]
        """The tensors of each body: the same memory."""


_Pending: TypeAlias = "tuple[Take, np.ndarray, np.ndarray]"
"""A tensor of a part that is gathered batch by batch: its column's take, rows [batches, T, slices], target [bodies, T, slices, *inner]."""


class GatherPlan:
    """How slices of one schema and horizon become tensors. Thread-safe.

    Args:
        schema: the columns'.
        horizon: H, transitions in a slice.
        incoming: the row convention.
        store_generation: generation of the columns' store.
        threads: threads that gather big batches; None leaves all to the caller's.
    """

    def __init__(
        self, schema: Schema, *, horizon: int, incoming: bool, store_generation: int = 0, threads: GatherThreads | None = None
    ) -> None:
        self._threads = GatherThreads() if threads is None else threads
        transitions = slice(1, None) if incoming else slice(None, -1)
        self.steps = horizon + 1
        """Steps of a slice."""
        stored = {spec.name: spec for spec in schema.columns}
        # Within a group the order is the schema's, which is that of episodes and of TorchRL's samples too.
        names = sorted(dict.fromkeys((*stored, "done")), key=group_order)
        without_done = stored["reward"].shape if "done" not in stored else ()
        self.outputs = tuple(OutputTensor.of(name, stored.get(name), transitions, horizon, missing=without_done) for name in names)
        """The tensors of a batch, in wire order."""
        self._output_of = {output.name: output for output in self.outputs}
        self._shapes: dict[int, list[tuple[str, slice, bool, tuple[int, ...] | None]]] = {}
        self._generations = (store_generation,) if store_generation else ()
        self._layouts: dict[tuple[int, tuple[str, ...], tuple[int, ...]], BatchLayout] = {}
        self._kept_device_gathers: DeviceGathers | None = None

    def layout(self, batch_size: int, optional: tuple[str, ...] = (), *, store_generations: tuple[int, ...] | None = None) -> BatchLayout:
        """Returns how a batch of this many slices looks on the wire and in a body.

        Args:
            batch_size: B.
            optional: fields of the optional provenance that it has: see :attr:`Draw.optional`.
            store_generations: generations of all stores that the batch is from; None takes that of the columns.
        """
        generations = self._generations if store_generations is None else store_generations
        key = batch_size, optional, generations
        layout = self._layouts.get(key)
        if layout is None:
            specs = [output.spec(batch_size) for output in self.outputs]
            layout = BatchLayout(specs, batch_size, optional, store_generations=generations)
            if len(self._layouts) >= MAX_LAYOUTS:
                self._layouts.clear()
            # Threads may make a layout twice. Whichever is kept: layouts of one batch size are alike.
            self._layouts[key] = layout
        return layout

    def fits_inline(self, columns: Columns, layout: BatchLayout, *, batches: int = 1) -> bool:
        """Returns whether an event loop may gather batches by itself: they are small, and neither on a disk nor on a device."""
        rows = batches * layout.batch_size * self.steps
        return columns.in_host_memory and rows <= MAX_INLINE_ROWS and batches * layout.body_bytes <= MAX_INLINE_BYTES

    def gather_into(self, parts: Sequence[DrawnPart], bodies: Sequence[Body], joined: JoinedTables | None = None) -> None:
        """Gathers batches into bodies on the host. A CUDA device is waited for once for all of them.

        Args:
            parts: what each table provides of the batches.
            bodies: one for each batch, or for each of the first ones. Every element of the parts' slices is written, and nothing else.
            joined: the tables of the parts, which make up whole batches, as one; None gathers part by part.
        """
        if joined is not None:
            self._gather_joined(joined, joined.rows(parts), bodies)
        for part in parts:
            if part.columns.on_cuda:
                layout = self.layout(part.end - part.begin, part.draw.optional)
                for body, gathered in zip(bodies, self.host_bodies(part, len(bodies)), strict=True):
                    for name, array in layout.body_views(gathered).items():
                        _range(body[name], part.begin, part.end)[...] = array
            else:
                provenance = part.provenance()
                for number, body in enumerate(bodies):
                    if joined is None:
                        self._gather_part(part, number, body)
                    for name, values in provenance:
                        _range(body[name], part.begin, part.end)[...] = values[number]

    def gather_each_into(
        self, parts: Sequence[DrawnPart], bodies: SpacedBodies, chosen: Sequence[int], joined: JoinedTables | None = None
    ) -> Iterator[None]:
        """Gathers batches from columns on the host like :meth:`gather_into`, and yields after each. Every batch of a ring passes here.

        What is small is written for all batches together, before the first yield.

        Args:
            parts: what each table provides of the batches.
            bodies: the bodies.
            chosen: the body of each batch.
            joined: see :meth:`gather_into`.
        """
        # A slice is written faster than a list of positions.
        run = range(chosen[0], chosen[0] + len(chosen))
        index = slice(run.start, run.stop) if list(chosen) == list(run) else np.array(chosen)
        whole: list[_Pending] = []
        by_step: list[_Pending] = []
        if joined is not None:
            whole = self._pending_joined(joined, joined.rows(parts), bodies.together, index)
        for part in parts:
            for name, values in part.provenance():
                target = bodies.together[name]
                if values.ndim == 2:
                    target[index, part.begin : part.end] = values
                else:
                    target[index, :, part.begin : part.end] = values
            if joined is not None:
                continue
            fills_batch = part.end - part.begin == bodies.together["provenance.start"].shape[1]
            (whole if fills_batch else by_step).extend(self._gather_small(part, bodies.together, index))
        if self._threads.pays(bodies.body_bytes):
            for number, position in enumerate(chosen):
                jobs = (pieces_of(take, rows[number], target[position]) for take, rows, target in (*whole, *by_step))
                self._threads.run(chain.from_iterable(jobs))
                yield
            return
        for number, position in enumerate(chosen):
            for take, rows, target in whole:
                take(rows[number], 0, target[position], "clip")
            for take, rows, target in by_step:
                for step_rows, step_target in zip(rows[number], target[position], strict=True):
                    take(step_rows, 0, step_target, "clip")
            yield

    def gather_piece_into(
        self, slices: DrawnSlices, piece: Piece, targets: Sequence[np.ndarray], *, batch_size: int, first: int = 0
    ) -> None:
        """Gathers what one piece of a large batch holds of these slices, from columns on the host.

        Args:
            slices: drawn.
            piece: a piece of the batch's layout, see :meth:`BatchLayout.chunk_plan`.
            targets: an array for each segment, [rows, *inner]. Nothing but the rows of these slices is written.
            batch_size: B, slices of the whole batch.
            first: slice of the batch at which the drawn ones begin.
        """
        for (name, begin, end, _), target in zip(piece.segments, targets, strict=True):
            output = self._output_of.get(name)
            if output is None:
                values = getattr(slices.draw, name.removeprefix("provenance."))
                values = values.reshape(-1, *values.shape[2:])  # flat rows, as of a column
                for source, at, count in _runs(begin, end, first=first, slices=len(slices), batch_size=batch_size):
                    target[at : at + count] = values[source : source + count]
            else:
                self._gather_rows(output, slices, target, begin=begin, first=first, batch_size=batch_size)

    def piece_gatherer(self, parts: Sequence[DrawnPart], layout: BatchLayout) -> Callable[[Piece, Sequence[np.ndarray]], None]:
        """Returns what gathers the pieces of the first batch, into an array for each segment. A CUDA device sends it in one transfer."""
        if not any(part.columns.on_cuda for part in parts):
            drawn = [(part.begin, part.slices(1)[0]) for part in parts]

            def gather(piece: Piece, targets: Sequence[np.ndarray]) -> None:
                for first, slices in drawn:
                    self.gather_piece_into(slices, piece, targets, batch_size=layout.batch_size, first=first)

            return gather
        if len(parts) == 1:
            body = layout.body_views(self.host_bodies(parts[0], 1)[0])
        else:
            body = layout.body_views(np.empty(layout.body_bytes, np.uint8))
            self.gather_into(parts, (body,))

        def copy(piece: Piece, targets: Sequence[np.ndarray]) -> None:
            for (name, begin, end, _), target in zip(piece.segments, targets, strict=True):
                target[...] = body[name].reshape(-1, *target.shape[1:])[begin:end]

        return copy

    def run_all(self, jobs: Sequence[Job], size_bytes: int) -> None:
        """Runs what gathers a batch of this size, in as many threads as pay. Raises what a job raises."""
        if self._threads.pays(size_bytes):
            self._threads.run(jobs)
        else:
            for job in jobs:
                job()

    def host_bodies(self, part: DrawnPart, batches: int) -> list[np.ndarray]:
        """Gathers the slices of one table, as batches of their own, on their device, and moves each batch to the host in one transfer.

        Returns:
            The bodies of the first batches, [body_bytes] uint8: fresh memory, pinned if the columns are on a CUDA device.
        """
        import torch

        size = self.layout(part.end - part.begin, part.draw.optional).body_bytes
        memory = torch.empty((batches, size), dtype=torch.uint8, pin_memory=part.columns.on_cuda)
        bodies = list(memory)
        self.gather_into_pinned(part, bodies)
        return [body.numpy() for body in bodies]

    def gather_into_pinned(self, part: DrawnPart, bodies: Sequence[torch.Tensor]) -> None:
        """Gathers the slices of one table, as batches of their own, on their device, and copies each batch straight into host memory.

        Args:
            part: the slices.
            bodies: [body_bytes] uint8 for each of the first batches, filled; pinned if the columns are on a CUDA device.
        """
        layout = self.layout(part.end - part.begin, part.draw.optional)
        self._device_gathers.to_host(replace(part, begin=0, end=layout.batch_size), layout, bodies)
        provenance = part.provenance()
        for number, body in enumerate(bodies):
            views = layout.body_views(body.numpy())
            for name, values in provenance:
                views[name][...] = values[number]

    def gather_tensors(
        self, parts: Sequence[DrawnPart], layout: BatchLayout, out: Mapping[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """Gathers the first batch on the parts' one device, in the order of the current stream.

        Args:
            parts: what each table provides of the batch.
            layout: the layout of the batch.
            out: an earlier batch of this layout on this device, which is overwritten; None takes fresh memory.

        Returns:
            The tensors by name, those of the provenance on the host.

        Raises:
            InvalidArgumentError: ``out`` is none of such a batch's.
        """
        from touchline_server.store.tensors import as_tensor, host_arrays

        specs = layout.specs[len(layout.columns) :]
        if out is None and len(parts) == 1:
            tensors = self._device_gathers.tensors(parts, layout)
            return tensors | {name: as_tensor(values[0].copy()) for name, values in parts[0].provenance()}
        provenance = {spec.name: np.empty(spec.shape, spec.dtype) for spec in specs} if out is None else host_arrays(out, specs)
        tensors = self._device_gathers.tensors(parts, layout, out)
        for part in parts:
            for name, values in part.provenance():
                _range(provenance[name], part.begin, part.end)[...] = values[0]
        return tensors | {name: as_tensor(values) for name, values in provenance.items()}

    @property
    def _device_gathers(self) -> DeviceGathers:
        if self._kept_device_gathers is None:
            from touchline_server.store.device_gather import DeviceGathers

            # Two threads may make one each: both work, and the one that is lost goes with its batch.
            self._kept_device_gathers = DeviceGathers(self.outputs)
        return self._kept_device_gathers

    def _gather_part(self, part: DrawnPart, number: int, body: Body) -> None:
        """Gathers the tensors of one batch's slices of a table. Every small batch passes here, so shapes are looked up, not computed."""
        rows, columns, begin, end = part.rows[number], part.columns, part.begin, part.end
        batch_size = len(body["provenance.start"])
        for name, steps, stored, shape in self._shapes_of(batch_size):
            target = body[name] if shape is None else body[name].reshape(shape)
            if end - begin < batch_size:
                target = target[:, begin:end]
            if not stored:
                target.fill(0)
            elif self._threads.pays(target.nbytes):
                self._threads.gather(columns.take(name), rows[steps], target)
            else:
                columns.gather(name, rows[steps], target)

    def _shapes_of(self, batch_size: int) -> list[tuple[str, slice, bool, tuple[int, ...] | None]]:
        """Returns name, steps, whether it is stored, and gathered shape of each output; None for a shape that is the batch's own."""
        shapes = self._shapes.get(batch_size)
        if shapes is None:
            shapes = []
            for output in self.outputs:
                shape = output.gathered_shape(batch_size)
                shapes.append((output.name, output.steps, output.stored, None if shape == output.spec(batch_size).shape else shape))
            if len(self._shapes) >= MAX_LAYOUTS:
                self._shapes.clear()
            self._shapes[batch_size] = shapes
        return shapes

    def _gather_small(self, part: DrawnPart, together: Body, index: slice | np.ndarray) -> list[_Pending]:
        """Gathers the small tensors of a part for all batches together; returns the others. Those of a whole batch are never small."""
        slices = part.end - part.begin
        count, batch_size = together["provenance.start"].shape
        left: list[_Pending] = []
        steps, small_rows = None, part.rows
        for output in self.outputs:
            target = together[output.name].reshape(count, *output.gathered_shape(batch_size))
            if slices < batch_size:
                target = target[:, :, part.begin : part.end]
            if not output.stored:
                target[index] = 0
                continue
            take = part.columns.take(output.name)
            if slices == batch_size or slices * output.row_bytes >= BULK_STEP_BYTES:
                left.append((take, part.rows[:, output.steps], target))
                continue
            if output.steps is not steps:  # most tensors have the steps of the one before
                steps, small_rows = output.steps, np.ascontiguousarray(part.rows[:, output.steps])
            target[index] = take(small_rows, 0, None, "clip")
        return left

    def _gather_joined(self, joined: JoinedTables, rows: np.ndarray, bodies: Sequence[Body]) -> None:
        """Gathers the tensors of whole batches of several tables."""
        for name, steps, stored, shape in self._shapes_of(len(bodies[0]["provenance.start"])):
            take = joined.take(name) if stored else None
            for number, body in enumerate(bodies):
                target = body[name] if shape is None else body[name].reshape(shape)
                if take is None:
                    target.fill(0)
                else:
                    take(rows[number, steps], 0, target, "clip")

    def _pending_joined(self, joined: JoinedTables, rows: np.ndarray, together: Body, index: slice | np.ndarray) -> list[_Pending]:
        """Returns what is to be gathered of whole batches of several tables; writes what is not stored."""
        count, batch_size = together["provenance.start"].shape
        pending: list[_Pending] = []
        for output in self.outputs:
            target = together[output.name].reshape(count, *output.gathered_shape(batch_size))
            if output.stored:
                pending.append((joined.take(output.name), rows[:, output.steps], target))
            else:
                target[index] = 0
        return pending

    def _gather_rows(
        self, output: OutputTensor, slices: DrawnSlices, target: np.ndarray, *, begin: int, first: int, batch_size: int
    ) -> None:
        """Gathers what ``target``, [rows, *inner], holds of these slices: flat rows ``begin`` and on of one tensor of the batch."""
        if not output.stored:
            target = target.reshape(len(target), -1)
        else:
            target = target.reshape(len(target), *output.inner_shape)
            rows = slices.rows[output.steps].reshape(-1)
        for source, at, count in _runs(begin, begin + len(target), first=first, slices=len(slices), batch_size=batch_size):
            if output.stored:
                slices.columns.gather(output.name, rows[source : source + count], target[at : at + count])
            else:
                target[at : at + count] = 0


def _runs(begin: int, end: int, *, first: int, slices: int, batch_size: int) -> Iterator[tuple[int, int, int]]:
    """Yields the runs of consecutive flat rows of a tensor, within ``begin`` to ``end`` - 1, that belong to a range of its slices.

    A tensor [T, B, ...] has the flat rows ``t * B + b``. The range is slices ``first`` to ``first + slices`` - 1; what is gathered for it
    is [T, slices], with the flat rows ``t * slices + (b - first)``.

    Yields:
        The flat row in what is gathered, the position after ``begin`` in the tensor, and the number of rows.
    """
    if slices == batch_size:
        yield begin, 0, end - begin  # both have the same flat rows: all steps are one run
        return
    for step in range(begin // batch_size, -(-end // batch_size)):
        # The range's rows of this step, cut to what is asked for.
        run_begin = max(begin, step * batch_size + first)
        run_end = min(end, step * batch_size + first + slices)
        if run_begin < run_end:
            column = run_begin - step * batch_size
            yield step * slices + column - first, run_begin - begin, run_end - run_begin


def _range(array: Any, first: int, end: int) -> Any:
    """Returns slices ``first`` to ``end`` - 1 of a batch's array or tensor, [B] or [T, B, ...]: a view."""
    return array[first:end] if array.ndim == 1 else array[:, first:end]
