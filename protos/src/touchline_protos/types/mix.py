"""The mix of a batch: the share of each table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from fractions import Fraction

Mix = Mapping[str, float] | Iterable[tuple[str, float]]
"""Share of each table by its name, in the order of the slices. Only the proportions count: 1 and 3 are 0.25 and 0.75."""

WHEN_EMPTY = ("wait", "others")
"""Rules for a table of a mix that has nothing to sample: wait for it, or give its share to the others."""


def check_mix(mix: Mix) -> tuple[tuple[str, float], ...]:
    """Returns the tables and their shares, in the order of the mix.

    Raises:
        ValueError: the mix is empty, names a table twice, or a share is not a finite number of at least 0, or all are 0. The text says
            what is wrong, and begins with ``mix``.
    """
    try:
        pairs = [(name, share) for name, share in (mix.items() if isinstance(mix, Mapping) else mix)]
    except (TypeError, ValueError):
        raise ValueError(f"mix: {mix!r}, expected a mapping of tables to shares, {{'online': 0.5, 'demos': 0.5}}") from None
    if not pairs:
        raise ValueError("mix: no tables, expected at least one with a share above 0")
    shares: dict[str, float] = {}
    for name, share in pairs:
        if not isinstance(name, str):
            raise ValueError(f"mix: table {name!r}, expected the name of a table")
        if name in shares:
            raise ValueError(f"mix: table {name!r} twice, expected each table once")
        shares[name] = _check_share(name, share)
    if not any(shares.values()):
        raise ValueError("mix: shares that sum to 0, expected at least one above 0")
    return tuple(shares.items())


def check_when_empty(when_empty: str) -> str:
    """Returns the value; raises ValueError if it is not one of :data:`WHEN_EMPTY`."""
    if when_empty not in WHEN_EMPTY:
        raise ValueError(f"when_empty: {when_empty!r}, expected {' or '.join(repr(value) for value in WHEN_EMPTY)}")
    return when_empty


def split_batch(shares: Iterable[float], batch_size: int) -> tuple[int, ...]:
    """Returns how many slices of a batch each table provides, by the method of the largest remainder (Hamilton's).

    Each table gets its quota, ``batch_size`` x share / sum of the shares, rounded down; the slices that are left go to the tables with the
    largest remainders, one each. Of tables with the same remainder the one that comes first in the mix has precedence. The numbers are
    exact: quotas are computed as fractions.

    Args:
        shares: shares in the order of the mix, at least 0, not all 0.
        batch_size: B, slices of the batch.

    Returns:
        Slices of each table: they sum to ``batch_size``, and each differs from the quota by less than 1. A table whose quota is below 1
        may get none.
    """
    exact = [Fraction(share) for share in shares]
    total = sum(exact)
    quotas = [batch_size * share / total for share in exact]
    split = [math.floor(quota) for quota in quotas]
    # sorted() is stable, so equal remainders stay in the order of the mix.
    by_remainder = sorted(range(len(quotas)), key=lambda position: split[position] - quotas[position])
    for position in by_remainder[: batch_size - sum(split)]:
        split[position] += 1
    return tuple(split)


def _check_share(name: str, share: float) -> float:
    try:
        good = not isinstance(share, str | bytes | bool) and math.isfinite(share) and share >= 0
    except (TypeError, OverflowError):
        good = False
    if not good:
        raise ValueError(f"mix: share {share!r} of table {name!r}, expected a finite number of at least 0")
    return float(share)
