"""How an op on global arrays becomes a `shard_map`: its mesh, the shardings of its arguments, donation of the cache."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from paged_dist._compat import has_explicit_axes
from paged_dist._errors import bad_value, require
from paged_dist.cache import PagedKVCache
from paged_dist.mesh import MeshAxes
from paged_dist.ops.arguments import Implementation, check_axes


def op_mesh(
    cache: PagedKVCache, mesh: Mesh | AbstractMesh | None, axes: MeshAxes, implementation: Implementation
) -> Mesh | AbstractMesh:
    """The mesh of a sharded op: the argument, else the cache's, else the one in scope.

    Inside a `shard_map` over other axes (a pipeline's stages) it is the one in scope, which must have the same sizes.

    Raises:
      ValueError: the cache does not divide over it, or the implementation does not run on it; a `shard_map` around
        the call splits one of `axes` already.
    """
    check_axes(axes)
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


class InPlaceOp:
    """An op `op(cache, *arrays, mesh=, axes=, implementation=) -> cache`, jitted, with the cache's pools donated.

    The key smoothing, which ops only read, is not donated: it goes in beside the pools, and the cache that comes out
    has the same array. Other caches may share it.

    Attributes:
      jitted: the program, `jitted(cache without smoothing, key_smoothing, *arrays, mesh=, axes=, implementation=)`.
    """

    def __init__(self, op: Callable[..., PagedKVCache]):
        @functools.partial(jax.jit, static_argnames=("mesh", "axes", "implementation"), donate_argnums=0)
        def written(pools, key_smoothing, *arrays, mesh, axes, implementation):
            cache = pools.with_smoothing(key_smoothing)
            return op(cache, *arrays, mesh=mesh, axes=axes, implementation=implementation).without_smoothing()

        functools.update_wrapper(self, op)
        self.jitted = written

    def __call__(
        self,
        cache: PagedKVCache,
        *arrays: jax.Array | int | None,
        mesh: Mesh | AbstractMesh,
        axes: MeshAxes,
        implementation: Implementation,
    ) -> PagedKVCache:
        options = dict(mesh=mesh, axes=axes, implementation=implementation)
        pools = self.jitted(cache.without_smoothing(), cache.key_smoothing, *arrays, **options)
        return pools.with_smoothing(cache.key_smoothing)


def run_sharded(local: Callable, mesh: Mesh | AbstractMesh, in_specs, out_specs, *args):
    """`shard_map(local)(*args)` on `mesh`. Arguments in other shardings are resharded, under Explicit axes too."""
    if has_explicit_axes(mesh):
        args = tuple(_reshard_argument(mesh, specs, x) for specs, x in zip(in_specs, args, strict=True))
    left = set(mesh.axis_names) - set(mesh.manual_axes)  # inside another shard_map, whose mesh is that in scope
    outer = mesh if len(left) == len(mesh.axis_names) else None
    return jax.shard_map(local, mesh=outer, axis_names=left, in_specs=tuple(in_specs), out_specs=out_specs)(*args)


def _reshard_argument(mesh: Mesh | AbstractMesh, specs, tree):
    """One argument, a pytree, resharded to `specs`, a PartitionSpec for each leaf. Only Explicit axes can be named."""
    explicit = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit}

    def keep(names):  # the Auto axes of the same mesh are left to shard_map
        names = (names,) if isinstance(names, str) else names or ()
        return tuple(n for n in names if n in explicit) or None

    put = lambda spec, x: jax.sharding.reshard(x, NamedSharding(mesh, P(*map(keep, spec))))
    return jax.tree.map(put, specs, tree, is_leaf=lambda s: isinstance(s, P))
