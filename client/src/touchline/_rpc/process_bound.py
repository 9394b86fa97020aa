"""Objects that belong to the process that made them, and say so when they are used in another one."""

from __future__ import annotations

import os
from typing import ClassVar, NoReturn

from touchline._rpc.fork import leak_parent_object, register_after_fork
from touchline.errors import ForkError


class ProcessBound:
    """Base of a stream or writer: refuses to be pickled or copied, and to be used in a forked child.

    A forked child keeps its copy of the object alive and never touches it, because a destructor could wait for a lock that some thread of
    the parent held at the fork.
    """

    _instead: ClassVar[str]
    """What to do in the other process, as the end of an error text."""

    def __init__(self) -> None:
        self._process = os.getpid()
        register_after_fork(self)

    @property
    def _inherited(self) -> bool:
        """Whether this is a forked child's copy of an object that the parent still uses."""
        return self._process != os.getpid()

    def _check_process(self) -> None:
        """Raises ForkError in a forked child."""
        if self._process != os.getpid():
            raise ForkError(
                f"{type(self).__name__}: belongs to process {self._process} and was used in its forked child {os.getpid()}; {self._instead}"
            )

    def after_fork_in_child(self) -> None:
        """Keeps the parent's object alive; every later use of it raises ForkError."""
        leak_parent_object(self)

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{type(self).__name__}: cannot be pickled or copied, it belongs to this process; {self._instead}")
