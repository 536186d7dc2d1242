"""Which chip a call is lowered for, and the decisions of the decode kernel that depend on the chip."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.experimental.pallas import tpu as pltpu

from paged_dist._compat import lowered_for
from paged_dist.kernels.chips import DescribedDevice, chip_facts
from paged_dist.kernels.dispatch import Interpret

# Bytes a second of HBM for each core from which on 8-bit pages of few heads arrive faster than a core starts their
# copies. By replay a v7x's core (3.7e12) is outrun and a v6e's (1.64e12) is not.
_OUTRUNS_CORE = 3e12


def target_device(*arrays: jax.Array) -> DescribedDevice | None:
    """The device (or jax's description of it) that a program over `arrays` is lowered for; None if not known.

    Known are: the mesh in scope (inside `shard_map`, under `jax.set_mesh` or `jax.sharding.use_abstract_mesh`),
    a mesh with Explicit axes that an argument carries, the devices of concrete arguments, and, with none of
    these, the host's own TPU. Not known: a plain `jit` lowered on a host without a TPU for an absent one.
    """
    meshes: list[jax.sharding.AbstractMesh | None] = [jax.sharding.get_abstract_mesh()]
    for array in arrays:
        if not isinstance(array, jax.core.Tracer) and isinstance(array, jax.Array):
            return next(iter(array.sharding.device_set))
        meshes.append(getattr(getattr(jax.typeof(array), "sharding", None), "mesh", None))
    for mesh in meshes:
        device = getattr(mesh, "abstract_device", None)
        if device is not None:
            return device
    return jax.devices()[0] if jax.default_backend() == "tpu" else None


def simulation(num_cores: int, interpret: Interpret) -> Interpret:
    """`interpret`, with True spelt out as the parameters that simulate `num_cores` cores."""
    if interpret is True:
        interpret = pltpu.InterpretParams()
        if num_cores > 1:
            interpret = dataclasses.replace(interpret, num_cores_or_threads=num_cores)
    return interpret


class Target(NamedTuple):
    """What the decode kernel does by chip: `chip_facts` as the three decisions that follow from them."""

    num_cores: int = 1
    multiplies_fp8: bool = True  # Mosaic takes float8_e4m3fn as an operand of the matrix unit
    outruns_core: bool = False  # 8-bit pages of few heads arrive faster than a core starts their copies

    @classmethod
    def of(cls, device: DescribedDevice | None) -> Target:
        """The target that `device` is; the usual one where its chip is not known."""
        facts = chip_facts(device)
        if facts is None:
            return cls()
        return cls(facts.num_cores, facts.name != "v4", facts.hbm_bytes_per_s_of_core > _OUTRUNS_CORE)


# All that `Target.of` says of some chip: v5e and v6e; v5p; v4; a v4's one core; v7x, 8i and 8t.
TARGETS = (Target(), Target(2), Target(2, False), Target(1, False), Target(1, True, True))


@dataclasses.dataclass(frozen=True)
class _IsTarget:
    """The question, put to the device that a program is lowered for, whether it agrees with `target` in `asks`."""

    target: Target
    asks: tuple[str, ...]

    def __call__(self, device: Any) -> bool:
        return _only(Target.of(device), self.asks) == self.target


def _only(target: Target, asks: tuple[str, ...]) -> Target:
    """`target` with its fields `asks`, and the others as by default."""
    return Target(**{name: getattr(target, name) for name in asks})


def on_target(launch: Callable, *operands: jax.Array | None, asks: tuple[str, ...], interpret: Interpret):
    """`launch(*operands, target=...)` with the `Target` that the program is lowered for, its fields `asks` filled in.

    Where the chip is not known when this is traced (a plain `jit`, lowered for an absent TPU), every target that
    differs in `asks` becomes a branch. The chip is asked for while the program is lowered, and the branches not taken
    are gone from the compiled program.
    """
    if interpret:
        cores = interpret.num_cores_or_threads if isinstance(interpret, pltpu.InterpretParams) else 1
        return launch(*operands, target=Target(cores or 1))
    device = target_device(*(x for x in operands if x is not None))
    if device is not None:
        return launch(*operands, target=_only(Target.of(device), asks))

    def choose(targets):
        target, *others = targets
        if not others:
            return functools.partial(launch, target=target)
        is_it = lowered_for(_IsTarget(target, asks))
        return lambda *x: jax.lax.cond(is_it, functools.partial(launch, target=target), choose(others), *x)

    return choose(list(dict.fromkeys(_only(target, asks) for target in TARGETS)))(*operands)
