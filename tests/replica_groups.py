"""Who talks to whom in a compiled program: the replica groups of its collectives, and what crosses slices."""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

_KINDS = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast"


class Talk(NamedTuple):
    """One collective of a compiled program."""

    kind: str
    groups: frozenset[frozenset[int]]  # partition ids, of this slice; single ones left out
    types: str  # of its results, as printed


def collective_groups(hlo: str) -> list[Talk]:
    """The collectives of a compiled program's text with the partitions that each of them joins.

    Those inside fusions and asynchronous pairs count once; one that joins no two partitions does not count.
    """
    found = []
    for match in re.finditer(rf"^.*? = (\(.*?\)|\S+) ({_KINDS})(?:-start)?\((.*)$", hlo, flags=re.M):
        types, kind, rest = match.groups()
        if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", rest):
            groups = [set(map(int, pair.split(","))) for pair in re.findall(r"\{([\d,]+)\}", pairs[1])]
        elif iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
            shape, dims, order = ([int(n) for n in (part or "").split(",") if n] for part in iota.groups())
            ids = np.arange(np.prod(dims)).reshape(dims)
            groups = [set(g.tolist()) for g in (ids.transpose(order) if order else ids).reshape(shape)]
        else:
            listed = re.search(r"replica_groups=\{(\{.*?\})\}", rest)
            assert listed, f"a {kind} without groups, so over all: {rest[:200]}"
            groups = [set(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", listed[1])]
        if groups := frozenset(frozenset(g) for g in groups if len(g) > 1):
            found.append(Talk(kind, groups, types))
    return found


def groups_along(mesh: Mesh, names: tuple[str, ...], num_slices: int = 1) -> frozenset[frozenset[int]]:
    """The partitions that a collective over mesh axes `names` joins, in the program of one of `num_slices` slices.

    libtpu compiles one program a slice; its partitions are the mesh's positions there, the outermost axis being split
    over slices in equal parts.
    """
    shape = list(mesh.devices.shape)
    shape[0] //= num_slices
    over = [mesh.axis_names.index(name) for name in names]
    ids = np.moveaxis(np.arange(np.prod(shape)).reshape(shape), over, range(-len(over), 0))
    return frozenset(frozenset(g.tolist()) for g in ids.reshape(-1, np.prod([shape[i] for i in over])))


def partitions(hlo: str) -> int:
    """How many devices a compiled program runs on together: those of one slice."""
    return int(re.search(r"num_partitions=(\d+)", hlo)[1])


def crossings(hlo: str) -> list[str]:
    """What of a compiled program crosses slices, or leaves the device at all: sends, receives, host transfers."""
    return re.findall(
        r"^.*(?:\b(?:send|recv)(?:-done)?\(|megascale|is_host_transfer|\boutfeed\(|\binfeed\().*$", hlo, re.M | re.I
    )
