"""The decode step of `plan`: built, compiled for the absent pod, and what is read from the compiled program.

`s` is a `sizing.Settings`, `sizes` the `sizing.Sizes` that a pod makes of it.
"""

from __future__ import annotations

import dataclasses
import math
import time
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from paged_dist import PagedKVCache, append_kv, sharded_paged_attention
from paged_dist._compat import lowering_for
from paged_dist._errors import require
from paged_dist.describe import mesh_facts
from paged_dist.kernels.attention.checks import check_pools
from paged_dist.kernels.decode import plan_choice
from paged_dist.kernels.target import Target
from paged_dist.kernels.tiling import LANES
from paged_dist.launch.planning import hlo_text, sizing
from paged_dist.launch.planning.absent_chips import without_compilation_cache
from paged_dist.launch.serving.synthetic import input_dtype
from paged_dist.launch.serving.workload import pages_needed
from paged_dist.mesh.devices import slice_of

_TORUS = {"x", "y", "z"}

if TYPE_CHECKING:
    from paged_dist.launch.planning.sizing import Settings, Sizes


def decode_step(s: Settings, mesh):
    """`step(cache, lengths, block_tables, *inputs) -> (cache, outputs)`: appends a token and attends, layer by layer.

    Without width, inputs are query [B, Hq, D], key and value [B, Hkv, D], and each layer's output is the next one's
    query; with it x [B, width] and the projections, with an MLP of hidden width F its three matrices too, as
    `sizing.weights` has them: [L, width, Hq or Hkv, D] and [L, width, F / 128, 128].
    """

    def attend(cache, query, key, value, lengths, tables, layer):
        cache = append_kv(cache, key, value, lengths - 1, tables, layer=layer, mesh=mesh)
        output = sharded_paged_attention(
            query,
            cache,
            lengths,
            tables,
            layer=layer,
            sm_scale=s.head_dim**-0.5,
            soft_cap=s.soft_cap,
            sliding_window=s.sliding_window,
            output_heads=sizing.output_heads(s, mesh),
            mesh=mesh,
        )
        return cache, output

    def bare(cache, lengths, tables, query, key, value):
        def one(carry, layer):
            cache, query = carry
            return attend(cache, query, key, value, lengths, tables, layer), None

        return lax.scan(one, (cache, query), jnp.arange(s.num_layers, dtype=jnp.int32))[0]

    into = lambda x, w: jnp.tensordot(x, w, 1)  # [B, width], [width, ...] -> [B, ...]
    out_of = lambda y, w: jnp.tensordot(y, w, 2 * (tuple(range(1, w.ndim)),))  # and back

    def projected(cache, lengths, tables, x, *weights):
        def one(carry, layer_and_weights):
            cache, x = carry
            layer, to_query, to_key, to_value, back, *mlp = layer_and_weights
            new = (into(x, w) for w in (to_query, to_key, to_value))
            cache, output = attend(cache, *new, lengths, tables, layer)
            x = x + out_of(output, back)
            if mlp:
                gate, up, down = mlp
                x = x + out_of(jax.nn.silu(into(x, gate)) * into(x, up), down)
            return (cache, x), None

        return lax.scan(one, (cache, x), (jnp.arange(s.num_layers, dtype=jnp.int32), *weights))[0]

    return projected if s.width else bare


def step_arguments(s: Settings, sizes: Sizes, mesh) -> tuple:
    """The abstract arguments of `decode_step`, each in its sharding."""
    dtype = jnp.dtype(input_dtype(s.dtype))
    of = lambda shape, dtype, *spec: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))
    batch, d = sizes.batch, s.head_dim
    first = (
        PagedKVCache.abstract(sizes.spec, mesh),
        of((batch,), jnp.int32, "data"),
        of((batch, sizes.pages_per_sequence), jnp.int32, "data", None),
    )
    if not s.width:
        heads = (s.num_q_heads, s.num_kv_heads, s.num_kv_heads)
        return *first, *(of((batch, n, d), dtype, "data", "model", None) for n in heads)
    weights = (of(shape, dtype, *split) for shape, split in sizing.weights(s, mesh).values())
    return *first, of((batch, s.width), dtype, "data", None), *weights


def compile_step(s: Settings, sizes: Sizes, mesh):
    """(compiled program, seconds to trace and lower, seconds to compile); nothing is taken from jax's cache on disk."""
    with without_compilation_cache(), lowering_for(mesh):
        start = time.perf_counter()
        lowered = jax.jit(decode_step(s, mesh), donate_argnums=0).lower(*step_arguments(s, sizes, mesh))
        between = time.perf_counter()
        compiled = lowered.compile()
        return compiled, between - start, time.perf_counter() - between


def read_program(s: Settings, sizes: Sizes, mesh, compiled) -> dict:
    """What a compiled step says of itself: memory, pool copies, collectives, sends, kernels. Bytes are a device's."""
    text, memory, spec = compiled.as_text(), compiled.memory_analysis(), sizes.spec
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
        "collectives": [_collective(c, s, mesh, torus) for c in hlo_text.collectives(text)],
        "sends": [{"arrays": list(c.arrays), "bytes": c.bytes * s.num_layers**c.loops} for c in hlo_text.sends(text)],
        "kernels": [{"name": name, "vmem_bytes": vmem} for name, vmem in hlo_text.kernels_and_vmem(text)],
    }


def pool_copies(spec, mesh, text: str) -> list[str]:
    """Instructions of a compiled program that make a value like a layer's pool of a device, or like its scales."""
    data, context, model = (mesh.shape[name] for name in ("data", "context", "model"))
    heads, pages = spec.num_kv_heads // model, spec.num_pages // (data * context)
    rows, lanes = spec.stored_page_shape
    pools = [((rows, lanes), heads * pages * rows * lanes * jnp.dtype(spec.dtype).itemsize)]
    if spec.is_quantized:
        scale_rows = spec.scales_shape[-2] // (data * context)
        pools.append(((scale_rows, LANES), 4 * heads * scale_rows * LANES))
    return [
        value[:120]
        for (rows, lanes), size in pools
        for value in hlo_text.values_as_large_as(text, size)
        if f",{rows},{lanes}]" in value
    ]


def other_copies(s: Settings, sizes: Sizes, mesh, text: str, of_pools: list[str]) -> list[dict]:
    """What a step makes in HBM that is as large as a layer's pool or the smallest stack of weights, pools apart.

    XLA may store weights anew in other tiles, say: that is read and written in each step, beside the weights' own read.
    """
    itemsize = jnp.dtype(input_dtype(s.dtype)).itemsize
    stacks = [itemsize * math.prod(shape) for shape in sizing.weight_shards(s, mesh)]
    least = min(stacks, default=sizes.spec.bytes_per_chip(mesh) // (2 * s.num_layers))
    return [
        {"array": value.array, "bytes": value.bytes, "times": s.num_layers**value.loops}
        for value in hlo_text.values_written_to_hbm(text, least)
        if not any(value.name in copy.split()[1:2] for copy in of_pools)
    ]


def _collective(c, s: Settings, mesh, torus: dict[str, set[str]]) -> dict:
    """One collective of the step: over which mesh axes, how often (the step's one loop is that over layers), and how
    many bytes each device puts in and sends in a ring over the step, over ICI or DCN. `torus`: mesh axis -> the torus's
    axes that it runs over."""
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


def axes_of(mesh, groups, num_slices: int = 1) -> tuple[tuple[str, ...], bool]:
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


def launch_of(s: Settings, sizes: Sizes, mesh) -> dict:
    """Scalar and vector memory that the attention kernel plans, a launch's, and how many launches a layer takes."""
    data, context, model = (mesh.shape[name] for name in ("data", "context", "model"))
    spec, rows = sizes.spec, sizes.batch // data
    local = dataclasses.replace(
        spec, num_kv_heads=spec.num_kv_heads // model, num_pages=spec.num_pages // (data * context)
    )
    pool = jax.ShapeDtypeStruct(local.pool_shape, local.dtype)
    scales = jax.ShapeDtypeStruct(local.scales_shape, jnp.float32) if spec.is_quantized else None
    columns = pages_needed(sizes.pages_per_sequence, context)
    problem = check_pools(
        jax.ShapeDtypeStruct((rows, s.num_q_heads // model, spec.stored_head_dim), input_dtype(s.dtype)),
        pool,
        pool,
        jax.ShapeDtypeStruct((rows,), jnp.int32),
        jax.ShapeDtypeStruct((rows, columns), jnp.int32),
        scales,
        scales,
    )
    plan = plan_choice.make_launch_plan(problem, Target.of(mesh.devices.flat[0]), sliding_window=s.sliding_window)
    plan_choice.check_block_sizes(plan)
    most = plan_choice.rows_per_launch(plan)
    part = dataclasses.replace(plan, problem=problem.replace(batch=min(rows, most)))
    return {
        "rows": min(rows, most),
        "launches": -(-rows // most),
        "smem_bytes": part.smem_bytes,
        "vmem_bytes": part.vmem_bytes,
    }
