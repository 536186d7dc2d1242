"""Continuous decoding of a request trace over a pod: the benchmark `paged-dist-decode`.

Requests enter as rows free up, in arrival order (arrival times are not replayed); their prompts' pages are filled;
each step appends and attends for every live row and every layer; finished ones free their pages, until all are
done. A sample of the outputs is checked against the float64 oracle as it goes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import warnings
import zlib

from paged_dist._errors import BadValue, require
from paged_dist.launch.common import flag_checks, provenance, record_output, shared_flags
from paged_dist.launch.common import flag_registry as flags
from paged_dist.launch.common.chips import chip_of
from paged_dist.launch.common.interrupt import INTERRUPTED, CtrlC
from paged_dist.launch.common.run_program import UsageError, run_program
from paged_dist.launch.common.start_jax import start_jax, watchdog
from paged_dist.launch.serving import workload_flags
from paged_dist.launch.serving.fits import check_memory
from paged_dist.launch.serving.workload import Request, pages_needed, whole_pool
from paged_dist.mesh.devices import memory_limit

ORACLE_SAMPLES = flags.DEFINE_integer("oracle_samples", 32, "Outputs to check against the float64 oracle.")

flags.adopt_module_key_flags(shared_flags)
flags.adopt_module_key_flags(workload_flags)

NAME = "paged-dist-decode"
ROWS_A_SHARD = 16
_HBM_GIB_ELSEWHERE = 16.0  # where no device tells its memory


@contextlib.contextmanager
def _usage(kinds: tuple[type[Exception], ...] = (ValueError, NotImplementedError)):
    """Bad values of this block end the run with one line: nothing is compiled or written in it."""
    try:
        yield
    except kinds as e:
        raise UsageError(str(e)) from e


def model_from_flags():
    """The model to run, checked as far as it can be without devices."""
    dtype = flag_checks.kv_dtype(shared_flags.KV_DTYPE.value)
    flag_checks.at_least(
        1,
        layers=shared_flags.NUM_LAYERS.value,
        num_q_heads=shared_flags.NUM_Q_HEADS.value,
        num_kv_heads=shared_flags.NUM_KV_HEADS.value,
        head_dim=shared_flags.HEAD_DIM.value,
        page_size=shared_flags.PAGE_SIZE.value,
        batch=shared_flags.BATCH.value,
        num_pages=shared_flags.NUM_PAGES.value,
        pages_per_sequence=shared_flags.PAGES_PER_SEQUENCE.value,
        sliding_window=shared_flags.SLIDING_WINDOW.value,
        data=shared_flags.DATA.value,
        context=shared_flags.CONTEXT.value,
        model=shared_flags.MODEL.value,
    )
    q, kv = shared_flags.NUM_Q_HEADS.value, shared_flags.NUM_KV_HEADS.value
    flag_checks.check_sizes()
    require(q % kv == 0, "--num_q_heads", q, f"must be a multiple of --num_kv_heads={kv}")
    cap = shared_flags.SOFT_CAP.value
    require(cap is None or 0 < cap < math.inf, "--soft_cap", cap, "must be above 0 and finite")
    require(
        shared_flags.IMPLEMENTATION.value in (None, "pallas", "pallas_interpret", "xla"),
        "--implementation",
        shared_flags.IMPLEMENTATION.value,
        "must be pallas, pallas_interpret or xla",
    )
    from paged_dist.launch.serving.programs import Model

    return Model(
        shared_flags.NUM_LAYERS.value,
        q,
        kv,
        shared_flags.HEAD_DIM.value,
        dtype,
        shared_flags.SOFT_CAP.value,
        shared_flags.SLIDING_WINDOW.value,
        shared_flags.SEED.value,
    )


def mesh_from_flags(num_kv_heads: int):
    """The mesh over all devices of the run; sizes that no flag gives are chosen."""
    import jax

    from paged_dist import make_pod_mesh
    from paged_dist.mesh.pod_mesh import devices_to_simulate

    data, context, model = shared_flags.DATA.value, shared_flags.CONTEXT.value or 1, shared_flags.MODEL.value
    if model is None:
        model = math.gcd(num_kv_heads, jax.device_count() // ((data or 1) * context)) or 1
    sizes = dict(data=data, context=context, model=model, num_kv_heads=num_kv_heads)
    devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
    try:
        return make_pod_mesh(**sizes, devices=devices)
    except ValueError as e:
        count = devices_to_simulate(devices, **sizes)
        if count is None:
            raise
        raise ValueError(f"{e}; or --cpu_devices={count}") from None


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


def plan_run(model, requests: list[Request], workload: str, mesh=None, batch: int | None = None) -> Run:
    """Sizes the pool over the mesh and checks that everything divides and every request fits.

    `mesh` and `batch` stand in place of those that the flags say.

    Raises:
      ValueError, NotImplementedError: what does not.
    """
    from paged_dist import CacheSpec
    from paged_dist.launch.serving.row_schedule import Pool

    page_size = shared_flags.PAGE_SIZE.value
    mesh = mesh_from_flags(model.num_kv_heads) if mesh is None else mesh
    data, context = mesh.shape["data"], mesh.shape["context"]
    batch = batch or shared_flags.BATCH.value or ROWS_A_SHARD * data
    flag_checks.at_most(max(flag_checks.MOST_ROWS, ROWS_A_SHARD * data), batch=batch)
    require(batch % data == 0, "--batch", batch, f"must be a multiple of the mesh's data size {data}")
    longest = max(requests, key=lambda r: r.tokens)
    columns = shared_flags.PAGES_PER_SEQUENCE.value or pages_needed(longest.tokens, page_size)
    require(
        columns * page_size >= longest.tokens,
        "--pages_per_sequence",
        columns,
        f"holds {columns * page_size} tokens, request {longest.id} has {longest.tokens}",
        f"give at least {pages_needed(longest.tokens, page_size)}",
    )
    shards = data * context
    pages = shared_flags.NUM_PAGES.value
    if pages is None:
        pages = Pool(batch, data, context, 0, page_size).pages_that_never_wait(requests)
        pages = whole_pool(pages, page_size, model.dtype, shards)
    spec = CacheSpec(model.num_kv_heads, model.head_dim, pages, page_size, model.dtype, model.num_layers)
    spec.check_mesh(mesh)
    pool = Pool(batch, data, context, pages // shards, page_size)
    given = shared_flags.NUM_PAGES.value is not None
    check_memory(spec, mesh, pool, requests, columns, num_pages_given=given)
    pool.check_fits(requests, model.dtype)
    return Run(model, mesh, spec, pool, requests, workload, columns)


def given_alike(requests: list[Request]) -> dict[str, object]:
    """What every process must have been started with alike, known before anything is made of it."""

    return {
        **shared_flags.given_flags(whole_run=True),
        "the requests' digest": f"{zlib.crc32(repr(requests).encode()):08x}",
        **{f"the version of {name}": version for name, version in provenance.versions().items()},
    }


def made_alike(run: Run) -> dict[str, object]:
    """What every process must have made of it alike: they would hang on each other otherwise."""
    return {
        "the model": run.model,
        "the mesh": dict(run.mesh.shape),
        "the cache": run.spec,
        "the pool": run.pool,
        "pages_per_sequence": run.pages_per_sequence,
    }


def _hbm_gib(mesh) -> float:
    """HBM of one chip of `mesh` in GiB: what the flag says, else what the chip has, else what a device here tells."""
    import jax

    if shared_flags.HBM_GIB.value is not None:
        return shared_flags.HBM_GIB.value
    chip = chip_of(mesh.devices.flat[0].device_kind)
    if chip is not None:
        return chip.hbm_gib * chip.devices
    here = (d for d in mesh.devices.flat if d.process_index == jax.process_index())
    told = min(map(memory_limit, here), default=math.inf)
    return told / 2**30 if told < math.inf else _HBM_GIB_ELSEWHERE


def described(run: Run) -> dict:
    """What is run on what, as `report.work_lines` prints it and a record has it."""

    m = run.model
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
        "implementation": shared_flags.IMPLEMENTATION.value,
    }
    return {
        "settings": settings,
        "platform": run.mesh.devices.flat[0].platform,
        "devices": provenance.device_counts(run.mesh),
        "processes": len({d.process_index for d in run.mesh.devices.flat}),
        "mesh": dict(run.mesh.shape),
        "requests": len(run.requests),
        "workload": run.workload,
        "pool_pages": run.spec.num_pages,
        "cache_bytes": run.spec.bytes_total,
        "bytes_per_token": run.spec.bytes_per_token,
    }


def record_of(run: Run, measured, everyone: list[dict]) -> dict:
    """The run's results as one flat record, from what every process told."""
    from paged_dist.launch.serving import report

    gathered = report.gather([told for told in everyone if told is not None])
    if len(set(gathered["digest"].tolist())) > 1:
        raise RuntimeError("processes gave out different pages: their allocators were called differently")
    record = report.summarise(
        gathered,
        measured,
        bytes_per_token=run.spec.bytes_per_token,
        num_pages=run.spec.num_pages,
        devices=provenance.device_counts(run.mesh),
        dtype=run.model.dtype,
    )
    record["capacity"] = report.capacity(run.spec, run.requests, _hbm_gib(run.mesh), record["chips"])
    return (
        record
        | described(run)
        | {
            "benchmark": "decode",
            "partial": measured.stopped,
            "profile_error": next((text for told in everyone if told and (text := told["profile_error"])), None),
            "projected": False,
            **provenance.record_origin(shared_flags.given_flags()),
        }
    )


def main(argv) -> int:
    """Runs the benchmark that the flags describe; 0, 1 where an output was wrong or something was not written, 75 where
    it was asked to stop (SIGTERM) and the record is a partial one, 130 where that was Ctrl-C."""
    del argv
    with _usage():
        model = model_from_flags()
        requests, workload = workload_flags.requests_from_flags()
        flag_checks.at_least(0, oracle_samples=ORACLE_SAMPLES.value)
        taken = [
            flag.name for flag in flags.FLAGS.get_key_flags_for_module(shared_flags) if flag.name != "context_tokens"
        ]
        shared_flags.refuse_others(
            taken, {"context_tokens": "lengths are the requests', see --trace and --length_scale"}
        )
        flag_checks.check_hbm_flag()
        flag_checks.check_output(shared_flags.OUTPUT.value)
        flag_checks.check_output(shared_flags.PROFILE_DIR.value, "profile_dir", folder=True)
        start_jax(NAME)

    with watchdog(NAME) as watch:
        watch.watch_for_preemption()
        return serve(model, requests, workload, watch)


def serve(model, requests: list[Request], workload: str, watch) -> int:
    """The run, on every process; the exit code, the same on all."""
    from paged_dist.cluster import FAILED, PREEMPTED
    from paged_dist.launch.serving import report

    say = sayer(NAME, watch)
    watch.agree(given_alike(requests))
    with _usage():
        run = plan_run(model, requests, workload)
    watch.agree(made_alike(run))
    if shared_flags.DRY_RUN.value:
        if watch.process_id == 0:
            print(dry_text(run))
        return 0

    def finish(record: dict) -> int:
        if (
            not record_output.deliver(NAME, report.table(record), shared_flags.OUTPUT.value, record)
            or not record["oracle_passed"]
        ):
            return FAILED
        return PREEMPTED if record["partial"] else FAILED if record["profile_error"] else 0

    code = measure(run, watch, say, finish, profile_dir=shared_flags.PROFILE_DIR.value)
    if code == FAILED and watch.process_id != 0:
        print(f"{NAME}: error: process 0 says that the run failed", file=sys.stderr, flush=True)
    return code


def sayer(name: str, watch):
    """What prints a line on stderr, of process 0 alone; warnings go through it too."""

    def say(line):
        if watch.process_id == 0:
            print(f"{name}: {line}", file=sys.stderr, flush=True)

    warnings.showwarning = lambda message, *_, **__: say(f"warning: {message}")
    return say


def measure(run: Run, watch, say, finish, *, tag: str = "", profile_dir: str | None = None, sweep=None) -> int:
    """Runs what was planned and reports it; every process calls it, also one that has no device of the mesh.

    Args:
      finish: takes the record, on process 0, and returns the exit code, which all return.
      tag: tells this run from others under the same watch.
      sweep: steps done before under the same watch, where it is one of several runs: SIGTERM then does not end it.

    Where this process was asked to stop by Ctrl-C, and all stopped, it returns 130 and the others 75.
    """
    import jax

    from paged_dist import PageAllocator, describe_mesh
    from paged_dist.cluster import PREEMPTED
    from paged_dist.launch.serving import report
    from paged_dist.launch.serving.engine import Engine
    from paged_dist.launch.serving.row_schedule import Schedule, choose_checks

    measured = told = None
    ctrl_c = CtrlC(NAME)
    takes_part = any(d.process_index == jax.process_index() for d in run.mesh.devices.flat)
    if takes_part:
        m, requests = run.model, run.requests
        watch.phase("compile")
        with _usage((BadValue, NotImplementedError)):  # it traces the step: JAX's own errors are no flag's
            engine = Engine(
                m, run.spec, run.mesh, run.pool.batch, run.pages_per_sequence, shared_flags.IMPLEMENTATION.value
            )
            allocator = PageAllocator(run.spec, run.mesh, run.pool.batch, run.pages_per_sequence)
            checks = choose_checks(requests, ORACLE_SAMPLES.value, m.num_layers, shared_flags.SEED.value)
            schedule = Schedule(requests, allocator, run.pool, engine.chunk_tokens, checks)
        say(describe_mesh(run.mesh).partition("\n")[0])
        say(f"compiling for {len(requests)} requests, {sum(r.generated for r in requests)} tokens to generate")
        engine.compile()
        engine.warm_up()
    watch.meet(f"compiled{tag}")
    if takes_part:
        with contextlib.nullcontext() if sweep is not None else ctrl_c:
            measured = engine.run(schedule, say, profile_dir, watch, first_step=sweep or 0, stops=sweep is None)
        if measured.profile_error:
            text = f"--profile_dir={profile_dir!r}: no profile could be written: {measured.profile_error}"
            print(f"{NAME}: error: {text}", file=sys.stderr, flush=True)
        told = report.told(measured, schedule.fingerprint)
    else:
        watch.idle()

    def conclude(everyone: list) -> int:
        if measured.stopped and not measured.step_seconds:
            say("asked to stop before the first step: there is nothing to report")
            return PREEMPTED
        return finish(record_of(run, measured, everyone))

    code = watch.decide(f"the report{tag}", told, conclude)
    return INTERRUPTED if code == PREEMPTED and ctrl_c.came else code


def dry_text(run: Run) -> str:
    """What would run, as lines of at most 80 columns."""
    from paged_dist import describe_mesh
    from paged_dist.launch.common.number_formats import quantity
    from paged_dist.launch.common.report_lines import report_line
    from paged_dist.launch.serving.report import work_lines

    head, *axes = describe_mesh(run.mesh).splitlines()
    more = {
        "mesh": [line.strip() for line in axes],
        "cache": [f"{quantity(run.spec.bytes_per_chip(run.mesh), 'B')} a device"],
        "workload": [f"{sum(r.generated for r in run.requests)} tokens to generate"],
    }
    lines = []
    for name, text in work_lines(described(run)):
        lines.append((name, head.removeprefix("mesh: ") if name == "mesh" else text))
        lines += [("", one) for one in more.get(name, [])]
    lines.append(("dry run", "nothing was compiled, allocated or written"))
    return "\n".join(report_line(*line) for line in lines)


def cli() -> None:
    """The console script."""
    run_program(main, NAME)


if __name__ == "__main__":
    cli()
