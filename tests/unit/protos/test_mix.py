"""Shares of a mix: which are refused, and how many slices of a batch they are."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from touchline_protos.types.mix import check_mix, check_when_empty, split_batch

shares_of_mixes = st.lists(st.floats(0, 1e300) | st.integers(0, 10), min_size=1, max_size=8).filter(lambda shares: any(shares))


@given(shares_of_mixes, st.integers(1, 5_000))
def test_split_sums_to_the_batch_and_is_within_one_of_each_quota(shares: list[float], batch_size: int) -> None:
    split = split_batch(shares, batch_size)

    total = sum(map(Fraction, shares))
    assert sum(split) == batch_size
    for count, share in zip(split, shares, strict=True):
        assert abs(count - batch_size * Fraction(share) / total) < 1
        assert share or not count


@given(shares_of_mixes, st.integers(1, 5_000), st.integers(1, 64))
def test_split_depends_on_the_proportions_only(shares: list[float], batch_size: int, factor: int) -> None:
    scaled = [Fraction(share) * factor for share in shares]

    assert split_batch(shares, batch_size) == split_batch(scaled, batch_size)  # type: ignore[arg-type]


@given(shares_of_mixes, st.integers(1, 500))
def test_left_over_slices_go_to_the_largest_remainders(shares: list[float], batch_size: int) -> None:
    split = split_batch(shares, batch_size)

    total = sum(map(Fraction, shares))
    quotas = [batch_size * Fraction(share) / total for share in shares]
    remainder = [quota - int(quota) for quota in quotas]
    rounded_up = [count > quota for count, quota in zip(split, quotas, strict=True)]
    up = [value for value, is_up in zip(remainder, rounded_up, strict=True) if is_up]
    down = [value for value, is_up in zip(remainder, rounded_up, strict=True) if not is_up]
    assert not up or not down or min(up) >= max(down)


@pytest.mark.parametrize(
    ("shares", "batch_size", "expected"),
    [
        ([0.5, 0.5], 256, (128, 128)),
        ([0.5, 0.5], 7, (4, 3)),  # a tie: the first in the mix
        ([1, 3], 10, (3, 7)),  # 2.5 and 7.5, a tie
        ([1, 1, 1], 2, (1, 1, 0)),
        ([0, 1], 5, (0, 5)),
        ([0.2, 0.2, 0.6], 1, (0, 0, 1)),
        ([5e-324, 1e308], 4, (0, 4)),
    ],
)
def test_split_of_known_mixes(shares: list[float], batch_size: int, expected: tuple[int, ...]) -> None:
    assert split_batch(shares, batch_size) == expected


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ({}, "no tables, expected at least one with a share above 0"),
        ([], "no tables, expected at least one with a share above 0"),
        ({"a": 0, "b": 0.0}, "shares that sum to 0, expected at least one above 0"),
        ({"a": -0.5, "b": 1}, "share -0.5 of table 'a', expected a finite number of at least 0"),
        ({"a": float("nan")}, "share nan of table 'a', expected a finite number of at least 0"),
        ({"a": float("inf")}, "share inf of table 'a', expected a finite number of at least 0"),
        ({"a": 10**400}, "of table 'a', expected a finite number of at least 0"),
        ({"a": "0.5"}, "share '0.5' of table 'a', expected a finite number of at least 0"),
        ({"a": None}, "share None of table 'a', expected a finite number of at least 0"),
        ({"a": True}, "share True of table 'a', expected a finite number of at least 0"),
        ([("a", 1), ("a", 2)], "table 'a' twice, expected each table once"),
        ({3: 1}, "table 3, expected the name of a table"),
        (0.5, "0.5, expected a mapping of tables to shares"),
        ("online", "'online', expected a mapping of tables to shares"),
        (["online", "demos"], "expected a mapping of tables to shares"),
    ],
)
def test_bad_mix_is_refused_with_what_was_expected(mix: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_mix(mix)

    assert str(caught.value).startswith("mix: ")
    assert message in str(caught.value)


def test_mix_keeps_its_order() -> None:
    assert check_mix({"b": 1, "a": 2}) == (("b", 1.0), ("a", 2.0))
    assert check_mix([("b", 1), ("", 2)]) == (("b", 1.0), ("", 2.0))


def test_unknown_rule_for_empty_tables_is_refused() -> None:
    assert check_when_empty("others") == "others"
    with pytest.raises(ValueError, match="when_empty: 'skip', expected 'wait' or 'others'"):
        check_when_empty("skip")
