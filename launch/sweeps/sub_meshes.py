"""A sweep on attached devices: each point runs on a sub-mesh of them. Every process of the run takes part in it."""

from __future__ import annotations

import collections
import contextlib

import jax

from paged_dist import make_pod_mesh
from paged_dist._errors import require
from paged_dist.cluster import PREEMPTED
from paged_dist.launch import decode
from paged_dist.launch.common import shared_flags
from paged_dist.launch.common.program import Program
from paged_dist.launch.common.run_program import UsageError
from paged_dist.launch.common.start_jax import watchdog
from paged_dist.launch.serving import run_setup
from paged_dist.launch.serving.measure_run import measure_run
from paged_dist.launch.serving.programs import Model
from paged_dist.launch.serving.workload import Request, repeated
from paged_dist.launch.sweeps import sweep_flags
from paged_dist.launch.sweeps.points import SweepSize, points_of, print_points
from paged_dist.launch.sweeps.sweep_rows import SweepRows
from paged_dist.mesh.devices import place_of

_STEPS_A_POINT = 10**9  # the watchdog numbers steps over the whole sweep: each point has a range of numbers of its own


def sub_devices(devices: list[jax.Device], size: int) -> list[jax.Device]:
    """`size` of the devices, process 0's first among them.

    Of TPUs it is a box of the torus, over the fewest hosts, and of such boxes the one nearest a cube.

    Raises:
      ValueError: there are fewer devices than `size`, or no box of `size` devices.
    """
    require(size <= len(devices), "--sizes", size, f"there are {len(devices)} devices")
    places = [place for d in devices if (place := place_of(d)) is not None]
    if size == len(devices) or len(places) < len(devices):
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


def sub_mesh_sizes(devices: list[jax.Device]) -> list[int]:
    """The sizes of --sizes. Without it: the powers of two for which there is a sub-mesh, and all devices."""
    if sweep_flags.SIZES.value is not None:
        return sweep_flags.sizes_of_sweep("sizes", sweep_flags.SIZES.value)
    found = set()
    for size in {*(2**i for i in range(len(devices).bit_length())), len(devices)}:
        with contextlib.suppress(ValueError):
            sub_devices(devices, size)
            found.add(size)
    return sorted(found)


def run_on_sub_meshes(program: Program, model: Model, requests: list[Request], workload: str) -> int:
    """Measures the points that are not in --output yet, on sub-meshes of this run's devices; the exit code.

    Every process calls it.

    Args:
      model, requests, workload: as `run_setup.prepare_run` takes them.
    """
    with watchdog(program.name) as watch:
        watch.phase("set-up")  # a phase has a time-out, which the time before the first one has not
        watch.watch_for_preemption()
        say = program.sayer(watch)
        watch.agree(run_setup.flags_to_agree_on(requests))
        devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
        try:
            sizes = sub_mesh_sizes(devices)
            points = points_of([SweepSize(size) for size in sizes])
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
            return print_points(points) if watch.process_id == 0 else 0
        rows = SweepRows(program, points, say, requests, dict(collections.Counter(d.device_kind for d in devices)))
        due = watch.decide("what is due", None, lambda _: [points.index(p) for p in rows.due()])
        for i in due:
            point = points[i]
            if watch.decide(f"stop before {i}", watch.is_asked_to_stop, any):
                rows.say_stopped()
                return PREEMPTED
            say(str(point))
            finish = lambda record, point=point: int(not (rows.add(point, record) and record["oracle_passed"]))
            code = measure_run(
                program,
                runs[point],
                watch,
                say,
                finish,
                oracle_samples=decode.ORACLE_SAMPLES.value,
                tag=f" of {i}",
                sweep=i * _STEPS_A_POINT,
            )
            if code != 0:
                return code
        return watch.decide("the table", None, lambda _: rows.conclude())
