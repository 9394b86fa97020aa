"""The gather of a batch in one launch, in Triton's interpreter on the CPU; on a card in tests/gpu."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings

pytest.importorskip("triton")

import torch

from support.gather_cases import GatherCase, check_gather, gather_cases, make_case
from touchline_protos.gather import OutputSpec, PartSpec
from touchline_protos.gather.row_gather import RowGather, rows_to_device
from touchline_protos.gather.specs import Field, Shape, make_tables, word_of

interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="this machine may have a card, see tests/gpu")
CPU = torch.device("cpu")


@interpreted
@settings(max_examples=12)
@given(case=gather_cases())
def test_gather_of_any_batch_writes_what_numpy_says_and_nothing_else(case: GatherCase) -> None:
    check_gather(case, "cpu")


@interpreted
def test_gather_of_two_tables_fills_each_ones_slices_of_one_body() -> None:
    check_gather(make_case({"obs": 12, "action": 4, "task": 8}, ends=(3, 8), capacities=(9, 30)), "cpu")


@interpreted
def test_gather_of_rows_outside_of_the_columns_stays_inside() -> None:
    check_gather(make_case({"obs": 16, "action": 3}, wild=True, ends=(6,)), "cpu")


@interpreted
def test_gather_of_a_row_wider_than_a_tile_takes_several_tiles() -> None:
    check_gather(make_case({"pixels": 3 * 4096 + 16, "action": 6}, horizon=1, ends=(2,), capacities=(4,)), "cpu")


@interpreted
@pytest.mark.parametrize("row_bytes", [3, 6, 12, 24, 48])
def test_gather_of_rows_narrower_than_their_tile_writes_nothing_after_them(row_bytes: int) -> None:
    check_gather(make_case({"obs": 8, "odd": row_bytes}, ends=(2,)), "cpu")


@interpreted
@pytest.mark.parametrize("kernel", [True, False])
def test_gather_with_a_cursor_takes_the_batch_that_it_names(kernel: bool) -> None:
    case = make_case({"obs": 8, "reward": 4}, batches=3)
    gather, rows, cursor = case.gather("cpu", kernel=kernel), rows_to_device(case.rows, CPU), torch.zeros(1, dtype=torch.int64)

    for batch in range(3):
        body = case.body("cpu")
        gather.run(rows, body, cursor=cursor)
        cursor.add_(1)
        assert body.numpy().tobytes() == case.expected(batch)


@interpreted
def test_gather_reads_columns_by_their_bare_addresses() -> None:
    case = make_case({"obs": 8, "reward": 4})
    (part,) = case.parts("cpu")
    addresses = part._replace(columns={name: column.data_ptr() for name, column in part.columns.items()})
    body = case.body("cpu")

    RowGather(case.outputs, [addresses], batch_size=5, device=CPU, kernel=True).run(torch.from_numpy(case.rows[0]), body)

    assert body.numpy().tobytes() == case.expected(0)


def test_gather_on_the_cpu_uses_index_select_and_says_why() -> None:
    case = make_case({"obs": 8, "reward": 4})
    gather, body = RowGather(case.outputs, case.parts("cpu"), batch_size=5, device=CPU), case.body("cpu")

    gather.run(torch.from_numpy(case.rows[0]), body)

    assert "the kernel is for CUDA" in gather.why_no_kernel
    assert body.numpy().tobytes() == case.expected(0)


def test_gather_with_a_kernel_that_cannot_be_compiled_falls_back_and_logs_it_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no C compiler")

    monkeypatch.setattr("touchline_protos.gather.row_gather.why_no_kernel", lambda _: "")
    monkeypatch.setattr("touchline_protos.gather.row_gather.Launcher._start", fail)
    case = make_case({"obs": 8, "reward": 4})
    gather = RowGather(case.outputs, case.parts("cpu"), batch_size=5, device=CPU)

    with caplog.at_level(logging.WARNING, "touchline_protos.gather"):
        bodies = [case.body("cpu") for _ in range(2)]
        for body in bodies:
            gather.run(torch.from_numpy(case.rows[0]), body)

    assert all(body.numpy().tobytes() == case.expected(0) for body in bodies)
    assert gather.why_no_kernel == "Triton cannot compile it here: RuntimeError: no C compiler"
    assert len(caplog.records) == 1


def test_gather_with_a_kernel_that_must_be_used_raises_what_it_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no C compiler")

    monkeypatch.setattr("touchline_protos.gather.row_gather.Launcher._start", fail)
    case = make_case({"obs": 8})

    with pytest.raises(RuntimeError, match="no C compiler"):
        case.gather("cpu", kernel=True).run(torch.from_numpy(case.rows[0]), case.body("cpu"))


@pytest.mark.parametrize(
    ("numbers", "word"), [((0, 16, 64), 16), ((0, 8, 64), 8), ((4, 8), 4), ((0, 6), 2), ((3, 16), 1), ((0x7F0000000010, 0, 9216), 16)]
)
def test_word_of_addresses_and_sizes_is_the_widest_that_divides_them(numbers: tuple[int, ...], word: int) -> None:
    assert word_of(*numbers) == word


def test_tables_name_each_tiles_entry_and_share_the_shapes() -> None:
    outputs = [OutputSpec("obs", 256, 0, 4, 0), OutputSpec("next", 256, 0, 4, 262144), OutputSpec("none", 0, 0, 4, 0)]
    outputs.append(OutputSpec("reward", 4, 1, 3, 524288))

    tables = make_tables(outputs, [PartSpec({}, 10, 0, 256)], batch_size=256, addresses=[{"obs": 4096, "next": 8192, "reward": 4100}])

    assert tables.shapes == (Shape(16, 64), Shape(4, 1))
    assert tables.entries[:, Field.SHAPE].tolist() == [0, 0, 1]
    # 1024 rows of 64 elements in tiles of 16 rows, and 768 rewards in one.
    assert tables.tiles.tolist() == [0] * 64 + [1] * 64 + [2]
    assert tables.entries[:, Field.FIRST_TILE].tolist() == [0, 64, 128]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"outputs": [OutputSpec("obs", 8, 0, -1, 0)]}, "expected numbers of 0 or more"),
        ({"parts": [PartSpec({}, 0, 0, 5)]}, "capacity: 0, expected 1 or more"),
        ({"parts": [PartSpec({}, 5, 3, 6)]}, "slices 3 to 6, expected a range within the batch's 5"),
        ({"parts": [PartSpec({"obs": torch.empty(8, 5).T}, 5, 0, 5)], "kernel": True}, "expected a contiguous column"),
        ({"parts": [PartSpec({"obs": 4096}, 5, 0, 5)]}, "expected a tensor without the kernel"),
    ],
)
def test_gather_refuses_specs_that_would_read_or_write_elsewhere(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"outputs": [OutputSpec("obs", 8, 0, 4, 0)], "parts": [PartSpec({}, 5, 0, 5)]} | change

    with pytest.raises(ValueError, match=message):
        RowGather(**arguments, batch_size=5, device=CPU)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rows", "body", "message"),
    [
        (torch.zeros((2, 5), dtype=torch.int64), torch.empty(159, dtype=torch.uint8), "expected 160 or more"),
        (torch.zeros((2, 5), dtype=torch.int64), torch.empty(200, dtype=torch.uint8)[1:], "aligned to 16"),
        (torch.zeros((2, 4), dtype=torch.int64), torch.empty(160, dtype=torch.uint8), "expected \\(2, 5\\)"),
        (torch.zeros((5, 2), dtype=torch.int64).T, torch.empty(160, dtype=torch.uint8), "contiguous"),
    ],
)
def test_gather_refuses_rows_and_bodies_of_another_shape(rows: torch.Tensor, body: torch.Tensor, message: str) -> None:
    gather = RowGather([OutputSpec("obs", 8, 0, 4, 0)], [PartSpec({}, 5, 0, 5)], batch_size=5, device=CPU)

    with pytest.raises(ValueError, match=message):
        gather.run(rows, body)


COMPILE = """
import re, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from touchline_protos.gather.kernel import gather_rows
from touchline_protos.gather.specs import Shape

shapes = [Shape(16, 1024), Shape(16, 64), Shape(8, 1), Shape(4, 32), Shape(2, 1), Shape(1, 4)]
pointers = {"entries": "*i64", "tiles": "*i32", "rows": "*i64", "cursor": "*i64", "body": "*u8"}
source = ASTSource(
    fn=gather_rows,
    signature=pointers | {"SHAPES": "constexpr", "COUNT": "constexpr"},
    constexprs={"SHAPES": sum(shape.code << 8 * n for n, shape in enumerate(shapes)), "COUNT": len(shapes)},
    attrs={(n,): [["tt.divisibility", 16]] for n in range(len(pointers))},
)
assembly = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32)).asm
assert len(assembly["cubin"]) > 1000
print(*sorted(set(re.findall(r"(?:ld|st)\\.global\\.\\S+", assembly["ptx"]))))
"""
"""Needs ptxas, which Triton brings along, and no card."""


@pytest.mark.parametrize("capability", ["80", "90"])
def test_kernel_compiles_for_a_card_and_copies_by_the_widest_words(capability: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}

    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE, capability], env=environment, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    found = set(done.stdout.split())
    assert {f"{op}.global.{word}" for op in ("ld", "st") for word in ("v4.b32", "b64", "b32", "b16", "b8")} <= found


def test_rows_to_device_copies_what_it_is_given() -> None:
    rows = np.arange(12).reshape(2, 2, 3)

    found = rows_to_device(rows, CPU)
    rows[...] = 0

    assert found.tolist() == np.arange(12).reshape(2, 2, 3).tolist()
