"""In what form a learner gets its batches: numpy arrays, torch tensors or JAX arrays, in host memory or on a CUDA device."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from touchline._learner.host_gather import HostMethod
from touchline._learner.stream import RECONNECT_S, BatchStream, StreamSource
from touchline._learner.torch_batch import batch_converter, same_batch
from touchline._rpc.calls import RpcClient
from touchline.errors import InvalidArgumentError
from touchline_protos import Batch
from touchline_protos.v1 import replay_pb2 as pb

TRANSPORTS = ("auto", "device", "ring", "stream")
"""Ways to ask for. On the host, auto asks for a ring: the server gathers while the learner computes (docs/benchmarks/device.md). For a
CUDA device it asks for the device to gather: the host then moves no batch at all."""


def host_converter(*, as_numpy: bool | None, as_jax: bool, default_numpy: bool) -> Callable[[Batch], Batch]:
    """Returns the function that turns a batch of numpy arrays in host memory into what the caller asked for.

    Args:
        as_numpy: numpy arrays even if torch is installed; None takes ``default_numpy``.
        as_jax: JAX arrays.
        default_numpy: the client's setting.

    Raises:
        InvalidArgumentError: both are asked for, or JAX is not installed.
    """
    if not as_jax:
        return batch_converter(as_numpy=default_numpy if as_numpy is None else as_numpy)
    if as_numpy:
        raise InvalidArgumentError("as_jax: True and as_numpy=True, expected one of them")
    from touchline._learner.jax_batch import jax_converter

    return jax_converter()


def open_stream(
    rpc: RpcClient,
    request: pb.SampleRequest,
    *,
    prefetch: int,
    timeout_s: float | None,
    transport: str,
    device: Any,
    as_numpy: bool | None,
    as_jax: bool,
    default_numpy: bool,
    reuse: bool,
) -> BatchStream:
    """Returns a stream of batches; see :meth:`~touchline.ReplayClient.batches`. Its session opens with the first batch.

    Raises:
        InvalidArgumentError: the transport is unknown, or the device and the form do not fit each other or this machine, or reused memory.
    """
    if transport not in TRANSPORTS:
        raise InvalidArgumentError(f"transport: {transport!r}, expected one of {', '.join(map(repr, TRANSPORTS))}")
    open_source = partial(
        StreamSource,
        rpc,
        request,
        prefetch=prefetch,
        timeout_s=timeout_s,
        reconnect_s=RECONNECT_S,
        ring=transport != "stream",
        as_bodies=as_jax,
    )
    if device is None or str(device) == "cpu":
        if reuse:
            raise InvalidArgumentError(f"reuse: True with device={device!r}, expected a CUDA device: batches in host memory have their own")
        method = HostMethod() if transport == "device" else None
        return BatchStream(open_source(method=method), host_converter(as_numpy=as_numpy, as_jax=as_jax, default_numpy=default_numpy))
    convert: Callable[[Batch], Batch] = same_batch
    host_fields: tuple[str, ...] = ()
    if as_jax:
        if reuse:
            raise InvalidArgumentError("reuse: True and as_jax=True, expected one of them: JAX's arrays must never change")
        from touchline._learner.jax_batch import HOST_FIELDS, check_jax_device

        convert, host_fields = host_converter(as_numpy=as_numpy, as_jax=True, default_numpy=default_numpy), HOST_FIELDS
    from touchline._learner.cuda import CudaSource, cuda_place
    from touchline._learner.cuda_gather import CudaMethod
    from touchline._learner.fixed_bodies import FixedBodies

    torch, place = cuda_place(device, as_numpy=bool(as_numpy))
    if as_jax:
        check_jax_device(device)
    bodies = FixedBodies() if reuse else None
    gathers = CudaMethod(torch, place, host_fields, bodies=bodies) if transport in ("auto", "device") else None
    return BatchStream(CudaSource(open_source(method=gathers), torch, place, host_fields, bodies=bodies), convert)
