"""A decode step for a pod that is not here, compiled ahead of time: `paged-dist-plan`.

    paged-dist-plan --topology=v5p:8x8x8 --num_kv_heads=8 --num_q_heads=64 --layers=80 --model_parallelism=32

It fills the pod's HBM with a cache, compiles the step (append and attend in every layer; with --width also the
attention's projections, with --mlp_width the MLP) with libtpu on this host's CPU, and prints what it read from the
compiled program: memory, collectives, copies, the kernels' vector and scalar memory; how many tokens and sequences of a
trace, or of --context_tokens, fit; and the least time that a step can take. Without --batch a data shard has 16 rows,
or as many as there is room for. Nothing runs, no TPU is needed.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
import time
from collections.abc import Callable, Mapping

from paged_dist._errors import BadValue, require
from paged_dist.launch.common import flag_checks, host, provenance, record_output, shared_flags
from paged_dist.launch.common import flag_registry as flags
from paged_dist.launch.common.chips import Chip, chip_of_topology, slice_of
from paged_dist.launch.common.number_formats import gib, kib, quantity
from paged_dist.launch.common.run_program import UsageError, run_program
from paged_dist.launch.planning import sizing
from paged_dist.launch.planning.sizing import Refused, Settings, Sizes, Way, sizes_of
from paged_dist.launch.serving import workload_flags
from paged_dist.launch.serving.workload import Request, sequences_on_shards

TOPOLOGY = flags.DEFINE_string(
    "topology",
    None,
    "The slice: v4:4x4x4, v5e:16x16, v5p:8x8x8, v6e:16x16, tpu7x:4x4x4, chips along each axis. Or its accelerator "
    "type: v4-128, v5litepod-256, v5p-1024, v6e-256, tpu7x-128, whose number counts the TensorCores of v4, v5p and "
    "tpu7x, two a chip, and the chips of v5e and v6e; of several shapes it is the one nearest a cube.",
)
NUM_SLICES = flags.DEFINE_integer("num_slices", 1, "So many slices of that shape; data alone runs between them.")
MODEL_PARALLELISM = flags.DEFINE_integer(
    "model_parallelism",
    None,
    "Devices to a sequence: model takes what divides the kv heads, context the rest. Default: model alone.",
)
WIDTH = flags.DEFINE_integer(
    "width",
    0,
    "Width of the model, to have the projections before and after attention in the step, split as in README's layer. "
    "0: no weights.",
)
MLP_WIDTH = flags.DEFINE_integer(
    "mlp_width", 0, "Hidden width of a gated MLP, three matrices, to have it in the step too; with --width. 0: none."
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
    "dry_run",
    "output",
)
for _name in _TAKEN:
    flags.declare_key_flag(_name)


def settings_from_flags(topology: str | None = None) -> Settings:
    """The settings that the flags name; of `topology` where that is given, and other launchers' flags then pass.

    Raises:
      ValueError: a value outside its rule, or a flag of another launcher.
    """
    if topology is None:
        shared_flags.refuse_others(_TAKEN)
        topology = TOPOLOGY.value
    require(topology is not None, "--topology", None, "is missing", "name a slice, such as --topology=v5p:8x8x8")
    topology, chip = slice_of(topology)
    f = flags.FLAGS
    sizes = ("data", "context", "model", "layers", "num_q_heads", "num_kv_heads", "head_dim", "batch", "page_size")
    sizes += ("num_pages", "pages_per_sequence", "sliding_window", "model_parallelism", "num_slices", "context_tokens")
    flag_checks.at_least(1, **{name: f[name].value for name in sizes})
    flag_checks.at_least(0, width=WIDTH.value, mlp_width=MLP_WIDTH.value)
    hidden = MLP_WIDTH.value
    require(WIDTH.value > 0 or hidden == 0, "--mlp_width", hidden, "needs the model's width", "give --width too")
    q, kv = shared_flags.NUM_Q_HEADS.value, shared_flags.NUM_KV_HEADS.value
    require(q % kv == 0, "--num_q_heads", q, f"must be a multiple of --num_kv_heads={kv}")
    cap = f["soft_cap"].value
    require(cap is None or 0 < cap < math.inf, "--soft_cap", cap, "must be above 0 and finite")
    check_hbm_gib(chip)
    flag_checks.check_output(shared_flags.OUTPUT.value)
    requests, workload = workload_flags.requests_from_flags()
    tokens = shared_flags.CONTEXT_TOKENS.value
    if tokens is not None and not workload_flags.are_given():  # what was asked is counted, not what nobody asked
        requests, workload = [], ""
    same = ("data", "context", "model", "num_q_heads", "num_kv_heads", "head_dim", "soft_cap", "sliding_window")
    same += ("batch", "page_size", "num_pages", "pages_per_sequence")
    same += ("num_slices", "model_parallelism", "width", "mlp_width", "context_tokens", "hbm_gib")
    return Settings(
        **{name: f[name].value for name in same},
        topology=topology,
        num_layers=shared_flags.NUM_LAYERS.value,
        dtype=flag_checks.kv_dtype(shared_flags.KV_DTYPE.value),
        requests=tuple(requests),
        workload=workload,
    )


def check_hbm_gib(chip: Chip) -> None:
    """Raises ValueError where --hbm_gib is none of such a chip, or more than it gives a program."""
    flag_checks.check_hbm_flag()
    gib, most = shared_flags.HBM_GIB.value, chip.hbm_gib * chip.devices
    require(
        gib is None or gib <= most,
        "--hbm_gib",
        gib,
        f"a {chip.name} chip gives a program {most:g} GiB",
        f"leave it out, or --hbm_gib={most:g} fits",
    )


def mesh_of(s: Settings):
    """The mesh over the absent pod; model takes what divides the kv heads where nothing says how many."""
    from paged_dist import make_pod_mesh
    from paged_dist.mesh.topology import topology_devices

    model = s.model
    if model is None and s.model_parallelism is None:
        devices, context = len(topology_devices(s.topology, s.num_slices)), s.context or 1
        model = math.gcd(s.num_kv_heads, devices // s.num_slices // context)  # model stays inside a slice
        model = math.gcd(model, devices // ((s.data or 1) * context)) or 1
    return make_pod_mesh(
        data=s.data,
        context=s.context,
        model=model,
        num_kv_heads=s.num_kv_heads,
        model_parallelism=s.model_parallelism,
        topology=s.topology,
        num_slices=s.num_slices,
    )


def floor_of(s: Settings, sizes: Sizes, mesh, chip: Chip, collectives: list[dict], copies: list[dict]) -> dict:
    """The least seconds of a step: HBM and ICI apart, one after the other, for a layer's merge waits for its attention.

    HBM: live K and V (those inside the window) and weights, each read once, and what the program copies besides, read
    and written, over the peak bandwidth. ICI: what a ring
    sends, over both directions of each physical axis that the mesh axis runs over, all at once; what stays between the
    cores of a chip costs nothing. Latency is not in it, nor is anything sent over DCN.
    """
    data, context, model = (mesh.shape[name] for name in ("data", "context", "model"))
    live = min(sizes.context_tokens, s.sliding_window or sizes.context_tokens)
    kv_bytes = sizes.batch // data * live * sizes.spec.bytes_per_token // (model * context)
    copied = 2 * sum(c["bytes"] * c["times"] for c in copies)
    hbm_s = (kv_bytes + sizes.weights_bytes + copied) / chip.device_hbm_bytes_per_s
    over_ici = [c for c in collectives if c["links"] == "ici" and c["torus_axes"]]
    sent = sum(c["bytes_sent"] for c in over_ici)
    ici_s = sum(c["bytes_sent"] / (2 * c["torus_axes"] * chip.link_bytes_per_s) for c in over_ici)
    return {
        "live_kv_bytes": kv_bytes,
        "copied_bytes": copied,
        "hbm_s": hbm_s,
        "ici_bytes_sent": sent,
        "ici_s": ici_s,
        "step_s": hbm_s + ici_s,
        "tokens_per_s": sizes.batch / (hbm_s + ici_s),
    }


def checked_sizes(
    s: Settings, mesh, chip: Chip, kept: int | None = None, fits: Callable[[Mapping[str, int]], bool] | None = None
) -> Sizes:
    """`sizing.sizes_of`, of what a launch of the kernels holds; the arguments are its.

    Raises:
      ValueError: what does not fit, with the nearest that does.
    """
    from paged_dist.launch.planning import pod_step

    def holds(changes: Mapping[str, int]) -> bool:
        changed = dataclasses.replace(s, **changes)
        try:
            pod_step.launch_of(changed, sizes_of(changed, mesh, chip, kept), mesh)
        except ValueError:
            return False
        return fits is None or fits(changes)

    sizes = sizes_of(s, mesh, chip, kept, holds)
    try:
        pod_step.launch_of(s, sizes, mesh)
    except ValueError as e:
        given = [name for name in ("context_tokens", "pages_per_sequence") if getattr(s, name)]
        if not given:  # the requests, or the shapes: no number of ours would help
            raise
        ways = tuple(Way(name, getattr(s, name)) for name in given)
        raise Refused(f"--{given[0]}", getattr(s, given[0]), str(e), ways).error(holds) from e
    return sizes


def compile_what_fits(
    s: Settings, mesh, chip: Chip, fits: Callable[[Mapping[str, int]], bool] | None = None
) -> tuple[Sizes, tuple]:
    """The sizes and `pod_step.compile_step` of them; the cache is made smaller where the program needs its room.

    `fits`: as in `sizing.sizes_of`.

    Raises:
      ValueError: --num_pages leaves the program too little room: names the most pages that compile.
      RuntimeError: the compiler refused the program for another reason.
    """
    from paged_dist.launch.planning import pod_step

    sizes = checked_sizes(s, mesh, chip, None, fits)
    for _ in range(4):
        try:
            compiled = pod_step.compile_step(s, sizes, mesh)
        except (BadValue, NotImplementedError):
            raise
        except Exception as e:
            text = " ".join(str(e).split())
            over = re.search(r"\(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)", text)
            if over is None:
                raise RuntimeError(f"the compiler refused the program: {text[:500]}") from e
            needs, has = (float(x) * 2**30 for x in over.groups())
            less = needs - has + sizing.KEPT * sizes.hbm_bytes
            kept = sizes.hbm_bytes - sizes.weights_bytes - sizes.spec.bytes_per_chip(mesh) + int(less)
            sizes = checked_sizes(dataclasses.replace(s, num_pages=None), mesh, chip, kept, fits)
            continue
        require(
            s.num_pages in (None, sizes.spec.num_pages),
            "--num_pages",
            s.num_pages,
            f"cache and step take more than the {gib(sizes.hbm_bytes)} that a device's HBM gives a program",
            f"--num_pages={sizes.spec.num_pages} fits",
        )
        return sizes, compiled
    raise RuntimeError("the compiler refused the program for want of HBM, with four sizes of the cache")


def plan(s: Settings, fits: Callable[[Mapping[str, int]], bool] | None = None) -> dict:
    """The plan as one flat record; a pod's program is compiled on the way. `fits`: as in `sizing.sizes_of`.

    Raises:
      ValueError, NotImplementedError: settings that do not fit the pod, each with what does.
      RuntimeError: no libtpu; the compiler refused the program, in its own words.
    """
    from paged_dist import describe_mesh
    from paged_dist.describe import mesh_facts
    from paged_dist.launch.planning import pod_step

    chip = chip_of_topology(s.topology)
    start = time.perf_counter()
    mesh = mesh_of(s)
    mesh_s = time.perf_counter() - start
    sizes, (compiled, lower_s, compile_s) = compile_what_fits(s, mesh, chip, fits)
    launch = pod_step.launch_of(s, sizes, mesh)
    found = pod_step.read_program(s, sizes, mesh, compiled)
    spec, devices = sizes.spec, mesh.devices.size
    counted, workload = s.requests, s.workload
    if not counted:
        counted, workload = (Request(0, sizes.context_tokens, 0),), f"{sizes.context_tokens} tokens"
    settings = {k: v for k, v in dataclasses.asdict(s).items() if k not in ("requests", "times", "batch_step")}
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
        "devices": provenance.device_counts(mesh),
        "mesh": dict(mesh.shape),
        "axes": dataclasses.asdict(mesh_facts(mesh))["axes"],
        "mesh_text": describe_mesh(
            mesh, spec, num_q_heads=s.num_q_heads, batch=sizes.batch, output_heads=sizing.output_heads(s, mesh)
        ),
        "output_heads": sizing.output_heads(s, mesh),
        "workload": workload,
        "requests": len(counted),
        "hbm_bytes": sizes.hbm_bytes,
        "bytes_per_token": spec.bytes_per_token,
        "tokens": spec.num_pages * spec.page_size,
        "sequences": sequences_on_shards(counted, spec.num_pages, spec.page_size, mesh.shape["data"]),
        **found,
        "launch": launch,
        "floor": floor_of(s, sizes, mesh, chip, found["collectives"], found["other_copies"]),
        "mesh_s": mesh_s,
        "lower_s": lower_s,
        "compile_s": compile_s,
        "processes": len({d.process_index for d in mesh.devices.flat}),
        "partial": False,
        **provenance.record_origin(shared_flags.given_flags()),
    }


def dry_text(s: Settings) -> str:
    """What would be compiled, as lines of at most 80 columns."""
    from paged_dist.launch.common.report_lines import report_line

    mesh = mesh_of(s)
    sizes = checked_sizes(s, mesh, chip_of_topology(s.topology))
    spec = sizes.spec
    lines = [
        ("mesh", " x ".join(f"{name} {size}" for name, size in mesh.shape.items()) + f" of {s.topology}"),
        ("cache", f"{spec.num_pages} pages of {spec.page_size} tokens in {spec.dtype}, {spec.num_layers} layers"),
        ("", f"{gib(spec.bytes_per_chip(mesh))} of the {gib(sizes.hbm_bytes)} of a device's HBM"),
        ("step", f"{sizes.batch} rows of {sizes.context_tokens} tokens, tables of {sizes.pages_per_sequence} pages"),
        ("dry run", "nothing was compiled or written"),
    ]
    return "\n".join(report_line(*line) for line in lines)


def problems(r: dict) -> list[str]:
    """What a plan's numbers say against it: nothing where the step would run as it should."""
    found = []
    if r["pool_copies"]:
        found.append(f"{len(r['pool_copies'])} values as large as a layer's pool: {'; '.join(r['pool_copies'])[:200]}")
    if r["aliased_bytes"] < r["cache_bytes"]:
        found.append(f"only {gib(r['aliased_bytes'])} of the cache's {gib(r['cache_bytes'])} are written in place")
    if r["used_bytes"] > r["hbm_bytes"]:
        found.append(f"it takes {gib(r['used_bytes'])} of a device's {gib(r['hbm_bytes'])}: give fewer --num_pages")
    return found


def table(r: dict) -> str:
    """The plan as lines of at most 80 columns."""
    from paged_dist.launch.common.report_lines import attention_options, head_dim_words, report_line

    size = lambda count: quantity(count, "B")
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
            f"{s['num_layers']} layers, {s['num_q_heads']} q heads, {s['num_kv_heads']} kv heads, "
            f"{head_dim_words(s['head_dim'])}, cache {s['dtype']}{attention_options(s)}{projections}",
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
            f"{gib(r['used_bytes'])} of {gib(r['hbm_bytes'])} a {unit}: cache {gib(r['cache_bytes'])}, weights "
            f"{gib(r['weights_bytes'])}, temp {size(r['temp_bytes'])}, program {size(r['program_bytes'])}",
        ),
        ("weights", _weights_text(r)),
        (
            "fits",
            f"{r['tokens']} tokens, {r['sequences']} sequences of {r['workload']} ({s['num_pages']} pages, "
            f"{r['bytes_per_token']} B a token)",
        ),
        ("pools", f"{len(r['pool_copies'])} copies, {gib(r['aliased_bytes'])} written in place"),
        *(("copies", f"{c['times']} x {c['array']}, {size(c['bytes'])}, in each step") for c in r["other_copies"]),
        *_traffic_lines(r),
        *(("kernel", f"{k['name']}: {kib(k['vmem_bytes'])} of VMEM") for k in r["kernels"]),
        (
            "",
            f"attention plans {kib(launch['vmem_bytes'])} of VMEM and {kib(launch['smem_bytes'])} of SMEM, "
            f"{launch['launches']} launch{'es' * (launch['launches'] > 1)} a layer, of {launch['rows']} rows",
        ),
        ("compile", f"{r['lower_s']:.2f} s to lower, {r['compile_s']:.2f} s to compile, on this host's CPU"),
        None,
        (
            "floor",
            f"{1e3 * floor['step_s']:.3f} ms a step, {floor['tokens_per_s']:.0f} tokens/s: projected, at peak rates, "
            "without latency",
        ),
        (
            "",
            f"HBM {1e3 * floor['hbm_s']:.3f} ms: {size(floor['live_kv_bytes'])} of live KV a {unit}, "
            f"{size(r['weights_bytes'])} of weights"
            + (f", {size(floor['copied_bytes'])} for copies" if floor["copied_bytes"] else ""),
        ),
        ("", f"ICI {1e3 * floor['ici_s']:.3f} ms: {size(floor['ici_bytes_sent'])} sent in a ring"),
        *(("PROBLEM", text) for text in problems(r)),
    ]
    return "\n".join(report_line(*line) if line else "" for line in lines)


def _weights_text(r: dict) -> str:
    """Which weights are counted, and which are not."""
    s = r["settings"]
    others = ["norms", "embeddings", *([] if s["mlp_width"] else ["the MLP (--mlp_width)"])]
    if not s["width"]:
        return "none are counted: --width and --mlp_width count the layers'"
    mlp = f"the MLP's of hidden width {s['mlp_width']}" if s["mlp_width"] else ""
    if r["mesh"]["context"] == 1:
        where = f" and {mlp}, over model" if mlp else ", over model"
    else:
        wo = "x context" if r["output_heads"] == "scattered" else "alone, for its heads do not divide over context too"
        where = f", wq, wk and wv over model, wo over model {wo}" + (f"; {mlp}, over model x context" if mlp else "")
    return (
        f"counted are attention's projections{where}. Not counted are {', '.join(others[:-1])} and {others[-1]}: leave "
        "them room by --hbm_gib"
    )


def _traffic_lines(r: dict) -> list[tuple[str, str]]:
    size = lambda count: quantity(count, "B")
    lines = []
    for c in r["collectives"]:
        lines.append(
            (
                c["links"].upper(),
                f"{c['kind']} of {' and '.join(c['arrays'])} over {' x '.join(c['axes']) or 'nothing'}, {c['group']} "
                f"devices, {c['times']} x: {size(c['bytes'])}, {size(c['bytes_sent'])} sent",
            )
        )
    if not any(c["links"] == "ici" for c in r["collectives"]):
        lines.append(("ICI", "no collective"))
    if sends := r["sends"]:
        lines.append(("DCN", f"{len(sends)} sends, {size(sum(c['bytes'] for c in sends))}"))
    elif not any(c["links"] == "dcn" for c in r["collectives"]):
        lines.append(("DCN", "nothing"))
    return lines


def main(argv) -> int:
    """Plans what the flags describe; 0, or 1 where the step would not run as it should or the file not be written."""
    del argv
    try:
        s = settings_from_flags()
        host.start_tpu_compiler()
        if shared_flags.DRY_RUN.value:
            print(dry_text(s))
            return 0
        record = plan(s)
    except (ValueError, NotImplementedError) as e:
        raise UsageError(str(e)) from e
    except RuntimeError as e:
        print(f"{NAME}: error: {e}", file=sys.stderr)
        return 1

    written = record_output.deliver(NAME, table(record), shared_flags.OUTPUT.value, record)
    return int(not written or bool(problems(record)))


def cli() -> None:
    """The console script."""
    run_program(main, NAME)


if __name__ == "__main__":
    cli()
