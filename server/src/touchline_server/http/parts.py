"""What the HTTP server works with. The composition root makes it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias

from touchline_protos.types.status import ServerStatus
from touchline_server.tables.registry import TableRegistry

Tables: TypeAlias = frozenset[str] | None
"""Names of the tables that a caller may see; None: every table."""


@dataclass(frozen=True, slots=True)
class HttpParts:
    """The parts of one HTTP server. Their functions may be called from any thread."""

    tables: TableRegistry
    """Tables whose episodes are shown."""
    readers: ThreadPoolExecutor
    """Threads that read stored episodes."""
    take_status: Callable[[], Future[ServerStatus]]
    """Takes a snapshot in the service's event loop; raises RuntimeError once that has ended."""
    confine: Callable[[ServerStatus, Tables], ServerStatus]
    """Returns the part of a snapshot that concerns some tables."""
    check_serving: Callable[[], None]
    """Raises a ReplayError while the server takes no calls: it is restoring its tables, or stopping."""
    authorize: Callable[[str], Tables] | None
    """Returns the tables that a token's owner may see, or raises AccessDeniedError; None: no token is needed."""
