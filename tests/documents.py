"""The repository's Markdown pages: their code, headings and links."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
FOLDERS = ("docs", "examples", "optax_sam", "tests")
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in (
        *ROOT.glob("*.md"),
        *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md")),
    )
)
TUTORIAL = "docs/tutorial.md"
NOTEBOOKS = [page for page in PAGES if page.startswith("docs/notebooks/")]


class Block(NamedTuple):
    language: str  # "" for text.
    heading: str  # The one it stands under.
    content: str


def blocks(page: str) -> Iterator[Block]:
    """A page in pieces: the code between fences, and the text around it by headings."""
    heading = ""
    # Between fences a line that begins with # is a comment, so these are split first.
    pieces = re.split(r"^```(.*)\n", (ROOT / page).read_text(), flags=re.MULTILINE)
    for i, content in enumerate(pieces[::2]):
        if i % 2:
            yield Block(pieces[2 * i - 1].strip(), heading, content)
            continue
        start, *sections = re.split(r"^#+ (.*)\n", content, flags=re.MULTILINE)
        yield Block("", heading, start)
        for heading, text in zip(sections[::2], sections[1::2], strict=True):
            yield Block("", heading, text)


def python(page: str) -> dict[str, str]:
    """The Python code of a page by the heading it stands under, in order."""
    sections: dict[str, str] = {}
    for block in blocks(page):
        if block.language in ("python", "{code-cell} python"):
            if block.heading in sections:
                assert block.heading == list(sections)[-1], f"{page}: two such headings"
            sections[block.heading] = sections.get(block.heading, "") + block.content
    return sections


def run(page: str, heading: str = "") -> dict[str, Any]:
    """The names that a reader has who pasted a page's code, all or up to a heading's.

    Pages of the site go on from the tutorial's quickstart, as docs/index.md says;
    notebooks, and pages elsewhere, begin with nothing.
    """
    sections = python(page)
    assert not heading or heading in sections, f"{page} has no code under {heading}"
    scope: dict[str, Any] = {"__name__": "__main__"}
    if page.startswith("docs/") and page not in (TUTORIAL, *NOTEBOOKS):
        scope = run(TUTORIAL, "Flax linen")
    for name, code in sections.items():
        exec(compile(code, f"{page}: {name}", "exec"), scope)
        if name == heading:
            break
    return scope


def commands(page: str) -> list[str]:
    """The shell commands of a page, in order."""
    return [block.content.strip() for block in blocks(page) if block.language == "sh"]


def anchors(page: str) -> set[str]:
    """What links can name of a page: its headings, as GitHub and MyST write them."""
    return {
        re.sub(r"[^\w\- ]", "", block.heading.lower()).replace(" ", "-")
        for block in blocks(page)
    }


def links(page: str) -> list[str]:
    """The targets of a page's links and pictures that are no web addresses."""
    text = "".join(block.content for block in blocks(page) if not block.language)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    return [target for target in targets if "://" not in target]
