"""Batches to gather for tests of the kernel: columns of every kind, rows that wrap and are padded, and what must come out by numpy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st

from touchline_protos.gather import OutputSpec, PartSpec
from touchline_protos.gather.row_gather import RowGather

CANARY = 0xA5
"""Byte that the bodies are full of before a gather."""

ROW_BYTES = [0, 1, 2, 3, 4, 6, 8, 12, 16, 20, 32, 34, 37, 96, 256, 4100]


@dataclass(frozen=True)
class GatherCase:
    """A batch to gather."""

    outputs: tuple[OutputSpec, ...]
    columns: list[dict[str, np.ndarray]]
    """Columns of each part, [capacity, row_bytes] uint8."""
    capacities: list[int]
    ends: list[int]
    """The last slice of each part, exclusive; a part begins where the one before it ends."""
    rows: np.ndarray
    """[batches, 2, B] int64."""

    @property
    def batch_size(self) -> int:
        return self.rows.shape[2]

    @property
    def body_bytes(self) -> int:
        return max(spec.offset + spec.steps * self.batch_size * spec.row_bytes for spec in self.outputs) + 13

    def parts(self, device: str) -> list[PartSpec]:
        """The parts, with columns of their own on a device, by dtypes as wide as they can be."""
        begins = [0, *self.ends]
        return [
            PartSpec({name: torch.from_numpy(column).to(device) for name, column in columns.items()}, capacity, begin, end)
            for columns, capacity, begin, end in zip(self.columns, self.capacities, begins[:-1], self.ends, strict=True)
        ]

    def gather(self, device: str, *, kernel: bool) -> RowGather:
        return RowGather(self.outputs, self.parts(device), batch_size=self.batch_size, device=torch.device(device), kernel=kernel)

    def body(self, device: str) -> torch.Tensor:
        """A body full of canaries."""
        return torch.full((self.body_bytes,), CANARY, dtype=torch.uint8, device=device)

    def expected(self, batch: int) -> bytes:
        """The body after the gather of one batch."""
        body = np.full(self.body_bytes, CANARY, np.uint8)
        for position, columns in enumerate(self.columns):
            begin, end, capacity = [0, *self.ends][position], self.ends[position], self.capacities[position]
            for spec in self.outputs:
                for step in range(spec.steps):
                    for number in range(begin, end):
                        first, last = self.rows[batch, :, number].tolist()
                        row = first + min(spec.first_step + step, last)
                        row = min(max(row - capacity if row >= capacity else row, 0), capacity - 1)
                        at = spec.offset + (step * self.batch_size + number) * spec.row_bytes
                        column = columns.get(spec.name)
                        body[at : at + spec.row_bytes] = 0 if column is None else column[row]
        return body.tobytes()


def make_case(
    row_bytes: dict[str, int],
    *,
    horizon: int = 3,
    ends: tuple[int, ...] = (5,),
    capacities: tuple[int, ...] = (20,),
    incoming: bool = True,
    missing: str = "",
    batches: int = 1,
    gap: int = 16,
    wild: bool = False,
    seed: int = 0,
) -> GatherCase:
    """Returns a batch: every second column is one of transitions, the last one a task's.

    Args:
        row_bytes: bytes of a row of each column.
        horizon: H.
        ends: end of each part, exclusive.
        capacities: rows of each part.
        incoming: the row convention.
        missing: column that no table has.
        batches: number of batches in the rows.
        gap: alignment of the tensors in a body.
        wild: whether rows may also lie far outside of the columns.
        seed: seed of the contents and of the rows.
    """
    random = np.random.default_rng(seed)
    outputs, at = [], 0
    for number, (name, size) in enumerate(row_bytes.items()):
        first_step, steps = (int(incoming), horizon) if number % 2 else (0, horizon + 1)
        if number and number == len(row_bytes) - 1:
            first_step, steps = 0, 1
        outputs.append(OutputSpec(name, size, first_step, steps, at))
        at += steps * ends[-1] * size
        at += -at % gap
    columns = [
        {name: random.integers(0, 256, (capacity, size), np.uint8) for name, size in row_bytes.items() if name != missing}
        for capacity in capacities
    ]
    capacity_of = np.repeat(capacities, np.diff([0, *ends]))
    first = random.integers(0, capacity_of, (batches, ends[-1]))
    last = random.integers(0, np.minimum(capacity_of, horizon + 2), (batches, ends[-1]))
    if wild:
        first = random.integers(-(2**40), 2**40, first.shape)
        last = random.integers(-100, 100, last.shape)
    return GatherCase(tuple(outputs), columns, list(capacities), list(ends), np.stack([first, last], 1))


@st.composite
def gather_cases(draw: st.DrawFn) -> GatherCase:
    """Any small batch."""
    sizes = draw(st.lists(st.sampled_from(ROW_BYTES), min_size=1, max_size=4))
    ends = tuple(sorted(draw(st.lists(st.integers(1, 6), min_size=1, max_size=2))))
    horizon = draw(st.integers(1, 4))
    return make_case(
        {f"column{number}": size for number, size in enumerate(sizes)},
        horizon=horizon,
        ends=ends,
        capacities=tuple(draw(st.integers(horizon + 1, 12)) for _ in ends),
        incoming=draw(st.booleans()),
        missing=draw(st.sampled_from(["", "column1"])),
        gap=draw(st.sampled_from([1, 4, 16])),
        wild=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )


def check_gather(case: GatherCase, device: str) -> None:
    """Asserts that the kernel and ``index_select`` both write what numpy says, and nothing else."""
    rows = torch.from_numpy(case.rows).to(device)
    for kernel in (True, False):
        body = case.body(device)
        case.gather(device, kernel=kernel).run(rows[0], body)
        assert body.cpu().numpy().tobytes() == case.expected(0), f"kernel={kernel}"
