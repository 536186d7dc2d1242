"""What is known of each TPU generation: cores, memories, and what the matrix unit multiplies.

A device that is attached is asked (`pltpu.get_tpu_info`'s own figures); for one that is absent, and is only compiled
for, there is a table. A test holds the table against jax's figures for every generation that the installed jax knows.

TPU 8i and 8t: jax 0.12 has figures of both, jax 0.10 of 8i. libtpu (0.0.42 of jax 0.10, 0.0.50 of jax 0.12) has no
compiler for either, and refuses their topologies, so that no kernel has been compiled for them. A register of 8t has
16 rows, where `tiling.SUBLANES` is 8: its kernels need other tiles before they can be expected to run there.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

from paged_dist._compat import attached_tpu_info

MEGACORE_CORES = 2  # cores of a v4 or v5p that run one program between them


class DescribedDevice(Protocol):
    """A jax device, attached or absent, or jax's description of one (`AbstractDevice`)."""

    @property
    def device_kind(self) -> str:
        """Such as 'TPU v5 lite'."""
        ...


@dataclasses.dataclass(frozen=True)
class ChipFacts:
    """One TPU generation as a program meets it: one JAX device of it.

    Attributes:
      name: the generation, as jax's `ChipVersion` writes it.
      num_cores: TensorCores that run one program and share the device's HBM.
      vmem_bytes, smem_bytes: vector and scalar memory of each core.
      sublanes: rows of a vector register, at 4 bytes an element.
      multiplies_int8, multiplies_fp8: whether the matrix unit multiplies two int8, or two fp8, without widening them.
        (Mosaic takes float8_e4m3fn on every chip after v4 and widens it where it must.)
      hbm_bytes, hbm_bytes_per_s: memory of the device, and its peak rate, as jax has them.
    """

    name: str
    num_cores: int
    vmem_bytes: int
    smem_bytes: int
    sublanes: int
    multiplies_int8: bool
    multiplies_fp8: bool
    hbm_bytes: int
    hbm_bytes_per_s: int

    @property
    def hbm_bytes_per_s_of_core(self) -> float:
        """A core's share of the device's HBM rate."""
        return self.hbm_bytes_per_s / self.num_cores

    def on_one_core(self) -> ChipFacts:
        """A megacore chip that is set up as two devices of one core and half the memory each."""
        return dataclasses.replace(
            self,
            num_cores=1,
            hbm_bytes=self.hbm_bytes // self.num_cores,
            hbm_bytes_per_s=self.hbm_bytes_per_s // self.num_cores,
        )


_MIB = 1 << 20
_SMEM = _MIB  # on every chip from v4 on

# name, cores, VMEM, SMEM, sublanes, int8, fp8, HBM, HBM rate
CHIP_FACTS = {
    facts.name: facts
    for facts in (
        ChipFacts("v4", 2, 16 * _MIB, _SMEM, 8, False, False, 34_400_000_000, 1_230_000_000_000),
        ChipFacts("v5e", 1, 128 * _MIB, _SMEM, 8, True, False, 17_200_000_000, 820_000_000_000),
        ChipFacts("v5p", 2, 64 * _MIB, _SMEM, 8, True, False, 103_000_000_000, 2_460_000_000_000),
        ChipFacts("v6e", 1, 128 * _MIB, _SMEM, 8, True, True, 34_400_000_000, 1_640_000_000_000),
        ChipFacts("7x", 1, 64 * _MIB, _SMEM, 8, False, True, 103_000_000_000, 3_700_000_000_000),
        ChipFacts("8i", 1, 192 * _MIB, _SMEM, 8, False, True, 154_500_000_000, 4_300_000_000_000),
        ChipFacts("8t", 1, 128 * _MIB, _SMEM, 16, True, True, 231_000_000_000, 6_400_000_000_000),
    )
}

_NAMES = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",  # what a v5p calls itself
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "7x",
    "TPU8i": "8i",
    "TPU8t": "8t",
}


def chip_facts(device: DescribedDevice | None) -> ChipFacts | None:
    """The facts of the chip that `device` is; None where it is no TPU, or none that is known."""
    info = attached_tpu_info(device)
    if info is not None:
        return ChipFacts(
            name=str(info.chip_version),
            num_cores=info.num_cores,
            vmem_bytes=info.vmem_capacity_bytes,
            smem_bytes=info.smem_capacity_bytes,
            sublanes=info.num_sublanes,
            multiplies_int8=info.int8_ops_per_second > 0,
            multiplies_fp8=info.fp8_ops_per_second > 0,
            hbm_bytes=info.hbm_capacity_bytes * info.num_cores,
            hbm_bytes_per_s=info.mem_bw_bytes_per_second * info.num_cores,
        )
    facts = CHIP_FACTS.get(_NAMES.get(getattr(device, "device_kind", ""), ""))
    if facts is None:
        return None
    cores = getattr(device, "num_cores", None) or facts.num_cores
    return facts.on_one_core() if cores < facts.num_cores else facts


def has_megacore(device: DescribedDevice | None) -> bool:
    """Whether `device` is a chip of two cores that run one program and share its memory."""
    facts = chip_facts(device)
    return facts is not None and facts.num_cores == MEGACORE_CORES


SMEM_BYTES = min(facts.smem_bytes for facts in CHIP_FACTS.values())
SMEM_RESERVED = 8 << 10  # Mosaic keeps 2.5 to 3 KiB of it (seen by compiling at the limit); the rest is headroom
SMEM_LIMIT = SMEM_BYTES - SMEM_RESERVED  # bytes of scalar memory that a launch may take on any chip
