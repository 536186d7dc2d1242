"""Which chips run one program on two cores, and what is known of the chip that a call is lowered for."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
from jax.experimental.pallas import tpu as pltpu

from paged_dist._compat import lowered_for
from paged_dist._errors import require
from paged_dist.kernels.attention.checks import NUM_CORES
from paged_dist.kernels.dispatch import Interpret

_KINDS = ("TPU v4", "TPU v5", "TPU v5p")  # "TPU v5" is what a v5p calls itself


def target_device(*arrays: jax.Array):
    """The device (or jax's description of it) that a program over `arrays` is lowered for; None if not known.

    Known are: the mesh in scope (inside `shard_map`, under `jax.set_mesh` or `jax.sharding.use_abstract_mesh`),
    a mesh with Explicit axes that an argument carries, the devices of concrete arguments, and, with none of
    these, the host's own TPU. Not known: a plain `jit` lowered on a host without a TPU for an absent one.
    """
    meshes = [jax.sharding.get_abstract_mesh()]
    for array in arrays:
        if not isinstance(array, jax.core.Tracer) and isinstance(array, jax.Array):
            return next(iter(array.sharding.device_set))
        meshes.append(getattr(getattr(jax.typeof(array), "sharding", None), "mesh", None))
    for mesh in meshes:
        device = getattr(mesh, "abstract_device", None)
        if device is not None:
            return device
    return jax.devices()[0] if jax.default_backend() == "tpu" else None


def has_megacore(device) -> bool:
    """Whether `device`, a jax device or jax's description of one, is a chip of two cores that share its memory."""
    # A v4 may also be set up as two devices of one core each.
    cores = getattr(device, "num_cores", None) or NUM_CORES
    return getattr(device, "device_kind", "") in _KINDS and cores == NUM_CORES


def check_target(megacore_mode: str | None, interpret: Interpret, *arrays: jax.Array) -> None:
    """Raises ValueError where the program would meet a TPU, real or simulated, that has not two cores."""
    if megacore_mode is None:
        return
    if isinstance(interpret, pltpu.InterpretParams):
        require(
            interpret.num_cores_or_threads == NUM_CORES,
            "interpret",
            interpret,
            f"megacore_mode={megacore_mode!r} simulates {NUM_CORES} cores",
            f"pass InterpretParams(num_cores_or_threads={NUM_CORES})",
        )
        return
    device = target_device(*arrays)
    kind = getattr(device, "device_kind", "")
    if not kind.startswith("TPU"):
        return
    require(
        has_megacore(device),
        "megacore_mode",
        megacore_mode,
        f"the program is for a {kind!r} of one core a device; megacore exists on v4 and v5p only",
        "pass None",
    )


def simulation(megacore_mode: str | None, interpret: Interpret) -> Interpret:
    """`interpret` with True spelt out: as many simulated cores as the mode uses."""
    if interpret is True:
        interpret = pltpu.InterpretParams()
        if megacore_mode is not None:
            interpret = dataclasses.replace(interpret, num_cores_or_threads=NUM_CORES)
    return interpret


class Target(NamedTuple):
    """What the decode kernel wants to know of a chip."""

    num_cores: int = 1
    multiplies_fp8: bool = True  # the matrix unit takes float8_e4m3fn
    outruns_core: bool = False  # 8-bit pages of few heads arrive faster than a core starts their copies

    @classmethod
    def of(cls, device) -> Target:
        kind = getattr(device, "device_kind", "")
        return cls(NUM_CORES if has_megacore(device) else 1, kind != "TPU v4", kind == "TPU7x")


_TARGETS = (Target(), Target(2), Target(2, False), Target(1, False), Target(1, True, True))


@dataclasses.dataclass(frozen=True)
class _Is:
    target: Target
    asks: tuple[str, ...]

    def __call__(self, device) -> bool:
        return _asked(Target.of(device), self.asks) == self.target


def _asked(target: Target, asks: tuple[str, ...]) -> Target:
    return Target(**{name: getattr(target, name) for name in asks})


def on_target(launch, *operands, asks: tuple[str, ...], interpret: Interpret):
    """`launch(*operands, target)` with the `Target` that the program is lowered for, its fields `asks` filled in.

    Where the chip is not known when this is traced (a plain `jit`, lowered for an absent TPU), it is asked for while
    the program is lowered, and the branches not taken are gone from the compiled program.
    """
    if interpret:
        cores = interpret.num_cores_or_threads if isinstance(interpret, pltpu.InterpretParams) else 1
        return launch(*operands, target=Target(cores or 1))
    device = target_device(*(x for x in operands if x is not None))
    if device is not None:
        return launch(*operands, target=_asked(Target.of(device), asks))

    def choose(targets):
        target, *others = targets
        if not others:
            return functools.partial(launch, target=target)
        is_it = lowered_for(_Is(target, asks))
        return lambda *x: jax.lax.cond(is_it, functools.partial(launch, target=target), choose(others), *x)

    return choose(list(dict.fromkeys(_asked(target, asks) for target in _TARGETS)))(*operands)
