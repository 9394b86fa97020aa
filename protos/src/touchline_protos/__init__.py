"""Touchline's wire contract: the generated stubs, the codec and the values that both sides speak of. Besides, what both sides' files
have in common."""

from touchline_protos.types.batch import Batch
from touchline_protos.types.counts import Counts

__version__ = "0.1.0"

PROTOCOL_VERSION = "1.0"
"""MAJOR.MINOR. Ends of different major versions refuse each other."""

PROTOCOL_METADATA_KEY = "touchline-protocol"
"""The call metadata that carries the client's :data:`PROTOCOL_VERSION`."""

DEFAULT_MAX_MESSAGE_BYTES = 64 * 1024 * 1024
"""The one limit of a message, the same on both sides; what is larger travels in chunks."""

MAX_REQUEST_BYTES = 2 * 1024 * 1024
"""Largest message to a server: every server takes it, unless its limit of a message is less, and none has room for much larger ones."""

__all__ = ["DEFAULT_MAX_MESSAGE_BYTES", "MAX_REQUEST_BYTES", "PROTOCOL_METADATA_KEY", "PROTOCOL_VERSION", "Batch", "Counts", "__version__"]
