"""Where a record is from: versions, commit, time and flags, so that a number can be measured again."""

from __future__ import annotations

import datetime
import importlib.metadata
import pathlib
import platform
import subprocess

import numpy as np
from jax.sharding import Mesh

import paged_dist


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for name in ("paged-dist", "jax", "jaxlib", "libtpu", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """The commit of the tree that this package is run from, with '+' where files differ from it; None elsewhere."""
    tree = pathlib.Path(paged_dist.__file__).resolve().parent.parent
    if not (tree / ".git").exists():
        return None
    ask = lambda *what: subprocess.run(["git", "-C", tree, *what], capture_output=True, text=True, timeout=10)
    try:
        head, changed = ask("rev-parse", "HEAD"), ask("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.TimeoutExpired):
        return None
    return head.stdout.strip() + "+" * bool(changed.stdout.strip()) if head.returncode == 0 else None


def record_origin(flags: dict[str, object]) -> dict:
    """What every record carries of where it is from: versions, commit, time of day, and the flags that were given."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"versions": versions(), "git_commit": git_commit(), "time": now, "flags": flags}


def device_counts(mesh: Mesh) -> dict[str, int]:
    """How many devices of each kind `mesh` has."""
    kinds, counts = np.unique([d.device_kind for d in mesh.devices.flat], return_counts=True)
    return dict(zip(map(str, kinds), map(int, counts), strict=True))
