"""What a gather copies, and the tables by which its kernel finds it. Numpy only."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

BODY_ALIGNMENT = 16
"""Alignment of a body in bytes: the widest word."""

WORD_BYTES = (1, 2, 4, 8, 16)
"""Words in which rows are copied. A word of 16 bytes is four of 4 bytes that a thread moves together."""

TILE_ELEMENTS = 1024
"""Elements that one program of the kernel copies: 4 KB of the wide words."""


class Field(enum.IntEnum):
    """Fields of an entry of the kernel's table, [entries, len(Field)] int64."""

    SHAPE = 0
    """Tile shape, by its position among those in use."""
    SOURCE = 1
    """Address of the column's row 0; 0 for zeros."""
    OFFSET = 2
    """Byte of the body at which the tensor begins."""
    ELEMENTS = 3
    """Elements of a row, in units of the shape's element."""
    FIRST_STEP = 4
    """Step of a slice with which the tensor begins."""
    STEPS = 5
    """T, steps of the tensor."""
    BEGIN = 6
    """First slice of the part."""
    SLICES = 7
    """Slices of the part."""
    BATCH_SIZE = 8
    """B, slices of the batch."""
    CAPACITY = 9
    """Rows of the column."""
    FIRST_TILE = 10
    """Number of the first program that copies for this entry."""
    ACROSS = 11
    """Tiles that lie side by side in a row."""


class OutputSpec(NamedTuple):
    """One tensor of a batch: [steps, B, row_bytes] of a body."""

    name: str
    row_bytes: int
    """Bytes of one step of one slice; may be 0."""
    first_step: int
    """Step of a slice with which the tensor begins."""
    steps: int
    """T, steps of a slice that it has."""
    offset: int
    """Byte of the body at which it begins."""


class PartSpec(NamedTuple):
    """Slices ``begin`` to ``end`` - 1 of a batch, which come from the columns of one table."""

    columns: Mapping[str, Any]
    """Columns by the outputs' names: a contiguous torch tensor [capacity, ...], or the address of one on the device. A tensor on the host
    must lie in memory that is registered with CUDA. An output without a column gets zeros."""
    capacity: int
    """Rows of the table: the number at which rows wrap."""
    begin: int
    end: int


class Shape(NamedTuple):
    """The shape of a tile: rows times elements of a row."""

    word_bytes: int
    """One of :data:`WORD_BYTES`."""
    across: int
    """Elements of a row, a power of two."""

    @property
    def element_bytes(self) -> int:
        """Bytes of an element: those of the word, but 4 for a word of 16."""
        return 4 if self.word_bytes == 16 else self.word_bytes

    @property
    def code(self) -> int:
        """The shape in 8 bits, as the kernel's ``SHAPES`` has it."""
        return WORD_BYTES.index(self.word_bytes) << 4 | self.across.bit_length() - 1


class Tables(NamedTuple):
    """What the kernel reads to find out what it copies."""

    entries: np.ndarray
    """[entries, len(Field)] int64: one for each output of each part that has any bytes."""
    tiles: np.ndarray
    """[programs] int32: entry of each program."""
    shapes: tuple[Shape, ...]
    """The tile shapes in use; an entry names one by its position."""

    @property
    def shape_codes(self) -> int:
        """All shapes in one number, 8 bits each, so that the kernel is compiled for these only."""
        return sum(shape.code << 8 * position for position, shape in enumerate(self.shapes))


def word_of(*numbers: int) -> int:
    """Returns the widest word that divides all of these addresses, offsets and sizes."""
    return next(word for word in reversed(WORD_BYTES) if all(number % word == 0 for number in numbers))


def body_bytes(outputs: Sequence[OutputSpec], batch_size: int) -> int:
    """Returns the bytes of a body up to the end of its last tensor."""
    return max((output.offset + output.steps * batch_size * output.row_bytes for output in outputs), default=0)


def make_tables(
    outputs: Sequence[OutputSpec], parts: Sequence[PartSpec], *, batch_size: int, addresses: Sequence[Mapping[str, int]]
) -> Tables:
    """Returns the kernel's tables.

    Args:
        outputs: tensors of a batch.
        parts: what each table provides of it.
        batch_size: B.
        addresses: addresses of each part's columns, by name.
    """
    shapes: dict[Shape, int] = {}
    entries: list[list[int]] = []
    counts: list[int] = []
    for part, found in zip(parts, addresses, strict=True):
        for output in outputs:
            rows = output.steps * (part.end - part.begin)
            if not rows * output.row_bytes:
                continue
            source = found.get(output.name, 0)
            word = word_of(source, output.offset, output.row_bytes)
            elements = output.row_bytes // Shape(word, 1).element_bytes
            shape = Shape(word, min(1 << (elements - 1).bit_length(), TILE_ELEMENTS))
            across = -(-elements // shape.across)
            entry = [0] * len(Field)
            entry[Field.SHAPE] = shapes.setdefault(shape, len(shapes))
            entry[Field.SOURCE], entry[Field.OFFSET], entry[Field.ELEMENTS] = source, output.offset, elements
            entry[Field.FIRST_STEP], entry[Field.STEPS] = output.first_step, output.steps
            entry[Field.BEGIN], entry[Field.SLICES] = part.begin, part.end - part.begin
            entry[Field.BATCH_SIZE], entry[Field.CAPACITY] = batch_size, part.capacity
            entry[Field.FIRST_TILE], entry[Field.ACROSS] = sum(counts), across
            entries.append(entry)
            counts.append(across * -(-rows // (TILE_ELEMENTS // shape.across)))
    return Tables(
        np.array(entries, np.int64).reshape(-1, len(Field)),
        np.repeat(np.arange(len(counts), dtype=np.int32), counts),
        tuple(shapes),
    )


def check_specs(outputs: Sequence[OutputSpec], parts: Sequence[PartSpec], batch_size: int) -> None:
    """Raises ValueError for specs by which a kernel would read or write anywhere else than it should."""
    for output in outputs:
        if min(output.row_bytes, output.first_step, output.steps, output.offset) < 0:
            raise ValueError(f"{output}: expected numbers of 0 or more")
    for part in parts:
        if part.capacity < 1:
            raise ValueError(f"capacity: {part.capacity}, expected 1 or more")
        if not 0 <= part.begin <= part.end <= batch_size:
            raise ValueError(f"slices {part.begin} to {part.end}, expected a range within the batch's {batch_size}")
