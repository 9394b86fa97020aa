"""What client and server share: the wire contract with stubs and codec, values, shared memory, and files of spools and stores."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from touchline_protos.types.limits import DEFAULT_MAX_MESSAGE_BYTES, MAX_REQUEST_BYTES
from touchline_protos.types.metadata import PROTOCOL_METADATA_KEY

if TYPE_CHECKING:
    from touchline_protos.types.batch import Batch
    from touchline_protos.types.counts import Counts

__version__ = "0.2.0"

PROTOCOL_VERSION = "1.3"
"""Version of the wire contract, MAJOR.MINOR. Client and server of different major versions refuse each other."""

__all__ = ["DEFAULT_MAX_MESSAGE_BYTES", "MAX_REQUEST_BYTES", "PROTOCOL_METADATA_KEY", "PROTOCOL_VERSION", "Batch", "Counts", "__version__"]

_ELSEWHERE = {"Batch": "touchline_protos.types.batch", "Counts": "touchline_protos.types.counts"}
"""Modules of the names that are imported on first use: a health check needs the metadata keys, but not numpy."""


def __getattr__(name: str) -> Any:
    if name not in _ELSEWHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_ELSEWHERE[name]), name)
    globals()[name] = value
    return value
