"""README and docs as data: their links, headings, code blocks and code spans."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path

from scripts.docs_tables import filled

ROOT = Path(__file__).resolve().parents[2]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
INDENTED = re.compile(r"(?:(?<=\n\n)|\A)(?: {4}.*\n|\n(?= {4}))+")
SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


@functools.cache
def text(page: Path) -> str:
    """A page as the site has it, with the tables that come from the code."""
    return filled(page.read_text(encoding="utf-8"))


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return INDENTED.sub("\n", FENCE.sub("", text(page)))


def links(page: Path) -> list[str]:
    return LINK.findall(SPAN.sub("", prose(page)))


def anchors(page: Path) -> set[str]:
    """The names that headings go by, on the site and where the repository is browsed."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).strip().replace(" ", "-") for heading in headings}


def python_blocks(page: Path) -> list[str]:
    return [code for language, code in FENCE.findall(text(page)) if language == "python"]


def code_lines(page: Path) -> Iterator[str]:
    """Lines of code blocks that are not Python, and code spans: where commands are."""
    whole = text(page)
    blocks = [code for language, code in FENCE.findall(whole) if language != "python"]
    blocks += [found[0] for found in INDENTED.finditer(FENCE.sub("", whole))]
    for block in blocks:
        yield from (line.strip() for line in block.splitlines())
    yield from (re.sub(r"\s*\n\s*", " ", span) for span in SPAN.findall(prose(page)))


def commands(page: Path, program: str) -> list[str]:
    """The command lines of a program, without remarks (after two spaces) and without where their output goes."""
    found = []
    for whole in code_lines(page):
        for line in whole.split(" && "):
            line = line.removeprefix(".venv/bin/")
            if line.startswith(f"{program} "):
                found.append(re.sub(r" > \S+$", "", re.split(r"\s{2,}", line)[0]))
    return found
