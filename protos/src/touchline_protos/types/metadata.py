"""Keys of the metadata that calls carry beside their messages. They are defined here only."""

from __future__ import annotations

PROTOCOL_METADATA_KEY = "touchline-protocol"
"""Metadata of a call: the client's :data:`touchline_protos.PROTOCOL_VERSION`."""

TOKEN_METADATA_KEY = "authorization"
"""Metadata of a call: ``Bearer TOKEN``."""

CLIENT_METADATA_KEY = "touchline-client"
"""Metadata of a call: the client's version, as in HTTP's User-Agent: ``touchline/0.2.0 python/3.11.2``. For the server's status only."""

SPOOL_METADATA_KEY = "touchline-spool"
"""Metadata of a call with episodes from a spool: ``EPISODES,BYTES``, how many wait in it besides those of the call, and its size on disk.
For the server's status only."""

REASON_METADATA_KEY = "touchline-reason"
"""Trailing metadata of a failed call: a :class:`~touchline_protos.types.reasons.Reason`."""

RETRY_METADATA_KEY = "grpc-retry-pushback-ms"
"""Trailing metadata of a failed call: delay before the next attempt, in whole milliseconds. gRPC's own name for it (proposal A6)."""

HEALTH_DETAIL_METADATA_KEY = "touchline-health-detail"
"""Trailing metadata of a health check: why the server does not serve, or why it accepts no episodes."""
