"""What tests read from a program compiled for several slices: libtpu compiles one for each slice, alike for all."""

from __future__ import annotations

import math
import re

import numpy as np
from jax.sharding import Mesh


def groups_along(mesh: Mesh, names: tuple[str, ...], num_slices: int = 1) -> frozenset[frozenset[int]]:
    """The partitions that a collective over mesh axes `names` joins, in the program of one of `num_slices` slices.

    Its partitions are the mesh's positions there, the outermost axis being split over slices in equal parts.
    """
    sizes = dict(mesh.shape)
    sizes[mesh.axis_names[0]] //= num_slices
    over = [list(sizes).index(name) for name in names]
    ids = np.moveaxis(np.arange(math.prod(sizes.values())).reshape(*sizes.values()), over, range(-len(over), 0))
    groups = ids.reshape(-1, math.prod(sizes[name] for name in names))
    return frozenset(frozenset(group) for group in groups.tolist())


def partitions(hlo: str) -> int:
    """How many devices a compiled program runs on together: those of one slice."""
    return int(re.search(r"num_partitions=(\d+)", hlo)[1])


def crossings(hlo: str) -> list[str]:
    """What of a compiled program crosses slices, or leaves the device at all: sends, receives, host transfers."""
    words = r"\b(?:send|recv)(?:-done)?\(|megascale|is_host_transfer|\b(?:out|in)feed\("
    return re.findall(rf"^.*(?:{words}).*$", hlo, re.M | re.I)
