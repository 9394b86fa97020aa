"""A gather of a whole batch in one launch: every column, from wherever it lies, into one body.

It needs addresses, shapes and a torch device, so a learner's process and the server's in-process buffer use the same one. The specs here
import neither torch nor Triton; :mod:`.row_gather` imports torch, and :mod:`.kernel` Triton, which is done when the first gather runs.
"""

from touchline_protos.gather.specs import OutputSpec, PartSpec

__all__ = ["OutputSpec", "PartSpec"]
