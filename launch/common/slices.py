"""Which slices of a TPU pod can be booked, and which one a topology or an accelerator type names."""

from __future__ import annotations

import functools
import math
import re
from typing import NamedTuple

from paged_dist._errors import bad_value
from paged_dist.launch.common.chip_rates import V4, V5E, V5P, V6E, V7X, Chip

# A generation as libtpu calls it, before the colon of a topology. Then other words for it: those that are taken, of
# accelerator types, and those that are answered with its name.
CHIP_OF_GENERATION = {"v4": V4, "v5e": V5E, "v5p": V5P, "v6e": V6E, "tpu7x": V7X}
_ALSO_CALLED = {"v5litepod": "v5e"}
_NOT_CALLED = {"v7x": "tpu7x", "v7": "tpu7x", "ironwood": "tpu7x", "trillium": "v6e", "v6": "v6e", "v5": "v5p or v5e"}

_FLAT_SLICES = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_PARTS_OF_A_CUBE = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
_CUBE = 4  # chips along each axis of what larger slices of a 3-D torus are wired from, in any box


class BookableSlice(NamedTuple):
    """A slice of a pod that can be booked."""

    topology: str  # as libtpu names it, such as 'v5p:8x8x8'
    chip: Chip


@functools.cache
def slices_sold(generation: str) -> tuple[tuple[int, ...], ...]:
    """The slices of a generation that can be booked, as chips along each axis, by number of chips.

    After Google's pages of each generation: v5e and v6e have eight shapes. v4, v5p and tpu7x have parts of a cube of
    4x4x4 chips, tpu7x also a single chip, and boxes of whole cubes, as many as the pod has. Axes ascend, but for the
    host's 2x2x1. Among shapes of equally many chips the one nearest a cube comes first.
    """
    chip = CHIP_OF_GENERATION[generation]
    if len(chip.pod) == 2:
        return _FLAT_SLICES
    most = math.prod(chip.pod) // _CUBE**3
    boxes = [
        (_CUBE * a, _CUBE * b, _CUBE * c)
        for a in range(1, most + 1)
        for b in range(a, most // a + 1)
        for c in range(b, most // (a * b) + 1)
    ]
    alone = [(1, 1, 1)] if chip is V7X else []
    return tuple(sorted([*alone, *_PARTS_OF_A_CUBE, *boxes], key=lambda dims: (math.prod(dims), sum(dims))))


def bookable_slice(name: str, flag: str = "--topology") -> BookableSlice:
    """The slice that `flag` names: by its shape, 'v5p:8x8x8', or by its accelerator type, 'v5p-1024'.

    The number of an accelerator type counts the TensorCores of v4, v5p and tpu7x, two a chip, and the chips of v5e
    (also called v5litepod) and v6e. Where it has several shapes, it is the one nearest a cube, as on Google's pages.
    A shape's axes may come in any order that leaves hosts of 2x2x1 chips whole.

    Raises:
      ValueError: no such generation, or a slice that nobody can book, with the nearest that one can. libtpu compiles
        for more than those, so that it is checked here.
    """
    match = re.fullmatch(r"(\w+)(?::|-(?=\d+x))(\d{1,6}(?:x\d{1,6})*)|(\w+)-(\d{1,9})", name, re.ASCII)
    if match is None:
        example = "write GENERATION:SHAPE or an accelerator type, such as v5p:8x8x8, v6e:16x16, v5p-1024 or v6e-256"
        raise bad_value(flag, name, "is no slice's name", example)
    word = match[1] or match[3]
    generation = _ALSO_CALLED.get(word, word)
    if generation not in CHIP_OF_GENERATION:
        known = word in _NOT_CALLED
        works = f"{_NOT_CALLED[word]} is its name" if known else f"use one of {', '.join(CHIP_OF_GENERATION)}"
        raise bad_value(flag, name, f"{word} is no generation that libtpu compiles for here", works)
    chip = CHIP_OF_GENERATION[generation]
    if match[4] is not None:
        return BookableSlice(_topology(generation, _shape_of_type(name, word, generation, int(match[4]), flag)), chip)
    dims = tuple(int(n) for n in match[2].split("x"))
    sold, axes = slices_sold(generation), len(chip.pod)
    if len(dims) != axes:
        chips = max(1, math.prod(dims))
        nearest = min(sold, key=lambda one: abs(math.log(math.prod(one) / chips)))
        rule = f"a {generation} slice has {axes} axes"
        raise bad_value(flag, name, rule, f"the nearest is {_topology(generation, nearest)}")
    whole_hosts = math.prod(dims) == 1 or dims[0] % 2 == dims[1] % 2 == 0
    if not whole_hosts or sorted(dims) not in map(sorted, sold):
        nearest = min(sold, key=lambda one: (_distance(one, dims), -math.prod(one)))
        raise bad_value(flag, name, _what_is_sold(generation), f"the nearest is {_topology(generation, nearest)}")
    return BookableSlice(_topology(generation, dims), chip)


def chip_of_topology(topology: str, flag: str = "--topology") -> Chip:
    """The chip of an absent slice; `bookable_slice` has what names it and what is refused."""
    return bookable_slice(topology, flag).chip


def _shape_of_type(name: str, word: str, generation: str, count: int, flag: str) -> tuple[int, ...]:
    """The shape of accelerator type `name`, which is `word`-`count`."""
    cores = 1 if len(CHIP_OF_GENERATION[generation].pod) == 2 else 2
    by_count = {}
    for dims in slices_sold(generation):
        by_count.setdefault(cores * math.prod(dims), dims)
    if count in by_count:
        return by_count[count]
    around = [*sorted(n for n in by_count if n < count)[-1:], *sorted(n for n in by_count if n > count)[:1]]
    near = [f"{word}-{n}, {_topology(generation, by_count[n])}" for n in around]
    what = "TensorCores, two a chip" if cores == 2 else "chips"
    rule = f"its number counts {what}, and no {generation} slice has so many"
    raise bad_value(flag, name, rule, f"the nearest {'are' if len(near) > 1 else 'is'} {' and '.join(near)}")


def _topology(generation: str, dims: tuple[int, ...]) -> str:
    return f"{generation}:{'x'.join(map(str, dims))}"


def _what_is_sold(generation: str) -> str:
    if len(CHIP_OF_GENERATION[generation].pod) == 2:
        return f"{generation} slices are {', '.join('x'.join(map(str, dims)) for dims in _FLAT_SLICES)}"
    sold = slices_sold(generation)
    small = ["x".join(map(str, dims)) for dims in sold if math.prod(dims) < _CUBE**3]
    most = math.prod(sold[-1]) // _CUBE**3
    return f"{generation} slices are {', '.join(small)}, and boxes of 1 to {most} cubes of 4x4x4 chips"


def _distance(one: tuple[int, ...], other: tuple[int, ...]) -> float:
    """How far one shape is from another, whatever the order of their axes: by what factor axes must grow or shrink."""
    pairs = zip(sorted(one), sorted(other), strict=True)
    return round(sum(abs(math.log(a / max(b, 1))) for a, b in pairs), 9)
