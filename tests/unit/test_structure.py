"""What the tree promises a reader: one name is one thing, and each public name's docstring has an example that runs."""

import ast
import collections
import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from repository import TREE

import paged_dist as pd
from paged_dist import kernels

PRODUCT = [file for folder in ("paged_dist", "kernels", "launch") for file in sorted((TREE / folder).rglob("*.py"))]

PUBLIC = {name: getattr(pd, name) for name in pd.__all__} | {
    name: getattr(kernels, name) for name in kernels.__all__ if name != "DEFAULT_MASK_VALUE"
}
PUBLIC |= {f"PageAllocator.{name}": getattr(pd.PageAllocator, name) for name in ("place", "prefix_match")}  # inherited
# What an example may take for granted, beside Python's own.
KNOWN = {"pd": pd, "kernels": kernels, "jax": jax, "jnp": jnp, "np": np}


def defined(tree: ast.Module):
    """The names that a module defines at its top level, those that it imports left out."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


def test_a_module_level_name_is_defined_once_in_the_product():
    files = collections.defaultdict(list)
    for file in PRODUCT:
        for name in set(defined(ast.parse(file.read_text()))):
            files[name].append(str(file.relative_to(TREE)))
    entry_points = {"main", "cli"}  # of each program
    twice = {
        name: found
        for name, found in files.items()
        if len(found) > 1 and name not in entry_points and not name.startswith("__")
    }
    assert not twice


def test_files_are_short_and_properties_are_methods():
    for file in PRODUCT:
        text = file.read_text()
        assert text.count("\n") <= 450, f"{file}: a module is one idea"
        assert "property(lambda" not in text and "locals()" not in text, file


def test_no_module_takes_a_private_name_of_another():
    taken = []
    for file in PRODUCT:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("paged_dist"):
                names = [alias.name for alias in node.names if alias.name.startswith("_")]
                taken += [f"{file.name}: {name}" for name in names if name not in ("_compat", "_errors")]
    assert not taken


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_the_docstring_of_each_public_name_has_an_example_that_runs(name, capsys):
    examples = doctest.DocTestFinder(exclude_empty=True).find(PUBLIC[name], name, globs=dict(KNOWN))
    assert any(part.examples for part in examples), f"{name}: no example"
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for part in examples:
        runner.run(part)
    assert not runner.failures, capsys.readouterr().out
