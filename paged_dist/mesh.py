"""The pod mesh: which devices lie along data, context and model."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import math
import numbers
from collections.abc import Sequence

import jax
import numpy as np
from absl import logging
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from paged_dist._devices import place_of, slice_of
from paged_dist._errors import bad_value, require
from paged_dist._mesh_sizes import infer_sizes
from paged_dist.topology import topology_devices

AXIS_NAMES = ("data", "context", "model")  # of `make_pod_mesh`, outermost first

DEVICE_COUNT_FLAG = "--xla_force_host_platform_device_count"  # of XLA_FLAGS: CPU devices to simulate

AxisNames = str | tuple[str, ...] | None
_MOST_SIMULATED = 256  # devices of a process: a larger mesh is likelier a slip than what someone wants to simulate


@dataclasses.dataclass(frozen=True)
class MeshAxes:
    """Which mesh axes play the three parts: each a name, a tuple of names (outermost first), or None.

    None (or an empty tuple) means that nothing is split that way, as an axis of size 1 does.
    """

    data: AxisNames = "data"  # sequences are split
    context: AxisNames = "context"  # the pages of one sequence are split
    model: AxisNames = "model"  # heads are split

    def __post_init__(self):
        for part in ("data", "context", "model"):
            names = getattr(self, part)
            if isinstance(names, list):
                object.__setattr__(self, part, names := tuple(names))
            if not (
                names is None
                or isinstance(names, str)
                or (isinstance(names, tuple) and all(isinstance(n, str) for n in names))
            ):
                raise bad_value(f"axes.{part}", names, "must be a mesh axis's name, a tuple of names, or None")

    def names(self, part: str) -> tuple[str, ...]:
        """The mesh axes of `part` ('data', 'context' or 'model'), outermost first; empty for None."""
        axes = getattr(self, part)
        return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)

    @property
    def pages(self) -> tuple[str, ...]:
        """The mesh axes over which a pool's pages are split: data, then context."""
        return self.names("data") + self.names("context")

    def size(self, mesh: Mesh | AbstractMesh, part: str) -> int:
        """How many shards `part` has on `mesh`. Raises ValueError, as `check`, for a name that `mesh` has not."""
        if not set(self.names(part)) <= set(mesh.axis_names):
            self.check(mesh.axis_names)
        return math.prod(mesh.shape[name] for name in self.names(part))

    def check(self, mesh_axes: Sequence[str], have: str = "the mesh has axes", works: str | None = None) -> None:
        """Raises ValueError where a name is none of `mesh_axes`, or one axis plays two parts.

        `have` and `works` are the error's words for `mesh_axes` and for what would do.
        """
        works = works or f"say which axis does what, for example axes={_example(tuple(mesh_axes))}"
        seen: dict[str, str] = {}
        for part in ("data", "context", "model"):
            for name in self.names(part):
                if name not in mesh_axes:
                    raise bad_value(
                        f"axes.{part}",
                        getattr(self, part),
                        f"{have} {tuple(mesh_axes)}",
                        f"{works}; MeshAxes({part}=None) where nothing is split so",
                    )
                if name in seen:
                    raise bad_value(
                        f"axes.{part}",
                        getattr(self, part),
                        f"axis {name!r} is axes.{seen[name]} already",
                        "one mesh axis plays one part",
                    )
                seen[name] = part


def _example(names: tuple[str, ...]) -> MeshAxes:
    """A MeshAxes of a mesh with axes `names`, outermost first as `make_pod_mesh` has them."""
    if len(names) < 2:
        return MeshAxes(None, None, names[0] if names else None)
    return MeshAxes(names[0], names[1] if len(names) > 2 else None, names[-1])


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
    common divisor with `num_kv_heads`, so that no head is ever repeated, and `context` the rest: 8 heads over 32
    chips are model 8 x context 4.

    On a TPU model, then context, run over physical neighbours (`place_devices` has the rule). On several slices `data`
    alone runs over the data-centre network between them (DCN); context and model stay inside a slice, so that no
    collective of the ops crosses it. Devices without coordinates keep their order: processes in turn for
    `jax.devices()`, the list's own for `devices`. It depends on nothing but the arguments and the pod, so all processes
    build the same mesh. `describe_mesh` says what came out, and why.

    Args:
      data: shards of the batch.
      context: shards of each sequence's pages.
      model: shards of the heads.
      num_kv_heads: KV heads of the model that will run; `model` must divide it.
      model_parallelism: model x context.
      devices: the devices to use, all of them; default `jax.devices()`.
      topology: instead of `devices`, an absent pod by name (`v5p:8x8x8`), for ahead-of-time compiles. Needs
        libtpu.
      num_slices: how many slices: of a `topology`, so many of that shape (default 1); of devices that are there, it
        must be how many they lie on, as a check of what was started against what was meant.
      axis_types: `jax.sharding.AxisType`, one for all axes or a tuple of three; default Auto.

    Raises:
      ValueError: sizes that do not multiply to the number of devices, or contradict each other; an empty list of
        devices, or one with duplicates or of several platforms; an unknown topology; devices of another number of
        slices than `num_slices`, or a context x model that does not fit into one.
      RuntimeError: `topology` without libtpu.
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
            whole = isinstance(size, numbers.Integral) and not isinstance(size, bool)
            require(whole and size >= 1, argument, size, "must be a positive integer or None")
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
    """How many CPU devices each process must simulate for `infer_sizes(..., **sizes)` to work, where it does not work
    with those `found` because they are too few. None where they are no CPU devices, or more would not help."""
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


def _divisors_near(total: int, wanted: int) -> str:
    """What would work in place of `wanted`, which does not divide `total`: the nearest divisors."""
    divisors = [d for d in range(1, total + 1) if total % d == 0]
    below = [d for d in divisors if d < wanted][-2:]
    above = [d for d in divisors if d > wanted][:2]
    return f"the nearest divisors of {total} are {', '.join(map(str, below + above))}"


def place_devices(devices: Sequence[jax.Device], shape: tuple[int, int, int]) -> np.ndarray:
    """The array [data, context, model] of `devices` that `make_pod_mesh` makes into a mesh.

    The rule, for TPUs:
    1. Slices are split over data alone, so that context and model never cross the data-centre network: each
       [context, model] of the array lies on one slice.
    2. Where one mesh axis takes the whole slice, JAX's `mesh_utils.create_device_mesh` orders it: it knows the
       rings through the small boards.
    3. Else `split_physical_axes` decides. JAX could do that too (`allow_split_physical_axes=True`), but under
       model 8 of a 16x16 torus it lays context 4 as 2x2 with one step of eight chips, on a 2x2 board it lays data
       diagonally, jax 0.10 stops at sizes such as 14, and 0.10 and 0.12 differ on tpu7x.
    4. Devices that do not fill a box, with holes or of unequal slices, are taken in the order of their
       coordinates, with a warning.
    Devices of other platforms are taken as they come.
    """
    places = {d: place_of(d) for d in devices}
    if None in places.values():
        return _object_array(devices).reshape(shape)
    z_before_x = lambda at: (at.slice, at.z, at.y, at.x, at.core)
    in_order = sorted(devices, key=lambda d: z_before_x(places[d]))
    slices = [list(members) for _, members in itertools.groupby(in_order, key=slice_of)]
    if len(slices) > 1:
        group, smallest = shape[1] * shape[2], min(map(len, slices))
        require(
            shape[0] % len(slices) == 0,
            "data",
            shape[0],
            f"must be a multiple of the {len(slices)} slices, over which only data is split",
            f"context x model {group} must divide a slice's {smallest} devices: {_divisors_near(smallest, group)}",
        )
        for members in slices:  # unequal ones would let a row of the mesh run on into the next slice
            require(
                len(members) % group == 0,
                "context x model",
                group,
                f"must divide the devices of each slice, {', '.join(str(len(s)) for s in slices)}, "
                "over which only data is split",
                _divisors_near(math.gcd(*map(len, slices)), group),
            )
    boxes = [_as_box(members) for members in slices]
    if any(box is None or box.shape != boxes[0].shape for box in boxes):
        logging.warning(
            "make_pod_mesh: the %d TPU devices do not fill a box%s: they are taken in the order of their "
            "coordinates, neighbours in the mesh may lie apart",
            len(devices),
            " on each slice alike" if len(slices) > 1 else "",
        )
        return _object_array(in_order).reshape(shape)
    in_slice = (shape[0] // len(slices), *shape[1:])
    return np.concatenate([_place_box(box, group, in_slice) for box, group in zip(boxes, slices, strict=True)])


def _object_array(devices: Sequence[jax.Device]) -> np.ndarray:
    out = np.empty(len(devices), dtype=object)
    out[:] = devices
    return out


def _as_box(devices: Sequence[jax.Device]) -> np.ndarray | None:
    """One slice's devices as [x, y, z, core], or None where they leave holes in the box around them."""
    where = np.array([place_of(d)[1:] for d in devices])
    where -= where.min(axis=0)
    dims = where.max(axis=0) + 1
    if math.prod(dims.tolist()) != len(devices):
        return None
    box = np.empty(dims, dtype=object)
    box[tuple(where.T)] = _object_array(devices)
    return None if any(d is None for d in box.flat) else box  # two devices in one place leave a hole elsewhere


def _place_box(box: np.ndarray, devices: list[jax.Device], shape: tuple[int, int, int]) -> np.ndarray:
    """`place_devices` for one slice: `devices` in the order of their coordinates, and as `box` [x, y, z, core]."""
    if max(shape) == len(devices):
        # Two devices a chip on a generation where jax expects one; devices that do not tell their core.
        with contextlib.suppress(AssertionError, AttributeError):
            return mesh_utils.create_device_mesh(shape, devices)
    parts = split_physical_axes(box.shape, shape)  # [mesh axis][physical axis]
    # Each physical axis becomes (data, context, model) with model innermost, so that its steps are of one chip.
    axes = len(box.shape)
    fine = box.reshape([parts[m][p] for p in range(axes) for m in range(3)])
    return fine.transpose([3 * p + m for m in range(3) for p in range(axes)]).reshape(shape)


def split_physical_axes(physical: tuple[int, ...], shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """How many positions of each physical axis each mesh axis takes, splitting physical axes where needed.

    Args:
      physical: sizes of the physical axes (x, y, z, core).
      shape: sizes of the mesh axes, the one that communicates most last; same product.

    Returns:
      For each mesh axis, its share of each physical axis. Products over physical axes give `shape`, products over
      mesh axes `physical`.

    The last mesh axis chooses first, by these preferences in turn: the cores of a chip, which share its links and
    have faster ones to each other; physical axes that no one has a part of (a step on a shared one passes over the
    other's chips); the largest product of physical axes taken whole (only those can have a wraparound link); the
    fewest physical axes split; the most taken whole (more links at once); the shortest axis to split; x before y
    before z.
    """
    left = list(physical)
    shares: list[tuple[int, ...]] = []
    for size in reversed(shape):

        def cost(share: tuple[int, ...], left=tuple(left)):
            taken = [p for p, n in enumerate(share) if n > 1]
            whole = math.prod(share[p] for p in taken if share[p] == physical[p])
            split = [physical[p] for p in taken if share[p] < physical[p]]
            return (
                3 not in taken,
                sum(left[p] < physical[p] for p in taken),
                -whole,
                len(split),
                len(split) - len(taken),
                sum(split),
                tuple(-n for n in share),
            )

        # There always is a choice: the mesh axes still to be laid multiply to exactly what is left.
        best = min(_shares(tuple(left), size), key=cost)
        shares.insert(0, best)
        left = [have // n for have, n in zip(left, best, strict=True)]
    return shares


def _shares(left: tuple[int, ...], size: int) -> list[tuple[int, ...]]:
    """All ways to write `size` as a product of one divisor of each of `left`."""
    if not left:
        return [()] if size == 1 else []
    first = math.gcd(left[0], size)
    return [(d, *rest) for d in range(1, first + 1) if first % d == 0 for rest in _shares(left[1:], size // d)]
