"""Traces with OpenTelemetry, if the program has set it up; without it they cost a look into a dictionary.

Only OpenTelemetry's API is used, and only once the program itself has imported it and set a tracer provider: what is recorded, and where it
is sent, is the program's to decide. A call carries its trace as the metadata ``traceparent`` (W3C Trace Context).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Tracer

Metadata = tuple[tuple[str, str], ...]
"""Metadata of a call."""


def get_tracer(name: str) -> Tracer | None:
    """Returns a tracer, or None if the program has not set a tracer provider.

    Args:
        name: name of the instrumented distribution.
    """
    trace = _trace()
    if trace is None or isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        return None
    return trace.get_tracer(name)


def trace_metadata() -> Metadata:
    """Returns the metadata that lead from a call to the current span; empty if there is none."""
    trace = _trace()
    if trace is None or not trace.get_current_span().get_span_context().is_valid:
        return ()
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return tuple(carrier.items())


def parent_of(metadata: Iterable[tuple[str, Any]]) -> Context:
    """Returns the context of the span that a call's metadata name; an empty one if they name none, or not one that can be read.

    Call it only if :func:`get_tracer` returned a tracer.
    """
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier = {key: value for key, value in metadata if isinstance(value, str)}
    return TraceContextTextMapPropagator().extract(carrier, Context())


def _trace() -> Any:
    """Returns OpenTelemetry's module of traces if the program has imported it; otherwise None."""
    return sys.modules.get("opentelemetry.trace")
