"""Ahead-of-time compiles for absent TPUs, and what tests read from the compiled program."""

from __future__ import annotations

import os
import re

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from paged_dist._compat import lowering_for
from paged_dist.topology import has_libtpu, topology_devices

# One single-chip topology for each generation.
CHIPS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "v7x": "tpu7x:2x2x1"}

# Where PAGED_DIST_REQUIRE_LIBTPU=1 (.ci/run sets it) such a test runs, and fails on the compiler that is not there.
needs_libtpu = pytest.mark.skipif(
    not has_libtpu() and os.environ.get("PAGED_DIST_REQUIRE_LIBTPU") != "1",
    reason="libtpu, the TPU compiler, is not installed: pip install 'jax[tpu]'",
)


def one_chip_mesh(chip: str) -> Mesh:
    """A mesh of one absent device of generation `chip`, a key of CHIPS."""
    return Mesh(np.array(topology_devices(CHIPS[chip])[:1]), ("chip",))


def compile_on(mesh: Mesh, fn, *args, **jit_options):
    """The compiled `jit(fn)` for `mesh`; a ShapeDtypeStruct without a sharding is taken as replicated on it."""
    replicated = NamedSharding(mesh, PartitionSpec())
    args = jax.tree.map(
        lambda a: (
            a
            if getattr(a, "sharding", None) is not None
            else jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=replicated)
        ),
        args,
    )
    with lowering_for(mesh):
        return jax.jit(fn, **jit_options).lower(*args).compile()


def collectives(hlo: str) -> list[str]:
    """The names of the collective operations in a compiled program's text, one for each instruction."""
    names = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
    return re.findall(rf"= [^=\n]*?\b({names})(?:-start)?\(", hlo)


_BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "f8e4m3fn": 1,
    "bf16": 2,
    "f16": 2,
    "s16": 2,
    "u16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
}
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_NO_MEMORY = {"parameter", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "opt-barrier"}


def _array_bytes(types: str) -> list[int]:
    """Bytes of each array in an HLO type, a tuple's elements one by one."""
    found = re.findall(r"\b(pred|s8|u8|f8e4m3fn|bf16|f16|s16|u16|s32|u32|f32)\[([\d,]*)\]", types)
    return [_BYTES[dtype] * int(np.prod([int(d) for d in dims.split(",") if d], dtype=float)) for dtype, dims in found]


def values_as_large_as(hlo: str, size: int) -> list[str]:
    """Instructions of a compiled program that make a value of `size` bytes or more, apart from those that only
    pass one on (parameters, tuples, bitcasts, loops) and kernels whose large results alias their operands."""
    made = []
    for line in hlo.splitlines():
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        name, types, op, rest = match.groups()
        large = [i for i, n in enumerate(_array_bytes(types)) if n >= size]
        if not large or op in _NO_MEMORY:
            continue
        aliased = re.search(r"output_to_operand_aliasing=\{(.*?\)\})", rest) if op == "custom-call" else None
        outputs = {int(i) for i in re.findall(r"\{(\d+)\}: \(", rest)} if aliased else set()
        if aliased and (set(large) <= outputs or (not types.startswith("(") and "{}: (" in rest)):
            continue
        made.append(f"{op} {name} {types[:80]}")
    return made
