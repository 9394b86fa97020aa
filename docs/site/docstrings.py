"""Docstrings of this project as Markdown: roles become code, and ``::`` before an example one colon."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:\w+:)?\w+:`~?\.?([^`]+)`")
BEFORE_CODE = re.compile(r"\s?::$", re.MULTILINE)


class ProjectDocstrings(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = BEFORE_CODE.sub(":", ROLE.sub(r"`\1`", obj.docstring.value))
