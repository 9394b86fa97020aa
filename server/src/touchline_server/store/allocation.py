"""Where a table's columns go: host memory, files, or a CUDA device, by the configuration and what there is room for."""

from __future__ import annotations

from touchline_protos.log_lines import get_logger
from touchline_server.errors import TooLargeError
from touchline_server.store import cuda_device
from touchline_server.store.columns import Columns
from touchline_server.store.memory import available_host_bytes
from touchline_server.store.schema import Schema

logger = get_logger(__name__)

CUDA_HEADROOM = 2.5
"""CUDA is chosen where this many times the columns' bytes are free: the learner needs room beside them (TD-MPC2's rule)."""

HOST_HEADROOM = 0.95
"""The columns may take this much of the available host memory."""


def allocate_columns(schema: Schema, *, capacity: int, wanted_device: str, scratch_dir: str = "") -> Columns:
    """Allocates the columns of a schema on the wanted device; what CUDA has no room for goes to the CPU, with a log line.

    Args:
        schema: of the columns.
        capacity: rows.
        wanted_device: ``auto``, ``cuda``, ``cuda:N``, ``cpu`` or ``disk``.
        scratch_dir: folder of the files for ``disk``.

    Raises:
        TooLargeError: there is no room, or the files cannot be made. Nothing is left behind.
    """
    required = capacity * schema.row_bytes
    device = choose_device(wanted_device, required)
    try:
        if device == "disk":
            columns = Columns(schema, capacity, scratch_dir)
        elif device == "cpu":
            columns = Columns(schema, capacity)
        else:
            columns = _on_cuda(schema, capacity, device)
    except OSError as error:
        raise TooLargeError(f"storage.scratch_dir: the columns' files cannot be made: {error.strerror}") from error
    except MemoryError:
        raise _too_large(required) from None
    logger.info("allocated %d rows of %d bytes on %s (%.2f GiB)", capacity, schema.row_bytes, columns.where, required / 2**30)
    return columns


def choose_device(wanted: str, required_bytes: int) -> str:
    """Returns where columns of ``required_bytes`` go, by DESIGN's device rule: ``cpu``, ``disk``, ``cuda`` or ``cuda:N``.

    Raises:
        TooLargeError: they do not fit in host memory (or in the file's file system, which the allocation itself finds out).
    """
    if wanted.startswith("cuda") or wanted == "disk":
        return wanted
    if wanted == "auto" and cuda_device.is_available():
        device, free = cuda_device.current()
        if CUDA_HEADROOM * required_bytes < free:
            return device
    check_host_memory(required_bytes)
    return "cpu"


def check_host_memory(required_bytes: int) -> None:
    """Raises TooLargeError unless host memory, or the container's share of it, has room for ``required_bytes``."""
    if required_bytes > HOST_HEADROOM * available_host_bytes():
        raise _too_large(required_bytes)


def _too_large(required_bytes: int) -> TooLargeError:
    return TooLargeError(
        f"the buffer needs {required_bytes / 2**30:.1f} GiB of host memory, {available_host_bytes() / 2**30:.1f} GiB are available; "
        'lower config.buffer_size or set storage.device = "disk" with a storage.scratch_dir'
    )


def _on_cuda(schema: Schema, capacity: int, device: str) -> Columns:
    """Returns columns on a CUDA device, or in host memory if it has no room for them."""
    from touchline_server.store.cuda_columns import CudaColumns, OutOfMemoryError

    try:
        return CudaColumns(schema, capacity, device)
    except OutOfMemoryError:
        required = capacity * schema.row_bytes
        logger.warning("%s has no room for %.1f GiB of columns: they go to host memory", device, required / 2**30)
        check_host_memory(required)
        return Columns(schema, capacity)
