"""No page, and no line of code, points to a page that isn't there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\((?!https?:|mailto:)([^)#\s]*)(?:#([^)\s]+))?\)")
_MENTION = re.compile(r"\bdocs/[\w/.-]+\.md\b")


PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
SOURCES = [
    ROOT / "Makefile",
    *ROOT.glob("*.toml"),
    *ROOT.glob("*.yaml"),
    *(ROOT / "monitoring").iterdir(),
    *(
        path
        for tree in ("protos", "models", "client", "server", "simulations", "tests")
        for path in (ROOT / tree).rglob("*")
        if path.suffix in {".py", ".proto", ".toml"} and "_pb2" not in path.name
    ),
]


def anchors(page: Path) -> set[str]:
    """The anchors that headings of a page get: lower case, blanks as dashes, no punctuation."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_between_pages_lead_somewhere() -> None:
    broken = []
    for page in PAGES:
        for target, anchor in _LINK.findall(page.read_text("utf-8")):
            found = (page.parent / target).resolve() if target else page
            if not found.exists() or (anchor and found.suffix == ".md" and anchor not in anchors(found)):
                broken.append(f"{page.relative_to(ROOT)} -> {target}#{anchor}")
    assert not broken


def test_pages_that_code_refers_to_exist() -> None:
    broken = []
    for source in SOURCES:
        for mention in _MENTION.findall(source.read_text("utf-8")):
            if not (ROOT / mention).is_file():
                broken.append(f"{source.relative_to(ROOT)} -> {mention}")
    assert not broken


def test_every_page_of_the_docs_is_in_their_index() -> None:
    index = ROOT / "docs" / "README.md"
    linked = {(index.parent / target).resolve() for target, _ in _LINK.findall(index.read_text("utf-8")) if target}
    missing = [
        str(page.relative_to(ROOT)) for page in PAGES if index.parent in page.parents and page not in linked | {index}
    ]
    assert not missing
