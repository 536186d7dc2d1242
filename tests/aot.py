"""Ahead-of-time compiles for absent TPUs, and what tests read from the compiled program."""

from __future__ import annotations

import re

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from paged_dist._compat import lowering_for
from paged_dist.topology import has_libtpu, topology_devices

# One single-chip topology for each generation.
CHIPS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "v7x": "tpu7x:2x2x1"}

needs_libtpu = pytest.mark.skipif(
    not has_libtpu(), reason="libtpu, the TPU compiler, is not installed: pip install 'jax[tpu]'"
)


def one_chip_mesh(chip: str) -> Mesh:
    """A mesh of one absent device of generation `chip`, a key of CHIPS."""
    return Mesh(np.array(topology_devices(CHIPS[chip])[:1]), ("chip",))


def compile_on(mesh: Mesh, fn, *args, **jit_options):
    """The compiled `jit(fn)` for `mesh`; a ShapeDtypeStruct without a sharding is taken as replicated on it."""
    replicated = NamedSharding(mesh, PartitionSpec())
    args = jax.tree.map(
        lambda a: (
            a
            if getattr(a, "sharding", None) is not None
            else jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=replicated)
        ),
        args,
    )
    with lowering_for(mesh):
        return jax.jit(fn, **jit_options).lower(*args).compile()


def collectives(hlo: str) -> list[str]:
    """The names of the collective operations in a compiled program's text, one for each instruction."""
    names = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
    return re.findall(rf"= [^=\n]*?\b({names})(?:-start)?\(", hlo)
