"""docs/command-line.md: it has the present help of every command, and names every check of the doctor."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_command_line", DOCS / "make_command_line.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_has_the_present_help_of_every_command(maker: ModuleType) -> None:
    page = maker.PAGE.read_text("utf-8")

    assert page == maker.updated(page), "run: .venv/bin/python docs/make_command_line.py"
    for command in ("touchline status", "touchline spool send", "touchline-server serve", "touchline-server recover"):
        assert f"### `{command}`\n\n```text\nUsage: {command} " in page


def test_page_names_every_check_of_the_doctor() -> None:
    sources = [path.read_text("utf-8") for path in (DOCS.parent / "client/src/touchline/_cli/doctor").glob("*.py")]
    checks = set(re.findall(r"(?:Finding|give_up)\(\s*\"(\w+)\"", "\n".join(sources)))

    table = (DOCS / "command-line.md").read_text("utf-8").partition("## Doctor")[2].partition("\n## ")[0]
    assert len(checks) >= 15
    assert checks <= set(re.findall(r"`(\w+)`", table))


@pytest.mark.parametrize("name", ["status.svg", "top.svg"])
def test_pictures_are_small_and_fetch_nothing(name: str) -> None:
    svg = (DOCS / "images" / name).read_text("utf-8")

    assert len(svg) < 100_000
    assert re.findall(r"https?://(?!www\.w3\.org|www\.textualize\.io)[^\s\"')]+", svg) == []
