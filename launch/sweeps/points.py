"""The points of a scaling sweep: one run each, with its mesh, batch and share of the work."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from typing import NamedTuple

from paged_dist._errors import require
from paged_dist.launch.common import shared_flags
from paged_dist.launch.planning import plan_flags
from paged_dist.launch.serving.workload import ROWS_A_SHARD
from paged_dist.launch.sweeps import sweep_flags


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    mode: str  # 'strong' or 'weak'
    mesh: tuple[int, int, int]  # data, context, model
    processes: int | None  # of a local pod; None for a sub-mesh of attached devices and for a plan
    topology: str | None  # the absent slice that a plan is for
    batch: int
    times: int  # how often the requests are served
    repeat: int  # from 0, of --runs

    @property
    def size(self) -> int:
        """Devices."""
        return math.prod(self.mesh)

    def key(self, origin: list) -> str:
        """16 hex digits that tell the point's row in a file from other rows.

        They depend on the point, on the flags of the work, and on the sweep's `origin` (versions, devices, ...).
        """
        text = json.dumps(
            [dataclasses.astuple(self), sweep_flags.flags_of_the_work(), origin], sort_keys=True, default=str
        )
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def __str__(self) -> str:
        processes = f"{self.processes} process{'es' * (self.processes > 1)}" if self.processes else "what is there"
        mesh = "x".join(map(str, self.mesh))
        work = f"batch {self.batch}" + (f", requests {self.times} times over" if self.times > 1 else "")
        run = f", run {self.repeat + 1}" if sweep_flags.RUNS.value > 1 else ""
        return (
            f"{self.mode} {mesh} ({self.size} device{'s' * (self.size > 1)}, {self.topology or processes}): {work}{run}"
        )


class SweepSize(NamedTuple):
    """One size of the sweep, and where its runs go."""

    devices: int
    processes: int | None = None  # of a local pod
    topology: str | None = None  # of a plan


def points_of(sizes: list[SweepSize]) -> list[Point]:
    """The points of the sweep that the flags describe, over `sizes`: strong and weak, each --runs times.

    Raises:
      ValueError: a size over which context and model do not divide, or a batch that does not divide over a mesh.
    """
    sizes = sorted(sizes, key=lambda size: (size.devices, size.topology or ""))
    context, kv_heads, smallest = shared_flags.CONTEXT.value or 1, shared_flags.NUM_KV_HEADS.value, sizes[0].devices
    model = shared_flags.MODEL.value or math.gcd(kv_heads, max(1, smallest // plan_flags.NUM_SLICES.value // context))
    for size in sizes:
        require(
            size.devices % (context * model) == 0,
            "--model" if shared_flags.MODEL.value else "--context",
            model if shared_flags.MODEL.value else context,
            f"context x model = {context} x {model} must divide each size, and {size.devices} devices are one",
        )
    runs: list[tuple[str, SweepSize, int]] = []  # mode, size, how often the requests are served
    for mode in dict.fromkeys(sweep_flags.SCALING.value):
        for size in sizes:
            whole = mode == "strong" or size.devices % smallest == 0
            require(whole, "--scaling", mode, f"{size.devices} devices are no multiple of {smallest}")
            runs.append((mode, size, size.devices // smallest if mode == "weak" else 1))
    data_of = lambda devices: devices // (context * model)
    step = batch_step([(data_of(size.devices), times) for _, size, times in runs])
    batch = shared_flags.BATCH.value
    require(
        batch is None or batch % step == 0,
        "--batch",
        batch,
        "must be a multiple of every mesh's data size" + (f", so of {step}" if step > 1 else ""),
    )
    points = []
    for mode, size, times in runs:
        rows = ROWS_A_SHARD * data_of(sizes[-1].devices if mode == "strong" else smallest)
        rows = -(-rows // step) * step if batch is None else batch
        mesh = data_of(size.devices), context, model
        point = Point(mode, mesh, size.processes, size.topology, rows * times, times, 0)
        points += [dataclasses.replace(point, repeat=i) for i in range(sweep_flags.RUNS.value)]
    return points


def batch_step(runs: list[tuple[int, int]]) -> int:
    """The number that --batch must be a multiple of.

    Args:
      runs: (data, times) of each run, whose batch is `times` the flag's and is split over `data` shards.
    """
    return math.lcm(*(data // math.gcd(data, times) for data, times in runs))


def print_points(points: list[Point]) -> int:
    """What --dry_run prints of a sweep; returns the exit code."""
    for point in points:
        print(point)
    print(f"dry run: {len(points)} runs; nothing was started or written")
    return 0
