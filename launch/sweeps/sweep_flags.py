"""The flags of a scaling sweep: its own, and those of the decode benchmark and of plans that it takes."""

from __future__ import annotations

from paged_dist._errors import bad_value, require
from paged_dist.launch import decode
from paged_dist.launch.common import flag_checks, shared_flags
from paged_dist.launch.common import flag_registry as flags
from paged_dist.launch.common.local_processes import MOST_DEVICES
from paged_dist.launch.common.slices import chip_of_topology
from paged_dist.launch.planning import plan_flags

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

_SET_BY_THE_SWEEP = ("data", "num_pages", "profile_dir")
_OF_PLANS = ("num_slices", "width", "mlp_width", "context_tokens")
for _flag in flags.FLAGS.get_key_flags_for_module(decode):
    if _flag.name not in _SET_BY_THE_SWEEP:
        flags.declare_key_flag(_flag.name)
for _name in _OF_PLANS:
    flags.declare_key_flag(_name)

# Flags of the whole sweep, and flags that differ between the processes of a run: no point's run is given them.
OF_THE_SWEEP = ("output", "dry_run", "plot", "runs", "scaling", "processes", "devices", "sizes", "plan")
OF_A_PROCESS = ("coordinator_address", "num_processes", "process_id", "coordinator_bind_address", "cpu_devices")
# A trace counts by its requests, wherever its file lies.
_NOT_THE_WORK = {*OF_THE_SWEEP, *OF_A_PROCESS, *shared_flags.TIMEOUTS, "trace", "trace_format"}
_MOST_RUNS = 1000


def flags_of_the_work() -> dict[str, object]:
    """Name and value of each flag that changes what a run does or measures."""
    found = {flag.name: flag.value for flag in flags.FLAGS.get_key_flags_for_module(__name__)}
    return {name: value for name, value in found.items() if name not in _NOT_THE_WORK}


def check_sweep_flags() -> None:
    """Raises ValueError for flags that are wrong, before anything is started."""
    for name in _SET_BY_THE_SWEEP:
        if flags.FLAGS[name].present:
            raise bad_value(f"--{name}", flags.FLAGS[name].value, "is no flag of this launcher", "the sweep sets it")
    others = _OF_PLANS if PLAN.value is None else ("implementation", "cpu_devices", "oracle_samples")
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


def sizes_of_sweep(flag: str, texts: list[str]) -> list[int]:
    """The numbers of a list flag, each once, ascending.

    Raises:
      ValueError: a text that is no whole number, or one below 1; an empty list.
    """
    require(len(texts) > 0, f"--{flag}", "", "must have at least one number")
    for text in texts:
        numbers = flag_checks.whole_numbers([text]) or [0]
        require(numbers[0] >= 1, f"--{flag}", text, "must be whole numbers, at least 1")
    return sorted(set(map(int, texts)))
