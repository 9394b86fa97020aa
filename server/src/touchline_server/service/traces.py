"""Traces of calls and of batches, if the server's process has set up OpenTelemetry: ``opentelemetry-instrument touchline-server serve``."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from touchline_protos.tracing import get_tracer, parent_of
from touchline_server.store.batch_draw import BatchDraw
from touchline_server.tables.sampler import Reserved, Sampler, Split

if TYPE_CHECKING:
    import grpc
    from opentelemetry.context import Context
    from opentelemetry.trace import Span, Tracer


class Traces:
    """Makes the spans of a server: ``touchline.store`` of the calls that add, ``touchline.batch`` of each batch."""

    def __init__(self) -> None:
        self._tracer = get_tracer("touchline_server")

    @contextmanager
    def store(self, call: grpc.aio.ServicerContext[Any, Any]) -> Iterator[None]:
        """Records a call that adds episodes, from its admission until its answer: all are stored, as durably as configured."""
        if self._tracer is None:
            yield
            return
        from opentelemetry.trace import SpanKind

        with self._tracer.start_as_current_span("touchline.store", context=_parent(call), kind=SpanKind.SERVER):
            yield

    def sampler(self, sampler: Sampler, call: grpc.aio.ServicerContext[Any, Any]) -> Sampler:
        """Returns a sampler, the spans of whose batches have the caller's span as their parent; the same one without OpenTelemetry."""
        return sampler if self._tracer is None else cast(Sampler, _TracedSampler(sampler, self._tracer, _parent(call)))


class _TracedSampler:
    """A sampler that records a span of each batch, from its draw until it is handed over: written, or taken out of the ring."""

    def __init__(self, sampler: Sampler, tracer: Tracer, parent: Context) -> None:
        self._sampler = sampler
        self._tracer = tracer
        self._parent = parent
        self._undrawn = 0
        """Batches that are reserved and neither drawn nor cancelled. They have no span yet."""
        self._spans: deque[Span] = deque()
        """Spans of the batches that are drawn and not handed over, oldest first: the order in which they are delivered."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)

    def reserve(self, batches: int, *, waits: bool) -> Reserved | None:
        """See :class:`Sampler`."""
        reserved = self._sampler.reserve(batches, waits=waits)
        self._undrawn += 0 if reserved is None else reserved.batches
        return reserved

    def draw(self, reserved: Reserved) -> BatchDraw:
        """See :class:`Sampler`."""
        attributes = {"touchline.batch_size": self._sampler.batch_size, "touchline.horizon": self._sampler.horizon}
        self._undrawn -= reserved.batches
        for _ in range(reserved.batches):
            self._spans.append(self._tracer.start_span("touchline.batch", context=self._parent, attributes=attributes))
        return self._sampler.draw(reserved)

    def delivered(self, batches: int, split: Split) -> None:
        """See :class:`Sampler`."""
        for _ in range(min(batches, len(self._spans))):
            self._spans.popleft().end()
        self._sampler.delivered(batches, split)

    def cancel(self, batches: int, split: Split) -> None:
        """See :class:`Sampler`."""
        undrawn = min(batches, self._undrawn)
        self._undrawn -= undrawn
        for _ in range(min(batches - undrawn, len(self._spans))):
            span = self._spans.pop()
            span.set_attribute("touchline.cancelled", True)
            span.end()
        self._sampler.cancel(batches, split)


def _parent(call: grpc.aio.ServicerContext[Any, Any]) -> Context:
    return parent_of(call.invocation_metadata() or ())
