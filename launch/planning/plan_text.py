"""A plan as lines of text: what a dry run would compile, the table of a plan's record, and what speaks against it."""

from __future__ import annotations

from paged_dist.launch.common.number_formats import gib, kib, quantity
from paged_dist.launch.common.report_lines import attention_options, head_dim_words, report_line
from paged_dist.launch.common.slices import chip_of_topology
from paged_dist.launch.planning.absent_chips import absent_pod_mesh
from paged_dist.launch.planning.fitting import checked_sizes
from paged_dist.launch.planning.pod_settings import PodSettings


def plan_dry_text(s: PodSettings) -> str:
    """What a dry run prints: the step that would be compiled, at most 80 columns wide."""
    mesh = absent_pod_mesh(s)
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
    """What is wrong with the planned step, from a plan's record: pools copied, or too much memory. Empty: nothing."""
    found = []
    if r["pool_copies"]:
        found.append(f"{len(r['pool_copies'])} values as large as a layer's pool: {'; '.join(r['pool_copies'])[:200]}")
    if r["aliased_bytes"] < r["cache_bytes"]:
        found.append(f"only {gib(r['aliased_bytes'])} of the cache's {gib(r['cache_bytes'])} are written in place")
    if r["used_bytes"] > r["hbm_bytes"]:
        found.append(f"it takes {gib(r['used_bytes'])} of a device's {gib(r['hbm_bytes'])}: give fewer --num_pages")
    return found


def plan_table(r: dict) -> str:
    """The table of a plan's record, at most 80 columns wide."""
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
    """Which weights the plan counts, how they are split, and which weights it does not count."""
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
    """What a step sends over ICI and DCN, a line for each collective."""
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
