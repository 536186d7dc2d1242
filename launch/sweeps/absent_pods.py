"""A sweep over slices that are not here: each point's step is compiled, and its least time is projected."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

from paged_dist.launch.common.program import Program
from paged_dist.launch.common.slices import bookable_slice, chip_of_topology
from paged_dist.launch.planning import plan_flags, sizing
from paged_dist.launch.planning.absent_chips import absent_pod_mesh
from paged_dist.launch.planning.fitting import checked_sizes
from paged_dist.launch.planning.plan_record import plan_record
from paged_dist.launch.planning.plan_text import problems
from paged_dist.launch.planning.pod_settings import PodSettings
from paged_dist.launch.sweeps.points import Point, SweepSize, batch_step, points_of
from paged_dist.launch.sweeps.sweep_rows import SweepRows
from paged_dist.mesh.topology import topology_devices


class PlannedSweep(NamedTuple):
    """The settings of each point's plan, checked against its slice."""

    settings: dict[Point, PodSettings]
    fits: Callable[[Mapping[str, int]], bool]  # whether changed settings fit every slice of the sweep


def settings_of_points(points: list[Point]) -> dict[Point, PodSettings]:
    """The settings of each point's plan: those of the flags, with the point's slice, mesh and batch."""
    found = {}
    for p in points:
        data, context, model = p.mesh
        s = plan_flags.pod_settings_from_flags(p.topology)
        found[p] = dataclasses.replace(
            s, data=data, context=context, model=model, batch=p.batch // p.times, times=p.times
        )
    step = batch_step([(p.mesh[0], p.times) for p in points])
    return {p: dataclasses.replace(s, batch_step=step) for p, s in found.items()}


def plan_sweep(slices: list[str]) -> PlannedSweep:
    """The settings of each of the `slices` of --plan, checked before anything is compiled.

    Raises:
      ValueError: what does not fit a slice, with what fits all of them.
    """
    names = dict.fromkeys(bookable_slice(t, "--plan").topology for t in slices)
    settings = settings_of_points(
        points_of([SweepSize(len(topology_devices(t, plan_flags.NUM_SLICES.value)), topology=t) for t in names])
    )
    meshes = {p: absent_pod_mesh(s) for p, s in settings.items()}

    def fits(changes: Mapping[str, int]) -> bool:
        """What is advised of one slice must hold for the others."""
        return all(sizing.fits_with(s, meshes[p], chip_of_topology(s.topology), changes) for p, s in settings.items())

    for p, s in settings.items():
        checked_sizes(s, meshes[p], chip_of_topology(s.topology), None, fits)
    return PlannedSweep(settings, fits)


def run_plans(program: Program, sweep: PlannedSweep) -> int:
    """Projects the points that are not in --output yet; the exit code."""
    requests = next(iter(sweep.settings.values())).requests
    rows = SweepRows(program, list(sweep.settings), program.say, requests)
    for point in rows.due():
        rows.say(str(point))
        try:
            r = plan_record(sweep.settings[point], sweep.fits)
        except (ValueError, NotImplementedError, RuntimeError) as e:
            rows.say(f"error: {point}: {e}")
            return 1
        for problem in problems(r):
            rows.say(f"error: {point}: {problem}")
            return 1
        floor = r["floor"]
        speed = {
            "tokens_per_s": floor["tokens_per_s"],
            "tokens_per_s_per_chip": floor["tokens_per_s"] / r["chips"],
            "step_ms_p50": 1e3 * floor["step_s"],
            "step_ms_p99": None,
            "live_kv_bytes_per_step": floor["live_kv_bytes"] * sum(r["devices"].values()),
        }
        if not rows.add(point, r | speed):
            return 1
    return rows.conclude()
