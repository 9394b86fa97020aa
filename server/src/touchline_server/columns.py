"""The columns of a table: TorchRL storage in host memory, CUDA memory or a file, written and gathered without TensorDict indexing.

``numpy.take`` with ``out=`` and ``mode="clip"`` gathers twice as fast as ``torch.index_select`` on the CPU (``mode="raise"`` buffers its
output). Clipping would hide a bad row, so rows are wrapped where the draw is made and never come from outside.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from tensordict import TensorDict
from torchrl.data import LazyMemmapStorage, LazyTensorStorage

from touchline_protos.dtypes import BFLOAT16
from touchline_server.config import ConfigError
from touchline_server.errors import TooLargeError
from touchline_server.memory import available_host_bytes, free_cuda_bytes
from touchline_server.schema import Schema
from touchline_server.torchrl_state import Storage, column_tensor, release, unannounced

logger = logging.getLogger(__name__)

CUDA_HEADROOM = 2.5
"""CUDA is chosen where this many times the columns' bytes are free: the learner needs room beside them (TD-MPC2's rule)."""

HOST_HEADROOM = 0.95
"""The columns may take this much of the available host memory."""


def make_storage(capacity: int, *, device: str, scratch_dir: str) -> Storage:
    """Returns a TorchRL storage that allocates nothing before the first episode.

    Args:
        capacity: rows.
        device: ``auto``, ``cuda``, ``cuda:N``, ``cpu`` or ``disk``.
        scratch_dir: where ``disk`` keeps its files.

    Raises:
        ConfigError: a CUDA device that this machine does not have.
    """
    if device.startswith("cuda") and (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"storage.device: '{device}', expected a device that torch finds: there are {torch.cuda.device_count()} for CUDA")
    if device == "disk":
        return LazyMemmapStorage(capacity, scratch_dir=scratch_dir, existsok=True, auto_cleanup=False)
    return LazyTensorStorage(capacity, device="auto")


def choose_device(wanted: str, required_bytes: int) -> torch.device:
    """Returns where columns of ``required_bytes`` go: DESIGN's device rule.

    Raises:
        TooLargeError: they do not fit in host memory (or in the file's file system, which the allocation itself finds out).
    """
    if wanted.startswith("cuda"):
        return torch.device(wanted)
    if wanted == "auto" and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        if CUDA_HEADROOM * required_bytes < free_cuda_bytes(device):
            return device
    if wanted != "disk":
        check_host_memory(required_bytes)
    return torch.device("cpu")


def check_host_memory(required_bytes: int) -> None:
    """Raises TooLargeError unless host memory, or the container's share of it, has room for ``required_bytes``."""
    available = available_host_bytes()
    if required_bytes > HOST_HEADROOM * available:
        raise TooLargeError(
            f"the buffer needs {required_bytes / 2**30:.1f} GiB of host memory, {available / 2**30:.1f} GiB are available; "
            'lower config.buffer_size or set storage.device = "disk" with a storage.scratch_dir'
        )


class Columns:
    """The allocated columns of one schema: [capacity, *shape] each.

    Not thread-safe by itself: the store lets one writer in at a time and never writes a row that a gather may be reading.
    """

    def __init__(self, storage: Storage, schema: Schema, capacity: int, device: torch.device) -> None:
        """Allocates. Use :func:`allocate_columns`."""
        self.schema = schema
        self.capacity = capacity
        first_row = TensorDict(
            {tuple(spec.name.split(".")): torch.zeros(spec.shape, dtype=torch_dtype(spec.dtype)) for spec in schema.columns}, []
        )
        with unannounced():
            storage.set(0, first_row.to(device))
        self.tensors = {spec.name: column_tensor(storage, spec.name) for spec in schema.columns}
        """Column by dotted name; shares the storage's memory."""
        self.device = next(iter(self.tensors.values())).device
        self.on_disk = isinstance(storage, LazyMemmapStorage)
        if self.on_disk:
            _reserve_files(storage, schema)
        self._arrays = None if self.device.type == "cuda" else {name: as_array(tensor) for name, tensor in self.tensors.items()}
        self._device = _DeviceOrder(self.device) if self.device.type == "cuda" else None
        self.settle()

    @property
    def where(self) -> str:
        """The device's name: ``cpu``, ``cuda:N`` or ``disk``."""
        return "disk" if self.on_disk else str(self.device)

    @property
    def in_host_memory(self) -> bool:
        """Whether writing is a copy in memory alone."""
        return self._arrays is not None and not self.on_disk

    @property
    def size_bytes(self) -> int:
        """Bytes allocated."""
        return self.capacity * self.schema.row_bytes

    def write(self, first_row: int, episode: Mapping[str, np.ndarray]) -> None:
        """Copies an episode's columns, each once, into consecutive rows modulo the capacity: in two pieces at the seam."""
        length = len(next(iter(episode.values())))
        before_seam = min(length, self.capacity - first_row)
        with self._device.writing() if self._device is not None else nullcontext():
            for name, source in episode.items():
                self._write_rows(name, first_row, source[:before_seam])
                if before_seam < length:
                    self._write_rows(name, 0, source[before_seam:])

    def note_reads(self) -> None:
        """Notes that the current stream was given gathers, which may outlive their pin: the next write follows them."""
        if self._device is not None:
            self._device.note_reads()

    def note_foreign_reads(self) -> None:
        """Notes the same of gathers by other code, on whatever stream, that end before the write lock is given back."""
        if self._device is not None:
            self._device.note_foreign_reads()

    def settle(self) -> None:
        """Waits until the device is done with all that it was given, whoever gave it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _write_rows(self, name: str, first_row: int, source: np.ndarray) -> None:
        if self._arrays is not None:
            self._arrays[name][first_row : first_row + len(source)] = source
        else:
            staging = torch.empty(source.shape, dtype=torch_dtype(source.dtype), pin_memory=True)
            as_array(staging)[...] = source
            self.tensors[name][first_row : first_row + len(source)].copy_(staging, non_blocking=True)

    def gather(self, name: str, rows: np.ndarray, out: np.ndarray) -> None:
        """Copies rows of one column into host memory.

        Args:
            name: the column.
            rows: any shape, int64, each in [0, capacity).
            out: [*rows.shape, *column shape], contiguous, of the column's dtype: filled.
        """
        if self._arrays is not None:
            self._arrays[name].take(rows, 0, out, "clip")
        else:
            as_tensor(out).copy_(self.gather_tensor(name, torch.from_numpy(rows).to(self.device)))

    def copy_bytes(self, name: str, first_row: int, offset_bytes: int, out: np.ndarray) -> None:
        """Copies a piece of one column's rows, which are consecutive modulo the capacity, into host memory.

        Args:
            name: the column.
            first_row: at which the rows begin, in [0, capacity).
            offset_bytes: where in their bytes the piece begins.
            out: [size] uint8, contiguous: filled.
        """
        if not len(out):
            return
        column = self.tensors[name]
        total = column.numel() * column.element_size()
        begin = (first_row * (total // self.capacity) + offset_bytes) % total
        before_seam = min(len(out), total - begin)
        self._copy_run(name, begin, out[:before_seam])
        if before_seam < len(out):
            self._copy_run(name, 0, out[before_seam:])

    def _copy_run(self, name: str, begin: int, out: np.ndarray) -> None:
        if self._arrays is not None:
            out[:] = self._arrays[name].reshape(-1).view(np.uint8)[begin : begin + len(out)]
            return
        with self._device.copying() if self._device is not None else nullcontext():
            # To pageable memory, so that the host waits for it: nothing is read once this returns.
            torch.from_numpy(out).copy_(self.tensors[name].reshape(-1).view(torch.uint8)[begin : begin + len(out)])

    def gather_tensor(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Returns rows of one column as a fresh tensor on the columns' device, [*rows.shape, *column shape]."""
        column = self.tensors[name]
        return column.index_select(0, rows.reshape(-1)).view(*rows.shape, *column.shape[1:])


class _DeviceOrder:
    """Keeps writes to columns on a CUDA device after the gathers before them, and before those that come later.

    Writes have a stream of their own. It waits, on the device, for the gathers that were noted, and the writer waits for that stream alone:
    for nothing else that the device was given, such as a learner's training step.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._lock = threading.Lock()
        self._reads: dict[torch.cuda.Stream, torch.cuda.Event] = {}
        self._foreign = False

    def note_reads(self) -> None:
        stream = torch.cuda.current_stream(self._device)
        with self._lock:
            event = self._reads.get(stream)
            if event is None:
                event = self._reads[stream] = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(stream)

    def note_foreign_reads(self) -> None:
        self._foreign = True

    def copying(self) -> AbstractContextManager[object]:
        """Has copies to the host that are made in the block wait for each other alone, and not for what callers gave the device."""
        return torch.cuda.stream(self._copies)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Has what is queued in the block come after the noted gathers, and waits for it."""
        with self._lock:
            reads, self._reads = self._reads, {}
            foreign, self._foreign = self._foreign, False
        if foreign:
            torch.cuda.synchronize(self._device)
        try:
            with torch.cuda.stream(self._stream):
                for event in reads.values():
                    self._stream.wait_event(event)
                yield
        finally:
            # Gathers on any stream may follow as soon as the episode is published, and the memory may go if it is not.
            self._stream.synchronize()


def allocate_columns(storage: Storage, schema: Schema, *, capacity: int, wanted_device: str) -> Columns:
    """Allocates the columns of a schema on the wanted device; what CUDA has no room for goes to the CPU, with a log line.

    Raises:
        TooLargeError: there is no room, or the files cannot be made. The storage is as before.
    """
    required = capacity * schema.row_bytes
    device = choose_device(wanted_device, required)
    try:
        columns = _allocate(storage, schema, capacity, device)
    except torch.cuda.OutOfMemoryError:
        logger.warning("%s has no room for %.1f GiB of columns: they go to host memory", device, required / 2**30)
        check_host_memory(required)
        columns = _allocate(storage, schema, capacity, torch.device("cpu"))
    logger.info("allocated %d rows of %d bytes on %s (%.2f GiB)", capacity, schema.row_bytes, columns.where, required / 2**30)
    return columns


def _allocate(storage: Storage, schema: Schema, capacity: int, device: torch.device) -> Columns:
    """Returns columns, or leaves the storage as it was."""
    try:
        return Columns(storage, schema, capacity, device)
    except OSError as error:
        release(storage)
        raise TooLargeError(f"storage.scratch_dir: the columns' files cannot be made: {error.strerror}") from error
    except BaseException:
        release(storage)
        raise


_TORCH_OF: dict[np.dtype, torch.dtype] = {
    np.dtype(np.bool_): torch.bool,
    np.dtype("u1"): torch.uint8,
    np.dtype("i1"): torch.int8,
    np.dtype("<i2"): torch.int16,
    np.dtype("<i4"): torch.int32,
    np.dtype("<i8"): torch.int64,
    np.dtype("<f2"): torch.float16,
    BFLOAT16: torch.bfloat16,
    np.dtype("<f4"): torch.float32,
    np.dtype("<f8"): torch.float64,
}


def torch_dtype(dtype: np.dtype) -> torch.dtype:
    """Returns the torch dtype of a supported numpy dtype."""
    return _TORCH_OF[dtype]


def as_tensor(array: np.ndarray) -> torch.Tensor:
    """Returns a CPU tensor that shares a writable array's memory; bfloat16 comes back as such."""
    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """Returns a numpy array that shares a CPU tensor's memory; bfloat16 by its bits."""
    plain = tensor.as_subclass(torch.Tensor)
    if plain.dtype == torch.bfloat16:
        return np.asarray(plain.view(torch.int16).numpy()).view(BFLOAT16)
    return np.asarray(plain.numpy())


def _reserve_files(storage: Storage, schema: Schema) -> None:
    """Reserves the files' blocks now: a full disk is an error here and not a crash at a later write."""
    for spec in schema.columns:
        if not spec.row_bytes:
            continue  # there is no file of no bytes
        column = column_tensor(storage, spec.name)
        path = Path(column.filename)  # type: ignore[attr-defined]
        with path.open("r+b") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, column.nbytes)
            except OSError as error:
                raise TooLargeError(f"{path.parent}: no room for {spec.name}, {column.nbytes} bytes: {error.strerror}") from error
