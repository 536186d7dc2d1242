"""Meshes of the tests: of simulated CPU devices, and of absent pods."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from paged_dist.mesh.axes import AXIS_NAMES
from paged_dist.mesh.topology import topology_devices


def simulated_pod(
    data: int, context: int, model: int, kind: AxisType = AxisType.Auto, devices: Sequence | None = None
) -> Mesh:
    """The first data x context x model of the simulated devices, or of `devices`."""
    chosen = np.array(jax.devices() if devices is None else devices)[: data * context * model]
    return Mesh(chosen.reshape(data, context, model), AXIS_NAMES, axis_types=(kind,) * 3)


def absent_pod(topology: str, data: int, model: int, context: int = 1) -> Mesh:
    """Any data x context x model devices of an absent pod: what is tested here does not depend on which."""
    devices = np.array(topology_devices(topology)[: data * context * model])
    return Mesh(devices.reshape(data, context, model), AXIS_NAMES)


ABSENT_PODS = [("v5p:4x4x4", 8, 8), ("v6e:8x8", 8, 8), ("v5e:4x8", 8, 4), ("v4:4x4x4", 8, 8), ("tpu7x:4x4x4", 16, 8)]
