"""Traces of a writer's episodes: a span from an episode's first row to its acknowledgement."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from touchline_protos.codec import Episode, EpisodeKey
from touchline_protos.tracing import get_tracer

if TYPE_CHECKING:
    from opentelemetry.trace import Span


class EpisodeTraces:
    """Spans of the episodes of one writer; does nothing unless the program has set up OpenTelemetry. Thread-safe.

    An episode that is sent by itself is the parent of its call's span on the server. Episodes that share a call are linked from a span of
    that call, as OpenTelemetry's conventions for messages in batches say.
    """

    def __init__(self) -> None:
        self._tracer = get_tracer("touchline")
        self._spans: dict[EpisodeKey, Span] = {}

    def begin(self, episode: Episode, *, table: str, begun_ns: int) -> None:
        """Begins the span of an episode that has ended.

        Args:
            episode: episode with its key.
            table: table that it is for.
            begun_ns: time of its first row, in nanoseconds since 1970.
        """
        if self._tracer is None or episode.key is None:
            return
        attributes: dict[str, Any] = {
            "touchline.table": table,
            "touchline.actor": episode.actor,
            "touchline.rows": episode.length,
            "touchline.policy_version": episode.policy_version,
        }
        span = self._tracer.start_span("touchline.episode", attributes=attributes, start_time=begun_ns)
        span.add_event("ended")
        self._spans[episode.key] = span

    @contextmanager
    def sending(self, keys: Sequence[EpisodeKey | None]) -> Iterator[None]:
        """Makes the span of an episode, or of a call with several, the current one while the block lasts. An error is recorded in it."""
        if self._tracer is None:
            yield
            return
        from opentelemetry import trace

        spans = [self._spans[key] for key in keys if key in self._spans]
        if len(keys) == 1 and spans:
            # The attempt may be repeated, so its error does not end the span.
            with trace.use_span(spans[0], record_exception=True, set_status_on_exception=False):
                yield
            return
        links = [trace.Link(span.get_span_context()) for span in spans]
        with self._tracer.start_as_current_span("touchline.send", links=links, attributes={"touchline.episodes": len(keys)}):
            yield

    def end(self, key: EpisodeKey, error: str = "") -> None:
        """Ends the span of an episode: it is acknowledged or, with a reason, it never will be by this writer."""
        span = self._spans.pop(key, None)
        if span is None:
            return
        if error:
            from opentelemetry.trace import StatusCode

            span.set_status(StatusCode.ERROR, error)
        span.end()

    def end_all(self, error: str) -> None:
        """Ends the spans of all episodes that are not acknowledged."""
        for key in list(self._spans):
            self.end(key, error)
