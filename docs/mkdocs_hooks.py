"""What `make docs` adds to mkdocs: pages from outside docs/, links to files of the repository, names in docstrings.

README.md, CONTRIBUTING.md, CHANGELOG.md and benchmarks/NOTES.md are pages of the site as they are, so nothing is said
twice. A link to another file of the repository, e.g. a result, leads to a copy of that file in the site.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent

PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/NOTES.md": "notes.md",
}
"""Files of the repository that are pages, and the site's name of each."""

COPIES = "repository"
"""Folder of the site for other files of the repository."""

FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<=\]\()(?!\w+:|#|/)([^)#\s]+)")
ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):`~?([^`]+)`")
SHARED = re.compile(r"^( +)(\w+)((?:, \w+)+): ", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside docs/, and the files that pages link to."""
    for path, name in PAGES.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / path)))
    linked = {
        target
        for page in files.documentation_pages()
        for target in _targets(page.content_string, _repository_path(page.src_uri))
        if _site_path(target).startswith(f"{COPIES}/") and (ROOT / target).is_file()
    }
    for target in sorted(linked):
        files.append(File.generated(config, _site_path(target), abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links as the repository has them into the site's; mkdocs then refuses those that lead nowhere."""
    here = page.file.src_uri
    folder = posixpath.dirname(_repository_path(here))

    def turned(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match[1]))
        return posixpath.relpath(_site_path(target), posixpath.dirname(here) or ".")

    return _outside_fences(lambda text: LINK.sub(turned, text), markdown)


class Docstrings(griffe.Extension):
    """Show Sphinx's roles, which docstrings use for names, as code, and names that share a line in its description."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each object of the package that was read."""
        if obj.docstring is not None:
            text = ROLE.sub(r"`\1`", obj.docstring.value)
            obj.docstring.value = SHARED.sub(r"\1\2: \2\3: ", text)


def _repository_path(name: str) -> str:
    """Where a page of the site lies in the repository."""
    return next((path for path, page in PAGES.items() if page == name), f"docs/{name}")


def _site_path(path: str) -> str:
    """Where a file of the repository lies in the site."""
    if path in PAGES:
        return PAGES[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else f"{COPIES}/{path}"


def _targets(markdown: str, path: str) -> set[str]:
    """Files of the repository that a page links to."""
    folder = posixpath.dirname(path)
    return {posixpath.normpath(posixpath.join(folder, link)) for link in LINK.findall(FENCE.sub("", markdown))}


def _outside_fences(change: Any, markdown: str) -> str:
    """Change a text but for its blocks of code."""
    parts, end = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [change(markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, change(markdown[end:])])
