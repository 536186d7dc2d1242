"""The flags that several programs have in common. A program takes all of them (`decode`), or some by name."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from paged_dist._errors import bad_value
from paged_dist.launch.common import flag_registry as flags

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


def names() -> list[str]:
    """Names of the flags of this module; most programs take some of them only."""
    return [flag.name for flag in flags.FLAGS.flags_by_module_dict()[__name__]]


def refuse_others(taken: Sequence[str], instead: Mapping[str, str] | None = None) -> None:
    """Raises ValueError where a flag of this module is given that a program does not take.

    Args:
      taken: names of the flags that it takes.
      instead: by name of a flag, what to say in place of "see --help".
    """
    for flag in flags.FLAGS.flags_by_module_dict()[__name__]:
        if flag.name not in taken and flag.present:
            hint = (instead or {}).get(flag.name, "see --help")
            raise bad_value(f"--{flag.name}", flag.value, "is no flag of this launcher", hint)


def given_flags(whole_run: bool = False) -> dict[str, object]:
    """The values of the flags that are set on the command line, by name as it is written there ('--batch').

    Args:
      whole_run: leaves out the flags that may differ between the processes of one run.
    """
    own = ("process_id", "coordinator_bind_address", "output", "profile_dir", "verbosity") if whole_run else ()
    return {
        f"--{flag.name}": flag.value
        for module, found in sorted(flags.FLAGS.flags_by_module_dict().items())
        if module.startswith("paged_dist.") or module == sys.argv[0]
        for flag in found
        if flag.present and flag.name not in own
    }
