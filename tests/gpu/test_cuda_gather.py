"""The gather of a batch in one launch, on a card: the same batches as in the interpreter, and in a CUDA graph."""

from __future__ import annotations

import mmap

import pytest
from hypothesis import given, settings

pytest.importorskip("triton")

import torch

from support.gather_cases import GatherCase, check_gather, gather_cases, make_case
from touchline_protos.gather.row_gather import RowGather, rows_to_device

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CUDA = torch.device("cuda", 0)


@settings(max_examples=15)  # each compiles a kernel
@given(case=gather_cases())
def test_cuda_gather_of_any_batch_writes_what_numpy_says_and_nothing_else(case: GatherCase) -> None:
    check_gather(case, "cuda:0")


@pytest.mark.parametrize("width", [1, 2, 3, 4, 8, 16, 20, 37, 256, 4100, 36864])
def test_cuda_gather_of_a_batch_as_large_as_a_learners_is_what_numpy_says(width: int) -> None:
    check_gather(make_case({"obs": width, "action": 32, "reward": 4}, ends=(192, 256), capacities=(700, 50)), "cuda:0")


def test_cuda_gather_uses_the_kernel_by_itself() -> None:
    case = make_case({"obs": 256, "reward": 4})
    gather, body = RowGather(case.outputs, case.parts("cuda:0"), batch_size=5, device=CUDA), case.body("cuda:0")

    gather.run(rows_to_device(case.rows[0], CUDA), body)

    assert gather.why_no_kernel == ""
    assert body.cpu().numpy().tobytes() == case.expected(0)


def test_cuda_gather_in_a_graph_goes_on_to_the_next_batch_at_each_replay() -> None:
    case = make_case({"obs": 256, "action": 32, "reward": 4}, batches=8)
    gather, body = case.gather("cuda:0", kernel=True), case.body("cuda:0")
    rows, cursor = rows_to_device(case.rows, CUDA), torch.zeros(1, dtype=torch.int64, device=CUDA)
    gather.run(rows, body, cursor=cursor)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gather.run(rows, body, cursor=cursor)
        cursor.add_(1)

    for batch in range(8):
        graph.replay()
        assert body.cpu().numpy().tobytes() == case.expected(batch)


def test_cuda_gather_neither_allocates_nor_waits() -> None:
    case = make_case({"obs": 256, "reward": 4})
    gather, body, rows = case.gather("cuda:0", kernel=True), case.body("cuda:0"), rows_to_device(case.rows[0], CUDA)
    gather.run(rows, body)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]

    torch.cuda._sleep(2_000_000_000)
    gather.run(rows, body)
    busy = not torch.cuda.current_stream().query()

    assert busy
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_cuda_gather_reads_host_memory_that_is_registered() -> None:
    case = make_case({"obs": 256, "reward": 4})
    size = sum(column.nbytes for column in case.columns[0].values())
    memory = torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)
    assert int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), size, 0)) == 0
    columns, at = {}, 0
    for name, column in case.columns[0].items():
        columns[name] = memory[at : at + column.nbytes].view(column.shape)
        columns[name].copy_(torch.from_numpy(column))
        at += column.nbytes
    parts = [part._replace(columns=columns) for part in case.parts("cpu")]

    try:
        for kernel in (True, False):
            body = case.body("cuda:0")
            RowGather(case.outputs, parts, batch_size=5, device=CUDA, kernel=kernel).run(rows_to_device(case.rows[0], CUDA), body)
            assert body.cpu().numpy().tobytes() == case.expected(0)
    finally:
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
