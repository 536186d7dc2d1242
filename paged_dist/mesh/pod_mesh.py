"""`make_pod_mesh`: axes data, context and model over the attached devices, a list of devices, or an absent pod."""

from __future__ import annotations

import collections
import contextlib
import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from paged_dist._errors import bad_value, is_whole_number, require
from paged_dist.mesh.axes import AXIS_NAMES
from paged_dist.mesh.devices import slice_of
from paged_dist.mesh.placement import place_devices
from paged_dist.mesh.sizes import infer_sizes
from paged_dist.mesh.topology import topology_devices

DEVICE_COUNT_FLAG = "--xla_force_host_platform_device_count"  # of XLA_FLAGS: CPU devices to simulate
_MOST_SIMULATED = 256  # devices of a process: a larger mesh is likelier a slip than what someone wants to simulate


def make_pod_mesh(
    *,
    data: int | None = None,
    context: int | None = None,
    model: int | None = None,
    num_kv_heads: int | None = None,
    model_parallelism: int | None = None,
    devices: Sequence[jax.Device] | None = None,
    topology: str | None = None,
    num_slices: int | None = None,
    axis_types: AxisType | tuple[AxisType, ...] | None = None,
) -> Mesh:
    """A mesh with axes ('data', 'context', 'model'), outermost first, laid over the pod's physical axes.

    Sizes left None are inferred: `model` and `context` from `model_parallelism` where it is given, else 1; `data`
    takes what is left of the devices. Of `model_parallelism` chips to a sequence, `model` gets the greatest
    common divisor with `num_kv_heads`, so that no head is ever repeated, and `context` gets the rest: 8 heads over 32
    chips are model 8 x context 4.

    On a TPU, model runs over physical neighbours, then context (`place_devices` has the rule). On several slices `data`
    alone crosses the data-centre network between them (DCN). Context and model stay inside a slice, so that no
    collective of the ops crosses DCN. Devices without coordinates keep their order: `jax.devices()` process by process,
    `devices` as listed. The mesh depends on nothing but the arguments and the pod, so all processes build the same one.
    `describe_mesh` says what came out, and why.

    Args:
      data: shards of the batch.
      context: shards of each sequence's pages.
      model: shards of the heads.
      num_kv_heads: KV heads of the model that will run; `model` must divide it.
      model_parallelism: model x context.
      devices: the devices to use, all of them; default `jax.devices()`.
      topology: instead of `devices`, an absent pod by name (`v5p:8x8x8`), for ahead-of-time compiles. Needs
        libtpu.
      num_slices: number of slices. With a `topology`, the absent pod has this many of that shape (default 1). Devices
        that are there must lie on exactly this many: a job that was started on too few slices fails here.
      axis_types: `jax.sharding.AxisType`, one for all axes or a tuple of three; default Auto.

    Raises:
      ValueError: sizes that do not multiply to the number of devices, or contradict each other; an empty list of
        devices, or one with duplicates or of several platforms; an unknown topology; devices of another number of
        slices than `num_slices`, or a context x model that does not fit into one.
      RuntimeError: `topology` without libtpu.

    Example:
      >>> mesh = pd.make_pod_mesh(num_kv_heads=2, model_parallelism=4)  # on 8 devices
      >>> dict(mesh.shape)
      {'data': 2, 'context': 2, 'model': 2}
    """
    if devices is not None and topology is not None:
        raise bad_value("topology", topology, "devices are given too", "pass one of the two")
    sizes = {
        "data": data,
        "context": context,
        "model": model,
        "num_kv_heads": num_kv_heads,
        "model_parallelism": model_parallelism,
    }
    for argument, size in {**sizes, "num_slices": num_slices}.items():
        if size is not None:
            positive = is_whole_number(size) and size >= 1
            require(positive, argument, size, "must be a positive integer or None")
    if axis_types is None or isinstance(axis_types, AxisType):
        axis_types = (axis_types or AxisType.Auto,) * 3
    require(len(axis_types) == 3, "axis_types", axis_types, "must be one AxisType, or one each of data, context, model")

    if topology is not None:
        found = list(topology_devices(topology, num_slices or 1))
    elif devices is None:
        found = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
    else:
        found = list(devices)
        require(bool(found), "devices", found, "is empty")
        twice = [d for d, times in collections.Counter(found).items() if times > 1]
        require(not twice, "devices", twice[:4], f"{len(twice)} devices are listed more than once")
        platforms = sorted({d.platform for d in found})
        require(len(platforms) == 1, "devices", platforms, "are of several platforms", "pass those of one")
    slices = collections.Counter(map(slice_of, found))
    on_slices = len(slices)
    require(
        num_slices in (None, on_slices),
        "num_slices",
        num_slices,
        f"the {len(found)} {found[0].platform} devices lie on {on_slices} slice{'s' * (on_slices > 1)}",
        f"pass {on_slices} or None if that is what should run",
    )
    if on_slices > 1:
        sizes["slice_devices"] = math.gcd(*slices.values())
    try:
        shape = infer_sizes(len(found), **sizes)
    except ValueError as e:
        count = devices_to_simulate(found, **sizes) if devices is None else None
        if count is None:
            raise
        raise ValueError(
            f"{e}; CPU devices can be simulated: before JAX starts set XLA_FLAGS={DEVICE_COUNT_FLAG}={count} or call "
            f"jax.config.update('jax_num_cpu_devices', {count}), in each process"
        ) from None
    return Mesh(place_devices(found, shape), AXIS_NAMES, axis_types=tuple(axis_types))


def devices_to_simulate(found: Sequence[jax.Device], **sizes: int | None) -> int | None:
    """The number of CPU devices that each process must simulate for `infer_sizes(..., **sizes)` to work.

    For a mesh that the CPU devices `found` are too few for. None where they are not too few, where they are no CPU
    devices, or where more would not help.
    """
    asked = {name: sizes.get(name) or 1 for name in ("data", "context", "model")}
    need = asked["data"] * (sizes.get("model_parallelism") or asked["context"] * asked["model"])
    processes = len({d.process_index for d in found})
    if found[0].platform != "cpu" or need <= len(found):
        return None
    for count in range(-(-need // processes), min(need, _MOST_SIMULATED) + 1):
        with contextlib.suppress(ValueError):
            infer_sizes(count * processes, **sizes)
            return count
    return None
