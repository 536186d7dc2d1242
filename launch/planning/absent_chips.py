"""TPUs that are not here: the mesh of one absent chip or of an absent pod, and a function compiled for a chip, timed.

libtpu compiles ahead of time on this host's CPU. `hlo_text` reads what a compiled program says.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Compiled

from paged_dist import make_pod_mesh
from paged_dist._compat import lowering_for
from paged_dist.launch.planning.hlo_text import program_text
from paged_dist.launch.planning.pod_settings import PodSettings
from paged_dist.mesh.topology import topology_devices

if TYPE_CHECKING:
    from jaxlib._jax import CompiledMemoryStats

# The smallest topology of each generation that libtpu compiles for, of whose devices one is taken.
CHIP_TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "v7x": "tpu7x:2x2x1"}


class CompiledForChip(NamedTuple):
    """A program compiled for an absent chip."""

    lower_s: float  # tracing, and lowering to what XLA takes; the kernel is in it, not yet compiled
    compile_s: float  # XLA, and the kernel's own compiler
    text: str
    temp_bytes: int  # HBM beside arguments and results


def one_chip_mesh(chip: str) -> Mesh:
    """A mesh of one absent device of generation `chip`, a key of CHIP_TOPOLOGIES."""
    return Mesh(np.array(topology_devices(CHIP_TOPOLOGIES[chip])[:1]), ("chip",))


def absent_pod_mesh(s: PodSettings) -> Mesh:
    """The mesh over the absent pod. Model, where not given, is the largest size that divides kv heads and slice."""
    model = s.model
    if model is None and s.model_parallelism is None:
        devices, context = len(topology_devices(s.topology, s.num_slices)), s.context or 1
        model = math.gcd(s.num_kv_heads, devices // s.num_slices // context)  # model stays inside a slice
        model = math.gcd(model, devices // ((s.data or 1) * context)) or 1
    return make_pod_mesh(
        data=s.data,
        context=s.context,
        model=model,
        num_kv_heads=s.num_kv_heads,
        model_parallelism=s.model_parallelism,
        topology=s.topology,
        num_slices=s.num_slices,
    )


@contextlib.contextmanager
def without_compilation_cache() -> Iterator[None]:
    """In this block no program is taken from JAX's compilation cache on disk, so that a compile takes its own time."""
    on_disk = jax.config.jax_enable_compilation_cache  # pyrefly: ignore[missing-attribute] made when jax is imported
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", on_disk)


def program_memory(program: Compiled) -> CompiledMemoryStats:
    """The bytes of a compiled program on one device: arguments, results, temporaries, code."""
    memory = program.memory_analysis()
    assert memory is not None, "JAX's compilers for TPU and CPU count them"
    return memory


def timed_compile(mesh: Mesh, fn, *arrays: jax.ShapeDtypeStruct) -> CompiledForChip:
    """`jit(fn)` over `arrays`, replicated on `mesh`, from nothing: neither traces nor programs are reused."""
    place = NamedSharding(mesh, PartitionSpec())
    placed = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place) for a in arrays]
    scalar = jax.ShapeDtypeStruct((), np.int32, sharding=place)
    with without_compilation_cache(), lowering_for(mesh):
        jax.jit(lambda x: x + 1).lower(scalar).compile()  # starts the chip's compiler, a second on the first call
        jax.clear_caches()
        start = time.perf_counter()
        lowered = jax.jit(fn).lower(*placed)
        between = time.perf_counter()
        compiled = lowered.compile()
        end = time.perf_counter()
    temp_bytes = program_memory(compiled).temp_size_in_bytes
    return CompiledForChip(between - start, end - between, program_text(compiled), temp_bytes)
