"""How decoding scales over mesh shapes, strong and weak: `paged-dist-scaling`.

Strong: the same work on every mesh. Weak: the same work a device. Each point is a run of the decode benchmark:

- on a host without accelerators, local pods of --processes=1,2,4 processes of --devices simulated devices;
- on accelerators, or with --sizes, sub-meshes of the devices that are there; several hosts all run this command;
- with --plan=v5p:2x2x1,v5p:4x4x4 nothing runs: the floor of a step on each of these slices, projected.

Each row goes to --output when it is measured, and a sweep that was ended goes on where it stopped: rows that are there,
of the same point, work, devices, versions and commit, are not measured again.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Mapping

from paged_dist._errors import bad_value, require
from paged_dist.launch import decode, plan
from paged_dist.launch.common import flag_checks, host, shared_flags
from paged_dist.launch.common import flag_registry as flags
from paged_dist.launch.common.chips import chip_of_topology, slice_of
from paged_dist.launch.common.local_processes import MOST_DEVICES, MOST_PROCESSES, dies_with_parent, launcher_command
from paged_dist.launch.common.run_program import UsageError, run_program
from paged_dist.launch.common.start_jax import start_jax, watchdog
from paged_dist.launch.planning import plan_flags, sizing
from paged_dist.launch.planning.absent_chips import absent_pod_mesh
from paged_dist.launch.planning.fitting import checked_sizes
from paged_dist.launch.planning.plan_text import problems
from paged_dist.launch.planning.pod_settings import PodSettings
from paged_dist.launch.serving import run_setup, workload_flags
from paged_dist.launch.serving.workload import Request, repeated
from paged_dist.mesh.devices import place_of

SCALING = flags.DEFINE_list("scaling", ["strong", "weak"], "Which sweeps: strong, weak or both.")
PROCESSES = flags.DEFINE_list("processes", ["1", "2", "4"], "Local pods of so many processes each.")
DEVICES = flags.DEFINE_integer("devices", 2, "Simulated devices of each process of a local pod.")
SIZES = flags.DEFINE_list(
    "sizes", None, "Sub-meshes of so many of the devices that are there. Default there: 1, 2, 4 and so on, and all."
)
PLAN = flags.DEFINE_list("plan", None, "Project, for slices of these names, instead of measuring.")
RUNS = flags.DEFINE_integer("runs", 1, "Runs of each point; tables and plots show medians.")
PLOT = flags.DEFINE_string(
    "plot", None, "Draw the sweep, and all others in --output, into this file, .svg or .png (needs matplotlib)."
)

NAME = "paged-dist-scaling"
_NOT_TAKEN = ("data", "num_pages", "profile_dir")
for _flag in flags.FLAGS.get_key_flags_for_module(decode):
    if _flag.name not in _NOT_TAKEN:
        flags.declare_key_flag(_flag.name)
for _name in ("num_slices", "width", "mlp_width", "context_tokens"):
    flags.declare_key_flag(_name)

_SWEEP = ("output", "dry_run", "plot", "runs", "scaling", "processes", "devices", "sizes", "plan")  # not a run's
_OF_A_PROCESS = ("coordinator_address", "num_processes", "process_id", "coordinator_bind_address", "cpu_devices")
# Of a trace its requests count, not its name.
_NOT_THE_WORK = (*_SWEEP, *_OF_A_PROCESS, *shared_flags.TIMEOUTS, "trace", "trace_format")
_OF_PLANS = ("num_slices", "width", "mlp_width", "context_tokens")
_MOST_RUNS = 1000
_STEPS_A_POINT = 10**9  # numbers of a point's steps, for the watch over the processes


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    mode: str  # 'strong' or 'weak'
    mesh: tuple[int, int, int]  # data, context, model
    processes: int | None  # of a local pod; None: what is there, or a plan
    topology: str | None  # of a plan
    batch: int
    times: int  # the requests are served
    repeat: int

    @property
    def size(self) -> int:
        """Devices."""
        return math.prod(self.mesh)

    def key(self, origin: list) -> str:
        """What tells its row from others in a file: the point, the work that flags describe, the sweep's `origin`."""
        work = {f.name: f.value for f in flags.FLAGS.get_key_flags_for_module(__name__)} | {
            f.name: f.value for f in flags.FLAGS.get_key_flags_for_module(sys.argv[0])
        }
        work = {name: value for name, value in work.items() if name not in _NOT_THE_WORK}
        text = json.dumps([dataclasses.astuple(self), work, origin], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def __str__(self) -> str:
        processes = f"{self.processes} process{'es' * (self.processes > 1)}" if self.processes else "what is there"
        mesh = "x".join(map(str, self.mesh))
        work = f"batch {self.batch}" + (f", requests {self.times} times over" if self.times > 1 else "")
        run = f", run {self.repeat + 1}" if RUNS.value > 1 else ""
        return (
            f"{self.mode} {mesh} ({self.size} device{'s' * (self.size > 1)}, {self.topology or processes}): {work}{run}"
        )


def check_flags() -> None:
    """Raises ValueError for flags that are wrong, before anything is started."""
    for name in _NOT_TAKEN:
        if flags.FLAGS[name].present:
            raise bad_value(f"--{name}", flags.FLAGS[name].value, "is no flag of this launcher", "the sweep sets it")
    others = _OF_PLANS if PLAN.value is None else ["implementation", "cpu_devices", "oracle_samples"]
    for name in others:
        if flags.FLAGS[name].present:
            mode = "--plan" if PLAN.value is None else "measured sweeps"
            raise bad_value(f"--{name}", flags.FLAGS[name].value, f"is a flag of {mode}", "leave it out")
    for name in ("topology", "model_parallelism"):
        if flags.FLAGS[name].present:
            raise bad_value(f"--{name}", flags.FLAGS[name].value, "is no flag of this launcher", "see --plan, --model")
    require(PLAN.value is None or any(PLAN.value), "--plan", "", "must name a slice", "such as v5p:4x4x4")
    flag_checks.at_least(0, oracle_samples=decode.ORACLE_SAMPLES.value)
    flag_checks.check_hbm_flag()
    for mode in SCALING.value:
        require(mode in ("strong", "weak"), "--scaling", mode, "must be strong, weak or both")
    require(len(SCALING.value) > 0, "--scaling", "", "must name strong, weak or both")
    flag_checks.at_least(1, runs=RUNS.value, devices=DEVICES.value)
    flag_checks.at_most(MOST_DEVICES, devices=DEVICES.value)
    flag_checks.at_most(_MOST_RUNS, runs=RUNS.value)
    require(
        PLAN.value is None or SIZES.value is None, "--plan", PLAN.value, "not together with --sizes", "give one of them"
    )
    for name in ("processes", "devices"):
        if flags.FLAGS[name].present and (PLAN.value or SIZES.value):
            raise bad_value(f"--{name}", flags.FLAGS[name].value, "is of local pods", "not with --plan or --sizes")
    if PLAN.value is not None:
        chips = [chip_of_topology(topology, "--plan") for topology in PLAN.value]
        plan_flags.check_hbm_flag_of(min(chips, key=lambda chip: chip.hbm_gib * chip.devices))
    flag_checks.check_output(shared_flags.OUTPUT.value)
    if PLOT.value is not None:
        require(PLOT.value.endswith((".svg", ".png")), "--plot", PLOT.value, "must end in .svg or .png")
        flag_checks.check_output(PLOT.value, "plot")
        try:
            import matplotlib  # noqa: F401
        except ImportError as e:
            raise bad_value("--plot", PLOT.value, "needs matplotlib", "pip install 'paged-dist[plot]'") from e


def whole_numbers(flag: str, texts: list[str]) -> list[int]:
    """The numbers of a list flag, each once, ascending; raises ValueError for what is none, or below 1."""
    for text in texts:
        require(text.strip().isdecimal() and int(text) >= 1, f"--{flag}", text, "must be whole numbers, at least 1")
    require(len(texts) > 0, f"--{flag}", "", "must have at least one number")
    return sorted({int(text) for text in texts})


def points_of(sizes: list[tuple[int, dict]]) -> list[Point]:
    """The sweep over numbers of devices, each with what else tells its points (processes, topology).

    Raises:
      ValueError: a size over which context and model do not divide, or a batch that does not divide over a mesh.
    """
    sizes = sorted(sizes, key=lambda item: (item[0], item[1].get("topology") or ""))
    context, kv_heads, smallest = shared_flags.CONTEXT.value or 1, shared_flags.NUM_KV_HEADS.value, sizes[0][0]
    model = shared_flags.MODEL.value or math.gcd(kv_heads, max(1, smallest // plan_flags.NUM_SLICES.value // context))
    for size, _ in sizes:
        require(
            size % (context * model) == 0,
            "--model" if shared_flags.MODEL.value else "--context",
            model if shared_flags.MODEL.value else context,
            f"context x model = {context} x {model} must divide each size, and {size} devices are one",
        )
    largest, by_mode = sizes[-1][0] // (context * model), []  # (mode, devices, how often the work is done, what else)
    for mode in dict.fromkeys(SCALING.value):
        for size, more in sizes:
            whole = mode == "strong" or size % smallest == 0
            require(whole, "--scaling", mode, f"{size} devices are no multiple of {smallest}")
            by_mode.append((mode, size, size // smallest if mode == "weak" else 1, more))
    data_of = lambda size: size // (context * model)
    step = math.lcm(*(data_of(size) // math.gcd(data_of(size), times) for _, size, times, _ in by_mode))
    batch = shared_flags.BATCH.value
    require(
        batch is None or batch % step == 0,
        "--batch",
        batch,
        "must be a multiple of every mesh's data size" + (f", so of {step}" if step > 1 else ""),
    )
    points = []
    for mode, size, times, more in by_mode:
        rows = run_setup.ROWS_A_SHARD * (largest if mode == "strong" else smallest // (context * model))
        rows = -(-rows // step) * step if batch is None else batch
        shape = data_of(size), context, model
        point = Point(mode, shape, more.get("processes"), more.get("topology"), rows * times, times, 0)
        points += [dataclasses.replace(point, repeat=i) for i in range(RUNS.value)]
    return points


def rows_of(path: str | None, say=lambda line: None) -> list[dict]:
    """The rows of sweeps in a file of JSON lines; rows of others are passed over, half-written ones with a note."""
    if path is None or not os.path.isfile(path):  # a device has no end
        return []
    rows = []
    with open(path, "rb") as file:
        for n, line in enumerate(file, 1):
            try:
                row = json.loads(line) if line.strip() else None
            except (ValueError, RecursionError):
                say(f"warning: {path}: line {n}: not JSON (half-written?), left out")
                continue
            if isinstance(row, dict) and row.get("benchmark") == "scaling":
                rows.append(row)
    return rows


def _counts(row: dict) -> bool:
    """Whether a row is a whole run's whose outputs were right."""
    return not row["partial"] and row.get("oracle_passed", True)


class Sweep:
    """The rows there are, and those that come: each is in the file before the next run begins.

    Args:
      requests: what is served; devices: the kinds and numbers of what it runs on, a plan's being named by its point.
    """

    def __init__(self, points: list[Point], say, requests: list[Request], devices: dict[str, int] | None = None):
        from paged_dist.launch.common.provenance import git_commit, versions

        self.points, self._say = points, say
        origin = [versions(), git_commit(), devices, zlib.crc32(repr(requests).encode())]
        self._keys = {p: p.key(origin) for p in points}
        known = {r["key"]: r for r in rows_of(shared_flags.OUTPUT.value, say) if _counts(r)}
        self.done = {p: known[key] for p, key in self._keys.items() if key in known}

    def due(self) -> list[Point]:
        """The points that are not in the file."""
        if self.done:
            self._say(f"{len(self.done)} of {len(self.points)} rows are in {shared_flags.OUTPUT.value} already")
        return [p for p in self.points if p not in self.done]

    def add(self, point: Point, record: dict) -> bool:
        """Writes a point's row; False where that fails."""
        from paged_dist.launch.common.record_output import append_output

        row = record | {"benchmark": "scaling", "mode": point.mode, "key": self._keys[point], "repeat": point.repeat}
        row["flags"] = shared_flags.given_flags()
        if _counts(row):
            self.done[point] = row
        return append_output(NAME, shared_flags.OUTPUT.value, row)

    def conclude(self) -> int:
        """Prints the table of this sweep and draws the plot, of other sweeps in the file too; the exit code."""
        from paged_dist.launch.common.record_output import print_text
        from paged_dist.launch.sweeps import scaling_report

        rows = [self.done[p] for p in self.points if p in self.done]
        printed = not rows or print_text(NAME, scaling_report.table(rows))
        mine = {r["key"] for r in rows}
        rows += [r for r in rows_of(shared_flags.OUTPUT.value) if _counts(r) and r["key"] not in mine]
        if PLOT.value is not None and rows:
            folder = os.path.dirname(os.path.abspath(PLOT.value))
            beside = os.path.join(folder, f".{os.getpid()}-{os.path.basename(PLOT.value)}")
            try:
                os.makedirs(folder, exist_ok=True)
                scaling_report.figure(rows).savefig(beside, format=PLOT.value.rsplit(".", 1)[1])
                os.replace(beside, PLOT.value)
            except OSError as e:
                self._say(f"error: --plot={PLOT.value!r}: could not be written: {e}")
                with contextlib.suppress(OSError):
                    os.unlink(beside)
                return 1
        return int(not printed)


# Local pods


def pod_command(point: Point, output: str) -> list[str]:
    """The command of a point's local pod: its row goes to `output`."""
    data, context, model = point.mesh
    own = {"data": data, "context": context, "model": model, "batch": point.batch}
    own["repeat_requests"] = point.times * workload_flags.REPEAT_REQUESTS.value
    taken = {
        f.name for module in (shared_flags, workload_flags, decode) for f in flags.FLAGS.get_flags_for_module(module)
    }
    given = [
        f"{name}={value}"
        for name, value in shared_flags.given_flags(whole_run=True).items()
        if name[2:] in taken and name[2:] not in (*own, *_SWEEP, *_OF_A_PROCESS)
    ]
    pod = [f"--processes={point.processes}", f"--devices={point.size // point.processes}", "--", "decode"]
    run = [*given, *(f"--{name}={value}" for name, value in own.items()), f"--output={output}"]
    return launcher_command("local_pod", [*pod, *run])


def run_in_pods(sweep: Sweep, say) -> int:
    """Measures what is due, each point in a local pod of its own."""
    pods = _Pods()
    with pods:
        for point in sweep.due():
            say(str(point))
            with tempfile.TemporaryDirectory() as folder:
                output, log = os.path.join(folder, "row.jsonl"), os.path.join(folder, "log")
                code = pods.run(pod_command(point, output), log)
                if pods.stopped:
                    say("asked to stop: the rows measured so far are kept, the same command goes on from here")
                    return pods.stopped
                if code != 0:
                    with open(log, encoding="utf-8", errors="replace") as file:
                        say("\n".join(["the last lines of the run:", *file.read().splitlines()[-8:]]))
                    say(f"error: {point}: exit code {code}")
                    return 1
                with open(output, encoding="utf-8") as file:
                    record = json.loads(file.readline())
            if not sweep.add(point, record):
                return 1
    return sweep.conclude()


class _Pods:
    """Local pods one after another; Ctrl-C and SIGTERM end the one that runs, and all of its processes.

    Attributes:
      stopped: the exit code for that, 130 or 75; 0 where nobody asked.
    """

    def __init__(self):
        self.stopped, self._pod, self._before = 0, None, {}

    def __enter__(self) -> _Pods:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._stop)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, number, frame) -> None:
        from paged_dist.cluster import PREEMPTED

        self.stopped = PREEMPTED if number == signal.SIGTERM else 128 + number
        if self._pod is not None and self._pod.poll() is None:
            self._pod.send_signal(signal.SIGINT)

    def run(self, command: list[str], log: str) -> int:
        """The exit code of `command`, whose output goes to the file `log`."""
        with open(log, "wb") as file:
            self._pod = subprocess.Popen(
                dies_with_parent(command),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        if self.stopped:  # while it was started
            self._pod.send_signal(signal.SIGINT)
        return self._pod.wait()


# What is there


def sub_devices(devices: list, size: int) -> list:
    """`size` of the devices, process 0's first among them: of TPUs a box of the torus, of as few hosts as can be, and
    then as near a cube as there is.

    Raises:
      ValueError: there are no so many devices, or no box of so many chips.
    """
    require(size <= len(devices), "--sizes", size, f"there are {len(devices)} devices")
    places = [place_of(d) for d in devices]
    if size == len(devices) or None in places:
        return devices[:size]
    cores = len({place.core for place in places})
    at = {}
    for d, place in zip(devices, places, strict=True):
        at.setdefault(place[:4], []).append(d)
    first = places[0][:4]
    dims = [max(where[i] for where in at) + 1 for i in (1, 2, 3)]
    chips = size // cores
    boxes = [
        (a, b, chips // (a * b))
        for a in range(1, dims[0] + 1)
        for b in range(1, dims[1] + 1)
        if size % cores == 0 and chips % (a * b) == 0 and chips // (a * b) <= dims[2]
    ]
    boxes = [box for box in boxes if all(n % m == 0 for n, m in zip(dims, box, strict=True))]
    require(bool(boxes), "--sizes", size, f"no box of so many devices divides the slice of {'x'.join(map(str, dims))}")
    found = []
    for box in boxes:
        low = [where // n * n for where, n in zip(first[1:], box, strict=True)]
        chosen = [
            d
            for where in sorted(at)
            if where[0] == first[0] and all(lo <= x < lo + n for lo, x, n in zip(low, where[1:], box, strict=True))
            for d in at[where]
        ]
        if len(chosen) == size:
            found.append((len({d.process_index for d in chosen}), sum(box), box, chosen))
    require(bool(found), "--sizes", size, "every box of so many has holes on this slice")
    return min(found, key=lambda one: one[:3])[3]


def run_here(model, requests, workload: str) -> int:
    """Measures what is due on sub-meshes of the devices of this run; on every process alike."""
    import jax

    from paged_dist import make_pod_mesh
    from paged_dist.cluster import PREEMPTED

    with watchdog(NAME) as watch:
        watch.watch_for_preemption()
        say = decode.sayer(NAME, watch)
        watch.agree(run_setup.flags_to_agree_on(requests))
        devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
        try:
            sizes = _sizes_here(devices)
            points = points_of([(size, {}) for size in sizes])
            parts = {size: sub_devices(devices, size) for size in sizes}
            runs = {}
            for p in points:
                data, context, kept = p.mesh
                mesh = make_pod_mesh(data=data, context=context, model=kept, devices=parts[p.size])
                served = repeated(requests, p.times)
                runs[p] = run_setup.prepare_run(model, served, workload, mesh, p.batch)
        except (ValueError, NotImplementedError) as e:
            raise UsageError(str(e)) from e
        watch.agree(run_setup.setup_to_agree_on(runs[points[-1]]) | {"the sweep": points})
        if shared_flags.DRY_RUN.value:
            return _dry_run(points) if watch.process_id == 0 else 0
        sweep = Sweep(points, say, requests, dict(collections.Counter(d.device_kind for d in devices)))
        due = watch.decide("what is due", None, lambda _: [points.index(p) for p in sweep.due()])
        for i in due:
            point = points[i]
            if watch.decide(f"stop before {i}", watch.is_asked_to_stop, any):
                say("asked to stop: the rows measured so far are kept, the same command goes on from here")
                return PREEMPTED
            say(str(point))
            finish = lambda record, point=point: int(not (sweep.add(point, record) and record["oracle_passed"]))
            code = decode.measure_run(runs[point], watch, say, finish, tag=f" of {i}", sweep=i * _STEPS_A_POINT)
            if code != 0:
                return code
        return watch.decide("the table", None, lambda _: sweep.conclude())


def _sizes_here(devices: list) -> list[int]:
    """The sizes that --sizes names, or those powers of two of which there is a sub-mesh, and all devices."""
    if SIZES.value is not None:
        return whole_numbers("sizes", SIZES.value)
    found = set()
    for size in {*(2**i for i in range(len(devices).bit_length())), len(devices)}:
        with contextlib.suppress(ValueError):
            sub_devices(devices, size)
            found.add(size)
    return sorted(found)


# Plans


def settings_of(points: list[Point]) -> dict[Point, PodSettings]:
    """What to plan, point by point."""
    found = {}
    for p in points:
        shape = dict(zip(("data", "context", "model"), p.mesh, strict=True))
        s = plan_flags.pod_settings_from_flags(p.topology)
        found[p] = dataclasses.replace(s, **shape, batch=p.batch // p.times, times=p.times)
    step = math.lcm(*(p.mesh[0] // math.gcd(p.mesh[0], p.times) for p in points))
    return {p: dataclasses.replace(s, batch_step=step) for p, s in found.items()}


def fits_all(settings: dict[Point, PodSettings], meshes: dict[Point, object]) -> Callable[[Mapping[str, int]], bool]:
    """Whether changed settings fit every point: what is advised of one must hold for the others."""
    return lambda changes: all(
        sizing.fits_with(s, meshes[p], chip_of_topology(p.topology), changes) for p, s in settings.items()
    )


def run_plans(settings: dict[Point, PodSettings], fits, say) -> int:
    """Projects what is due; `fits`: as in `plan.plan_record`."""
    requests = next(iter(settings.values())).requests
    sweep = Sweep(list(settings), say, list(requests))
    for point in sweep.due():
        say(str(point))
        s = settings[point]
        try:
            r = plan.plan_record(s, fits)
        except (ValueError, NotImplementedError, RuntimeError) as e:
            say(f"error: {point}: {e}")
            return 1
        for problem in problems(r):
            say(f"error: {point}: {problem}")
            return 1
        floor = r["floor"]
        speed = {
            "tokens_per_s": floor["tokens_per_s"],
            "tokens_per_s_per_chip": floor["tokens_per_s"] / r["chips"],
            "step_ms_p50": 1e3 * floor["step_s"],
            "step_ms_p99": None,
            "live_kv_bytes_per_step": floor["live_kv_bytes"] * sum(r["devices"].values()),
        }
        if not sweep.add(point, r | speed):
            return 1
    return sweep.conclude()


def _dry_run(points: list[Point]) -> int:
    for point in points:
        print(point)
    print(f"dry run: {len(points)} runs; nothing was started or written")
    return 0


def main(argv) -> int:
    """Runs the sweep; 0, 1 where a run or a file failed, 75 where it was asked to stop, to be gone on with."""
    del argv
    say = lambda line: print(f"{NAME}: {line}", file=sys.stderr, flush=True)
    try:
        check_flags()
        if PLAN.value is not None:
            return _main_of_plans(say)
        model = run_setup.model_from_flags()
        requests, workload = workload_flags.requests_from_flags()
        if SIZES.value is None and host.is_lone_cpu_host():
            counts = whole_numbers("processes", PROCESSES.value)
            flag_checks.at_most(MOST_PROCESSES, processes=counts[-1])
            points = points_of([(n * DEVICES.value, {"processes": n}) for n in counts])
            return _dry_run(points) if shared_flags.DRY_RUN.value else run_in_pods(Sweep(points, say, requests), say)
        start_jax(NAME)
    except (ValueError, NotImplementedError) as e:
        raise UsageError(str(e)) from e
    return run_here(model, requests, workload)


def planned() -> tuple[dict[Point, PodSettings], Callable[[Mapping[str, int]], bool]]:
    """The settings of every slice of --plan, checked, and whether changed ones fit them all.

    Raises:
      ValueError: what does not fit a slice, with what fits all of them.
    """
    from paged_dist.mesh.topology import topology_devices

    names = dict.fromkeys(slice_of(t, "--plan").topology for t in PLAN.value)
    settings = settings_of(
        points_of([(len(topology_devices(t, plan_flags.NUM_SLICES.value)), {"topology": t}) for t in names])
    )
    meshes = {p: absent_pod_mesh(s) for p, s in settings.items()}
    fits = fits_all(settings, meshes)
    for p, s in settings.items():
        checked_sizes(s, meshes[p], chip_of_topology(p.topology), None, fits)
    return settings, fits


def _main_of_plans(say) -> int:
    host.start_tpu_compiler()
    settings, fits = planned()  # refused before anything is compiled
    return _dry_run(list(settings)) if shared_flags.DRY_RUN.value else run_plans(settings, fits, say)


def cli() -> None:
    """The console script."""
    run_program(main, NAME)


if __name__ == "__main__":
    cli()
