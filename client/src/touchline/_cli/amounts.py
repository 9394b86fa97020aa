"""Amounts as short texts for people: counts, bytes, durations, rates and shares."""

from __future__ import annotations


def count_text(value: float) -> str:
    """Returns a number with at most four digits: ``"950"``, ``"12.3k"``, ``"4.56M"``."""
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= factor:
            scale = 1e3 if unit == "k" else factor
            return f"{value / scale:.3g}{unit}"
    return f"{value:,.0f}" if abs(value) >= 10 or value == int(value) else f"{value:.2g}"


def size_text(size_bytes: float) -> str:
    """Returns a number of bytes: ``"0 B"``, ``"12.3 kB"``, ``"4.56 GB"``."""
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(size_bytes) >= factor:
            value = size_bytes / factor
            return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    return f"{size_bytes:.0f} B"


def duration_text(seconds: float) -> str:
    """Returns a duration: ``"0.35 ms"``, ``"12 s"``, ``"4.5 min"``, ``"2.1 d"``."""
    for factor, unit in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * factor:
            return f"{seconds / factor:.1f} {unit}"
    if seconds >= 10:
        return f"{seconds:.0f} s"
    if not seconds:
        return "0 s"
    if seconds < 1e-4:
        return f"{seconds * 1e6:.3g} us"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def share_text(share: float) -> str:
    """Returns a share of 1 in percent."""
    return f"{share:.0%}" if share >= 0.01 or not share else "<1%"
