"""Keeps the list of files in docs/structure.md: every .py file of paged_dist, kernels and launch, once.

    python docs/list_structure.py           adds files that are missing, takes out those that are gone
    python docs/list_structure.py --fresh   writes every line anew
    python docs/list_structure.py --check   prints what is wrong and changes nothing

A line that is added says what the first line of the module's docstring says. Plain Python.
"""

from __future__ import annotations

import ast
import collections
import pathlib
import re
import sys

TREE = pathlib.Path(__file__).resolve().parents[1]
PAGE = TREE / "docs" / "structure.md"
BEGIN = "<!-- the files; python docs/list_structure.py -->"
# In the order in which a reader meets them; another folder of theirs comes behind the one that it is in.
FOLDERS = (
    "paged_dist",
    "paged_dist/mesh",
    "paged_dist/cache",
    "paged_dist/pages",
    "paged_dist/ops",
    "paged_dist/transfer",
    "paged_dist/cluster",
    "kernels",
    "kernels/decode",
    "kernels/cache_update",
    "kernels/attention",
    "kernels/seed",
    "launch",
)


def folder_on_disk(folder: str) -> pathlib.Path:
    """kernels and launch stand at the top of the tree; in an sdist inside paged_dist alone."""
    inside = TREE / "paged_dist" / folder
    return inside if folder.startswith(("kernels", "launch")) and not (TREE / folder).exists() else TREE / folder


def files() -> list[str]:
    """The .py files, in the order of the page."""
    found = []
    for top in ("paged_dist", "kernels", "launch"):
        base = folder_on_disk(top)
        for path in base.rglob("*.py"):
            inner = path.relative_to(base)
            if top != "paged_dist" or inner.parts[0] not in ("kernels", "launch"):
                found.append(f"{top}/{inner.as_posix()}")

    def order(file: str):
        folder = file.rpartition("/")[0]
        known = max((f for f in FOLDERS if f"{folder}/".startswith(f"{f}/")), key=len)
        return FOLDERS.index(known), folder, not file.endswith("/__init__.py"), file

    return sorted(found, key=order)


def first_line(file: str) -> str:
    """The first line of a module's docstring, without the full stop."""
    folder, _, name = file.rpartition("/")
    doc = ast.get_docstring(ast.parse((folder_on_disk(folder) / name).read_text())) or ""
    return doc.split("\n")[0].rstrip(".:") or "(no docstring)"


def listed() -> list[tuple[str, str]]:
    """(file, what is said of it) of each line of the page."""
    found, folder = [], ""
    for line in PAGE.read_text().partition(BEGIN)[2].splitlines():
        if heading := re.fullmatch(r"#+ `([\w/]+)/`.*", line):
            folder = heading[1]
        elif entry := re.fullmatch(r"- `([\w.]+\.py)`: (.*)", line):
            found.append((f"{folder}/{entry[1]}", entry[2]))
    return found


def problems() -> list[str]:
    """What is wrong with the list, a line each; empty where it is right."""
    there, said = files(), collections.Counter(file for file, _ in listed())
    return [
        *(f"missing: {file}: {first_line(file)}" for file in there if file not in said),
        *(f"gone: {file}" for file in said if file not in there),
        *(f"{count} times: {file}" for file, count in said.items() if count > 1),
        *(f"nothing is said of {file}" for file, words in listed() if len(words.split()) < 2),
    ]


def text(fresh: bool) -> str:
    """The page with its list in order: what it says of a file, or, for a new one, the module's first line."""
    said = {} if fresh else dict(listed())
    parts, folder = [PAGE.read_text().partition(BEGIN)[0] + BEGIN], ""
    for file in files():
        if file.rpartition("/")[0] != folder:
            folder = file.rpartition("/")[0]
            parts.append(f"\n### `{folder}/`\n")
        name = file.rpartition("/")[2]
        parts.append(f"- `{name}`: {said.get(file) or first_line(file)}")
    return "\n".join(parts) + "\n"


def main(arguments: list[str]) -> int:
    unknown = set(arguments) - {"--fresh", "--check"}
    if unknown:
        print(f"unknown: {' '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    found = problems()
    print("\n".join(found) or "each file stands in docs/structure.md once")
    if "--check" in arguments:
        return int(bool(found))
    PAGE.write_text(text("--fresh" in arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
