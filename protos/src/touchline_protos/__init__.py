"""Touchline's wire contract: the generated stubs, the codec and the values that both sides speak of. Besides, what both sides' files
have in common."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from touchline_protos.types.limits import DEFAULT_MAX_MESSAGE_BYTES, MAX_REQUEST_BYTES
from touchline_protos.types.metadata import PROTOCOL_METADATA_KEY

if TYPE_CHECKING:
    from touchline_protos.types.batch import Batch
    from touchline_protos.types.counts import Counts

__version__ = "0.1.0"

PROTOCOL_VERSION = "1.0"
"""MAJOR.MINOR. Ends of different major versions refuse each other."""

__all__ = ["DEFAULT_MAX_MESSAGE_BYTES", "MAX_REQUEST_BYTES", "PROTOCOL_METADATA_KEY", "PROTOCOL_VERSION", "Batch", "Counts", "__version__"]

_ELSEWHERE = {"Batch": "touchline_protos.types.batch", "Counts": "touchline_protos.types.counts"}
"""Where a name comes from that is imported when it is asked for: a health check needs metadata keys and no numpy."""


def __getattr__(name: str) -> Any:
    if name not in _ELSEWHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_ELSEWHERE[name]), name)
    globals()[name] = value
    return value
