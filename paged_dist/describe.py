"""`describe_mesh`: which physical axes each mesh axis runs over, why, and what a step communicates, in words."""

from __future__ import annotations

import math

from jax.sharding import Mesh

from paged_dist._errors import require
from paged_dist.cache import CacheSpec
from paged_dist.mesh import MeshAxes
from paged_dist.mesh.facts import MeshFacts, PhysicalRun, mesh_facts
from paged_dist.ops.collectives import Collective, attention_collectives


def describe_mesh(
    mesh: Mesh,
    spec: CacheSpec | None = None,
    *,
    num_q_heads: int | None = None,
    batch: int | None = None,
    num_query_tokens: int = 1,
    output_heads: str = "replicated",
    axes: MeshAxes = MeshAxes(),
) -> str:
    """How a mesh lies on its devices, in words: a line for the mesh, and one for each axis.

    With a `spec`, also why model and context have their sizes, and the bytes of the cache on each chip. With
    `num_q_heads` and `batch` besides, the collectives of an attention call, and their bytes over the layers of a step.
    The text is the same on every process.

    Args:
      mesh: any mesh of devices.
      spec: of the cache that will lie on it.
      num_q_heads, batch, num_query_tokens, output_heads: of the calls of `sharded_paged_attention`, as in
        `attention_collectives`; the first two go together and need a spec.
      axes: which mesh axes split sequences, one sequence's pages, and heads; used with a spec.

    Raises:
      ValueError: an AbstractMesh; a spec or a batch that does not divide over the mesh.

    Example:
      >>> mesh = pd.make_pod_mesh(num_kv_heads=2, model_parallelism=4)
      >>> print(pd.describe_mesh(mesh))
      mesh: data 2 x context 2 x model 2 = 8 devices (cpu), 1 process, no physical coordinates
        data 2: a quarter of the devices of a process (2 of 8, 4 apart)
        context 2: a quarter of the devices of a process (2 of 8, 2 apart)
        model 2: a quarter of the devices of a process (2 of 8, neighbours)

    Of a TPU pod, `make_pod_mesh(context=4, model=8, topology="v5p:8x8x8")`::

        mesh: data 16 x context 4 x model 8 = 512 devices (TPU v5), 128 processes, physical x 8, y 8, z 8
          data 16: a quarter of physical axis y (2 of 8, 4 apart), all 8 of physical axis z
          context 4: half of physical axis y (4 of 8, neighbours)
          model 8: all 8 of physical axis x
          split: physical axis y between data and context

    To which `spec=CacheSpec(8, 128, 8192, num_layers=32), num_q_heads=64, batch=128` adds::

          heads: model 8 is the greatest common divisor of the 8 kv heads and a sequence's 32 chips, context takes the
            other 4; 1 kv head a chip, no K or V is stored twice
          cache: 8192 pages over data 16 x context 4, 128 a chip: 268.44 MB a chip in bfloat16, 32 layers
          collectives of an attention call, over context 4 only, for 8 rows and 8 q heads a chip:
            all-reduce (max) of f32 [8, 8]: 256 B a chip, 384 B sent in a ring
            all-reduce (sum) of f32 [8, 8, 128] and [8, 8]: 33.02 kB a chip, 49.54 kB sent in a ring
          collectives of a step, 32 layers: 1.06 MB a chip, 1.60 MB sent in a ring
    """
    facts = mesh_facts(mesh)
    require(
        (num_q_heads is None) == (batch is None) and (batch is None or spec is not None),
        "num_q_heads, batch, spec",
        (num_q_heads, batch, spec),
        "the collectives of attention follow from all three",
    )
    lines = _mesh_lines(facts)
    if spec is not None:
        unit = "chip" if facts.has_coordinates and "core" not in dict(facts.physical) else "device"
        lines += _cache_lines(spec, mesh, axes, unit)
        if num_q_heads is not None and batch is not None:
            made = attention_collectives(
                spec,
                mesh,
                batch,
                num_q_heads,
                num_query_tokens=num_query_tokens,
                output_heads=output_heads,
                axes=axes,
            )
            lines += _collective_lines(made, spec.num_layers, unit)
    return "\n".join(lines)


def _mesh_lines(facts: MeshFacts) -> list[str]:
    """The mesh's sizes and devices, where each axis runs, and which physical axes several mesh axes share."""
    shape = " x ".join(f"{axis.name} {axis.size}" for axis in facts.axes)
    kinds = ", ".join(kind if len(facts.device_kinds) == 1 else f"{count} {kind}" for kind, count in facts.device_kinds)
    head = [
        f"mesh: {shape} = {_count_of(facts.num_devices, 'device')} ({kinds})",
        _count_of(facts.num_processes, "process", "processes"),
    ]
    if facts.num_slices > 1:
        head.append(f"{facts.num_slices} slices")
    if facts.has_coordinates:
        sizes = ", ".join(f"{name} {size}" for name, size in facts.physical if name != "slice")
        head.append(f"physical {sizes}" if sizes else "one chip")
    else:
        head.append("no physical coordinates")
    types = sorted({axis.type for axis in facts.axes})
    if types != ["Auto"]:
        head.append("axis types " + ", ".join(f"{axis.name} {axis.type}" for axis in facts.axes))
    lines = [", ".join(head)]
    for axis in facts.axes:
        where = ", ".join(map(_run_in_words, axis.runs)) if axis.size > 1 else "nothing is split"
        lines.append(f"  {axis.name} {axis.size}: {where}")
    for name in facts.split:
        lines.append(f"  split: {_axis_in_words(name)} between {' and '.join(facts.sharers(name))}")
    if facts.has_coordinates and not facts.fills_box:
        lines.append("  the devices do not fill a box: neighbours in the mesh may lie apart")
    return lines


def _cache_lines(spec: CacheSpec, mesh: Mesh, axes: MeshAxes, unit: str) -> list[str]:
    """Why model and context have their sizes, and what of the cache lies on each `unit`, a chip or a device."""
    data, context, model = (axes.size(mesh, part) for part in ("data", "context", "model"))
    per_chip = spec.bytes_per_chip(mesh, axes)  # raises where it does not divide
    heads, group = spec.num_kv_heads, context * model
    most = math.gcd(heads, group)
    if group == 1:
        why = f"model is 1 and context is 1, each {unit} has its sequences to itself"
    elif model == most:
        why = f"model {model} is the greatest common divisor of the {_count_of(heads, 'kv head')} and a sequence's "
        why += f"{group} {unit}s"
        why += f", context takes the other {context}" if context > 1 else ", nothing is left for context"
    else:
        why = f"model {model} was chosen, context {context} takes the rest of a sequence's {group} {unit}s (model "
        why += f"could be {most}, the greatest common divisor with the {_count_of(heads, 'kv head')})"
    each = f"{_count_of(heads // model, 'kv head')} a {unit}"
    copies = mesh.devices.size // (data * group)
    if copies > 1:
        parts = {name for part in ("data", "context", "model") for name in axes.names(part)}
        rest = [name for name in mesh.axis_names if name not in parts and mesh.shape[name] > 1]
        twice = f"K and V are stored {copies} times, for {' x '.join(rest)} splits nothing of them"
    else:
        twice = "no K or V is stored twice"
    layers = "" if spec.num_layers is None else f", {_count_of(spec.num_layers, 'layer')}"
    padded = ""
    if spec.stored_head_dim > spec.head_dim:
        padded = f", head_dim {spec.head_dim} stored as {spec.stored_head_dim}"
    pages = (
        f"{spec.num_pages} pages over data {data} x context {context}, {spec.num_pages // (data * context)} a {unit}"
    )
    size = f"{_bytes_in_words(per_chip)} a {unit} in {spec.dtype}{padded}{layers}"
    return [f"  heads: {why}; {each}, {twice}", f"  cache: {pages}: {size}"]


def _collective_lines(made: tuple[Collective, ...], num_layers: int | None, unit: str) -> list[str]:
    """The collectives of one attention call, and their bytes over all layers."""
    if not made:
        return ["  collectives of an attention call: none, for context is 1"]
    over, (rows, *_, heads) = made[0], made[0].shapes[0]
    lines = [
        f"  collectives of an attention call, over {' x '.join(over.axes)} {over.group} only, for "
        f"{_count_of(rows, 'row')} and {_count_of(heads, 'q head')} a {unit}:"
    ]
    cost = lambda count, sent: f"{_bytes_in_words(count)} a {unit}, {_bytes_in_words(sent)} sent in a ring"
    for one in made:
        arrays = " and ".join(str(list(shape)) for shape in one.shapes)
        lines.append(f"    {one.kind} ({one.reduction}) of f32 {arrays}: {cost(one.bytes, one.bytes_sent)}")
    calls = num_layers or 1
    total = cost(calls * sum(one.bytes for one in made), calls * sum(one.bytes_sent for one in made))
    return [*lines, f"  collectives of a step, {_count_of(calls, 'layer')}: {total}"]


def _bytes_in_words(count: int) -> str:
    """As '33.02 kB', in powers of 1000."""
    for prefix, size in (("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {prefix}B"
    return f"{count} B"


def _count_of(n: int, one: str, many: str | None = None) -> str:
    """As '1 layer' or '2 layers'; `many` is the plural where it is not `one` + s."""
    return f"{n} {one if n == 1 else many or one + 's'}"


def _axis_in_words(physical: str) -> str:
    """A physical axis by what it is made of."""
    return {
        "slice": "the slices",
        "core": "the cores of a chip",
        "process": "the processes",
        "device": "the devices of a process",
    }.get(physical, f"physical axis {physical}")


def _run_in_words(run: PhysicalRun) -> str:
    """Which share of a physical axis a mesh axis takes: how many of its positions, and how far apart."""
    if run.whole:
        what = {
            "slice": f"all {run.size} slices (across the data-centre network)",
            "core": f"the {run.size} cores of a chip",
            "process": f"all {run.size} processes",
            "device": f"all {run.size} devices of a process",
        }
        words = what.get(run.physical, f"all {run.size} of physical axis {run.physical}")
        return words if run.regular else words + " (unevenly)"
    ratio = run.size // run.count
    share = "part"
    if run.size % run.count == 0:
        share = {2: "half", 3: "a third", 4: "a quarter"}.get(ratio, f"1/{ratio}")
    if not run.regular:
        apart = "unevenly"
    elif run.stride == 1:
        apart = "neighbours"
    else:
        apart = f"{run.stride} apart"
    return f"{share} of {_axis_in_words(run.physical)} ({run.count} of {run.size}, {apart})"
