"""The kernel that gathers a batch, in Triton. Importing this imports Triton; with ``TRITON_INTERPRET=1`` it runs on the CPU."""

from __future__ import annotations

import triton
import triton.language as tl

from touchline_protos.gather.specs import TILE_ELEMENTS, Field

# A kernel sees only globals that are constexpr.
SHAPE = tl.constexpr(int(Field.SHAPE))
SOURCE = tl.constexpr(int(Field.SOURCE))
OFFSET = tl.constexpr(int(Field.OFFSET))
ELEMENTS = tl.constexpr(int(Field.ELEMENTS))
FIRST_STEP = tl.constexpr(int(Field.FIRST_STEP))
STEPS = tl.constexpr(int(Field.STEPS))
BEGIN = tl.constexpr(int(Field.BEGIN))
SLICES = tl.constexpr(int(Field.SLICES))
BATCH_SIZE = tl.constexpr(int(Field.BATCH_SIZE))
CAPACITY = tl.constexpr(int(Field.CAPACITY))
FIRST_TILE = tl.constexpr(int(Field.FIRST_TILE))
ACROSS = tl.constexpr(int(Field.ACROSS))
WIDTH = tl.constexpr(len(Field))
TILE = tl.constexpr(TILE_ELEMENTS)


@triton.jit
def _copy_tile(entry, tile, rows, body, ELEMENT: tl.constexpr, ALIGNED: tl.constexpr, COLUMNS: tl.constexpr):
    """Copies one tile: TILE // COLUMNS rows, COLUMNS elements of each. ALIGNED elements are one word."""
    ROWS: tl.constexpr = TILE // COLUMNS
    source = tl.load(entry + SOURCE)
    capacity = tl.load(entry + CAPACITY)
    batch_size = tl.load(entry + BATCH_SIZE).to(tl.int32)
    slices = tl.load(entry + SLICES).to(tl.int32)
    across = tl.load(entry + ACROSS).to(tl.int32)
    number = tile - tl.load(entry + FIRST_TILE).to(tl.int32)

    # Row n of a part is slice n % slices of step n // slices. Their numbers fit 32 bits, which divide several times faster than 64.
    at = number // across * ROWS + tl.arange(0, ROWS)
    step = at // slices
    part_slice = tl.load(entry + BEGIN).to(tl.int32) + at % slices
    inside = step < tl.load(entry + STEPS).to(tl.int32)
    first = tl.load(rows + part_slice, mask=inside, other=0)
    last = tl.load(rows + batch_size + part_slice, mask=inside, other=0)
    # From the logical row to the physical one: steps of padding stay at the last row, the ring wraps, and nothing lies outside of it.
    row = first + tl.minimum(step + tl.load(entry + FIRST_STEP), last)
    row = tl.where(row >= capacity, row - capacity, row)
    row = tl.maximum(tl.minimum(row, capacity - 1), 0)

    # In words times their elements, so that the compiler sees that every row begins and ends with a word.
    elements = tl.load(entry + ELEMENTS) // ALIGNED * ALIGNED
    column = number % across * COLUMNS + tl.arange(0, COLUMNS)
    mask = inside[:, None] & (column < elements)[None, :]
    word_bytes: tl.constexpr = ALIGNED * ELEMENT.primitive_bitwidth // 8
    origin = tl.multiple_of(source.to(tl.pointer_type(ELEMENT)), word_bytes)
    target = tl.multiple_of((body + tl.load(entry + OFFSET)).to(tl.pointer_type(ELEMENT)), word_bytes)
    target_row = (step * batch_size + part_slice).to(tl.int64)
    # A column that is not there has the address 0: nothing is read, and its tensor gets zeros.
    readable = tl.where(source == 0, 0, elements)
    read_mask = inside[:, None] & (column < readable)[None, :]
    value = tl.load(origin + (row * elements)[:, None] + column[None, :], mask=read_mask, other=0)
    tl.store(target + (target_row * elements)[:, None] + column[None, :], value, mask=mask)


@triton.jit
def _copy_shape(entry, tile, rows, body, CODE: tl.constexpr):
    """Copies one tile of the shape with this code, see :attr:`touchline_protos.gather.specs.Shape.code`."""
    COLUMNS: tl.constexpr = 1 << (CODE & 15)
    if CODE >> 4 == 0:
        _copy_tile(entry, tile, rows, body, tl.int8, 1, COLUMNS)
    elif CODE >> 4 == 1:
        _copy_tile(entry, tile, rows, body, tl.int16, 1, COLUMNS)
    elif CODE >> 4 == 2:
        _copy_tile(entry, tile, rows, body, tl.int32, 1, COLUMNS)
    elif CODE >> 4 == 3:
        _copy_tile(entry, tile, rows, body, tl.int64, 1, COLUMNS)
    else:
        _copy_tile(entry, tile, rows, body, tl.int32, 4, COLUMNS)


@triton.jit
def gather_rows(entries, tiles, rows, cursor, body, SHAPES: tl.constexpr, COUNT: tl.constexpr):
    """Gathers a batch into a body: see :class:`touchline_protos.gather.row_gather.RowGather`. One program a tile.

    Args:
        entries: [entries, WIDTH] int64, see :class:`touchline_protos.gather.specs.Field`.
        tiles: [programs] int32: entry of each program.
        rows: [batches, 2, B] int64: first rows, and what may be added to them at most.
        cursor: [1] int64: the batch that is gathered.
        body: uint8, aligned to 16 bytes.
        SHAPES: tile shapes, 8 bits each: see :attr:`touchline_protos.gather.specs.Shape.code`.
        COUNT: their number.
    """
    tile = tl.program_id(0)
    entry = entries + tl.load(tiles + tile) * WIDTH
    shape = tl.load(entry + SHAPE)
    batch_rows = rows + tl.load(cursor) * 2 * tl.load(entry + BATCH_SIZE)
    for position in tl.static_range(COUNT):
        if shape == position:
            _copy_shape(entry, tile, batch_rows, body, (SHAPES >> (8 * position)) & 255)
