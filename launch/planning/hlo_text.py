"""What the text of a compiled program (HLO) says: the values it makes, its collectives, sends and kernels.

`compiled.as_text()` is such a text. Which of these values are copies of page pools is found in `pool_copies`.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jax.stages import Compiled

# `%copy.3 = bf16[8,128]{1,0:T(8,128)} copy(%param.0), metadata={...}`: name, type, operation, rest of the line.
# A tuple's type has parentheses inside: those of its arrays' tiles.
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"\b(body|condition|to_apply|calls|(?:branch|called)_computations)=(\{[^}]*\}|%?[\w.\-]+)")
_NO_MEMORY = {"parameter", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "opt-barrier"}
_NO_WORK = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "opt-barrier"}
_KERNEL = 'custom_call_target="tpu_custom_call"'
_BYTES_OF_DTYPE = {
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
_ARRAY = re.compile(rf"\b({'|'.join(_BYTES_OF_DTYPE)})\[([\d,]*)\]")
_LAID_OUT = re.compile(_ARRAY.pattern + r"(\{[^}]*\})?")


def program_text(program: Compiled) -> str:
    """The text of a compiled program."""
    text = program.as_text()
    assert text is not None, "JAX's compilers for TPU and CPU have one"
    return text


def _array_bytes(types: str) -> list[int]:
    """Bytes of each array in an HLO type, a tuple's elements one by one."""
    found = _ARRAY.findall(types)
    return [
        _BYTES_OF_DTYPE[dtype] * int(np.prod([int(d) for d in dims.split(",") if d], dtype=float))
        for dtype, dims in found
    ]


def values_as_large_as(hlo: str, size: int) -> list[str]:
    """The instructions, as 'operation name type', that make a value of `size` bytes or more.

    Left out are instructions that only pass a value on (parameters, tuples, bitcasts, loops) and kernels whose large
    results alias their operands.
    """
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
        made.append(f"{op} {name} {types}")
    return made


class WrittenValue(NamedTuple):
    """A value that a compiled program writes to HBM."""

    name: str
    array: str  # 'bf16[80,8,128,8192]', of one device
    bytes: int
    loops: int  # loops that it stands in


def values_written_to_hbm(hlo: str, size: int) -> list[WrittenValue]:
    """The values of `size` bytes or more that a compiled program writes to HBM, except kernels' in-place results.

    Values inside a fusion are not written, nor are those that a called computation returns. An asynchronous pair
    (copy-start, copy-done) counts as one.
    """
    loops, large = loop_depths(hlo), {x.split()[1] for x in values_as_large_as(hlo, size)}
    inner = {
        called
        for _, _, _, op, rest in _instructions(hlo)
        for role, names in _CALLED.findall(rest)
        if not (op in ("while", "conditional") and role != "condition")
        for called in re.findall(r"[\w.\-]+", names)
    }
    return [
        WrittenValue(name, f"{dtype}[{dims}]", count, loops.get(inside, 0))
        for inside, name, types, op, _ in _instructions(hlo)
        if name in large and inside not in inner and not op.endswith("-start")
        for (dtype, dims, layout), count in zip(_LAID_OUT.findall(types), _array_bytes(types), strict=True)
        if count >= size and "S(" not in layout
    ]


class HloCollective(NamedTuple):
    """One collective operation of a compiled program."""

    kind: str  # 'all-reduce', 'reduce-scatter', 'all-gather', ...
    arrays: tuple[str, ...]  # its operands as 'f32[8,4,128]', of one device
    bytes: int  # of these
    groups: tuple[tuple[int, ...], ...]  # the devices, by number in the mesh, that talk to each other
    loops: int = 0  # loops that it stands in; the text for a TPU does not say how often one runs


_COLLECTIVES = (
    "all-reduce|all-gather|all-to-all|ragged-all-to-all|collective-permute|reduce-scatter|collective-broadcast"
)


def collectives(hlo: str) -> list[HloCollective]:
    """The collective operations of a compiled program. An asynchronous pair (start, done) is one.

    Raises ValueError for groups in a form that is not known here.
    """
    types = {m[1]: m[2] for m in map(_INSTRUCTION.match, hlo.splitlines()) if m}
    loops = loop_depths(hlo)
    found = []
    for inside, name, _, op, rest in _instructions(hlo):
        kind = re.fullmatch(rf"({_COLLECTIVES})(-start)?", op)
        if kind is None:
            continue
        operands = re.findall(r"%([\w.\-]+)", rest[: rest.index(")")])
        arrays = [f"{dtype}[{dims}]" for x in operands for dtype, dims in _ARRAY.findall(types[x])]
        size = sum(_array_bytes(" ".join(arrays)))
        found.append(HloCollective(kind[1], tuple(arrays), size, _replica_groups(name, rest), loops.get(inside, 0)))
    return found


def _instructions(hlo: str) -> Iterator[tuple[str, str, str, str, str]]:
    """(computation, name, type, operation, rest of the line) of each instruction."""
    inside = ""
    for line in hlo.splitlines():
        if match := _COMPUTATION.match(line):
            inside = match[1]
        elif match := _INSTRUCTION.match(line):
            yield inside, match[1], match[2], match[3], match[4]


def loop_depths(hlo: str) -> dict[str, int]:
    """Computation -> the number of loops that it runs in, its callers' loops among them."""
    callers: dict[str, list[tuple[str, int]]] = {}
    for inside, _, _, op, rest in _instructions(hlo):
        for role, names in _CALLED.findall(rest):
            within = int(op == "while" and role in ("body", "condition"))
            for name in re.findall(r"[\w.\-]+", names):
                callers.setdefault(name, []).append((inside, within))

    @functools.cache
    def depth(name: str) -> int:
        return max((depth(caller) + within for caller, within in callers.get(name, ())), default=0)

    return {name: depth(name) for name in callers}


class Send(NamedTuple):
    """One send: data that leaves a device for another slice, over DCN, or for the host."""

    arrays: tuple[str, ...]
    bytes: int
    loops: int


def sends(hlo: str) -> list[Send]:
    """The sends of a compiled program. libtpu turns a collective over several slices into sends and receives."""
    types = {m[1]: m[2] for m in map(_INSTRUCTION.match, hlo.splitlines()) if m}
    loops, found = loop_depths(hlo), []
    for inside, _, _, op, rest in _instructions(hlo):
        if op == "send":
            first = re.search(r"%([\w.\-]+)", rest)
            arrays = [f"{dtype}[{dims}]" for dtype, dims in _ARRAY.findall(types[first[1]])] if first else []
            found.append(Send(tuple(arrays), sum(_array_bytes(" ".join(arrays))), loops.get(inside, 0)))
    return found


_MESH_AXIS = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")


def _replica_groups(name: str, text: str) -> tuple[tuple[int, ...], ...]:
    """The replica groups of an instruction, which XLA writes in one of four ways."""
    mesh = r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\]T\(([\d,]+)\)\))? \{([^}]*)\}"
    if match := re.search(mesh, text):
        numbers = lambda x: [int(n) for n in x.split(",")]
        sizes = {k: int(n) for k, n in re.findall(r"'([^']+)'=(\d+)", match[1])}
        ids = np.arange(np.prod(list(sizes.values())))
        if match[2]:
            ids = ids.reshape(numbers(match[2])).transpose(numbers(match[3]))
        # 'model', or 'model':(4)2 for its part of size 2 behind one of size 4: every axis as three, before, it, behind.
        parts = {k: (int(before or 1), int(n or sizes[k])) for k, before, n in _MESH_AXIS.findall(match[4])}
        split = {k: parts.get(k, (1, 1)) for k in sizes}
        ids = ids.reshape(
            [n for k, (before, size) in split.items() for n in (before, size, sizes[k] // before // size)]
        )
        where = [3 * list(sizes).index(k) + 1 for k in parts]
        within = math.prod(size for _, size in parts.values())
        return _as_groups(np.moveaxis(ids, where, range(-len(where), 0)).reshape(-1, within))
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, dims, order = ([int(n) for n in (x or "").split(",") if n] for x in match.groups())
        ids = np.arange(math.prod(dims)).reshape(dims)
        return _as_groups((ids.transpose(order) if order else ids).reshape(shape))
    if match := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}", text):
        return tuple(tuple(int(n) for n in group.split(",")) for group in re.findall(r"\{([\d,]+)\}", match[1]))
    raise ValueError(f"the groups of {name} are in a form that is not known: {text[:200]}")


def _as_groups(ids: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(group) for group in ids.tolist())


def ops_around_kernels(hlo: str) -> list[str]:
    """The instructions of the entry computation that do work and are no kernel. An asynchronous pair is one."""
    found = [m.groups() for m in map(_INSTRUCTION.match, hlo[hlo.index("\nENTRY ") :].splitlines()) if m]
    return [
        f"{op} {name}"
        for name, _, op, rest in found
        if op not in _NO_WORK and not op.endswith("-done") and not (op == "custom-call" and _KERNEL in rest)
    ]


def kernel_vmem(hlo: str) -> list[int]:
    """Bytes of VMEM that the compiler gave each kernel of a compiled program."""
    return [size for _, size in kernels_and_vmem(hlo)]


def kernels_and_vmem(hlo: str) -> list[tuple[str, int]]:
    """(name, bytes of VMEM that the compiler gave it) of each kernel of a compiled program."""
    used = re.compile(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"0","size":"(\d+)"')
    named = re.compile(r'op_name="[^"]*?([^"/]+)/pallas_call"')
    lines = [line for line in hlo.splitlines() if _KERNEL in line]
    return [
        (m[1] if (m := named.search(line)) else "kernel", int(m[1]) if (m := used.search(line)) else 0)
        for line in lines
    ]
