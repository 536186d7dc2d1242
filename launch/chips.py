"""What the launchers know of TPU chips that no device tells: published rates, and the HBM that XLA gives a program."""

from __future__ import annotations

import re
from typing import NamedTuple

from paged_dist._errors import bad_value, require


class Chip(NamedTuple):
    """One generation. Rates are Google's published figures, as peak; HBM is what libtpu's compiler lets a program have
    on one device (it refuses more, by name of the limit), less than the chip's by what the runtime keeps."""

    name: str
    hbm_bytes_per_s: float  # of a chip
    hbm_gib: float  # of a device
    link_bytes_per_s: float  # of one ICI link, one way
    pod: tuple[int, ...]  # chips along each axis of the largest pod
    devices: int = 1  # that JAX shows a chip

    @property
    def device_hbm_bytes(self) -> int:
        """Bytes of HBM that a program may take on one device."""
        return int(self.hbm_gib * 2**30)

    @property
    def device_hbm_bytes_per_s(self) -> float:
        """A device's share of the chip's HBM bandwidth."""
        return self.hbm_bytes_per_s / self.devices


V4 = Chip("v4", 1228e9, 30.75, 45e9, (16, 16, 16))
V5E = Chip("v5e", 819e9, 15.75, 45e9, (16, 16))
V5P = Chip("v5p", 2765e9, 95.74, 90e9, (16, 20, 28))
V6E = Chip("v6e", 1640e9, 31.25, 90e9, (16, 16))
V7X = Chip("v7x", 7380e9, 94.75, 100e9, (16, 24, 24), devices=2)

# By what JAX calls a device of them, less the leading "TPU".
_KINDS = {
    "v4": V4,
    "v5e": V5E,
    "v5 lite": V5E,
    "v5p": V5P,
    "v5": V5P,
    "v6e": V6E,
    "v6 lite": V6E,
    "7x": V7X,
    "v7x": V7X,
    "v7": V7X,
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip of a JAX device kind, such as 'TPU v5 lite'; None where it is no TPU, or none that is known."""
    name = device_kind.strip()
    return _KINDS.get(name.removeprefix("TPU").strip().lower()) if name.startswith("TPU") else None


_TOPOLOGIES = {"v4": V4, "v5e": V5E, "v5p": V5P, "v6e": V6E, "tpu7x": V7X}
_HOST = (2, 2, 1)  # chips along each axis of a host's board, of which a slice is made


def chip_of_topology(topology: str, flag: str = "--topology") -> Chip:
    """The chip of an absent slice by its name, such as 'v5p:8x8x8', which `flag` gave.

    Raises:
      ValueError: no such generation; not whole hosts of 2x2 chips; more than a pod has. libtpu compiles some slices
        that no pod has, so that it is checked here.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", topology)
    example = "write GENERATION:SHAPE, such as v5p:8x8x8 or v6e:16x16"
    require(match is not None, flag, topology, "is no slice's name", example)
    name, dims = match[1], [int(n) for n in match[2].split("x")]
    if name not in _TOPOLOGIES:
        works = "tpu7x is its name" if name in ("v7x", "v7") else f"use one of {', '.join(_TOPOLOGIES)}"
        raise bad_value(flag, topology, f"{name} is no generation that libtpu compiles for here", works)
    chip = _TOPOLOGIES[name]
    axes = len(chip.pod)
    shape = lambda dims: f"{name}:{'x'.join(map(str, dims))}"
    nearest = _nearest_slice(dims, chip.pod)
    require(len(dims) == axes, flag, topology, f"a {name} slice has {axes} axes", f"the nearest is {shape(nearest)}")
    require(
        dims == nearest,
        flag,
        topology,
        f"a slice is made of hosts of 2x2 chips, and a {name} pod has {'x'.join(map(str, chip.pod))}",
        f"the nearest is {shape(nearest)}",
    )
    return chip


def _nearest_slice(dims: list[int], pod: tuple[int, ...]) -> list[int]:
    """The slice nearest to `dims`: whole hosts, along no axis more than the pod has (in any order of its axes)."""
    dims = (dims + [1] * len(pod))[: len(pod)]
    dims = [-(-max(n, 1) // host) * host for n, host in zip(dims, _HOST, strict=False)]
    for place, most in zip(sorted(range(len(dims)), key=lambda i: dims[i]), sorted(pod), strict=True):
        dims[place] = min(dims[place], most)
    return dims
