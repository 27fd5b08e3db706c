"""The documents: links lead somewhere, the README stays short, and no option or flag is left out or made up."""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md"), ROOT / "benchmarks" / "NOTES.md"])

LINES_OF_README = 130
SHARED = "What several commands take"
"""Section of docs/cli.md with the flags that are not repeated under each command."""

FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"(`+).+?\1", re.DOTALL)
LINK = re.compile(r"\[(?:[^\]\[]|\[[^\]]*\])*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#{1,6} +(.+?) *#*$", re.MULTILINE)
FLAG = re.compile(r"(?<![\w-])--?[a-z][a-z-]*")


def links(page: Path) -> Iterator[str]:
    """Targets of a page's links, those in code left out."""
    text = CODE.sub("code", FENCE.sub("", page.read_text(encoding="utf-8")))
    return (match[1] for match in LINK.finditer(text))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    found: set[str] = set()
    for heading in HEADING.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        text = LINK.sub(lambda link: link[0][1 : link[0].index("](")], heading).replace("`", "")
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        number = 1
        unique = slug
        while unique in found:
            unique, number = f"{slug}-{number}", number + 1
        found.add(unique)
    return found


def broken(page: Path) -> list[str]:
    """Links of a page that lead to no file, or to no heading of it."""
    wrong = []
    for link in links(page):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        inside = target.is_relative_to(ROOT)
        if not inside or not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    return wrong


def section(page: Path, title: str) -> str:
    """The text under a heading of the second level."""
    parts = re.split(r"^## +", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    (found,) = [part for part in parts[1:] if part.splitlines()[0].strip() == title]
    return found


def commands() -> dict[str, argparse.ArgumentParser]:
    """Every subcommand of the command line."""
    from afbs_compile.cli.main import _parser

    (sub,) = [action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(sub.choices)


def flags(parser: argparse.ArgumentParser) -> set[str]:
    """Every spelling of every flag but ``--help``."""
    return {flag for action in parser._actions for flag in action.option_strings} - {"-h", "--help"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_anchors_lead_somewhere(page):
    assert broken(page) == []


def test_a_link_that_leads_nowhere_is_seen(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    page, other = tmp_path / "page.md", tmp_path / "other.md"
    other.write_text("# One `thing`, or [two](page.md)\n\n## Twice\n\n## Twice\n\n```sh\n# not a heading\n```\n")
    good = "[a](other.md) [b](other.md#one-thing-or-two) [c](#here) [d](other.md#twice-1) [e](https://x.io) `[f](no)`"
    page.write_text(f"# Here\n\n{good}\n\n```\n[g](no.md)\n```\n")
    assert broken(page) == []
    bad = ["no.md", "other.md#not-a-heading", "#there", "../outside.md", "other.md#twice-2"]
    page.write_text("# Here\n\n" + " ".join(f"[x]({link})" for link in bad))
    assert broken(page) == bad


def test_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= LINES_OF_README


def test_pages_that_a_reader_needs_are_linked_from_the_readme():
    linked = set(links(README))
    assert {f"docs/{page.name}" for page in DOCS.glob("*.md")} - {"docs/api.md"} <= linked  # the API is the site's


def test_every_option_is_documented_once_and_none_is_made_up():
    from afbs_compile.options import OPTIONS

    rows = re.findall(r"^\| `(\w+)` \|.*$", (DOCS / "options.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(rows) == sorted(option.name for option in OPTIONS.values())


def test_commands_have_a_section_each():
    sections = re.findall(r"^## +(.+)$", (DOCS / "cli.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sections == [SHARED, *commands()]


@pytest.mark.parametrize("command", commands())
def test_every_flag_of_a_command_is_documented_and_none_is_made_up(command):
    shared = set(FLAG.findall(section(DOCS / "cli.md", SHARED)))
    own = set(FLAG.findall(section(DOCS / "cli.md", command)))
    exist = flags(commands()[command])
    assert exist - shared - own == set()
    assert own - exist == set()


def test_shared_flags_exist():
    shared = set(FLAG.findall(section(DOCS / "cli.md", SHARED)))
    assert shared <= set().union(*map(flags, commands().values()))


def test_every_flag_of_an_option_is_a_flag_of_a_command():
    rows = (DOCS / "options.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\|.*\| `(--[a-z-]+)` \|", rows, re.MULTILINE))
    assert named <= set().union(*map(flags, commands().values()))
