"""Differences between the supported jax versions (0.10.2 to 0.12), and the few uses of new or private jax API."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import AbstractMesh, AxisType, ManualAxisType, Mesh, NamedSharding, PartitionSpec

if TYPE_CHECKING:
    from jax.experimental.pallas.tpu import TpuInfo

# A kernel's only result, pinned to HBM and returned by the program, is copied by the compiler of jax 0.10. One of two
# results is not. (libtpu 0.0.42 copies, 0.0.50 of jax 0.12 does not; versions between them were not tried.)
COPIES_A_LONE_RESULT = jax.__version_info__ < (0, 12)


def varying_axes(*arrays: jax.Array) -> frozenset[str]:
    """The manual mesh axes over which any of `arrays` varies; empty outside a `shard_map` that checks them."""
    return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in arrays))


def out_struct(shape: Sequence[int], dtype, *like: jax.Array) -> jax.ShapeDtypeStruct:
    """The type of a kernel's result, which varies over each mesh axis that one of its operands `like` varies over."""
    varying = ManualAxisType(varying=varying_axes(*like))
    return jax.ShapeDtypeStruct(tuple(shape), dtype, manual_axis_type=varying)


def vary_like(x: jax.Array, *like: jax.Array) -> jax.Array:
    """`x`, typed as varying over the mesh axes of `like` too. A loop's first carry must be, under `check_vma`."""
    missing = varying_axes(*like) - varying_axes(x)
    return jax.lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x


def broadcasts(fn: Callable) -> Callable:
    """`fn`, in which arrays of unequal ranks broadcast, whatever `jax_numpy_rank_promotion` says.

    A caller sets it to find slips in the caller's own code. This library broadcasts on purpose.
    """

    @functools.wraps(fn)
    def call(*args, **kwargs):
        with jax.numpy_rank_promotion("allow"):
            return fn(*args, **kwargs)

    return call


def has_explicit_axes(mesh: Mesh | AbstractMesh) -> bool:
    """Whether any axis of `mesh` is Explicit, so that `shard_map` refuses arguments in another sharding."""
    return any(t == AxisType.Explicit for t in mesh.axis_types)


def lowering_for(mesh: Mesh) -> contextlib.AbstractContextManager:
    """The context in which to lower a program for `mesh`, whose devices may be absent.

    jax 0.12 takes the lowering platform of an absent chip from the abstract mesh in scope; 0.10 takes it from
    the arguments' shardings, and its abstract mesh would turn a plain jit into one with a mesh context.
    """
    if getattr(mesh.abstract_mesh, "abstract_device", None) is not None:
        return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
    return contextlib.nullcontext()


def reshape_minor(x: jax.Array, shape: Sequence[int]) -> jax.Array:
    """`x.reshape(shape)` of minor axes that no mesh axis splits. Under Explicit axes the result's sharding is given."""
    sharding = jax.typeof(x).sharding
    if AxisType.Explicit not in getattr(sharding.mesh, "axis_types", ()):
        return jax.lax.reshape(x, tuple(shape))
    split = [i for i, names in enumerate(sharding.spec) if names is not None]
    kept = sharding.spec[: max(split, default=-1) + 1]
    return jax.lax.reshape(x, tuple(shape), out_sharding=NamedSharding(sharding.mesh, PartitionSpec(*kept)))


def lowered_for(test: Callable[[jax.Device], bool]) -> jax.Array:
    """A scalar bool, constant in the lowered program: whether `test` holds for a device that it is lowered for.

    The device may be absent. `jax.lax.platform_dependent` chooses by platform alone, and jax has no public way to ask
    for the chip. False where the lowering has no device (an export, say).
    """
    return _lowered_for_p.bind(test=test)


def _lowering_device(ctx: mlir.LoweringRuleContext) -> jax.Device | None:
    """The first device that the program at `ctx` is lowered for; None where the lowering has none."""
    axis_context = ctx.module_context.axis_context
    devices = getattr(axis_context, "device_assignment", None)
    mesh = getattr(axis_context, "mesh", None)
    if devices is None and isinstance(mesh, Mesh):
        devices = mesh.devices.flat
    return next(iter(devices or ()), None)


_lowered_for_p = Primitive("paged_dist_lowered_for")
_lowered_for_p.def_abstract_eval(lambda *, test: ShapedArray((), np.bool_))
_lowered_for_p.def_impl(lambda *, test: jax.jit(lambda: _lowered_for_p.bind(test=test))())


def _lower_lowered_for(ctx: mlir.LoweringRuleContext, *, test: Callable[[jax.Device], bool]):
    device = _lowering_device(ctx)
    return [mlir.ir_constant(np.bool_(device is not None and test(device)))]


mlir.register_lowering(_lowered_for_p, _lower_lowered_for)


def backends_are_initialized() -> bool:
    """Whether a back end runs already, so that this process can no longer become one of several. Starts none."""
    from jax._src import xla_bridge

    return xla_bridge.backends_are_initialized()


def detect_cluster(timeout_seconds: float) -> tuple[str, str | None, int, int] | None:
    """What JAX's own detection says of this process: (cluster, coordinator address, processes, process id).

    None where it recognises no cluster. One process alone has no coordinator address, and none is asked for. jax has
    no public way to ask without starting the runtime; its `initialize` takes the same steps in the same order.
    """
    from jax._src import clusters

    for cluster in clusters.ClusterEnv._cluster_types:
        if not cluster.opt_in_only_method and cluster.is_env_present():
            num_processes = cluster.get_process_count()
            if num_processes == 1:
                return cluster.name, None, 1, 0
            address = os.environ.get("JAX_COORDINATOR_ADDRESS") or cluster.get_coordinator_address(
                timeout_secs=int(timeout_seconds), override_coordinator_port=os.environ.get("JAX_COORDINATOR_PORT")
            )
            return cluster.name, address, num_processes, cluster.get_process_id()
    return None


def attached_tpu_info(device) -> TpuInfo | None:
    """jax's own figures of the chip that `device` is (a jax device or a description of one), each for one core.

    None where this host has no such TPU. What it has none of is not asked for: jax answers for the device in use.
    """
    from jax.experimental.pallas import tpu as pltpu

    kind = getattr(device, "device_kind", "")
    if not kind.startswith("TPU") or not backends_are_initialized() or jax.default_backend() != "tpu":
        return None
    own = jax.devices()[0]
    cores = getattr(device, "num_cores", None)
    if own.device_kind != kind or cores not in (None, getattr(own, "num_cores", None)):
        return None
    try:
        return pltpu.get_tpu_info()
    except ValueError:  # a chip that this jax has no figures of
        return None


def tpu_info_of(chip: str, num_cores: int) -> TpuInfo | None:
    """jax's figures of a generation, 'v5p' say, whose devices have `num_cores` cores; None where it knows none."""
    from jax.experimental.pallas import tpu as pltpu

    version = {str(version): version for version in pltpu.ChipVersion}.get(chip)
    return None if version is None else pltpu.get_tpu_info_for_chip(version, num_cores)
