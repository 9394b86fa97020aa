"""Allocation of a table's columns in host memory, in files or on a CUDA device, by the configuration and the free memory."""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import partial

from touchline_protos.log_lines import get_logger
from touchline_server.config.settings import Config
from touchline_server.errors import TooLargeError
from touchline_server.store import cuda_device
from touchline_server.store.columns import Columns
from touchline_server.store.gather_threads import GatherThreads
from touchline_server.store.memory import available_host_bytes
from touchline_server.store.schema import Schema

logger = get_logger(__name__)

CUDA_HEADROOM = 2.5
"""CUDA is chosen if this many times the columns' bytes are free: the learner needs memory as well (the rule of TD-MPC2's buffer)."""

HOST_HEADROOM = 0.95
"""Largest share of the available host memory that the columns may take."""


def with_sharing_decided(config: Config) -> Config:
    """Returns a server's configuration with ``storage.share_columns`` "on" where it is "auto" and this machine may have a CUDA device.

    Without this, "auto" means "off": no other process reads a buffer that is not served.
    """
    if not cuda_device.is_possible():
        return config
    tables = {name: {"share_columns": "on"} for name, table in config.tables.items() if getattr(table, "share_columns", None) == "auto"}
    if config.storage.share_columns == "auto":
        config = config.override(storage={"share_columns": "on"})
    return config.override(tables={name: config.tables[name].model_dump(exclude_unset=True) | keys for name, keys in tables.items()})


def allocate_columns(
    schema: Schema,
    *,
    capacity: int,
    configured_device: str,
    scratch_dir: str = "",
    share: bool = False,
    writable: bool = False,
    copy_threads: int = 1,
) -> Columns:
    """Allocates the columns of a schema on the configured device. What does not fit into CUDA memory goes to host memory, with a log line.

    Args:
        schema: the columns.
        capacity: number of rows.
        configured_device: ``auto``, ``cuda``, ``cuda:N``, ``cpu`` or ``disk``.
        scratch_dir: folder of the files for ``disk``.
        share: whether other processes of this host read the columns too, except for files. If they cannot, a line in the log says why.
        writable: whether they may also write what is shared in host memory.
        copy_threads: threads that copy large episodes for a CUDA device, as in ``server.gather_threads``.

    Raises:
        TooLargeError: there is not enough memory, or the files cannot be created. Nothing is left behind.
    """
    required = capacity * schema.row_bytes
    device = choose_device(configured_device, required)
    try:
        if device == "disk":
            columns = Columns(schema, capacity, scratch_dir)
        elif device == "cpu":
            columns = _on_host(schema, capacity, share=share, writable=writable)
        else:
            on_host = partial(_on_host, schema, capacity, share=share, writable=writable)
            columns = _on_cuda(schema, capacity, device, share=share, threads=GatherThreads(copy_threads), on_host=on_host)
    except OSError as error:
        raise TooLargeError(f"storage.scratch_dir: the columns' files cannot be created: {error.strerror}") from error
    except MemoryError:
        raise _too_large(required) from None
    where = columns.where if columns.shared is None else f"{columns.where}, shared with learners"
    logger.info("allocated %d rows of %d bytes on %s (%.2f GiB)", capacity, schema.row_bytes, where, required / 2**30)
    return columns


def choose_device(configured: str, required_bytes: int) -> str:
    """Returns where columns of ``required_bytes`` go: ``cpu``, ``disk``, ``cuda`` or ``cuda:N`` (docs/design.md, "The store").

    Raises:
        TooLargeError: they do not fit into host memory. Whether files fit on a disk, the allocation itself finds out.
    """
    if configured.startswith("cuda") or configured == "disk":
        return configured
    if configured == "auto" and cuda_device.is_available():
        device, free = cuda_device.current()
        if CUDA_HEADROOM * required_bytes < free:
            return device
    check_host_memory(required_bytes)
    return "cpu"


def check_host_memory(required_bytes: int) -> None:
    """Raises TooLargeError unless host memory, or the container's share of it, has ``required_bytes`` free."""
    if required_bytes > HOST_HEADROOM * available_host_bytes():
        raise _too_large(required_bytes)


def _too_large(required_bytes: int) -> TooLargeError:
    return TooLargeError(
        f"the buffer needs {required_bytes / 2**30:.1f} GiB of host memory, {available_host_bytes() / 2**30:.1f} GiB are available; "
        'lower config.buffer_size or set storage.device = "disk" with a storage.scratch_dir'
    )


def _on_host(schema: Schema, capacity: int, *, share: bool, writable: bool) -> Columns:
    """Returns columns in host memory: shared if they are to be and can be."""
    if share:
        try:
            return Columns(schema, capacity, share=True, writable=writable)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.ENOMEM):
                raise MemoryError(error.strerror) from error
            logger.warning("the columns cannot be shared with learners: %s", error.strerror)
    return Columns(schema, capacity)


def _on_cuda(schema: Schema, capacity: int, device: str, *, share: bool, threads: GatherThreads, on_host: Callable[[], Columns]) -> Columns:
    """Returns columns on a CUDA device, or those of ``on_host`` if they do not fit there."""
    from touchline_server.store.cuda_columns import CudaColumns, OutOfMemoryError

    try:
        return CudaColumns(schema, capacity, device, share=share, threads=threads)
    except OutOfMemoryError:
        required = capacity * schema.row_bytes
        logger.warning("%s is too small for %.1f GiB of columns: they go to host memory", device, required / 2**30)
        check_host_memory(required)
        return on_host()
