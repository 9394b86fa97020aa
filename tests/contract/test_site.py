"""The site of the documentation builds strictly, fetches nothing, and its references are complete."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from touchline_protos.v1 import replay_pb2 as pb

ROOT = Path(__file__).parents[2]
DOCUMENTED = ("touchline", "touchline.datasets", "touchline.recorders", "touchline_server")
"""Packages whose exports are in the reference."""


def build(folder: Path, out: Path) -> subprocess.CompletedProcess[str]:
    # Without --quiet, with which mkdocs counts no warnings and strict does nothing.
    command = [sys.executable, "-m", "mkdocs", "build", "--config-file", folder / "mkdocs.yml", "--site-dir", out]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The built site; building it is the first test."""
    out = tmp_path_factory.mktemp("site")
    result = build(ROOT, out)
    assert result.returncode == 0, result.stderr
    yield out
    shutil.rmtree(out)


def pages(site: Path) -> dict[str, str]:
    return {str(path.relative_to(site)): path.read_text("utf-8") for path in site.rglob("*.html")}


def test_site_fetches_nothing_from_elsewhere(site: Path) -> None:
    fetched = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*?(?:src|href)=\"?((?:https?:)?//[^\" >]*)")
    styles = "".join(path.read_text("utf-8") for path in site.rglob("*.css"))

    found = {name: fetched.findall(text) for name, text in pages(site).items()}

    assert len(found) > 30
    assert {name: addresses for name, addresses in found.items() if addresses} == {}
    assert re.findall(r"url\([\"']?(?:https?:)?//[^)]*|@import[^;]*", styles) == []


def test_no_direction_for_the_tests_is_shown(site: Path) -> None:
    assert [name for name, text in pages(site).items() if "<!-- test" in text or "&lt;!-- test" in text] == []


@pytest.mark.parametrize("package", DOCUMENTED)
def test_reference_has_every_export(site: Path, package: str) -> None:
    texts = "".join(path.read_text("utf-8") for path in (site / "reference").glob("*.html"))
    documented = {name.rpartition(".")[2] for name in re.findall(r'id="(touchline[\w.]*)"', texts)}

    assert set(importlib.import_module(package).__all__) - {"__version__", "FORMATS"} - documented == set()


def test_reference_has_every_call_message_and_field_with_its_comment(site: Path) -> None:
    text = (site / "reference" / "protocol.html").read_text("utf-8")
    rows = {name for row in re.findall(r"<tr>(.*?)</tr>", text, re.DOTALL) for name in re.findall(r"<td><code>(\w+)</code></td>", row)[:1]}
    headings = set(re.findall(r'<h3 id="([\w-]+)"', text))

    for service in pb.DESCRIPTOR.services_by_name.values():
        assert {method.name.lower() for method in service.methods} <= headings
    for message in pb.DESCRIPTOR.message_types_by_name.values():
        assert message.name.lower() in headings
        assert {field.name for field in message.fields} <= rows
    assert {value.name for enum in pb.DESCRIPTOR.enum_types_by_name.values() for value in enum.values} <= rows
    assert re.findall(r"<tr>\s*<td><code>\w+</code></td>\s*<td>\d+</td>\s*<td>[^\n]*</td>\s*<td></td>", text) == []


@pytest.mark.parametrize(
    ("planted", "complaint"),
    [
        ("[nowhere](nowhere.md)", "nowhere.md"),
        ("[nowhere](other.md#nowhere)", "#nowhere"),
        ("![nothing](nothing.png)", "nothing.png"),
    ],
)
def test_strict_build_refuses_a_planted_fault(planted: str, complaint: str, tmp_path: Path) -> None:
    """The same checks of links as in mkdocs.yml, on two pages without the slow references."""
    settings = (ROOT / "mkdocs.yml").read_text("utf-8")
    checks = settings[settings.index("validation:") : settings.index("\nplugins:")].partition("\n\n")[0]
    assert "anchors: warn" in checks and "strict: true" in settings
    (tmp_path / "mkdocs.yml").write_text(f"site_name: planted\nstrict: true\ntheme: mkdocs\nplugins: []\n{checks}\n", "utf-8")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(f"# Planted\n\n{planted}\n", "utf-8")
    (tmp_path / "docs" / "other.md").write_text("# Other\n", "utf-8")

    result = build(tmp_path, tmp_path / "out")

    assert result.returncode == 1
    assert complaint in result.stderr
