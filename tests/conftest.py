"""What all tests share."""

from __future__ import annotations

import ctypes
import logging
import os
import signal

from hypothesis import settings

# One thread of torch in this process and in its children: on a busy machine, OpenMP threads that wait for each other turned 3 seconds of
# training into a minute and more.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# TorchRL announces every allocation on stdout, a hundred times in a property test.
logging.getLogger("torchrl").addFilter(lambda record: record.levelno >= logging.WARNING)

# Servers of tests serve no web page unless a test asks for one: its port is the same for all.
os.environ.setdefault("TOUCHLINE_HTTP__ENABLED", "off")

# Without a card, Triton's kernels run in its interpreter on the CPU. Triton reads this when it is imported.
try:
    ctypes.CDLL("libcuda.so.1")
except OSError:
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("touchline", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("touchline")

# A shell starts what it runs in the background with SIGINT ignored, and so would be every process that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
