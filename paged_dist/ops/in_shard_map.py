"""What the sharded ops share: the mesh they run on, the shardings of their arguments, this shard's page ids."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from paged_dist._compat import has_explicit_axes, varying_axes
from paged_dist._errors import bad_value, require
from paged_dist.cache import PagedKVCache
from paged_dist.kernels.dispatch import Interpret
from paged_dist.kernels.stripes import Stripes
from paged_dist.mesh import MeshAxes

Implementation = str | pltpu.InterpretParams | None
_INTERPRET = {None: None, "pallas": False, "pallas_interpret": True, "xla": "xla"}


def interpret_of(implementation: Implementation) -> Interpret:
    """The kernels' `interpret` for a sharded op's `implementation`; InterpretParams pass through (race detection).

    Raises:
      ValueError: no such implementation.
    """
    if isinstance(implementation, pltpu.InterpretParams):
        return implementation
    require(implementation in _INTERPRET, "implementation", implementation, f"must be one of {tuple(_INTERPRET)}")
    return _INTERPRET[implementation]


def as_arrays(*values) -> tuple[jax.Array | None, ...]:
    """Each value as a jax array, lists too; None stays None."""
    return tuple(None if x is None else jnp.asarray(x) for x in values)


def op_mesh(
    cache: PagedKVCache, mesh: Mesh | AbstractMesh | None, axes: MeshAxes, implementation: Implementation
) -> Mesh | AbstractMesh:
    """The mesh of a sharded op: the argument, else the cache's, else the one in scope.

    Inside a `shard_map` over other axes (a pipeline's stages) it is the one in scope, whatever names its devices.

    Raises:
      ValueError: the cache does not divide over it, or the implementation does not run on it; a `shard_map` around
        the call splits one of `axes` already.
    """
    _check_axes(axes)
    scope = jax.sharding.get_abstract_mesh()
    manual = scope.manual_axes
    if set(manual) & {*axes.pages, *axes.names("model")} or (manual and len(manual) == len(scope.axis_names)):
        raise bad_value(
            "mesh", dict(scope.shape), "is split by a shard_map already", "use the op's _local form in there"
        )
    mesh = mesh if mesh is not None else cache.mesh
    if mesh is None:
        mesh = scope
        if mesh.empty:
            raise bad_value(
                "mesh", None, "the cache knows no mesh and none is in scope", "pass mesh=, or enter jax.set_mesh(mesh)"
            )
    cache.spec.check_mesh(mesh, axes)
    platform = mesh.devices.flat[0].platform if isinstance(mesh, Mesh) else "tpu"
    if implementation == "pallas" and platform != "tpu":
        works = "pass None, which follows the platform, or 'pallas_interpret'"
        raise bad_value("implementation", implementation, f"needs a TPU, not {platform}", works)
    if not manual:
        return mesh
    require(
        dict(mesh.shape) == dict(scope.shape),
        "mesh",
        dict(mesh.shape),
        f"differs from that of the shard_map around this call, {dict(scope.shape)}",
        "split all of it there and here alike",
    )
    cache.check_part(scope, MeshAxes(None, None, None))
    return scope


def check_shard(cache: PagedKVCache, axes: MeshAxes) -> None:
    """Inside a `shard_map`: `cache` holds this shard's part over `axes`.

    Raises:
      ValueError: no `shard_map` around the call splits one of `axes`, or the pools are another part, in which page
        ids and heads would mean others.
    """
    _check_axes(axes)
    scope = jax.sharding.get_abstract_mesh()
    axes.check(scope.manual_axes, "the shard_maps around this call split", "outside of one, use the op without _local")
    cache.check_part(scope, axes)


def _check_axes(axes: MeshAxes) -> None:
    require(
        isinstance(axes, MeshAxes), "axes", axes, "must be a MeshAxes", "MeshAxes(data=..., context=..., model=...)"
    )


def check_batch(batch: int, mesh: Mesh | AbstractMesh, axes: MeshAxes, argument: str) -> None:
    """Raises ValueError where `batch` rows do not divide over the data axis."""
    data = axes.size(mesh, "data")
    require(
        batch % data == 0,
        argument,
        batch,
        f"rows must be a multiple of the mesh's data size {data}",
        "pad the batch with empty rows (length 0): they cost nothing",
    )


def in_place(op: Callable) -> Callable:
    """Jits `op(cache, *arrays, mesh=, axes=, implementation=) -> cache`, so that what it writes is donated, no more.

    A key smoothing is only read. It goes in beside the pools, not donated, and the cache that comes out has the same
    array: other caches may share it.
    """

    @functools.partial(jax.jit, static_argnames=("mesh", "axes", "implementation"), donate_argnums=0)
    def written(pools, key_smoothing, *arrays, mesh, axes, implementation):
        cache = pools.with_smoothing(key_smoothing)
        return op(cache, *arrays, mesh=mesh, axes=axes, implementation=implementation).without_smoothing()

    @functools.wraps(op)
    def call(cache, *arrays, **options):
        pools = written(cache.without_smoothing(), cache.key_smoothing, *arrays, **options)
        return pools.with_smoothing(cache.key_smoothing)

    call.jitted = written
    return call


def run_sharded(local: Callable, mesh: Mesh | AbstractMesh, in_specs, out_specs, *args):
    """`shard_map(local)(*args)` on `mesh`. Arguments in another sharding are resharded, under Explicit axes too."""
    if has_explicit_axes(mesh):
        args = tuple(_reshard(mesh, specs, x) for specs, x in zip(in_specs, args, strict=True))
    left = set(mesh.axis_names) - set(mesh.manual_axes)  # inside another shard_map, whose mesh is that in scope
    outer = mesh if len(left) == len(mesh.axis_names) else None
    return jax.shard_map(local, mesh=outer, axis_names=left, in_specs=tuple(in_specs), out_specs=out_specs)(*args)


def _reshard(mesh: Mesh | AbstractMesh, specs, tree):
    explicit = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit}

    def keep(names):  # an Auto axis of the same mesh cannot be named here; shard_map itself sees to it
        names = (names,) if isinstance(names, str) else names or ()
        return tuple(n for n in names if n in explicit) or None

    put = lambda spec, x: jax.sharding.reshard(x, NamedSharding(mesh, P(*map(keep, spec))))
    return jax.tree.map(put, specs, tree, is_leaf=lambda s: isinstance(s, P))


def context_size(axes: MeshAxes) -> int:
    """Inside a `shard_map`: over how many shards the pages of one sequence are split."""
    return jax.lax.axis_size(axes.names("context")) if axes.names("context") else 1


def invariant_over_context(x: jax.Array, axes: MeshAxes) -> jax.Array:
    """Inside a `shard_map` with one context shard: `x`, typed as the same on every one.

    In a caller's `shard_map` the pools, and so `x`, vary over context, and only a reduction changes the type; its
    groups are single, and XLA on TPU drops it.
    """
    names = tuple(name for name in axes.names("context") if name in varying_axes(x))
    return jax.lax.psum(x, names) if names else x


def local_pages(block_tables: jax.Array, pages: int, axes: MeshAxes) -> tuple[jax.Array, Stripes | None]:
    """Inside a `shard_map`: this shard's columns of `block_tables`, with local page ids, and which columns they are.

    Page i of a sequence lies on context shard (o + i) mod C, o being the shard that owns its first page's id. Ids of
    other shards, where a table is wrong, come out negative or past the pool; so do unused entries, and what
    follows the last column where C does not divide the table's width.

    Args:
      block_tables: [B, S] int32 global ids. This shard r = data shard * C + context shard owns ids
        [r * pages, (r + 1) * pages).

    Returns:
      ([B, ceil(S / C)] int32, Stripes), or ([B, S] int32, None) with one context shard.
    """
    size, stripes = context_size(axes), None
    if size > 1:
        owner = jax.lax.div(jnp.maximum(block_tables[:, 0], 0), jnp.int32(pages))  # any, where a sequence has no page
        here = jax.lax.axis_index(axes.names("context")).astype(jnp.int32)
        stripes = Stripes(jax.lax.rem(here - jax.lax.rem(owner, jnp.int32(size)) + size, jnp.int32(size)), size)
        block_tables = _columns(block_tables, stripes)
    names = tuple(name for name in axes.pages if jax.lax.axis_size(name) > 1)  # those of size 1 change no number
    if names:
        block_tables = block_tables - jax.lax.axis_index(names).astype(block_tables.dtype) * pages
    return block_tables, stripes


def _columns(block_tables: jax.Array, stripes: Stripes) -> jax.Array:
    """Columns first[b] + k * stride of row b of a table [B, S], for every k: [B, ceil(S / stride)]."""
    stride, (rows, columns) = stripes.stride, block_tables.shape
    groups = -(-columns // stride)
    padded = jnp.pad(block_tables, ((0, 0), (0, groups * stride - columns)), constant_values=-1)
    # No gather, nor a slice for each of the columns: this is two small operations on a TPU.
    is_mine = stripes.first[:, None] == jnp.arange(stride, dtype=jnp.int32)
    return jnp.sum(jnp.where(is_mine[:, None], padded.reshape(rows, groups, stride), 0), axis=-1, dtype=jnp.int32)
