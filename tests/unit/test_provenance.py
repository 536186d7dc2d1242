"""What a record says of where it is from."""

from __future__ import annotations

import pathlib
import subprocess

from paged_dist.launch.common import provenance


def test_the_commit_is_that_of_the_tree_that_the_package_is_run_from():
    tree = pathlib.Path(__file__).parents[2]
    done = subprocess.run(["git", "-C", tree, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=60)
    is_checkout = (tree / ".git").exists() and done.returncode == 0
    commit = provenance.git_commit()
    assert commit is None if not is_checkout else commit.rstrip("+") == done.stdout.strip()
