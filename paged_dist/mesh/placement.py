"""Which device stands where in a mesh: its axes run along whole physical axes of the torus where sizes allow it."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Sequence

import jax
import numpy as np
from absl import logging
from jax.experimental import mesh_utils

from paged_dist._errors import require
from paged_dist.mesh.devices import place_of, slice_of
from paged_dist.mesh.sizes import divisors_near


def place_devices(devices: Sequence[jax.Device], shape: tuple[int, int, int]) -> np.ndarray:
    """`devices` as an array [data, context, model], which `make_pod_mesh` makes into a mesh.

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
            f"context x model {group} must divide a slice's {smallest} devices: {divisors_near(smallest, group)}",
        )
        for members in slices:  # unequal ones would let a row of the mesh run on into the next slice
            require(
                len(members) % group == 0,
                "context x model",
                group,
                f"must divide the devices of each slice, {', '.join(str(len(s)) for s in slices)}, "
                "over which only data is split",
                divisors_near(math.gcd(*map(len, slices)), group),
            )
    boxes = [box for box in map(_as_box, slices) if box is not None]
    if len(boxes) < len(slices) or len({box.shape for box in boxes}) > 1:
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
    """[len(devices)], of objects."""
    out = np.empty(len(devices), dtype=object)
    out[:] = devices
    return out


def _as_box(devices: Sequence[jax.Device]) -> np.ndarray | None:
    """One slice's devices as [x, y, z, core], or None where they leave holes in the box around them."""
    where = np.array([place[1:] for place in map(place_of, devices) if place is not None])
    where -= where.min(axis=0)
    dims = where.max(axis=0) + 1
    if math.prod(dims.tolist()) != len(devices):
        return None
    box = np.empty(dims, dtype=object)
    box[tuple(where.T)] = _object_array(devices)
    return None if any(d is None for d in box.flat) else box  # two devices in one place leave a hole elsewhere


def _place_box(box: np.ndarray, devices: list[jax.Device], shape: tuple[int, int, int]) -> np.ndarray:
    """`place_devices` for one slice: `devices` in the order of coordinates, and the same in a `box` [x, y, z, core]."""
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
