"""One call of SampleStream: batches in its messages, or by a ring in shared memory that the server offers on the same host."""

from __future__ import annotations

import queue
from enum import Enum, auto
from typing import Any

from touchline._learner.ring_reader import RingBatches, RingEndedError
from touchline._learner.row_offer import GatherMethod
from touchline._learner.row_ring import RowBatches
from touchline._rpc.calls import RpcClient
from touchline._rpc.convert import newer_feature, tables_of
from touchline.errors import ServerError, UnavailableError
from touchline_protos import Batch
from touchline_protos.codec import BatchDecoder, CodecError
from touchline_protos.shm.ring import RingError, shared_memory_id
from touchline_protos.v1 import replay_pb2 as pb

NO_REASON = "the server offered none and did not say why, as older ones do"
"""Reason for having no ring if only the server knows it."""

NO_SHARED_MEMORY = "this machine is not Linux on x86-64, or has no /dev/shm"
TURNED_OFF = 'turned off by ring=False, or transport="stream"'
"""Reasons for having no ring if it was not asked for."""

NO_ROWS_REASON = "the server offered no columns to gather from and did not say why, as older ones do"
"""Reason for a ring of batches although rows were asked for, if only the server knows it."""


class _State(Enum):
    """How the batches of a session come."""

    AWAITING_OFFER = auto()
    """A ring was asked for, and the server's next message may offer one."""
    MESSAGES = auto()
    RING = auto()


class StreamSession:
    """An open call of SampleStream. One thread receives and grants; any thread may end it.

    Args:
        rpc: client of the server's service.
        request: request that opens the session.
        credits: batches that the server may send before the first grant.
        ring: ask the server for a ring.
        method: how this process gathers batches by itself, if the server shares its columns; None: it does not.
        as_bodies: see :class:`BatchDecoder`.
    """

    def __init__(
        self,
        rpc: RpcClient,
        request: pb.SampleRequest,
        credits: int,
        *,
        ring: bool,
        method: GatherMethod | None = None,
        as_bodies: bool = False,
    ) -> None:
        feature, least = newer_feature(request)
        rpc.check_server_version(feature, least=least, table=tables_of(request)[0])
        self._rpc = rpc
        self._requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        identity = shared_memory_id() if ring else ""
        self._state = _State.AWAITING_OFFER if identity else _State.MESSAGES
        self._method = method if identity else None
        self.transport_reason = ""
        """Why batches come in messages, or through a ring although this process can gather them; empty if they come as was asked for, or
        the server's offer is still to come."""
        if not identity:
            self.transport_reason = NO_SHARED_MEMORY if ring else TURNED_OFF
        self.ring: RingBatches | None = None
        """The ring that batches come through; None while they come in messages."""
        self._decoder = BatchDecoder(as_bodies=as_bodies)
        self._grants: dict[int, bytes] = {}
        rows = None if self._method is None else self._method.request()
        opening = pb.SampleStreamOpen(sample=request, credits=credits, shared_memory_id=identity, rows=rows)
        self._requests.put(pb.SampleStreamRequest(open=opening).SerializeToString())
        self._call: Any = rpc.stream("SampleStream", iter(self._requests.get, None))

    @property
    def transport(self) -> str:
        """How batches come: ``device``, ``ring`` or ``stream``."""
        return self.ring.transport if self.ring is not None else "stream"

    @property
    def has_answer(self) -> bool:
        """Whether the server has said how batches come."""
        return self._state is not _State.AWAITING_OFFER

    def receive(self) -> list[Batch]:
        """Returns the batches that the next message completes, or the ring's next batch; none after a short wait for the ring.

        Raises:
            TouchlineError: the session ended.
        """
        address = self._rpc.channel.address
        try:
            if self.ring is not None:
                batch = self.ring.take()
                return [] if batch is None else [batch]
            message = next(self._call)
            if self._state is _State.AWAITING_OFFER and self._take_offer(message):
                return []
            return self._decoder.feed(message)
        except RingEndedError as error:
            if isinstance(error.reason, Exception) and not isinstance(error.reason, StopIteration):
                raise self._rpc.translate(error.reason) from error.reason
            raise UnavailableError(f"{address}: the server ended the stream") from None
        except StopIteration:
            raise UnavailableError(f"{address}: the server ended the stream") from None
        except (CodecError, RingError) as error:
            raise ServerError(f"{address}: malformed frame: {error}") from error
        except Exception as error:
            raise self._rpc.translate(error) from error

    def grant(self, batches: int) -> None:
        """Allows the server to send ``batches`` more. Does nothing on a ring, whose free slots are its credits."""
        if self._state is _State.RING:
            return
        message = self._grants.get(batches)
        if message is None:
            credit = pb.SampleStreamRequest(credit=pb.SampleStreamCredit(batches=batches))
            message = self._grants[batches] = credit.SerializeToString()
        self._requests.put(message)

    def close(self) -> None:
        """Ends the call and releases what was needed to take batches, from any thread."""
        self.end()
        if self.ring is not None:
            self.ring.close()

    def end(self) -> None:
        """Ends the call, from any thread."""
        self._requests.put(None)  # releases gRPC's thread that waits for requests
        self._call.cancel()
        if self.ring is not None:
            self.ring.interrupt()

    def _take_offer(self, message: bytes) -> bool:
        """Attaches the ring that a message offers, and answers the offer; returns False if the message is a batch."""
        if not message.startswith(_OFFER_TAG):
            self.transport_reason = self.transport_reason or NO_REASON
            self._state = _State.MESSAGES
            return False
        setup = pb.SampleStreamResponse.FromString(message).ring
        self.transport_reason = setup.refused or self.transport_reason or setup.rows_refused
        if setup.refused:
            self._state = _State.MESSAGES
            return True
        declined = ""
        try:
            ring = self._attach(setup)
            ring.start()
        except (CodecError, RingError, RuntimeError) as error:  # RuntimeError: the system has no thread left
            what = "columns" if setup.HasField("rows") else "ring"
            self.transport_reason = declined = f"the server's {what} cannot be used here: {error}"
            # Another offer, without rows, follows one with rows.
            self._state = _State.AWAITING_OFFER if setup.HasField("rows") else _State.MESSAGES
        else:
            self.ring = ring
            self._state = _State.RING
            if ring.transport == "device":
                self.transport_reason = ""
            elif self._method is not None:
                self.transport_reason = self.transport_reason or NO_ROWS_REASON
        answer = pb.RingAttachment(attached=not declined, reason=declined)
        self._requests.put(pb.SampleStreamRequest(ring=answer).SerializeToString())
        return True

    def _attach(self, setup: pb.RingSetup) -> RingBatches:
        if not setup.HasField("rows"):
            return RingBatches(setup, self._call, self._rpc)
        if self._method is None:
            raise RingError("rows were not asked for")
        return RowBatches(setup, self._call, self._method, self._rpc)


_OFFER_TAG = pb.SampleStreamResponse(ring=pb.RingSetup()).SerializeToString()[:1]
