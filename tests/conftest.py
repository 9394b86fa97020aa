"""What all tests share."""

from __future__ import annotations

import logging
import os

from hypothesis import settings

# TorchRL announces every allocation on stdout, a hundred times in a property test.
logging.getLogger("torchrl").addFilter(lambda record: record.levelno >= logging.WARNING)

settings.register_profile("touchline", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("touchline")
