"""What cannot go to another process, and says so."""

from __future__ import annotations

from typing import ClassVar, NoReturn


class NotCopied:
    """Refuses to be pickled and copied: it holds what is this process's."""

    _instead: ClassVar[str]
    """What to do instead, in words."""

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{type(self).__name__}: cannot be pickled or copied, it belongs to this process; {self._instead}")
