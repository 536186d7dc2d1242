"""Continuous decoding of a request trace over a pod: the benchmark `paged-dist-decode`.

Requests enter as rows free up, in arrival order (arrival times are not replayed); their prompts' pages are filled;
each step appends and attends for every live row and every layer; finished ones free their pages, until all are
done. A sample of the outputs is checked against the float64 oracle as it goes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import sys
import warnings
import zlib

from absl import flags

from paged_dist._errors import bad_value, require
from paged_dist.launch import flags as shared
from paged_dist.launch.workload import Request, draw_requests, pages_needed, read_trace, shorten, whole_pool

TRACE = flags.DEFINE_string(
    "trace",
    None,
    "CSV file with columns ContextTokens and GeneratedTokens, a line a request. Default: requests whose "
    "lengths are drawn like those of a production conversation service.",
)
NUM_REQUESTS = flags.DEFINE_integer(
    "num_requests", None, "Requests to serve: the trace's first. Default: the whole trace, or 96 drawn ones."
)
LENGTH_SCALE = flags.DEFINE_float("length_scale", 1.0, "Factor on every request's lengths.")
MAX_CONTEXT = flags.DEFINE_integer("max_context", None, "Cap on a request's prompt tokens.")
MAX_GENERATED = flags.DEFINE_integer("max_generated", None, "Cap on a request's generated tokens.")
HBM_GIB = flags.DEFINE_float(
    "hbm_gib", 16.0, "HBM of a chip in GiB, for the report's line on how many sequences fit; nothing is allocated."
)
ORACLE_SAMPLES = flags.DEFINE_integer("oracle_samples", 32, "Outputs to check against the float64 oracle.")

flags.adopt_module_key_flags(shared)

NAME = "paged-dist-decode"
_DRAWN_REQUESTS = 96
_ROWS_A_SHARD = 16
_MOST_ROWS = _MOST_COLUMNS = 1 << 16  # of a block table: beyond it a typo is likelier than a pod


@contextlib.contextmanager
def _usage():
    """Bad values of this block end the run with one line: nothing is compiled or written in it."""
    try:
        yield
    except (ValueError, NotImplementedError) as e:
        raise shared.UsageError(str(e)) from e


def requests_from_flags() -> tuple[list[Request], str]:
    """The requests to serve, and what to call them in the report."""
    shared.at_least(
        1, num_requests=NUM_REQUESTS.value, max_context=MAX_CONTEXT.value, max_generated=MAX_GENERATED.value
    )
    shared.at_least(0, oracle_samples=ORACLE_SAMPLES.value)
    shared.check_seed()
    gib = HBM_GIB.value
    require(0 < gib < math.inf, "--hbm_gib", gib, "must be above 0 and finite")
    scale = LENGTH_SCALE.value
    require(0 < scale < math.inf, "--length_scale", scale, "must be above 0 and finite")
    if TRACE.value is not None:
        requests, name = read_trace(TRACE.value, NUM_REQUESTS.value), TRACE.value.rsplit("/", 1)[-1]
        if NUM_REQUESTS.value and len(requests) < NUM_REQUESTS.value:
            raise bad_value("--num_requests", NUM_REQUESTS.value, f"the trace has {len(requests)}")
    else:
        requests = draw_requests(NUM_REQUESTS.value or _DRAWN_REQUESTS, shared.SEED.value)
        name = "the built-in workload"
    if scale != 1:
        name += f", lengths x {scale:g}"
    return shorten(requests, scale, MAX_CONTEXT.value, MAX_GENERATED.value), name


def model_from_flags():
    """The model to run, checked as far as it can be without devices."""
    dtype = shared.kv_dtype(shared.KV_DTYPE.value)
    shared.at_least(
        1,
        layers=shared.NUM_LAYERS.value,
        num_q_heads=shared.NUM_Q_HEADS.value,
        num_kv_heads=shared.NUM_KV_HEADS.value,
        head_dim=shared.HEAD_DIM.value,
        page_size=shared.PAGE_SIZE.value,
        batch=shared.BATCH.value,
        num_pages=shared.NUM_PAGES.value,
        pages_per_sequence=shared.PAGES_PER_SEQUENCE.value,
        sliding_window=shared.SLIDING_WINDOW.value,
        data=shared.DATA.value,
        context=shared.CONTEXT.value,
        model=shared.MODEL.value,
    )
    q, kv = shared.NUM_Q_HEADS.value, shared.NUM_KV_HEADS.value
    require(q % kv == 0, "--num_q_heads", q, f"must be a multiple of --num_kv_heads={kv}")
    cap = shared.SOFT_CAP.value
    require(cap is None or 0 < cap < math.inf, "--soft_cap", cap, "must be above 0 and finite")
    require(
        shared.IMPLEMENTATION.value in (None, "pallas", "pallas_interpret", "xla"),
        "--implementation",
        shared.IMPLEMENTATION.value,
        "must be pallas, pallas_interpret or xla",
    )
    from paged_dist.launch.step import Model

    return Model(
        shared.NUM_LAYERS.value,
        q,
        kv,
        shared.HEAD_DIM.value,
        dtype,
        shared.SOFT_CAP.value,
        shared.SLIDING_WINDOW.value,
        shared.SEED.value,
    )


def mesh_from_flags(num_kv_heads: int):
    """The mesh over all devices of the run; sizes that no flag gives are chosen."""
    import jax

    from paged_dist import make_pod_mesh

    data, context, model = shared.DATA.value, shared.CONTEXT.value or 1, shared.MODEL.value
    if model is None:
        model = math.gcd(num_kv_heads, jax.device_count() // ((data or 1) * context)) or 1
    return make_pod_mesh(data=data, context=context, model=model, num_kv_heads=num_kv_heads)


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything a run is made of, checked."""

    model: object
    mesh: object
    spec: object
    pool: object
    requests: list[Request]
    workload: str
    pages_per_sequence: int


def plan_run(model, requests: list[Request], workload: str) -> Run:
    """Sizes the pool over the mesh and checks that everything divides and every request fits.

    Raises:
      ValueError, NotImplementedError: what does not.
    """
    from paged_dist import CacheSpec
    from paged_dist.launch.schedule import Pool

    page_size = shared.PAGE_SIZE.value
    mesh = mesh_from_flags(model.num_kv_heads)
    data, context = mesh.shape["data"], mesh.shape["context"]
    batch = shared.BATCH.value or _ROWS_A_SHARD * data
    require(batch <= _MOST_ROWS, "--batch", batch, f"must be at most {_MOST_ROWS}")
    require(batch % data == 0, "--batch", batch, f"must be a multiple of the mesh's data size {data}")
    longest = max(requests, key=lambda r: r.tokens)
    columns = shared.PAGES_PER_SEQUENCE.value or pages_needed(longest.tokens, page_size)
    require(columns <= _MOST_COLUMNS, "--pages_per_sequence", columns, f"must be at most {_MOST_COLUMNS}")
    require(
        columns * page_size >= longest.tokens,
        "--pages_per_sequence",
        columns,
        f"holds {columns * page_size} tokens, request {longest.id} has {longest.tokens}",
        f"give at least {pages_needed(longest.tokens, page_size)}",
    )
    shards = data * context
    pages = shared.NUM_PAGES.value
    if pages is None:
        pages = Pool(batch, data, context, 0, page_size).pages_that_never_wait(requests)
        pages = whole_pool(pages, page_size, model.dtype, shards)
    spec = CacheSpec(model.num_kv_heads, model.head_dim, pages, page_size, model.dtype, model.num_layers)
    spec.check_mesh(mesh)
    check_memory(spec, mesh)
    pool = Pool(batch, data, context, pages // shards, page_size)
    pool.check_fits(requests)
    return Run(model, mesh, spec, pool, requests, workload, columns)


def check_memory(spec, mesh) -> None:
    """Raises ValueError where this process's part of the cache is over the memory it goes to, if that is known."""
    import jax

    here = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
    need, where = spec.bytes_per_chip(mesh), "a device has"
    if here[0].platform == "cpu":  # simulated devices share the host
        need, have, where = need * len(here), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "this host has"
    else:
        have = (here[0].memory_stats() or {}).get("bytes_limit", math.inf)
    require(
        need <= have,
        "--num_pages",
        spec.num_pages,
        f"a cache of {need / 1e9:.1f} GB, where {where} {have / 1e9:.1f} GB",
        "give fewer pages, layers or heads, or a smaller --batch",
    )


def check_agreement(run: Run) -> None:
    """Raises ValueError unless every process was given the same run: they would hang on each other later."""
    import jax

    if jax.process_count() == 1:
        return
    import numpy as np
    from jax.experimental import multihost_utils

    mine = (
        run.model,
        run.spec,
        run.pool,
        run.requests,
        run.pages_per_sequence,
        ORACLE_SAMPLES.value,
        tuple(run.mesh.shape.items()),
        shared.IMPLEMENTATION.value,
    )
    every = np.asarray(multihost_utils.process_allgather(np.uint32(zlib.crc32(repr(mine).encode())))).ravel()
    odd = np.flatnonzero(every != every[0])
    if odd.size:
        raise bad_value(
            "flags",
            f"process {', '.join(map(str, odd))}",
            "differ from those of process 0",
            "give every process the same flags and the same trace",
        )


def record_of(run: Run, measured, schedule) -> dict:
    """The run's results as one flat record; a collective where there are several processes."""
    import jax

    from paged_dist.launch import report

    gathered = report.gather(measured, schedule.fingerprint)
    if len(set(gathered["digest"].tolist())) > 1:
        raise RuntimeError("processes gave out different pages: their allocators were called differently")
    m = run.model
    devices = report.device_counts(run.mesh)
    record = report.summarise(
        gathered,
        measured,
        bytes_per_token=run.spec.bytes_per_token,
        num_pages=run.spec.num_pages,
        devices=devices,
        dtype=m.dtype,
    )
    record["capacity"] = report.capacity(run.spec, run.requests, HBM_GIB.value, record["chips"])
    settings = {
        "layers": m.num_layers,
        "num_q_heads": m.num_q_heads,
        "num_kv_heads": m.num_kv_heads,
        "head_dim": m.head_dim,
        "dtype": m.dtype,
        "input_dtype": m.input_dtype,
        "page_size": run.spec.page_size,
        "batch": run.pool.batch,
        "pages_per_sequence": run.pages_per_sequence,
        "soft_cap": m.soft_cap,
        "sliding_window": m.sliding_window,
        "seed": m.seed,
        "implementation": shared.IMPLEMENTATION.value,
    }
    return record | {
        "benchmark": "decode",
        "settings": settings,
        "requests": len(run.requests),
        "workload": run.workload,
        "mesh": dict(run.mesh.shape),
        "cache_bytes": run.spec.bytes_total,
        "bytes_per_token": run.spec.bytes_per_token,
        "processes": jax.process_count(),
        "versions": report.versions(),
    }


def main(argv) -> int:
    """Runs the benchmark that the flags describe; 0, or 1 where an output was wrong."""
    del argv
    with _usage():
        model = model_from_flags()
        requests, workload = requests_from_flags()
        shared.check_output(shared.OUTPUT.value)
        shared.check_output(shared.PROFILE_DIR.value, "profile_dir", folder=True)
        shared.start_jax(NAME)

    import jax

    from paged_dist import PageAllocator, describe_mesh
    from paged_dist.launch import report
    from paged_dist.launch.engine import Engine
    from paged_dist.launch.schedule import Schedule, choose_checks

    first = jax.process_index() == 0

    def say(line):
        if first:
            print(f"{NAME}: {line}", file=sys.stderr, flush=True)

    warnings.showwarning = lambda message, *_, **__: say(f"warning: {message}")
    with _usage():
        run = plan_run(model, requests, workload)
        check_agreement(run)
        engine = Engine(model, run.spec, run.mesh, run.pool.batch, run.pages_per_sequence, shared.IMPLEMENTATION.value)
        allocator = PageAllocator(run.spec, run.mesh, run.pool.batch, run.pages_per_sequence)
        checks = choose_checks(requests, ORACLE_SAMPLES.value, model.num_layers, shared.SEED.value)
        schedule = Schedule(requests, allocator, run.pool, engine.chunk_tokens, checks)
    say(describe_mesh(run.mesh).partition("\n")[0])
    say(f"compiling for {len(requests)} requests, {sum(r.generated for r in requests)} tokens to generate")
    engine.compile()
    measured = engine.run(schedule, say, shared.PROFILE_DIR.value)
    record = record_of(run, measured, schedule)
    if first:
        print(report.table(record), flush=True)
        try:
            if shared.OUTPUT.value is not None:
                report.append_json_line(shared.OUTPUT.value, record)
        except OSError as e:
            say(f"error: --output={shared.OUTPUT.value!r}: could not be written: {e}")
            return 1
    return 0 if record["oracle_passed"] else 1


def cli() -> None:
    """The console script."""
    shared.cli(main, NAME)


if __name__ == "__main__":
    cli()
