"""The pages that a reader is given, and what tests take from them: blocks, words in backticks, tables."""

from __future__ import annotations

import re

from repository import ROOT
from test_structure import tracked

PAGES = sorted(["README.md", "CONTRIBUTING.md", *tracked("docs/*.md")])
QUOTED = re.compile(r"`([^`\n]+)`")
FENCED = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.S | re.M)


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


def quoted(page: str) -> list[str]:
    """What stands in single backticks outside of blocks."""
    return QUOTED.findall(FENCED.sub("", text_of(page)))


def blocks(page: str, language: str) -> list[str]:
    return [body for kind, body in FENCED.findall(text_of(page)) if kind == language]


def rows_of(page: str, heading: str) -> list[list[str]]:
    """The cells of the table rows under a heading, its head left out."""
    section = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#+ |\Z)", text_of(page), re.S | re.M)
    assert section, f"{page} has no heading {heading!r}"
    lines = [line for line in section[1].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def example(page: str, containing: str) -> str:
    (found,) = [body for body in blocks(page, "python") if containing in body]
    return found
