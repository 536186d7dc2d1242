"""The flags that the launchers share, and how one that is wrong ends a run: one line, exit code 2."""

from __future__ import annotations

import contextlib
import glob
import math
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

from absl import flags as absl_flags
from absl import logging

from paged_dist._errors import bad_value, require
from paged_dist.launch.common import flag_registry as flags
from paged_dist.launch.common.interrupt import INTERRUPTED
from paged_dist.launch.local_pod import MOST_DEVICES

DATA = flags.DEFINE_integer("data", None, "Mesh: shards of the batch. Default: what context and model leave.")
CONTEXT = flags.DEFINE_integer("context", None, "Mesh: shards of one sequence's pages.")
MODEL = flags.DEFINE_integer(
    "model", None, "Mesh: shards of the heads. Default: as many as divide both kv heads and devices."
)

NUM_LAYERS = flags.DEFINE_integer("layers", 2, "Layers of attention.")
NUM_Q_HEADS = flags.DEFINE_integer("num_q_heads", 16, "Query heads.")
NUM_KV_HEADS = flags.DEFINE_integer("num_kv_heads", 4, "Key/value heads.")
HEAD_DIM = flags.DEFINE_integer(
    "head_dim", 128, "Elements of a head. Pages store 64, or a multiple of 128, the rest zeros."
)
KV_DTYPE = flags.DEFINE_string(
    "kv_dtype", "bf16", "Cache: bf16, f32, int8 or fp8. Query and output are bf16, with an f32 cache f32."
)
SOFT_CAP = flags.DEFINE_float("soft_cap", None, "Soft cap on the logits. Default: none.")
SLIDING_WINDOW = flags.DEFINE_integer("sliding_window", None, "Attend to the last so many tokens. Default: all.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of everything that is drawn.")
IMPLEMENTATION = flags.DEFINE_string(
    "implementation", None, "pallas, pallas_interpret or xla. Default: pallas on TPU, xla elsewhere."
)

BATCH = flags.DEFINE_integer("batch", None, "Rows decoded together. Default: 16 a data shard.")
PAGE_SIZE = flags.DEFINE_integer("page_size", 128, "Tokens a page.")
NUM_PAGES = flags.DEFINE_integer(
    "num_pages", None, "Pages in a layer's pool, over all shards. Default: enough that no request waits for pages."
)
PAGES_PER_SEQUENCE = flags.DEFINE_integer(
    "pages_per_sequence", None, "Columns of the block table. Default: what the longest request needs."
)

CONTEXT_TOKENS = flags.DEFINE_integer(
    "context_tokens",
    None,
    "Live tokens of each sequence. Default: 4096, in a plan the requests' mean, half answered.",
)
HBM_GIB = flags.DEFINE_float(
    "hbm_gib",
    None,
    "HBM of a chip in GiB. Default: what a program gets on a TPU of this kind, elsewhere what the device tells, or 16.",
)

OUTPUT = flags.DEFINE_string("output", None, "File to which process 0 appends one JSON line with the results.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print what would run; compile, allocate and write nothing.")
PROFILE_DIR = flags.DEFINE_string("profile_dir", None, "Folder for a JAX profile of some steps.")

TIMEOUT_SECONDS = flags.DEFINE_float(
    "timeout_seconds",
    60.0,
    "Of several processes: how long one may be silent, or a step may take, before the run ends.",
)
START_TIMEOUT_SECONDS = flags.DEFINE_float(
    "start_timeout_seconds",
    None,
    "Of several processes: how long they wait for each other at the start. Default: as --timeout_seconds.",
)
PHASE_TIMEOUT_SECONDS = flags.DEFINE_float(
    "phase_timeout_seconds",
    3600.0,
    "Of several processes: how long what is no step, such as a compile, may take before the run ends.",
)
TIMEOUTS = ("start_timeout_seconds", "timeout_seconds", "phase_timeout_seconds")
CPU_DEVICES = flags.DEFINE_integer(
    "cpu_devices",
    None,
    "Run on so many simulated CPU devices (in each process, at most 1024). Default: 8 where the host has no "
    "accelerator and the run has one process.",
)
COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "host:port of process 0. Default: $JAX_COORDINATOR_ADDRESS, else JAX's own detection."
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes of the run. Default: $JAX_NUM_PROCESSES.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "This process, from 0. Default: $JAX_PROCESS_ID.")
BIND_ADDRESS = flags.DEFINE_string(
    "coordinator_bind_address", None, "host:port on which process 0 listens. Default: $JAX_COORDINATOR_BIND_ADDRESS."
)

_DTYPES = {"bf16": "bfloat16", "f32": "float32", "int8": "int8", "fp8": "float8_e4m3fn"}
_HELP = frozenset(("-h", "-help", "--help", "-?"))
_DEVICE_COUNT = "--xla_force_host_platform_device_count"


class UsageError(Exception):
    """Bad input found before anything was compiled or written: its text is the one line that the user sees."""


def cli(main: Callable[[Sequence[str]], int], name: str) -> NoReturn:
    """Parses the flags, runs `main` and exits with its result; bad flags and UsageError give exit code 2."""
    from absl import app  # here, for it defines flags

    def parse(argv):
        if _HELP.intersection(argv[1:]):  # absl looks for the flags of the console script, which has none, and exits 1
            print(help_text(main.__module__))
            sys.exit(0)
        try:
            rest = flags.parse(argv)
        except flags.Error as e:
            _end(name, str(e))
        program = absl_flags.FLAGS
        if program["verbosity"].using_default_value:
            program.verbosity = logging.WARNING  # what a run has to say it prints itself; --verbosity=0 says more
        return rest

    def run(argv):
        try:
            if len(argv) > 1:
                raise UsageError(f"{argv[1]!r}: is not a flag; every setting is a flag, see --help")
            code = main(argv)
        except UsageError as e:
            _end(name, str(e))
        except KeyboardInterrupt:
            with contextlib.suppress(OSError):
                print(f"{name}: interrupted", file=sys.stderr, flush=True)
            _leave(INTERRUPTED)
        except BaseException as e:
            if (code := getattr(e, "exit_code", None)) is not None:
                _end(name, str(e), code)
            if not _is_one_of_several() or isinstance(e, SystemExit):
                raise
            code = 1
            with contextlib.suppress(OSError):
                traceback.print_exc()
        if code:
            _leave(code)
        return 0

    app.run(run, flags_parser=parse)
    raise AssertionError("app.run does not return")


_GROUPS = {
    "Mesh": ("data", "context", "model", "model_parallelism", "topology", "num_slices"),
    "Model and cache": (
        *("layers", "num_q_heads", "num_kv_heads", "head_dim", "width", "kv_dtype", "soft_cap", "sliding_window"),
        *("mlp_width", "implementation", "batch", "page_size", "num_pages", "pages_per_sequence", "hbm_gib"),
    ),
    "Work": (
        *(
            "trace",
            "trace_format",
            "lengths_trace",
            "num_requests",
            "repeat_requests",
            "length_scale",
            "max_context",
            "max_generated",
        ),
        *("context_tokens", "seed", "oracle_samples"),
    ),
    "Output": ("output", "profile_dir", "plot", "dry_run"),
    "Several processes": (
        *("coordinator_address", "num_processes", "process_id", "coordinator_bind_address"),
        *(*TIMEOUTS, "cpu_devices"),
    ),
}
_EXIT_CODES = (
    "Exit codes: 0 done; 1 failed: a wrong output, a file that could not be written, an error, processes that did not "
    "come; 2 bad flags, nothing was started; 3 another process was lost, stuck or failed; 4 the processes disagree; 75 "
    "asked to stop (SIGTERM), a partial result is written and marked as such; 130 Ctrl-C, the same; 128 + n: signal n."
)


def help_text(module: str) -> str:
    """What --help prints of a launcher: its docstring, its flags in groups, exit codes; at most 80 columns."""
    found = {f.name: f for f in flags.FLAGS.get_key_flags_for_module(module)}
    found |= {f.name: f for f in flags.FLAGS.get_flags_for_module(sys.argv[0])}  # of a module that is run as a script
    named = {name for names in _GROUPS.values() for name in names}
    groups = {"This launcher": [name for name in sorted(found) if name not in named], **_GROUPS}
    parts = [_in_80_columns(sys.modules[module].__doc__ or "")]
    for title, names in groups.items():
        lines = [_flag_line(found[name]) for name in names if name in found]
        if lines:
            parts.append("\n".join([f"{title}:", *lines]))
    return "\n\n".join([*parts, _fill(_EXIT_CODES, 80)])


def _fill(text: str, width: int, **indents) -> str:
    return textwrap.fill(text, width, break_on_hyphens=False, **indents)


def _in_80_columns(text: str) -> str:
    """`text` with its paragraphs filled; those that are indented, such as commands and lists, line by line."""
    paragraphs = []
    for paragraph in text.strip().split("\n\n"):
        lines = paragraph.splitlines()
        if any(line.startswith((" ", "- ")) for line in lines):
            filled = [
                _fill(line, 80, subsequent_indent="        " if line.startswith("    ") else "  ") for line in lines
            ]
            paragraphs.append("\n".join(filled))
        else:
            paragraphs.append(_fill(paragraph, 80))
    return "\n\n".join(paragraphs)


def _flag_line(flag: flags.Flag) -> str:
    name = f"--[no]{flag.name}" if flag.boolean else f"--{flag.name}"
    default, text = flag.default_as_str, flag.help
    if flag.default is not None:  # a launcher's own, where the shared text has another
        text = re.sub(r"\s*\bDefault: .*", "", text, flags=re.DOTALL)
    said = f" (default: {default.strip(chr(39))})" if default is not None and not flag.boolean else ""
    return _fill(f"{name}: {text}{said}", 80, initial_indent="  ", subsequent_indent="      ")


def _end(name: str, message: str, code: int = 2) -> NoReturn:
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        print(f"{name}: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    _leave(code)


def _is_one_of_several() -> bool:
    distributed = sys.modules.get("paged_dist.cluster.startup")  # not loaded: nothing was started
    return distributed is not None and distributed.peers()[1] > 1


def _leave(code: int) -> NoReturn:
    """Ends this process. One of several that ends with an error does not wait for the others, as JAX's shut-down does:
    they may be what the error is about."""
    if not _is_one_of_several():
        sys.exit(code)
    try:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.modules["paged_dist.cluster.startup"].wait_for_others_to_end(2.0)
    finally:
        os._exit(code)


def kv_dtype(flag: str) -> str:
    """JAX's name of the dtype that --kv_dtype names, which may be that name itself.

    Raises:
      ValueError: any other name.
    """
    named = _DTYPES.get(flag, flag)
    require(named in _DTYPES.values(), "--kv_dtype", flag, "is no cache dtype", "use bf16, f32, int8 or fp8")
    return named


def check_seed() -> None:
    """Raises ValueError where --seed is no 32-bit number."""
    require(0 <= SEED.value < 2**32, "--seed", SEED.value, "must be at least 0 and below 2**32")


def at_least(smallest: int, **by_flag: int | float | None) -> None:
    """Raises ValueError where a flag's value is given and below `smallest`."""
    for name, value in by_flag.items():
        require(value is None or value >= smallest, f"--{name}", value, f"must be at least {smallest}")


def at_most(largest: int, **by_flag: int | None) -> None:
    """Raises ValueError where a flag's value is given and above `largest`: a typo is likelier than that it is meant."""
    for name, value in by_flag.items():
        require(value is None or value <= largest, f"--{name}", value, f"must be at most {largest}")


MOST_ROWS = 1 << 16  # decoded together
_LARGEST = {
    **dict.fromkeys(("layers", "num_q_heads", "num_kv_heads", "head_dim", "page_size"), 1 << 16),
    **dict.fromkeys(("context_tokens", "sliding_window"), 2**31 - 1),  # lengths are int32
}


def check_sizes() -> None:
    """Raises ValueError where a size is so large that the run would hang, or fail deep inside, before it is refused."""
    for name, largest in _LARGEST.items():
        at_most(largest, **{name: flags.FLAGS[name].value})


def host_bytes() -> int:
    """Bytes of memory that this host has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_host_memory(argument: str, value: object, need: int) -> None:
    """Raises ValueError where `need` bytes, of which `argument` is the likeliest cause, are over what this host has."""
    have = host_bytes()
    rule = f"takes {need / 1e9:.1f} GB, where this host has {have / 1e9:.1f} GB"
    require(need <= have, argument, value, rule, "give smaller sizes")


def check_hbm_gib() -> None:
    """Raises ValueError where --hbm_gib is no HBM of a chip."""
    gib = HBM_GIB.value
    require(gib is None or 0 < gib < 2**20, "--hbm_gib", gib, "must be above 0 and below 2**20")


def start_tpu_compiler() -> None:
    """Makes ready for compiles for absent TPUs, a TPU of this host being left alone; UsageError without libtpu."""
    from paged_dist.mesh.topology import has_libtpu

    if not has_libtpu():
        raise UsageError("libtpu, the TPU compiler, is not installed: pip install 'paged-dist[tpu]'")
    simulate_devices(1, many_processes=False)


def refuse_others(taken: Sequence[str], instead: Mapping[str, str] | None = None) -> None:
    """Raises ValueError where a flag of this module is given that is not among those that a launcher has `taken`.

    `instead` has what to say in place of "see --help" of some.
    """
    for flag in flags.FLAGS.flags_by_module_dict()[__name__]:
        if flag.name not in taken and flag.present:
            hint = (instead or {}).get(flag.name, "see --help")
            raise bad_value(f"--{flag.name}", flag.value, "is no flag of this launcher", hint)


def given_flags(whole_run: bool = False) -> dict[str, object]:
    """The launchers' flags that are set on the command line, by name as it is written there ('--batch').

    `whole_run` leaves out those that may differ between the processes of one run.
    """
    own = ("process_id", "coordinator_bind_address", "output", "profile_dir", "verbosity") if whole_run else ()
    return {
        f"--{flag.name}": flag.value
        for module, found in sorted(flags.FLAGS.flags_by_module_dict().items())
        if module.startswith("paged_dist.") or module == sys.argv[0]
        for flag in found
        if flag.present and flag.name not in own
    }


def check_output(path: str | None, flag: str = "output", folder: bool = False) -> None:
    """Raises ValueError unless the file (or folder) could be written; writes nothing, makes no folder."""
    if path is None:
        return
    require(path != "", f"--{flag}", path, "is empty", "name a file")
    target = os.path.abspath(path)
    if not folder:
        require(not os.path.isdir(target), f"--{flag}", path, "is a folder", "name a file in it")
        if os.path.exists(target):
            require(os.access(target, os.W_OK), f"--{flag}", path, "the file cannot be written")
        target = os.path.dirname(target)
    while not os.path.lexists(target):
        target = os.path.dirname(target)
    require(os.path.isdir(target), f"--{flag}", path, f"{target} is not a folder")
    require(
        os.access(target, os.W_OK | os.X_OK) and _writable_mount(target),
        f"--{flag}",
        path,
        f"folder {target} cannot be written",
        "name one that can",
    )


def _writable_mount(folder: str) -> bool:
    # For root every folder passes os.access but those of the kernel, which hold no files of ours.
    if folder.startswith(("/proc", "/sys")):
        return False
    return not os.statvfs(folder).f_flag & os.ST_RDONLY


def _environment_int(name: str) -> int | None:
    text = os.environ.get(name)
    if text is None:
        return None
    require(text.isdecimal(), f"${name}", text, "must be a whole number")
    return int(text)


def start_jax(name: str):
    """Starts JAX as the flags and the environment say: the other processes, then simulated devices.

    Call it once, before anything that looks at devices. Where the other processes do not come, it says so and ends
    this one with exit code 1.

    Returns:
      The `paged_dist.cluster.startup.DistributedInfo`.

    Raises:
      ValueError: --cpu_devices below 1 or above 1024, pallas_interpret in several processes, a time-out that is no
        positive number, or coordinator flags of which some are missing or wrong.
    """
    at_least(1, cpu_devices=CPU_DEVICES.value)
    at_most(MOST_DEVICES, cpu_devices=CPU_DEVICES.value)
    timeout, start_timeout = TIMEOUT_SECONDS.value, START_TIMEOUT_SECONDS.value
    for flag in (TIMEOUT_SECONDS, START_TIMEOUT_SECONDS, PHASE_TIMEOUT_SECONDS):
        timely = flag.value is None or 0 < flag.value < math.inf
        require(timely, f"--{flag.name}", flag.value, "must be above 0 and finite")
    place, told_by = (COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value), "flags"
    if place == (None, None, None) and "JAX_NUM_PROCESSES" in os.environ and "JAX_PROCESS_ID" in os.environ:
        told_by = "environment"
        place = (
            os.environ.get("JAX_COORDINATOR_ADDRESS"),
            _environment_int("JAX_NUM_PROCESSES"),
            _environment_int("JAX_PROCESS_ID"),
        )
    if place != (None, None, None):
        _keep_stdout_to_ourselves()
        _refuse_simulated_kernels(place[1])
    _choose_platform()

    from paged_dist import initialize_distributed

    try:
        info = initialize_distributed(
            *place,
            bind_address=BIND_ADDRESS.value,
            timeout_seconds=timeout if start_timeout is None else start_timeout,
            silence_timeout_seconds=timeout,
        )
    except RuntimeError as e:
        _end(name, str(e), 1)
    if info.num_processes > 1:
        if place == (None, None, None):
            _keep_stdout_to_ourselves()
            _refuse_simulated_kernels(info.num_processes)
        how = f"told by {told_by}" if info.how == "explicit" else f"detected: {info.how.partition(':')[2]}"
        print(
            f"{name}: process {info.process_id} of {info.num_processes} (pid {os.getpid()}), coordinator "
            f"{info.coordinator_address}, {how}",
            file=sys.stderr,
            flush=True,
        )
    if IMPLEMENTATION.value == "pallas_interpret":  # each simulated device waits on a thread of its own
        os.environ.setdefault("PJRT_NPROC", str(max(8, 2 * (CPU_DEVICES.value or 8))))
    simulate_devices(CPU_DEVICES.value, place != (None, None, None) or info.num_processes > 1)
    return info


def watchdog(name: str):
    """The `paged_dist.Watchdog` of this run, as the flags say; a context, entered after `start_jax`."""
    from paged_dist import Watchdog

    return Watchdog(
        TIMEOUT_SECONDS.value,
        name=name,
        start_timeout_seconds=START_TIMEOUT_SECONDS.value,
        phase_timeout_seconds=PHASE_TIMEOUT_SECONDS.value,
    )


def _refuse_simulated_kernels(num_processes: int | None) -> None:
    """The simulation waits for every device of the mesh at once: forever for those of another process."""
    interpreted = IMPLEMENTATION.value == "pallas_interpret"
    require(
        not interpreted or num_processes in (None, 1),
        "--implementation",
        "pallas_interpret",
        "runs in one process only",
        "use xla",
    )


def _keep_stdout_to_ourselves() -> None:
    """Python's stdout stays what it was; what native code writes to file descriptor 1 goes to stderr from now on.

    gloo reports each connection there, in pieces that fall into the middle of a table's lines.
    """
    sys.stdout.flush()
    ours = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(ours, "w", buffering=1, encoding=sys.stdout.encoding, errors=sys.stdout.errors)


def _choose_platform(count: int | None = None) -> None:
    """CPU devices where they are asked for, or where the host has no accelerator: an installed libtpu then does not
    look for a TPU that is not there."""
    count = CPU_DEVICES.value if count is None else count
    if count is not None:
        os.environ["JAX_PLATFORMS"] = "cpu"
    elif not _has_accelerator():
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def is_lone_cpu_host() -> bool:
    """Whether this is one process on a host without accelerators, as far as flags and environment say."""
    given = (COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value, CPU_DEVICES.value) != (None,) * 4
    from paged_dist._compat import detect_cluster

    if given or "JAX_NUM_PROCESSES" in os.environ or _has_accelerator():
        return False
    found = detect_cluster(1)
    return found is None or found[2] == 1


def _has_accelerator() -> bool:
    from paged_dist.mesh.topology import has_tpu_chips

    return has_tpu_chips() or any(glob.glob(p) for p in ("/dev/nvidia[0-9]*", "/dev/kfd"))


def simulate_devices(count: int | None, many_processes: bool) -> None:
    """Sets the environment for `count` simulated CPU devices (see --cpu_devices); JAX must not have started."""
    _choose_platform(count)
    if count is None and not many_processes:
        count = 8
        if _DEVICE_COUNT in os.environ.get("XLA_FLAGS", "") or "JAX_NUM_CPU_DEVICES" in os.environ:
            return
    if count is not None:
        others = re.sub(rf"{_DEVICE_COUNT}=\S*", "", os.environ.get("XLA_FLAGS", ""))
        os.environ["XLA_FLAGS"] = f"{others} {_DEVICE_COUNT}={count}".strip()
        os.environ.pop("JAX_NUM_CPU_DEVICES", None)  # it would win
    import jax

    if count is not None and jax.config.jax_num_cpu_devices != -1:
        jax.config.update("jax_num_cpu_devices", -1)  # `import jax` has read the environment's before

    # `import jax` reads JAX_PLATFORMS, and may have come before us.
    if os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
