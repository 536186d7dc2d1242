"""What a device does not tell of its TPU: published rates, the pod's size, and the HBM that XLA gives a program.

`kernels.chips` has what kernels are compiled by: cores, vector and scalar memory, and jax's own figure of the HBM rate.
That one is rounded, and for v5p lower than Google's (2,460 for 2,765 GB/s): peaks and projections here are Google's.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class RatedChip:
    """A generation of TPU that a run may find itself on. The rate is Google's published figure, as peak."""

    name: str
    hbm_bytes_per_s: float  # of a chip
    devices: int = 1  # that JAX shows a chip

    @property
    def device_hbm_bytes_per_s(self) -> float:
        """A device's share of the chip's HBM bandwidth."""
        return self.hbm_bytes_per_s / self.devices


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip(RatedChip):
    """A generation that libtpu compiles for, so that a pod of them can be planned.

    Its HBM is what libtpu's compiler lets a program have on one device (it refuses more, by name of the limit): less
    than the chip's, by what the runtime keeps.
    """

    hbm_gib: float  # of a device
    link_bytes_per_s: float  # of one ICI link, one way
    pod: tuple[int, ...]  # chips along each axis of the largest pod

    @property
    def device_hbm_bytes(self) -> int:
        """Bytes of HBM that a program may take on one device."""
        return int(self.hbm_gib * 2**30)


V4 = Chip(name="v4", hbm_bytes_per_s=1228e9, hbm_gib=30.75, link_bytes_per_s=45e9, pod=(16, 16, 16))
V5E = Chip(name="v5e", hbm_bytes_per_s=819e9, hbm_gib=15.75, link_bytes_per_s=45e9, pod=(16, 16))
V5P = Chip(name="v5p", hbm_bytes_per_s=2765e9, hbm_gib=95.74, link_bytes_per_s=90e9, pod=(16, 20, 28))
V6E = Chip(name="v6e", hbm_bytes_per_s=1640e9, hbm_gib=31.25, link_bytes_per_s=90e9, pod=(16, 16))
V7X = Chip(name="v7x", hbm_bytes_per_s=7380e9, hbm_gib=94.75, link_bytes_per_s=100e9, pod=(16, 24, 24), devices=2)

# Of TPU 8i and 8t the HBM rate is published. A link's rate is not, nor which slices can be booked, and libtpu has no
# compiler for them yet that would say what HBM a program gets. An 8i has two TensorCores, a device each.
V8I = RatedChip(name="8i", hbm_bytes_per_s=8601e9, devices=2)
V8T = RatedChip(name="8t", hbm_bytes_per_s=6528e9)

# By what JAX calls a device of them, less the leading "TPU".
_CHIP_OF_KIND = {
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
    "8i": V8I,
    "8t": V8T,
}


def chip_of(device_kind: str) -> RatedChip | None:
    """The chip of a JAX device kind, such as 'TPU v5 lite'; None where it is no TPU, or none that is known."""
    name = device_kind.strip()
    return _CHIP_OF_KIND.get(name.removeprefix("TPU").strip().lower()) if name.startswith("TPU") else None
