"""Ahead-of-time compiles for absent TPUs, and what tests read from the compiled program."""

from __future__ import annotations

import os

import jax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from paged_dist._compat import lowering_for
from paged_dist.launch.planning.absent_chips import CHIP_TOPOLOGIES, one_chip_mesh
from paged_dist.launch.planning.hlo_text import collectives, values_as_large_as
from paged_dist.mesh.topology import has_libtpu

__all__ = ["CHIP_TOPOLOGIES", "collectives", "compile_on", "needs_libtpu", "one_chip_mesh", "values_as_large_as"]

# Where PAGED_DIST_REQUIRE_LIBTPU=1 (.ci/run sets it) such a test runs, and fails on the compiler that is not there.
needs_libtpu = pytest.mark.skipif(
    not has_libtpu() and os.environ.get("PAGED_DIST_REQUIRE_LIBTPU") != "1",
    reason="libtpu, the TPU compiler, is not installed: pip install 'jax[tpu]'",
)


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
