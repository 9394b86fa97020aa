"""One batch a call: the unary ``Sample``, or a sampling stream of one batch if that is larger than a message."""

from __future__ import annotations

import threading
from dataclasses import replace

from touchline._learner.readiness import Readiness, readiness_of
from touchline._learner.stream import RECONNECT_S, StreamSource
from touchline._rpc.calls import RpcClient
from touchline._rpc.convert import newer_feature, reach_of, table_names_of, tables_of
from touchline._rpc.waits import waiting
from touchline.errors import NotReadyError, ServerError, TooLargeError, TouchlineError
from touchline_protos import Batch
from touchline_protos.codec import BatchDecoder, CodecError
from touchline_protos.v1 import replay_pb2 as pb


class SingleBatchSampler:
    """Draws batches, one call each. Thread-safe: every thread decodes into buffers of its own.

    Args:
        rpc: client of the server's service.
    """

    def __init__(self, rpc: RpcClient) -> None:
        self._rpc = rpc
        self._local = threading.local()

    def sample(self, request: pb.SampleRequest, *, as_bodies: bool = False) -> Batch:
        """Returns one batch of writable numpy arrays, which are the caller's.

        Args:
            request: what to draw.
            as_bodies: see :class:`BatchDecoder`.

        Raises:
            NotReadyError: nothing could be sampled within the request's ``wait_s``; carries the counts.
            ServerError: the answer is malformed.
            TouchlineError: the call failed.
        """
        feature, least = newer_feature(request)
        self._rpc.check_server_version(feature, least=least, table=tables_of(request)[0])
        readiness = readiness_of(self._rpc, request)
        address, horizon = self._rpc.channel.address, reach_of(request)
        try:
            with waiting("sample()", address, lambda: readiness.explain(horizon)):
                message = self._rpc.unary("Sample", request.SerializeToString(), wait_s=request.wait_s)
        except TooLargeError:
            return self._sample_over_stream(request, as_bodies)
        except NotReadyError as error:
            raise self._with_counts(error, readiness, horizon) from error.__cause__
        try:
            batch = self._decoder(as_bodies).sample_response(message)
            return replace(batch, table_names=table_names_of(request)) if request.mix else batch
        except CodecError as error:
            raise ServerError(f"{address}: malformed batch: {error}") from error

    def _decoder(self, as_bodies: bool) -> BatchDecoder:
        # A decoder may only be used by one thread at a time, so each thread has its own: one for each layout that it asks for.
        name = "bodies" if as_bodies else "messages"
        decoder: BatchDecoder | None = getattr(self._local, name, None)
        if decoder is None:
            decoder = BatchDecoder(as_bodies=as_bodies)
            setattr(self._local, name, decoder)
        return decoder

    def _sample_over_stream(self, request: pb.SampleRequest, as_bodies: bool) -> Batch:
        timeout_s = self._rpc.timeout_s + request.wait_s
        source = StreamSource(self._rpc, request, prefetch=1, timeout_s=timeout_s, reconnect_s=RECONNECT_S, ring=False, as_bodies=as_bodies)
        try:
            return source.take()
        finally:
            source.close()

    def _with_counts(self, error: NotReadyError, readiness: Readiness, horizon: int | None) -> NotReadyError:
        try:
            return NotReadyError(str(error), readiness.probe(horizon, self._rpc.timeout_s).counts)
        except TouchlineError:
            return error
