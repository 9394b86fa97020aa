"""Hooks of the site's build (mkdocs.yml): pages from outside ``docs/``, links that leave it, and the page of the protocol's messages.

The pages are written to be read as plain files of the repository. On the site README.md, CONTRIBUTING.md and CHANGELOG.md are pages, too;
other files of the repository that a page links to are copied to ``repository/``; links are rewritten accordingly. HTML comments, which
direct the tests of code blocks, are left out.
"""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))

import proto_reference

ROOT = Path(__file__).resolve().parents[2]
DOCS = "docs"
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Pages from outside of docs/, and their names on the site."""
REPOSITORY = "repository"
"""Folder of the site for other files of the repository."""
MESSAGES = "reference/protocol.md"
COMMENT = re.compile(r"<!--.*?-->\n?", re.DOTALL)
LINK = re.compile(r"(\]\()(?!\w+:|#)([^)#\s]+)")


def repository_path(uri: str) -> str:
    """Returns the path in the repository of a page of the site."""
    return next((path for path, page in PAGES.items() if page == uri), f"{DOCS}/{uri}")


def site_uri(path: str) -> str:
    """Returns the place on the site of a file of the repository."""
    if path in PAGES:
        return PAGES[path]
    return path.removeprefix(f"{DOCS}/") if path.startswith(f"{DOCS}/") else f"{REPOSITORY}/{path}"


def targets(page: str) -> dict[str, str]:
    """Returns the links of a page of the repository, each with the path in the repository that it leads to."""
    text = (ROOT / page).read_text("utf-8")
    return {link: posixpath.normpath(posixpath.join(posixpath.dirname(page), link)) for _, link in LINK.findall(text)}


def on_files(files: Files, *, config: Any) -> Files:
    """Adds the pages and files from outside of ``docs/``."""
    for path, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / path)))
    files.append(File.generated(config, MESSAGES, content=proto_reference.render(ROOT / "protos")))
    pages = [repository_path(file.src_uri) for file in files.documentation_pages() if file.src_uri != MESSAGES]
    linked = {path for page in pages for path in targets(page).values()}
    for path in sorted(linked):
        if not path.startswith(f"{DOCS}/") and path not in PAGES and (ROOT / path).is_file():
            files.append(File.generated(config, site_uri(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Rewrites links for the site and removes comments."""
    uri = page.file.src_uri
    if uri == MESSAGES:
        return markdown
    paths = targets(repository_path(uri))

    def rewritten(match: re.Match[str]) -> str:
        path = paths.get(match[2])
        return match[0] if path is None else match[1] + posixpath.relpath(site_uri(path), posixpath.dirname(uri) or ".")

    return LINK.sub(rewritten, COMMENT.sub("", markdown))
