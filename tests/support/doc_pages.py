"""The pages of the documentation, taken apart: code blocks, headings, links, and the commands in them."""

from __future__ import annotations

import pathlib
import re
import shlex
import textwrap
from typing import NamedTuple

from repository import TREE

PAGES = sorted([*TREE.glob("*.md"), *(TREE / "docs").glob("*.md")])

_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```", flags=re.S | re.M)


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str  # as named from the top of the tree, such as 'docs/plan.md'
    line: int  # of its first line of text, from 1
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def name_of(page: pathlib.Path) -> str:
    return page.relative_to(TREE).as_posix()


def blocks(page: str, language: str | None = None) -> list[Block]:
    """The blocks of a page in their order, all or those of one language."""
    text = (TREE / page).read_text()
    found = [
        Block(page, text.count("\n", 0, match.start()) + 2, match[2], textwrap.dedent(match[3]))
        for match in _FENCE.finditer(text)
    ]
    return [block for block in found if language in (None, block.language)]


def prose(page: str) -> str:
    """The page without its blocks."""
    return _FENCE.sub("", (TREE / page).read_text())


def inline_code(page: str) -> list[str]:
    """What stands between backticks in the prose."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(page))]


def links(page: str) -> list[str]:
    """The targets of the page's links and pictures."""
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", prose(page)))


def anchors(page: str) -> list[str]:
    """What a link can name after '#': the headings, as GitHub writes them."""
    headings = re.findall(r"^#+ +(.+?) *$", prose(page), flags=re.M)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def words_of(command: str) -> list[str]:
    """A command's words as a shell splits them, without its comment and the variables that it sets."""
    words = shlex.split(command, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    return words


def commands(page: str) -> list[tuple[str, list[str]]]:
    """(where it stands, its words) of each command of a page: in blocks of sh; in the prose, those of this project."""
    found = []
    for block in blocks(page, "sh"):
        for line in block.text.replace("\\\n", " ").splitlines():
            found.append((str(block), words_of(line)))
    ours = re.compile(r"(PYTHON=\S+ )?(\./run|paged-dist-[\w-]+|python -m paged_dist\S+) \S")
    found += [(page, words_of(code)) for code in inline_code(page) if ours.match(code)]
    return [(where, words) for where, words in found if words]
