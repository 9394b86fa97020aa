"""The kernel that draws slices on a CUDA device. Importing this imports Triton; with ``TRITON_INTERPRET=1`` it runs on the CPU."""

from __future__ import annotations

import triton
import triton.language as tl

from touchline_server.store.device_episodes import DRAWN_LAWS, ENTRY_FIELDS, Entry, State

# A kernel sees only globals that are constexpr.
TABLE = tl.constexpr(int(State.TABLE))
ENTRIES = tl.constexpr(int(State.ENTRIES))
OLDEST = tl.constexpr(int(State.OLDEST))
EPISODES = tl.constexpr(int(State.EPISODES))
FIRST_START = tl.constexpr(int(State.FIRST_START))
STARTS = tl.constexpr(int(State.STARTS))
ID = tl.constexpr(int(Entry.ID))
FIRST_ROW = tl.constexpr(int(Entry.FIRST_ROW))
LENGTH = tl.constexpr(int(Entry.LENGTH))
ACTOR = tl.constexpr(int(Entry.ACTOR))
POLICY_VERSION = tl.constexpr(int(Entry.POLICY_VERSION))
STARTS_BEFORE = tl.constexpr(int(Entry.STARTS_BEFORE))
WIDTH = tl.constexpr(ENTRY_FIELDS)
BY_EPISODE = tl.constexpr(DRAWN_LAWS.index("episode"))


@triton.jit
def _uniform(high, low):
    """Returns float64 numbers in [0, 1) of 53 bits, as numpy makes them, from two blocks of uint32."""
    bits = (high.to(tl.uint64) << 32) | low.to(tl.uint64)
    return (bits >> 11).to(tl.float64) * (1.0 / 9007199254740992.0)


@triton.jit
def _entry(table, position, oldest, entries):
    """Returns the address of the entry of the ``position``-th oldest episode."""
    return table + (oldest + position) % entries * WIDTH


@triton.jit
def draw_slices(
    state,
    random,
    rows,
    provenance,
    probability,
    valid,
    batch_size,
    horizon,
    reach,
    LAW: tl.constexpr,
    PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Draws a batch, and advances the random numbers to the next one. A single program, so no other one still needs the old number.

    Args:
        state: [State] int64, see :class:`touchline_server.store.device_episodes.State`; at least one episode is stored.
        random: [2] int64: seed, and the number of the batch.
        rows: [2, B] int64, filled: see :meth:`touchline_protos.gather.row_gather.RowGather.run`.
        provenance: [4, B] int64, filled: ids, starts, actors, policy versions.
        probability: [B] float64, filled.
        valid: [H, B] bool as bytes, filled if PAD.
        batch_size: B.
        horizon: H.
        reach: transitions that follow a start at least.
        LAW: position in ``DRAWN_LAWS``.
        PAD: whether slices may run over their episode's end.
        BLOCK: slices that are drawn together.
    """
    table = tl.load(state + TABLE).to(tl.pointer_type(tl.int64))
    entries = tl.load(state + ENTRIES)
    oldest = tl.load(state + OLDEST)
    episodes = tl.load(state + EPISODES)
    first_start = tl.load(state + FIRST_START)
    all_starts = tl.load(state + STARTS)
    seed = tl.load(random)
    number = tl.load(random + 1)

    for begin in range(0, batch_size, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        inside = at < batch_size
        # Philox is a function of the key and a counter: here the slice and the number of the batch.
        low = (number & 0xFFFFFFFF).to(tl.uint32)
        high = (number >> 32).to(tl.uint32)
        slices = at.to(tl.uint32)
        zero = slices * 0
        a, b, c, d = tl.philox(seed, slices, zero + low, zero + high, zero)
        if LAW == BY_EPISODE:
            position = tl.minimum((_uniform(a, b) * episodes.to(tl.float64)).to(tl.int64), episodes - 1)
            entry = _entry(table, position, oldest, entries)
            starts = tl.load(entry + LENGTH, mask=inside, other=reach + 1) - reach
            start = tl.minimum((_uniform(c, d) * starts.to(tl.float64)).to(tl.int64), starts - 1)
            chance = 1.0 / (episodes.to(tl.float64) * starts.to(tl.float64))
        else:
            nth = tl.minimum((_uniform(a, b) * all_starts.to(tl.float64)).to(tl.int64), all_starts - 1) + first_start
            # The last episode with at most this many starts before it: it lies in [position, above).
            position = tl.zeros([BLOCK], tl.int64)
            above = position + episodes
            span = episodes
            while span > 1:
                middle = (position + above) // 2
                before = tl.load(_entry(table, middle, oldest, entries) + STARTS_BEFORE, mask=inside & (middle < episodes), other=0)
                found = before <= nth
                position = tl.where(found, middle, position)
                above = tl.where(found, above, middle)
                span = (span + 1) // 2
            entry = _entry(table, position, oldest, entries)
            start = nth - tl.load(entry + STARTS_BEFORE, mask=inside, other=0)
            chance = tl.zeros([BLOCK], tl.float64) + 1.0 / all_starts.to(tl.float64)

        last = tl.load(entry + LENGTH, mask=inside, other=0) - 1 - start
        tl.store(rows + at, tl.load(entry + FIRST_ROW, mask=inside, other=0) + start, mask=inside)
        tl.store(rows + batch_size + at, last, mask=inside)
        tl.store(provenance + at, tl.load(entry + ID, mask=inside, other=0), mask=inside)
        tl.store(provenance + batch_size + at, start, mask=inside)
        tl.store(provenance + 2 * batch_size + at, tl.load(entry + ACTOR, mask=inside, other=0), mask=inside)
        tl.store(provenance + 3 * batch_size + at, tl.load(entry + POLICY_VERSION, mask=inside, other=0), mask=inside)
        tl.store(probability + at, chance, mask=inside)
        if PAD:
            for step in range(0, horizon):
                tl.store(valid + step * batch_size + at, (step + 1 <= last).to(tl.int8), mask=inside)
    tl.store(random + 1, number + 1)
