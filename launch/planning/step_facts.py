"""The facts of a compiled step, read from the program: memory, pool copies, collectives, sends and kernels."""

from __future__ import annotations

import math

import numpy as np
from jax.sharding import Mesh
from jax.stages import Compiled

from paged_dist._errors import require
from paged_dist.describe import mesh_facts
from paged_dist.launch.planning import hlo_text
from paged_dist.launch.planning.absent_chips import program_memory
from paged_dist.launch.planning.hlo_text import HloCollective
from paged_dist.launch.planning.pod_settings import PodSettings
from paged_dist.launch.planning.pool_copies import other_copies, pool_copies
from paged_dist.launch.planning.sizing import Sizes
from paged_dist.mesh.devices import slice_of

_TORUS = {"x", "y", "z"}


def read_step(s: PodSettings, sizes: Sizes, mesh: Mesh, compiled: Compiled) -> dict:
    """The part of a plan's record that is read from the compiled step. Bytes are those on one device."""
    text, memory, spec = hlo_text.program_text(compiled), program_memory(compiled), sizes.spec
    alone = memory.output_size_in_bytes - memory.alias_size_in_bytes  # results that are in no argument's place
    cache_bytes = spec.bytes_per_chip(mesh)
    copies = pool_copies(spec, mesh, text)
    torus = {axis.name: {run.physical for run in axis.runs} & _TORUS for axis in mesh_facts(mesh).axes}
    return {
        "cache_bytes": cache_bytes,
        "weights_bytes": sizes.weights_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "program_bytes": memory.generated_code_size_in_bytes,
        "used_bytes": memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
        + alone,
        "aliased_bytes": memory.alias_size_in_bytes,
        "pool_copies": copies,
        "other_copies": other_copies(s, sizes, mesh, text, copies),
        "collectives": [_collective_facts(c, s, mesh, torus) for c in hlo_text.collectives(text)],
        "sends": [{"arrays": list(c.arrays), "bytes": c.bytes * s.num_layers**c.loops} for c in hlo_text.sends(text)],
        "kernels": [{"name": name, "vmem_bytes": vmem} for name, vmem in hlo_text.kernels_and_vmem(text)],
    }


def _collective_facts(c: HloCollective, s: PodSettings, mesh: Mesh, torus: dict[str, set[str]]) -> dict:
    """One collective of the step: its mesh axes, how often it runs, and the bytes that a device puts in and sends.

    A step has one loop, that over layers. The bytes sent are those of a ring, over ICI or DCN.

    Args:
      torus: mesh axis -> the axes of the torus that it runs over.
    """
    axes, over_slices = axes_of(mesh, c.groups, s.num_slices)
    times = s.num_layers**c.loops
    group = max(map(len, c.groups))
    share = {"all-reduce": 2 * (group - 1) / group, "all-gather": group - 1, "collective-permute": 1}
    sent = share.get(c.kind, (group - 1) / group)
    return {
        "kind": c.kind,
        "arrays": list(c.arrays),
        "axes": list(axes),
        "links": "dcn" if over_slices else "ici",
        "torus_axes": len(set().union(*(torus[name] for name in axes))),
        "group": group,
        "times": times,
        "bytes": times * c.bytes,
        "bytes_sent": int(times * c.bytes * sent),
    }


def axes_of(mesh: Mesh, groups, num_slices: int = 1) -> tuple[tuple[str, ...], bool]:
    """(mesh axes along which the members of `groups` differ, whether any group has members on several slices).

    The program of several slices is one slice's: its devices are numbered as the mesh's part on that slice.
    """
    shape = list(mesh.devices.shape)
    shape[0] //= num_slices
    members = np.array([m for g in groups for m in g])
    require(members.max() < mesh.devices.size, "groups", int(members.max()), "has more devices than the mesh")
    within = members.max() < math.prod(shape)
    shape = shape if within else list(mesh.devices.shape)
    where = [np.stack(np.unravel_index(np.array(g), shape), axis=-1) for g in groups]
    differ = np.any([(w != w[:1]).any(axis=0) for w in where], axis=0)
    axes = tuple(name for name, d in zip(mesh.axis_names, differ, strict=True) if d)
    if within:
        return axes, False
    slices = lambda g: {slice_of(mesh.devices.flat[i]) for i in g}
    return axes, any(len(slices(g)) > 1 for g in groups)
