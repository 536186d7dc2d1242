"""How long a program takes on a device: from the device's own events in an XProf trace, or else by the wall clock."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence

import jax
from jax.profiler import ProfileData

_TPU_PLANE = re.compile(r"^/device:TPU:\d+$")
_NAME = re.compile(r"%?([\w.\-]+)")  # of an instruction, in the text of an event or of a compiled program
_KERNEL = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = .*custom_call_target=\"tpu_custom_call\"", re.M)


@dataclasses.dataclass(frozen=True)
class Times:
    """Microseconds of each run of a program, of the slowest device where several run it.

    Attributes:
      program: the whole program, everything in it counted.
      kernels: its Pallas kernels alone; empty where the clock cannot see them.
      clock: 'device trace' or 'wall clock'.
    """

    program: tuple[float, ...]
    kernels: tuple[float, ...]
    clock: str

    @property
    def median(self) -> float:
        """Median microseconds of the whole program."""
        return statistics.median(self.program)

    @property
    def kernels_median(self) -> float | None:
        """Median microseconds of the kernels alone."""
        return statistics.median(self.kernels) if self.kernels else None

    @property
    def spread(self) -> float:
        """Distance of the quartiles over the median; 0 of a single run."""
        if len(self.program) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.program, n=4, method="inclusive")
        return (high - low) / self.median


def time_program(
    program: Callable, state, *inputs, name: str, runs: int = 20, on_device: bool | None = None
) -> tuple[Times, object]:
    """Runs `state, output = program(state, *inputs)`, jitted under `name` with `state` donated, `runs` times.

    Args:
      program: a function of arrays; what it writes (page pools) travels in `state`, a pytree, () for none.
      name: what the program is called in the trace.
      runs: timed runs, after two that are not.
      on_device: read a trace; None: where the devices are TPUs.

    Returns:
      (times, the last output).
    """

    def named(state, *inputs):
        return program(state, *inputs)

    named.__name__ = named.__qualname__ = name
    leaf = next(x for x in jax.tree.leaves((state, inputs)) if isinstance(x, jax.Array))
    on_device = next(iter(leaf.devices())).platform == "tpu" if on_device is None else on_device
    compiled = jax.jit(named, donate_argnums=0).lower(state, *inputs).compile()
    output = None
    for _ in range(2):
        state, output = compiled(state, *inputs)
    jax.block_until_ready((state, output))
    if not on_device:
        seconds = []
        for _ in range(runs):
            begin = time.perf_counter()
            state, output = compiled(state, *inputs)
            jax.block_until_ready((state, output))
            seconds.append(time.perf_counter() - begin)
        return Times(tuple(1e6 * s for s in seconds), (), "wall clock"), output
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(runs):
                state, output = compiled(state, *inputs)
                jax.block_until_ready((state, output))
        (path,) = pathlib.Path(folder).rglob("*.xplane.pb")  # one a process
        profile = ProfileData.from_file(str(path))
    return read_times(profile, name, kernels_in(compiled.as_text())), output


def kernels_in(hlo: str) -> tuple[str, ...]:
    """Names of the Pallas kernels' instructions in the text of a compiled program."""
    return tuple(_KERNEL.findall(hlo))


def read_times(profile: ProfileData, program: str, kernels: Sequence[str]) -> Times:
    """The runs of the jitted function `program` in a trace of TPUs: of each run the slowest device's time.

    Args:
      profile: a trace, whose TPU planes have the lines 'XLA Modules' (an event a run of a program) and 'XLA Ops'.
      program: the function's name.
      kernels: names of the kernels' instructions, as in `kernels_in`.

    Raises:
      ValueError: the trace has no TPU, no run of the program, not as many on each device, or no event of a kernel;
        the error says what there is.
    """
    found = list(_device_runs(profile, program, frozenset(kernels)))
    if not found or not all(found):
        names = [plane.name for plane in profile.planes]
        raise ValueError(f"the trace has no run of jit_{program} on each TPU; its planes are {names}")
    if len({len(runs) for runs in found}) != 1:
        raise ValueError(
            f"jit_{program} ran {[len(runs) for runs in found]} times on the devices: not as often on each"
        )
    by_run = list(zip(*found, strict=True))
    alone = tuple(max(kernel for _, kernel in run) for run in by_run) if kernels else ()
    if kernels and not all(alone):
        raise ValueError(f"the trace has no event of the kernels {list(kernels)} in the runs of jit_{program}")
    return Times(tuple(max(whole for whole, _ in run) for run in by_run), alone, "device trace")


def _device_runs(profile: ProfileData, program: str, kernels: frozenset[str]) -> Iterator[list[tuple[float, float]]]:
    """For each TPU: (microseconds of the program, of its kernels) of each of its runs."""
    for plane in profile.planes:
        if not _TPU_PLANE.match(plane.name):
            continue
        lines = {line.name: list(line.events) for line in plane.lines}
        modules = [e for e in lines.get("XLA Modules", ()) if re.match(rf"jit_{re.escape(program)}\b", e.name)]
        ops = [e for e in lines.get("XLA Ops", ()) if (m := _NAME.match(e.name)) and m[1] in kernels]
        yield [
            (
                module.duration_ns / 1e3,
                sum(op.duration_ns for op in ops if module.start_ns <= op.start_ns < module.end_ns) / 1e3,
            )
            for module in modules
        ]
