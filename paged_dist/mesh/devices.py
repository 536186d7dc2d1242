"""What a jax device reports of itself: its slice, its coordinates on a TPU's torus, its memory. Back ends differ."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax


class Place(NamedTuple):
    """Where a TPU device is: its slice, its chip's coordinates on the torus, its core of the chip."""

    slice: int
    x: int
    y: int
    z: int
    core: int


def slice_of(device: jax.Device) -> int:
    """The slice that `device` lies on; 0 where the back end knows no slices."""
    return getattr(device, "slice_index", 0) or 0


def place_of(device: jax.Device) -> Place | None:
    """Where a TPU `device` is; None for a device that is on no torus.

    GPUs have `coords` too, but of their own meaning and length, and no `core_on_chip`.
    """
    coords = getattr(device, "coords", None)
    if device.platform != "tpu" or coords is None or len(coords) != 3:
        return None
    x, y, z = coords
    return Place(slice_of(device), x, y, z, getattr(device, "core_on_chip", 0) or 0)


def memory_limit(device: jax.Device) -> float:
    """Bytes that this process may take of `device`'s memory; infinite where the back end does not say."""
    try:
        stats = device.memory_stats()
    except (AttributeError, NotImplementedError, jax.errors.JaxRuntimeError):  # back ends differ in how they refuse
        stats = None
    return (stats or {}).get("bytes_limit") or math.inf
