"""Pages are true: what they name exists, links lead somewhere, and tables have what they are about. test_code_blocks.py runs their code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from touchline._rpc.calls import ERROR_OF_REASON, ERROR_OF_STATUS
from touchline_server import read_cfg
from touchline_server.service.grpc_status import INTERNAL, STATUS_OF

ROOT = Path(__file__).parents[2]

PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / folder / "README.md" for folder in ("protos", "client", "server"))]
)


def table(text: str, marker: str) -> list[list[str]]:
    """Returns the cells of the table after a comment, without its head."""
    _, found, rest = text.partition(f"<!-- test: {marker} -->\n")
    assert found
    rows = [line.strip("| ").split(" | ") for line in rest.partition("\n\n")[0].splitlines()]
    return rows[2:]


def code_of(cell: str) -> str:
    assert cell.startswith("`") and cell.endswith("`"), cell
    return cell.strip("`")


# Configuration


def test_variables_that_pages_set_override_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    named = {match for page in PAGES for match in re.findall(r"\bTOUCHLINE_([A-Z]+)__([A-Z_]+)=([\w.:]+)", page.read_text("utf-8"))}
    named = {(section, key, value) for section, key, value in named if section != "TABLES"}
    assert len(named) >= 3

    for section, key, value in named:
        with monkeypatch.context() as patch:
            patch.setenv("TOUCHLINE_STORAGE__SCRATCH_DIR", "scratch")  # which storage.device = "disk" needs
            patch.setenv(f"TOUCHLINE_{section}__{key}", value)
            config = read_cfg(ROOT / "cfg" / "default.toml")
        assert str(getattr(getattr(config, section.lower()), key.lower())).lower() == value.lower()


# What pages name


def slugs(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    dead = []
    for path, anchor in re.findall(r"\]\((?!https?://)([^)#\s]*)#?([^)\s]*)\)", page.read_text("utf-8")):
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in slugs(target)):
            dead.append(f"{path}#{anchor}" if anchor else path)

    assert dead == []


def test_readme_leads_to_every_page() -> None:
    links = set(re.findall(r"\]\((docs/[^)#]*)", (ROOT / "README.md").read_text("utf-8")))
    pages = {str(page.relative_to(ROOT)) for page in PAGES if page.relative_to(ROOT).parts[0] == "docs" and page.parent.name != "reference"}

    assert pages - links == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_of_the_repository_that_are_named_exist(page: Path) -> None:
    named = re.findall(r"`((?:server|client|protos|tests|examples|benchmarks|docs|cfg|docker)/[\w./-]+)", page.read_text("utf-8"))

    assert [path for path in named if not (ROOT / path).exists()] == []


def test_make_targets_that_are_named_exist() -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    named = set()
    for page in PAGES:
        code = re.findall(r"`([^`\n]+)`", page.read_text("utf-8"))
        named |= {target for line in code for target in re.findall(r"(?:^|[ =])make (?:[A-Z]+=\S+ )*([a-z][a-z-]*)", line)}

    assert {"docs", "install", "serve"} <= named
    assert named - targets == set()


# Statuses


def test_protocol_page_has_every_status_and_reason() -> None:
    rows = table((ROOT / "docs" / "wire.md").read_text("utf-8"), "statuses")

    found = [(code_of(status), code_of(reason)) for status, reason, *_ in rows]

    assert len(found) == len(set(found))
    assert set(found) == {(status.code.name, status.reason) for status in (*STATUS_OF.values(), INTERNAL)}


def test_troubleshooting_says_which_error_each_status_and_reason_becomes() -> None:
    rows = table((ROOT / "docs" / "troubleshooting.md").read_text("utf-8"), "reasons")

    found = {tuple(where.replace("`", "").split(", ")): code_of(error) for error, where, *_ in rows}

    statuses = {*STATUS_OF.values(), INTERNAL}
    assert found == {
        (status.code.name, status.reason): (ERROR_OF_REASON.get(status.reason) or ERROR_OF_STATUS[status.code]).__name__
        for status in statuses
    }
