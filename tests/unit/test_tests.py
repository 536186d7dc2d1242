"""The structure of the tests: what they share stands in tests/support, a name means one thing, folders keep rules."""

from __future__ import annotations

import ast
import collections
import functools
import pathlib

import pytest

TESTS = pathlib.Path(__file__).resolve().parents[1]


@functools.cache
def trees() -> dict[pathlib.Path, ast.Module]:
    """The syntax tree of each file, by its path below tests/."""
    return {path.relative_to(TESTS): ast.parse(path.read_text()) for path in sorted(TESTS.rglob("*.py"))}


def imported_by(tree: ast.Module) -> set[str]:
    """The modules that a file imports anywhere."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names


def test_no_file_imports_a_test_module():
    wrong = {
        str(path): name for path, tree in trees().items() for name in imported_by(tree) if name.startswith("test_")
    }
    assert wrong == {}


def test_no_two_test_modules_have_one_name():
    """Pytest imports them by their file's name alone."""
    names = collections.Counter(path.name for path in trees() if path.name != "conftest.py")
    assert [name for name, count in names.items() if count > 1] == []


def test_a_helper_s_name_means_one_thing():
    """No two top-level functions or classes that are no tests share a name, in all files together."""
    where = collections.defaultdict(set)
    for path, tree in trees().items():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith(("test_", "pytest_")):
                where[node.name].add(str(path))
    assert {name: paths for name, paths in where.items() if len(paths) > 1} == {}


def test_no_constant_of_the_shared_modules_has_a_namesake():
    where = collections.defaultdict(set)
    for path, tree in trees().items():
        for node in tree.body:
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    for name in ast.walk(target):
                        if isinstance(name, ast.Name):
                            where[name.id].add(str(path))
    assert {n: p for n, p in where.items() if len(p) > 1 and any(x.startswith("support") for x in p)} == {}


@pytest.mark.parametrize("folder", ["unit", "simulated", "processes", "device"])
def test_what_needs_libtpu_stands_in_aot(folder):
    """README's examples stand together in one file, whatever they need; test_package.py tests the mark itself."""
    wrong = [
        str(path)
        for path, tree in trees().items()
        if path.parts[0] == folder
        and path.name not in ("test_docs.py", "test_package.py")
        and any("needs_libtpu" in (getattr(n, "id", ""), getattr(n, "attr", "")) for n in ast.walk(tree))
    ]
    assert wrong == []
