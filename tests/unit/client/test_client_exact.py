"""What a caller hands over is a column as it was, or refused by name: values, casts, names and their order."""

from __future__ import annotations

import collections
import subprocess
import sys
import textwrap
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tensordict import TensorDict, lazy_stack, tensorclass

from touchline import InvalidArgumentError, InvalidEpisodeError, ReplayClient
from touchline._actor.episode_factory import make_episode
from touchline_protos.codec import EpisodeKey
from touchline_protos.types.casting import ColumnError, cast, narrow
from touchline_protos.types.dtypes import BFLOAT16
from touchline_protos.types.flatten import flatten_columns, split_episodes, to_array
from touchline_protos.types.rules import DONE_ALIASES, check_done_name

KEY = EpisodeKey("me", 1, 0)
NUMBERS = [np.dtype(name) for name in ("bool", "u1", "i1", "i2", "i4", "i8", "f2", "f4", "f8")]


@tensorclass
class Rollout:
    """An episode as a tensorclass."""

    obs: torch.Tensor
    action: torch.Tensor
    reward: torch.Tensor


def episode(rows: int = 4, **columns: Any) -> dict[str, Any]:
    return {"obs": np.ones((rows, 2), np.float32), "action": np.ones((rows, 1), np.float32), "reward": np.ones(rows, np.float32)} | columns


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "None, expected numbers"),
        ("left", r"text \('left'\), expected numbers; store a number"),
        (b"left", r"text \(b'left'\), expected numbers"),
        (["left", "right"], r"text \('left'\), expected numbers"),
        (np.array(["left", "right"]), r"text \('left'\), expected numbers"),
        ([1.0, "x"], "."),
        ([1.0, None], "None, expected numbers"),
        (np.array([1.0, None]), r"objects \(of type float first\), expected numbers"),
        ({1, 2}, "of type set, expected numbers"),
        ((number for number in range(3)), "of type generator, expected numbers"),
        ({"a": 1}.values(), "of type dict_values, expected numbers"),
        (object(), "of type object, expected numbers"),
        (Decimal("0.1"), "of type Decimal, expected numbers"),
        ([Fraction(1, 3)], "of type Fraction, expected numbers"),
        (2**70, "of type int, expected numbers"),
        (1 + 2j, "complex128, expected real numbers"),
        (np.datetime64("2026-01-01"), r'datetime64\[D\], expected numbers; convert them with \.astype\("int64"\)'),
        (np.array([3, 4], "m8[s]"), r"timedelta64\[s\], expected numbers"),
        (np.zeros(3, [("x", "f4"), ("y", "i8")]), "a structured array with the fields x, y, expected plain numbers"),
        ([[1, 2], [3]], r"a list of elements of the shapes \(2,\), \(1,\), expected one shape"),
        ([np.zeros(2), np.zeros(3)], r"a list of elements of the shapes \(2,\), \(3,\)"),
        ((np.zeros((4, 2)), np.zeros((4, 3))), "a tuple of 2 arrays, expected one array: numpy.stack"),
        ((np.zeros((4, 2)), np.zeros((4, 2))), "a tuple of 2 arrays, expected one array"),
        ((torch.zeros(4), torch.zeros(4)), "a tuple of 2 arrays, expected one array"),
        (np.ma.array([1.0, 2.0], mask=[False, True]), "1 masked values, expected none"),
        (np.ma.masked, "1 masked values, expected none"),
        ([1.0, np.ma.masked], "1 masked values"),
        ([np.ma.array([1, 2], mask=[1, 1]), np.ma.array([3, 4])], "2 masked values"),
        ([-1, 2**63], "9223372036854775808 among"),
        ([0.5, 2**53 + 1], "9007199254740993 among floats"),
        ([np.int64(2**53 + 1), np.float32(0.5)], "9007199254740993, which is 9007199254740992.0 as float64"),
        ([np.arange(2), np.zeros(2, [("bfloat16", "<u2")])], "a list of elements of different dtypes"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_value_that_cannot_be_a_column_is_refused_by_name_and_kind(value: Any, message: str) -> None:
    with pytest.raises(ColumnError, match=f"^goal: {message}"):
        to_array("goal", value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.ma.array([1.0, 2.0], mask=[False, False]), np.array([1.0, 2.0])),
        (np.ma.array([1, 2]), np.array([1, 2])),
        ([1, 2, 3], np.array([1, 2, 3])),
        ([True, 2.5], np.array([1.0, 2.5])),
        ((0.1, 0.2), np.array([0.1, 0.2])),
        ((np.float32(0.1), np.float32(0.2)), np.array([0.1, 0.2], np.float32)),
        ([np.zeros(2, np.float32), np.ones(2, np.float32)], np.array([[0, 0], [1, 1]], np.float32)),
        ([torch.zeros(2), torch.ones(2, requires_grad=True)], np.array([[0, 0], [1, 1]], np.float32)),
        ([np.float32(0.5), np.float64(0.1)], np.array([0.5, 0.1])),
        ([np.int8(3), np.float32(0.5)], np.array([3, 0.5], np.float32)),
        (((1, 2), (3, 4)), np.array([[1, 2], [3, 4]])),
        ([], np.array([])),
        (range(3), np.arange(3)),
        (collections.deque([1.0, 2.0]), np.array([1.0, 2.0])),
        (np.arange(6, dtype=">i4").reshape(2, 3)[:, ::2], np.array([[0, 2], [3, 5]], np.int32)),
    ],
    ids=str,
)
def test_value_that_is_a_column_is_stored_as_it_was(value: Any, expected: np.ndarray) -> None:
    array = to_array("goal", value)

    assert array.dtype == expected.dtype
    np.testing.assert_array_equal(array, expected)


@given(
    st.sampled_from([dtype for dtype in NUMBERS if dtype.kind != "b"]).flatmap(
        lambda dtype: hnp.arrays(dtype, hnp.array_shapes(max_dims=2))
    ),
    st.sampled_from(NUMBERS),
)
def test_cast_gives_the_same_numbers_or_is_refused(array: np.ndarray, dtype: np.dtype[Any]) -> None:
    """Held against Python's own numbers, which are exact."""

    def exact(value: Any) -> Any:
        return value if value != value or value in (float("inf"), float("-inf")) else Fraction(value)

    try:
        made = cast("c", array, dtype, rounding=False, why="here")
    except ColumnError as error:
        with np.errstate(all="ignore"):
            became = array.astype(dtype)
        changed = [
            (before, after)
            for before, after in zip(array.reshape(-1).tolist(), became.reshape(-1).tolist(), strict=True)
            if exact(before) != exact(after) and not (before != before and after != after)
        ]
        # A cast that is undefined may happen to return the same number.
        assert changed or dtype.kind in "biu"
        assert str(error).startswith("c: ")
    else:
        assert made.dtype == dtype
        for before, after in zip(array.reshape(-1).tolist(), made.reshape(-1).tolist(), strict=True):
            assert exact(before) == exact(after) or (before != before and after != after)


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (0.5, "u1"),
        (300, "i1"),
        (-1, "u1"),
        (np.nan, "u1"),
        (np.nan, "bool"),
        (np.nan, "i8"),
        (np.inf, "i4"),
        (2, "bool"),
        (0.5, "bool"),
        (2**24 + 1, "f4"),
        (2049, "f2"),
        (70000, "f2"),
        (2**63 - 1, "f8"),
        (2.0**63, "i8"),
        (0.1, "f4"),
        (1e300, "f4"),
    ],
)
def test_cast_that_loses_something_is_refused_with_the_value(value: Any, dtype: str) -> None:
    with pytest.raises(ColumnError, match=r"^reward: .*expected a value of \w+ of the space"):
        cast("reward", np.asarray(value), np.dtype(dtype), rounding=False, why="of the space")


@given(hnp.arrays(np.uint16, 8), st.sampled_from(["f4", "f8"]))
def test_cast_of_bfloat16_gives_its_values(bits: np.ndarray, dtype: str) -> None:
    made = cast("c", bits.view(BFLOAT16), np.dtype(dtype), rounding=False, why="here")

    expected = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).to(torch.float64).numpy()
    np.testing.assert_array_equal(made.astype(np.float64), expected)


@given(hnp.arrays(np.float64, 5))
def test_narrow_rounds_and_never_makes_infinity(array: np.ndarray) -> None:
    assume(not np.array_equal(array, np.zeros(5)))
    with np.errstate(over="ignore"):
        expected = array.astype(np.float32)

    if np.isinf(expected[np.isfinite(array)]).any():
        with pytest.raises(ColumnError, match=r"^obs: .* which is -?inf as float32"):
            narrow("obs", array, np.dtype(np.float32))
    else:
        assert narrow("obs", array, np.dtype(np.float32)).tobytes() == expected.tobytes()


def test_client_with_dtype_rounds_only_float64() -> None:
    columns = episode(obs={"a": np.full((4, 2), 0.1), "b": np.ones(4, np.float16)}, task=np.arange(4))

    made = make_episode(columns, key=KEY, actor="", policy_version=0, dtype=np.dtype(np.float32))

    assert [column.dtype.name for column in made.columns.values()] == ["float32", "float16", "float32", "float32", "int64"]
    assert made.columns["obs.a"][0, 0] == np.float32(0.1)


@pytest.mark.parametrize("dtype", ["float32", np.float32, np.dtype("float32"), torch.float32])
def test_client_takes_float32_of_any_library(dtype: Any) -> None:
    with ReplayClient("localhost:1", dtype=dtype) as client:
        assert client.dtype == np.float32


@pytest.mark.parametrize("dtype", ["float16", "int8", 32, np.float64])
def test_client_refuses_another_cast(dtype: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=r"^dtype: .*expected 'float32'"):
        ReplayClient("localhost:1", dtype=dtype)


def test_tensorclass_is_an_episode_and_a_part_of_one() -> None:
    made = Rollout(obs=torch.ones(4, 2), action=torch.zeros(4, 1), reward=torch.zeros(4), batch_size=[4])

    assert list(flatten_columns(made)) == ["obs", "action", "reward"]
    assert list(flatten_columns({"info": made})) == ["info.obs", "info.action", "info.reward"]


def test_lazy_stack_of_unequal_lengths_is_refused_as_one_episode_and_loaded_as_several() -> None:
    stack = lazy_stack([TensorDict(episode(rows), [rows]) for rows in (3, 5)])

    with pytest.raises(ColumnError, match=r"^action: a lazy stack whose elements differ in shape, .* all with load\(\)"):
        flatten_columns(stack)
    assert [len(flatten_columns(part)["obs"]) for part in split_episodes(stack)] == [3, 5]


@pytest.mark.parametrize("episodes", ["episodes.npz", b"x", None, 3])
def test_load_of_what_holds_no_episodes_is_refused(episodes: Any) -> None:
    with pytest.raises(ColumnError, match=r"^episodes: .*expected a mapping of arrays or an iterable"):
        list(split_episodes(episodes))


def test_dotted_key_below_obs_is_refused_with_what_to_do() -> None:
    frames = {"observation.state": np.zeros((4, 3)), "observation.images.top": np.zeros((4, 2))}

    with pytest.raises(
        ColumnError, match=r"^obs\.observation\.state: a dot in the key .*'observation_state', or \{'observation': \{'state': \.\.\.\}\}$"
    ):
        flatten_columns({"obs": frames})
    with pytest.raises(ColumnError, match=r"\{'a': \{'b': \{'c': \.\.\.\}\}\}$"):
        flatten_columns({"obs": {"deep": {"a.b.c": np.zeros(4)}}})


def test_dotted_name_of_the_episode_is_the_nested_one() -> None:
    assert list(flatten_columns({"obs.rgb": np.zeros(4), "info": {"success.rate": np.zeros(4)}})) == ["obs.rgb", "info.success.rate"]


@pytest.mark.parametrize("name", DONE_ALIASES)
def test_column_that_marks_ends_by_another_name_is_refused_unless_done_exists(name: str) -> None:
    with pytest.raises(
        ColumnError, match=rf"^{name}: given without done, so batches would say that no episode ever terminated; name it done"
    ):
        check_done_name(["obs", "action", "reward", name])
    check_done_name(["obs", "action", "reward", "done", name])
    check_done_name(["obs", "action", "reward", "truncated"])


def test_mismatched_tuple_of_observations_names_the_tuple() -> None:
    with pytest.raises(InvalidEpisodeError, match=r"^obs: a tuple of 2 arrays"):
        make_episode(episode(6, obs=(np.zeros((6, 2)), np.zeros((6, 2)))), key=KEY, actor="", policy_version=0)


HALF_IMPORTED = """
    import importlib.machinery, sys, threading, types
    import numpy as np

    class Slow(importlib.machinery.PathFinder):
        '''A torch whose import has begun in one thread, and goes on once the other has stored its values.'''
        @classmethod
        def find_spec(cls, name, path=None, target=None):
            return importlib.machinery.ModuleSpec(name, cls()) if name == "torch" else None
        def create_module(self, spec):
            return None
        def exec_module(self, module):
            begun.set()
            assert stored.wait(30)
            module.Tensor = type("Tensor", (), {})

    sys.meta_path.insert(0, Slow)
    begun, stored = threading.Event(), threading.Event()
    importing = threading.Thread(target=__import__, args=("torch",))
    importing.start()
    assert begun.wait(30) and "torch" in sys.modules and not hasattr(sys.modules["torch"], "Tensor")

    from touchline._actor.rows import EpisodeRows, row_columns
    from touchline_protos.types.flatten import flatten_columns

    rows = EpisodeRows()
    rows.append(row_columns({"obs": np.ones(3), "reward": 0.5}))
    assert list(flatten_columns({"obs": {"a": [1, 2]}})) == ["obs.a"]
    stored.set()
    importing.join()
    print(len(rows))
"""


def test_rows_are_taken_while_another_thread_imports_torch() -> None:
    ran = subprocess.run([sys.executable, "-c", textwrap.dedent(HALF_IMPORTED)], capture_output=True, text=True, timeout=60, check=False)

    assert (ran.returncode, ran.stdout) == (0, "1\n"), ran.stderr
