"""A decode step for a pod that is not here, compiled ahead of time: `paged-dist-plan`.

    paged-dist-plan --topology=v5p:8x8x8 --num_kv_heads=8 --num_q_heads=64 --layers=80 --model_parallelism=32

It fills the pod's HBM with a cache, compiles the step (append and attend in every layer; with --width also the
attention's projections) with libtpu on this host's CPU, and prints what it read from the compiled program: memory,
collectives, copies, the kernels' vector and scalar memory; how many tokens and sequences of a trace fit; and the least
time that a step can take. Nothing runs, no TPU is needed.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time

from absl import flags

from paged_dist._errors import bad_value, require
from paged_dist.launch import flags as shared
from paged_dist.launch import workload_flags
from paged_dist.launch.chips import Chip, chip_of_topology
from paged_dist.launch.workload import Request, pages_needed, sequences_that_fit, whole_pool

TOPOLOGY = flags.DEFINE_string(
    "topology", None, "The slice: v4:4x4x4, v5e:16x16, v5p:8x8x8, v6e:16x16, tpu7x:4x4x4, chips along each axis."
)
NUM_SLICES = flags.DEFINE_integer("num_slices", 1, "So many slices of that shape; data alone runs between them.")
MODEL_PARALLELISM = flags.DEFINE_integer(
    "model_parallelism",
    None,
    "Devices to a sequence: model takes what divides the kv heads, context the rest. Default: model alone.",
)
WIDTH = flags.DEFINE_integer(
    "width", 0, "Width of the model, to have the projections before and after attention in the step; 0: without."
)

flags.adopt_module_key_flags(workload_flags)

NAME = "paged-dist-plan"
_TAKEN = (
    "data",
    "context",
    "model",
    "layers",
    "num_q_heads",
    "num_kv_heads",
    "head_dim",
    "kv_dtype",
    "soft_cap",
    "sliding_window",
    "seed",
    "batch",
    "page_size",
    "num_pages",
    "pages_per_sequence",
    "context_tokens",
    "hbm_gib",
    "output",
)
for _name in _TAKEN:
    flags.declare_key_flag(_name)

_KEPT = 0.02  # of HBM, for what the program needs beside cache and weights, where --num_pages does not say
_ROWS_A_SHARD = 16


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to plan. B rows over the pod, Hq, Hkv, D, P; None where the pod decides."""

    topology: str
    num_slices: int
    data: int | None
    context: int | None
    model: int | None
    model_parallelism: int | None
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    soft_cap: float | None
    sliding_window: int | None
    width: int
    batch: int | None
    page_size: int
    num_pages: int | None
    pages_per_sequence: int | None
    context_tokens: int | None
    hbm_gib: float | None
    requests: tuple[Request, ...]
    workload: str

    @property
    def weights_bytes(self) -> int:
        """Bytes of the attention's projections, all layers, bf16."""
        heads = 2 * self.num_q_heads + 2 * self.num_kv_heads
        return 2 * self.num_layers * self.width * heads * self.head_dim


def settings_from_flags() -> Settings:
    """The settings that the flags name.

    Raises:
      ValueError: a value outside its rule, or a flag of another launcher.
    """
    shared.refuse_others(_TAKEN)
    require(TOPOLOGY.value is not None, "--topology", None, "is missing", "name a slice, such as --topology=v5p:8x8x8")
    chip_of_topology(TOPOLOGY.value)
    f = flags.FLAGS
    sizes = ("data", "context", "model", "layers", "num_q_heads", "num_kv_heads", "head_dim", "batch", "page_size")
    sizes += ("num_pages", "pages_per_sequence", "sliding_window", "model_parallelism", "num_slices", "context_tokens")
    shared.at_least(1, **{name: f[name].value for name in sizes})
    shared.at_least(0, width=WIDTH.value)
    q, kv = shared.NUM_Q_HEADS.value, shared.NUM_KV_HEADS.value
    require(q % kv == 0, "--num_q_heads", q, f"must be a multiple of --num_kv_heads={kv}")
    for name in ("hbm_gib", "soft_cap"):
        value = f[name].value
        require(value is None or 0 < value < math.inf, f"--{name}", value, "must be above 0 and finite")
    shared.check_output(shared.OUTPUT.value)
    requests, workload = workload_flags.requests_from_flags()
    same = ("data", "context", "model", "num_q_heads", "num_kv_heads", "head_dim", "soft_cap", "sliding_window")
    same += ("batch", "page_size", "num_pages", "pages_per_sequence")
    same += ("topology", "num_slices", "model_parallelism", "width", "context_tokens", "hbm_gib")
    return Settings(
        **{name: f[name].value for name in same},
        num_layers=shared.NUM_LAYERS.value,
        dtype=shared.kv_dtype(shared.KV_DTYPE.value),
        requests=tuple(requests),
        workload=workload,
    )


def mesh_of(s: Settings):
    """The mesh over the absent pod; model takes what divides the kv heads where nothing says how many."""
    from paged_dist import make_pod_mesh
    from paged_dist.topology import topology_devices

    model = s.model
    if model is None and s.model_parallelism is None:
        devices = len(topology_devices(s.topology, s.num_slices))
        model = math.gcd(s.num_kv_heads, devices // ((s.data or 1) * (s.context or 1)) or 1)
    return make_pod_mesh(
        data=s.data,
        context=s.context,
        model=model,
        num_kv_heads=s.num_kv_heads,
        model_parallelism=s.model_parallelism,
        topology=s.topology,
        num_slices=s.num_slices,
    )


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the pod makes of the settings: the cache, the rows, and what they take of a device's HBM."""

    spec: object
    batch: int
    pages_per_sequence: int
    context_tokens: int  # live tokens of each row
    hbm_bytes: int  # of a device
    weights_bytes: int  # on a device


def sizes_of(s: Settings, mesh, chip: Chip) -> Sizes:
    """Sizes the cache to the pod's HBM, or checks the one that was asked for against it.

    Raises:
      ValueError: what does not fit, by which limit, and the nearest that does.
    """
    from paged_dist import CacheSpec

    data, context, model = (mesh.shape[name] for name in ("data", "context", "model"))
    shards = data * context
    hbm = chip.device_hbm_bytes if s.hbm_gib is None else int(s.hbm_gib * 2**30) // chip.devices
    weights = s.weights_bytes // model
    require(s.num_q_heads % model == 0, "--num_q_heads", s.num_q_heads, f"must be a multiple of model {model}")
    batch = s.batch or _ROWS_A_SHARD * data
    up = -(-batch // data) * data
    require(batch % data == 0, "--batch", batch, f"must be a multiple of the mesh's data size {data}", f"{up} works")
    page = CacheSpec(
        s.num_kv_heads, s.head_dim, whole_pool(1, s.page_size, s.dtype), s.page_size, s.dtype, s.num_layers
    )
    page_bytes = page.bytes_per_token * s.page_size // model  # on each device that holds it
    unit = whole_pool(1, s.page_size, s.dtype)
    fit = lambda room: max(room, 0) // page_bytes // unit * unit * shards
    room, most = int(hbm * (1 - _KEPT)) - weights, fit(hbm - weights)
    if most == 0:
        raise bad_value(
            "--width" if weights else "--page_size",
            s.width if weights else s.page_size,
            f"{_gib(weights)} of weights leave no room for a page in the {_gib(hbm)} of a device's HBM",
            "give a larger --model, or fewer --layers",
        )
    pages = s.num_pages or fit(room)
    if s.num_pages is not None:
        CacheSpec(s.num_kv_heads, s.head_dim, pages, s.page_size, s.dtype, s.num_layers).check_mesh(mesh)
        require(
            pages <= most,
            "--num_pages",
            pages,
            f"a cache of {_gib(pages // shards * page_bytes)} a device"
            + (f" and {_gib(weights)} of weights" if weights else "")
            + f", where its HBM gives a program {_gib(hbm)}",
            f"{most} pages fit",
        )
    longest = max(s.context_tokens or 0, *(r.tokens for r in s.requests))
    columns = s.pages_per_sequence or pages_needed(longest, s.page_size)
    mean = sum(r.context + r.generated / 2 for r in s.requests) / len(s.requests)
    tokens = s.context_tokens or min(round(mean), columns * s.page_size)
    require(
        tokens <= columns * s.page_size,
        "--context_tokens",
        tokens,
        f"a row's {columns} pages hold {columns * s.page_size}",
        f"give --pages_per_sequence={pages_needed(tokens, s.page_size)}",
    )
    a_row = pages_needed(pages_needed(tokens, s.page_size), context)  # pages on each context shard
    rows, rows_that_fit = batch // data, pages // shards // a_row
    require(
        rows * a_row <= pages // shards,
        "--batch",
        batch,
        f"{rows} rows of {tokens} tokens on a data shard take {rows * a_row} pages on each device, which has "
        f"{pages // shards}",
        f"--batch={rows_that_fit * data} fits" if rows_that_fit else "give fewer --context_tokens, or more --num_pages",
    )
    spec = CacheSpec(s.num_kv_heads, s.head_dim, pages, s.page_size, s.dtype, s.num_layers)
    return Sizes(spec, batch, columns, tokens, hbm, weights)


def decode_step(s: Settings, mesh):
    """`step(cache, lengths, block_tables, *inputs) -> (cache, outputs)`: appends a token and attends, layer by layer.

    Without width, inputs are query [B, Hq, D], key and value [B, Hkv, D], and each layer's output is the next one's
    query; with it x [B, width] and the projections [L, width, Hq, D], 2 x [L, width, Hkv, D] and [L, Hq, D, width].
    """
    import jax.numpy as jnp
    from jax import lax

    from paged_dist import append_kv, sharded_paged_attention

    def attend(cache, query, key, value, lengths, tables, layer):
        cache = append_kv(cache, key, value, lengths - 1, tables, layer=layer, mesh=mesh)
        output = sharded_paged_attention(
            query,
            cache,
            lengths,
            tables,
            layer=layer,
            sm_scale=s.head_dim**-0.5,
            soft_cap=s.soft_cap,
            sliding_window=s.sliding_window,
            mesh=mesh,
        )
        return cache, output

    def bare(cache, lengths, tables, query, key, value):
        def one(carry, layer):
            cache, query = carry
            return attend(cache, query, key, value, lengths, tables, layer), None

        return lax.scan(one, (cache, query), jnp.arange(s.num_layers, dtype=jnp.int32))[0]

    def projected(cache, lengths, tables, x, *weights):
        def one(carry, layer_and_weights):
            cache, x = carry
            layer, to_query, to_key, to_value, back = layer_and_weights
            new = (jnp.einsum("bw,whd->bhd", x, w) for w in (to_query, to_key, to_value))
            cache, output = attend(cache, *new, lengths, tables, layer)
            return (cache, x + jnp.einsum("bhd,hdw->bw", output, back)), None

        return lax.scan(one, (cache, x), (jnp.arange(s.num_layers, dtype=jnp.int32), *weights))[0]

    return projected if s.width else bare


def step_arguments(s: Settings, sizes: Sizes, mesh) -> tuple:
    """The abstract arguments of `decode_step`, each in its sharding."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from paged_dist import PagedKVCache
    from paged_dist.launch.synthetic import input_dtype

    dtype = jnp.dtype(input_dtype(s.dtype))
    of = lambda shape, dtype, *spec: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))
    batch, layers, width, d = sizes.batch, s.num_layers, s.width, s.head_dim
    first = (
        PagedKVCache.abstract(sizes.spec, mesh),
        of((batch,), jnp.int32, "data"),
        of((batch, sizes.pages_per_sequence), jnp.int32, "data", None),
    )
    heads = (s.num_q_heads, s.num_kv_heads, s.num_kv_heads)
    if not width:
        return *first, *(of((batch, n, d), dtype, "data", "model", None) for n in heads)
    into = (of((layers, width, n, d), dtype, None, None, "model", None) for n in heads)
    back = of((layers, s.num_q_heads, d, width), dtype, None, "model", None, None)
    return *first, of((batch, width), dtype, "data", None), *into, back


def compile_step(s: Settings, sizes: Sizes, mesh):
    """(compiled program, seconds to trace and lower, seconds to compile); nothing is taken from jax's cache on disk."""
    import jax

    from paged_dist._compat import lowering_for

    on_disk = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        with lowering_for(mesh):
            start = time.perf_counter()
            lowered = jax.jit(decode_step(s, mesh), donate_argnums=0).lower(*step_arguments(s, sizes, mesh))
            between = time.perf_counter()
            compiled = lowered.compile()
            return compiled, between - start, time.perf_counter() - between
    finally:
        jax.config.update("jax_enable_compilation_cache", on_disk)


def read_program(s: Settings, sizes: Sizes, mesh, compiled) -> dict:
    """What a compiled step says of itself: memory, pool copies, collectives, sends, kernels. Bytes are a device's."""
    from paged_dist.launch import compiled as read

    text, memory, spec = compiled.as_text(), compiled.memory_analysis(), sizes.spec
    alone = memory.output_size_in_bytes - memory.alias_size_in_bytes  # results that are in no argument's place
    cache_bytes = spec.bytes_per_chip(mesh)
    rows, lanes = spec.stored_page_shape
    layer_pool = cache_bytes // (2 * s.num_layers)
    if spec.is_quantized:  # the pages without their scales
        layer_pool = layer_pool * s.head_dim // (s.head_dim + 4)
    copies = [
        value for value in read.values_as_large_as(text, layer_pool) if f",{rows},{lanes}]" in value.replace(" ", "")
    ]
    return {
        "cache_bytes": cache_bytes,
        "weights_bytes": sizes.weights_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "program_bytes": memory.generated_code_size_in_bytes,
        "used_bytes": memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
        + alone,
        "aliased_bytes": memory.alias_size_in_bytes,
        "pool_copies": copies,
        "collectives": [_collective(c, s, mesh) for c in read.collectives(text)],
        "sends": [{"arrays": list(c.arrays), "bytes": c.bytes * s.num_layers**c.loops} for c in read.crossings(text)],
        "kernels": [{"name": name, "vmem_bytes": vmem} for name, vmem in read.kernels(text)],
    }


def _collective(c, s: Settings, mesh) -> dict:
    """One collective of the step: over which mesh axes, how often (the step's one loop is that over layers), and how
    many bytes each device puts in and sends in a ring over the step, over ICI or DCN."""
    axes, over_slices = axes_of(mesh, c.groups, s.num_slices)
    times = s.num_layers**c.loops
    group = max(map(len, c.groups))
    passes = {"all-reduce": 2, "all-gather": group}.get(c.kind, 1)
    return {
        "kind": c.kind,
        "arrays": list(c.arrays),
        "axes": list(axes),
        "links": "dcn" if over_slices else "ici",
        "group": group,
        "times": times,
        "bytes": times * c.bytes,
        "bytes_sent": times * passes * c.bytes * (group - 1) // group,
    }


def axes_of(mesh, groups, num_slices: int = 1) -> tuple[tuple[str, ...], bool]:
    """(mesh axes along which the members of `groups` differ, whether any group has members on several slices).

    The program of several slices is one slice's: its devices are numbered as the mesh's part on that slice.
    """
    import numpy as np

    shape = list(mesh.devices.shape)
    shape[0] //= num_slices
    members = np.array([m for g in groups for m in g])
    require(members.max() < mesh.devices.size, "groups", int(members.max()), "has more devices than the mesh")
    within = members.max() < math.prod(shape)
    shape = shape if within else list(mesh.devices.shape)
    where = [np.stack(np.unravel_index(np.array(g), shape), axis=-1) for g in groups]
    differ = np.any([(w != w[:1]).any(axis=0) for w in where], axis=0)
    axes = tuple(name for name, d in zip(mesh.axis_names, differ, strict=True) if d)
    if within:
        return axes, False
    slices = lambda g: {getattr(mesh.devices.flat[i], "slice_index", 0) for i in g}
    return axes, any(len(slices(g)) > 1 for g in groups)


def launch_of(s: Settings, sizes: Sizes, mesh) -> dict:
    """Scalar and vector memory that the attention kernel plans, a launch's, and how many launches a layer takes."""
    import jax
    import jax.numpy as jnp

    from paged_dist.kernels.paged_attention import decode_plan
    from paged_dist.kernels.paged_attention.checks import check_pools
    from paged_dist.kernels.paged_attention.megacore import Target
    from paged_dist.launch.synthetic import input_dtype

    data, context, model = (mesh.shape[name] for name in ("data", "context", "model"))
    spec, rows = sizes.spec, sizes.batch // data
    local = dataclasses.replace(
        spec, num_kv_heads=spec.num_kv_heads // model, num_pages=spec.num_pages // (data * context)
    )
    pool = jax.ShapeDtypeStruct(local.pool_shape, local.dtype)
    scales = jax.ShapeDtypeStruct(local.scales_shape, jnp.float32) if spec.is_quantized else None
    columns = pages_needed(sizes.pages_per_sequence, context)
    problem = check_pools(
        jax.ShapeDtypeStruct((rows, s.num_q_heads // model, s.head_dim), input_dtype(s.dtype)),
        pool,
        pool,
        jax.ShapeDtypeStruct((rows,), jnp.int32),
        jax.ShapeDtypeStruct((rows, columns), jnp.int32),
        scales,
        scales,
    )
    plan = decode_plan.make_plan(problem, Target.of(mesh.devices.flat[0]), sliding_window=s.sliding_window)
    decode_plan.check_block_sizes(plan)
    most = decode_plan.rows_per_launch(plan)
    part = dataclasses.replace(plan, problem=problem.replace(batch=min(rows, most)))
    return {
        "rows": min(rows, most),
        "launches": -(-rows // most),
        "smem_bytes": part.smem_bytes,
        "vmem_bytes": part.vmem_bytes,
    }


def floor_of(s: Settings, sizes: Sizes, mesh, chip: Chip, collectives: list[dict]) -> dict:
    """The least seconds of a step: HBM and ICI apart, one after the other, for a layer's merge waits for its attention.

    HBM: live K and V (those inside the window) and weights, each read once, over the peak bandwidth. ICI: what a ring
    sends, over a link's both directions at once; latency is not in it, nor is anything sent over DCN.
    """
    data, context, model = (mesh.shape[name] for name in ("data", "context", "model"))
    live = min(sizes.context_tokens, s.sliding_window or sizes.context_tokens)
    kv_bytes = sizes.batch // data * live * sizes.spec.bytes_per_token // (model * context)
    hbm_s = (kv_bytes + sizes.weights_bytes) / chip.device_hbm_bytes_per_s
    sent = sum(c["bytes_sent"] for c in collectives if c["links"] == "ici")
    ici_s = sent / (2 * chip.link_bytes_per_s)
    return {
        "live_kv_bytes": kv_bytes,
        "hbm_s": hbm_s,
        "ici_bytes_sent": sent,
        "ici_s": ici_s,
        "step_s": hbm_s + ici_s,
        "tokens_per_s": sizes.batch / (hbm_s + ici_s),
    }


def plan(s: Settings) -> dict:
    """The plan as one flat record; a pod's program is compiled on the way.

    Raises:
      ValueError, NotImplementedError: settings that do not fit the pod, each with what does.
      RuntimeError: no libtpu; the compiler refused the program, in its own words.
    """
    from paged_dist import describe_mesh
    from paged_dist.describe import mesh_facts
    from paged_dist.launch import report

    chip = chip_of_topology(s.topology)
    start = time.perf_counter()
    mesh = mesh_of(s)
    mesh_s = time.perf_counter() - start
    sizes = sizes_of(s, mesh, chip)
    launch = launch_of(s, sizes, mesh)
    try:
        compiled, lower_s, compile_s = compile_step(s, sizes, mesh)
    except (ValueError, NotImplementedError):
        raise
    except Exception as e:
        raise RuntimeError(f"the compiler refused the program: {' '.join(str(e).split())[:500]}") from e
    found = read_program(s, sizes, mesh, compiled)
    spec, devices = sizes.spec, mesh.devices.size
    settings = {k: v for k, v in dataclasses.asdict(s).items() if k != "requests"}
    return {
        "benchmark": "plan",
        "projected": True,
        "settings": settings
        | {
            "batch": sizes.batch,
            "num_pages": spec.num_pages,
            "pages_per_sequence": sizes.pages_per_sequence,
            "context_tokens": sizes.context_tokens,
        },
        "chip": chip.name,
        "chips": devices / chip.devices,
        "devices": report.device_counts(mesh),
        "mesh": dict(mesh.shape),
        "axes": dataclasses.asdict(mesh_facts(mesh))["axes"],
        "mesh_text": describe_mesh(mesh, spec, num_q_heads=s.num_q_heads, batch=sizes.batch),
        "workload": s.workload,
        "requests": len(s.requests),
        "hbm_bytes": sizes.hbm_bytes,
        "bytes_per_token": spec.bytes_per_token,
        "tokens": spec.num_pages * spec.page_size,
        "sequences": sequences_that_fit(list(s.requests), spec.num_pages, spec.page_size),
        **found,
        "launch": launch,
        "floor": floor_of(s, sizes, mesh, chip, found["collectives"]),
        "mesh_s": mesh_s,
        "lower_s": lower_s,
        "compile_s": compile_s,
        "versions": report.versions(),
    }


def problems(r: dict) -> list[str]:
    """What a plan's numbers say against it: nothing where the step would run as it should."""
    found = []
    if r["pool_copies"]:
        found.append(f"{len(r['pool_copies'])} values as large as a layer's pool: {'; '.join(r['pool_copies'])[:200]}")
    if r["aliased_bytes"] < r["cache_bytes"]:
        found.append(f"only {_gib(r['aliased_bytes'])} of the cache's {_gib(r['cache_bytes'])} are written in place")
    if r["used_bytes"] > r["hbm_bytes"]:
        found.append(f"it takes {_gib(r['used_bytes'])} of a device's {_gib(r['hbm_bytes'])}: give fewer --num_pages")
    return found


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def _quantity(size: float) -> str:
    for prefix, unit in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if size >= unit:
            return f"{size / unit:.2f} {prefix}B"
    return f"{size:.0f} B"


def table(r: dict) -> str:
    """The plan as lines of at most 80 columns."""
    from paged_dist.launch.report import wrap

    s, floor, launch = r["settings"], r["floor"], r["launch"]
    unit = "device" if r["chip"] == "v7x" else "chip"
    slices = f"{s['num_slices']} x " if s["num_slices"] > 1 else ""
    projections = f", projections of width {s['width']}" if s["width"] else ""
    head, *axes = [line.strip() for line in r["mesh_text"].splitlines()]
    kept = [line for line in axes if line.split(":")[0].split(" ")[0] in (*r["mesh"], "split", "heads")]
    lines = [
        ("pod", f"{slices}{s['topology']}, {r['chips']:g} chips"),
        ("mesh", head.removeprefix("mesh: ")),
        *(("", line) for line in kept),
        (
            "model",
            f"{s['num_layers']} layers, {s['num_q_heads']} q heads, {s['num_kv_heads']} kv heads, head_dim "
            f"{s['head_dim']}, cache {s['dtype']}{projections}",
        ),
        (
            "step",
            f"{s['batch']} rows of {s['context_tokens']} tokens, tables of {s['pages_per_sequence']} pages of "
            f"{s['page_size']}",
        ),
        ("versions", " ".join(f"{name} {version}" for name, version in r["versions"].items())),
        None,
        (
            "HBM",
            f"{_gib(r['used_bytes'])} of {_gib(r['hbm_bytes'])} a {unit}: cache {_gib(r['cache_bytes'])}, weights "
            f"{_gib(r['weights_bytes'])}, temp {_quantity(r['temp_bytes'])}, program {_quantity(r['program_bytes'])}",
        ),
        (
            "fits",
            f"{r['tokens']} tokens, {r['sequences']} sequences of {r['workload']} ({s['num_pages']} pages, "
            f"{r['bytes_per_token']} B a token)",
        ),
        ("pools", f"{len(r['pool_copies'])} copies, {_gib(r['aliased_bytes'])} written in place"),
        *_traffic_lines(r),
        *(("kernel", f"{k['name']}: {_kib(k['vmem_bytes'])} of VMEM") for k in r["kernels"]),
        (
            "",
            f"attention plans {_kib(launch['vmem_bytes'])} of VMEM and {_kib(launch['smem_bytes'])} of SMEM, "
            f"{launch['launches']} launch{'es' * (launch['launches'] > 1)} a layer, of {launch['rows']} rows",
        ),
        ("compile", f"{r['lower_s']:.2f} s to lower, {r['compile_s']:.2f} s to compile, on this host's CPU"),
        None,
        (
            "floor",
            f"{1e3 * floor['step_s']:.3f} ms a step, {floor['tokens_per_s']:.0f} tokens/s: projected, at peak rates, "
            "without latency",
        ),
        ("", f"HBM {1e3 * floor['hbm_s']:.3f} ms: {_quantity(floor['live_kv_bytes'])} of live KV a {unit}, weights"),
        ("", f"ICI {1e3 * floor['ici_s']:.3f} ms: {_quantity(floor['ici_bytes_sent'])} sent in a ring"),
        *(("PROBLEM", text) for text in problems(r)),
    ]
    return "\n".join(wrap(*line) if line else "" for line in lines)


def _traffic_lines(r: dict) -> list[tuple[str, str]]:
    lines = []
    for c in r["collectives"]:
        lines.append(
            (
                c["links"].upper(),
                f"{c['kind']} of {' and '.join(c['arrays'])} over {' x '.join(c['axes']) or 'nothing'}, {c['group']} "
                f"devices, {c['times']} x: {_quantity(c['bytes'])}, {_quantity(c['bytes_sent'])} sent",
            )
        )
    if not any(c["links"] == "ici" for c in r["collectives"]):
        lines.append(("ICI", "no collective"))
    if sends := r["sends"]:
        lines.append(("DCN", f"{len(sends)} sends, {_quantity(sum(c['bytes'] for c in sends))}"))
    elif not any(c["links"] == "dcn" for c in r["collectives"]):
        lines.append(("DCN", "nothing"))
    return lines


def _kib(size: int) -> str:
    return f"{size / 1024:.0f} KiB"


def main(argv) -> int:
    """Plans what the flags describe; 0, or 1 where the step would not run as it should or the file not be written."""
    del argv
    from paged_dist.topology import has_libtpu

    try:
        s = settings_from_flags()
        if not has_libtpu():
            raise shared.UsageError("libtpu, the TPU compiler, is not installed: pip install 'paged-dist[tpu]'")
        shared.simulate_devices(1, many_processes=False)  # a TPU of this host, if any, is left alone
        record = plan(s)
    except (ValueError, NotImplementedError) as e:
        raise shared.UsageError(str(e)) from e
    except RuntimeError as e:
        print(f"{NAME}: error: {e}", file=sys.stderr)
        return 1
    from paged_dist.launch import report

    print(table(record), flush=True)
    written = report.append_output(NAME, shared.OUTPUT.value, record)
    return int(not written or bool(problems(record)))


def cli() -> None:
    """The console script."""
    shared.cli(main, NAME)


if __name__ == "__main__":
    cli()
