"""The decode step of a plan: the function and its arguments, compiled for the absent pod; its attention's launch.

In every function here `s` are the settings and `sizes` what `sizing` makes of them for the pod.
"""

from __future__ import annotations

import dataclasses
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.stages import Compiled

from paged_dist import PagedKVCache, append_kv, sharded_paged_attention
from paged_dist._compat import lowering_for
from paged_dist.kernels.attention.checks import check_pools
from paged_dist.kernels.decode import plan_choice
from paged_dist.kernels.target import Target
from paged_dist.launch.planning.absent_chips import without_compilation_cache
from paged_dist.launch.planning.pod_settings import PodSettings
from paged_dist.launch.planning.sizing import Sizes
from paged_dist.launch.planning.step_weights import output_heads, weights_of_step
from paged_dist.launch.serving.synthetic import input_dtype
from paged_dist.launch.serving.workload import pages_needed


def planned_step(s: PodSettings, mesh: Mesh):
    """The step to plan: `step(cache, lengths, block_tables, *inputs) -> (cache, outputs)` appends and attends by layer.

    Without width, inputs are query [B, Hq, D], key and value [B, Hkv, D], and each layer's output is the next one's
    query; with it x [B, width] and the projections, with an MLP of hidden width F its three matrices too, as
    `step_weights.weights_of_step` has them: [L, width, Hq or Hkv, D] and [L, width, F / 128, 128].
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
            output_heads=output_heads(s, mesh),
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
            query, key, value = into(x, to_query), into(x, to_key), into(x, to_value)
            cache, output = attend(cache, query, key, value, lengths, tables, layer)
            x = x + out_of(output, back)
            if mlp:
                gate, up, down = mlp
                x = x + out_of(jax.nn.silu(into(x, gate)) * into(x, up), down)
            return (cache, x), None

        return lax.scan(one, (cache, x), (jnp.arange(s.num_layers, dtype=jnp.int32), *weights))[0]

    return projected if s.width else bare


def step_arguments(s: PodSettings, sizes: Sizes, mesh: Mesh) -> tuple:
    """The abstract arguments of `planned_step`, each in its sharding."""
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
    weights = (of(shape, dtype, *split) for shape, split in weights_of_step(s, mesh).values())
    return *first, of((batch, s.width), dtype, "data", None), *weights


class CompiledStep(NamedTuple):
    """A planned step, compiled for the absent pod."""

    program: Compiled
    lower_s: float  # tracing and lowering
    compile_s: float


def compile_step(s: PodSettings, sizes: Sizes, mesh: Mesh) -> CompiledStep:
    """Traces, lowers and compiles the step; nothing is taken from JAX's cache on disk."""
    with without_compilation_cache(), lowering_for(mesh):
        start = time.perf_counter()
        lowered = jax.jit(planned_step(s, mesh), donate_argnums=0).lower(*step_arguments(s, sizes, mesh))
        between = time.perf_counter()
        program = lowered.compile()
        return CompiledStep(program, between - start, time.perf_counter() - between)


def attention_launch(s: PodSettings, sizes: Sizes, mesh: Mesh) -> dict:
    """The attention kernel's launches: how many a layer takes, each one's rows, and the SMEM and VMEM that it plans."""
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
