"""What --help prints of a program: its docstring, its flags in groups, the exit codes."""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Sequence

from paged_dist.launch.common import flag_registry as flags
from paged_dist.launch.common.shared_flags import TIMEOUTS

FLAG_GROUPS = {
    "Mesh": ("data", "context", "model", "model_parallelism", "topology", "num_slices"),
    "Model and cache": (
        *("layers", "num_q_heads", "num_kv_heads", "head_dim", "width", "kv_dtype", "soft_cap", "sliding_window"),
        *("mlp_width", "implementation", "batch", "page_size", "num_pages", "pages_per_sequence", "hbm_gib"),
    ),
    "Work": (
        *("trace", "trace_format", "lengths_trace", "num_requests", "repeat_requests", "length_scale"),
        *("max_context", "max_generated", "context_tokens", "seed", "oracle_samples"),
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


_HELP = frozenset(("-h", "-help", "--help", "-?"))


def asks_for_help(argv: Sequence[str]) -> bool:
    """Whether a command line asks for the help text; the program's name comes first in it."""
    return not _HELP.isdisjoint(argv[1:])


def help_text(module: str) -> str:
    """What --help prints of the program in `module`: at most 80 columns."""
    found = {f.name: f for f in flags.FLAGS.get_key_flags_for_module(module)}
    found |= {f.name: f for f in flags.FLAGS.get_flags_for_module(sys.argv[0])}  # of a module that is run as a script
    named = {name for names in FLAG_GROUPS.values() for name in names}
    groups = {"This launcher": [name for name in sorted(found) if name not in named], **FLAG_GROUPS}
    parts = [_in_80_columns(sys.modules[module].__doc__ or "")]
    for title, names in groups.items():
        lines = [_flag_line(found[name]) for name in names if name in found]
        if lines:
            parts.append("\n".join([f"{title}:", *lines]))
    return "\n\n".join([*parts, _fill(_EXIT_CODES)])


def _fill(text: str, first: str = "", rest: str = "") -> str:
    """`text` as one paragraph of at most 80 columns, its first line and the rest indented."""
    return textwrap.fill(text, 80, break_on_hyphens=False, initial_indent=first, subsequent_indent=rest)


def _in_80_columns(text: str) -> str:
    """`text` with its paragraphs filled; those that are indented, such as commands and lists, line by line."""
    paragraphs = []
    for paragraph in text.strip().split("\n\n"):
        lines = paragraph.splitlines()
        if any(line.startswith((" ", "- ")) for line in lines):
            filled = [_fill(line, rest="        " if line.startswith("    ") else "  ") for line in lines]
            paragraphs.append("\n".join(filled))
        else:
            paragraphs.append(_fill(paragraph))
    return "\n\n".join(paragraphs)


def _flag_line(flag: flags.Flag) -> str:
    """A flag, its help and its default, as an indented paragraph."""
    name = f"--[no]{flag.name}" if flag.boolean else f"--{flag.name}"
    default, text = flag.default_as_str, flag.help
    if flag.default is not None:  # a launcher's own, where the shared text has another
        text = re.sub(r"\s*\bDefault: .*", "", text, flags=re.DOTALL)
    said = f" (default: {default.strip(chr(39))})" if default is not None and not flag.boolean else ""
    return _fill(f"{name}: {text}{said}", "  ", "      ")
