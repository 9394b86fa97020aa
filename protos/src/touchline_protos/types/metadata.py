"""The metadata that calls carry beside their messages: the one place where keys are spelled."""

from __future__ import annotations

PROTOCOL_METADATA_KEY = "touchline-protocol"
"""Of a call: the client's :data:`touchline_protos.PROTOCOL_VERSION`."""

TOKEN_METADATA_KEY = "authorization"
"""Of a call: ``Bearer TOKEN``."""

REASON_METADATA_KEY = "touchline-reason"
"""Trailing, of a call that failed: a :class:`~touchline_protos.types.reasons.Reason`."""

RETRY_METADATA_KEY = "grpc-retry-pushback-ms"
"""Trailing, of a call that failed: the delay before the next attempt in whole milliseconds. gRPC's own name for it (proposal A6)."""

HEALTH_DETAIL_METADATA_KEY = "touchline-health-detail"
"""Trailing, of a health check: why the server does not serve, or why it accepts no episodes."""
