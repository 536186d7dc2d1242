"""Checks of flag values that several programs make before anything is started; a ValueError names the flag."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

from paged_dist._errors import require
from paged_dist.launch.common import flag_registry as flags
from paged_dist.launch.common import host
from paged_dist.launch.common.number_formats import gigabytes
from paged_dist.launch.common.shared_flags import HBM_GIB, NUM_KV_HEADS, NUM_Q_HEADS, SEED

_DTYPE_BY_FLAG = {"bf16": "bfloat16", "f32": "float32", "int8": "int8", "fp8": "float8_e4m3fn"}


def kv_dtype(flag: str) -> str:
    """JAX's name of the dtype that --kv_dtype names, which may be that name itself.

    Raises:
      ValueError: any other name.
    """
    named = _DTYPE_BY_FLAG.get(flag, flag)
    require(named in _DTYPE_BY_FLAG.values(), "--kv_dtype", flag, "is no cache dtype", "use bf16, f32, int8 or fp8")
    return named


def check_seed() -> None:
    """Raises ValueError where --seed is no 32-bit number."""
    require(0 <= SEED.value < 2**32, "--seed", SEED.value, "must be at least 0 and below 2**32")


def at_least(smallest: int, **by_flag: int | float | None) -> None:
    """Raises ValueError where a flag's value is given and below `smallest`."""
    for name, value in by_flag.items():
        require(value is None or value >= smallest, f"--{name}", value, f"must be at least {smallest}")


def at_most(largest: int, **by_flag: int | None) -> None:
    """Raises ValueError where a flag's value is given and above `largest`, which is likelier a typo than meant."""
    for name, value in by_flag.items():
        require(value is None or value <= largest, f"--{name}", value, f"must be at most {largest}")


def above_zero(**by_flag: float | None) -> None:
    """Raises ValueError where a flag's value is given and not a positive finite number."""
    for name, value in by_flag.items():
        require(value is None or 0 < value < math.inf, f"--{name}", value, "must be above 0 and finite")


MOST_ROWS = 1 << 16  # decoded together
_LARGEST_SIZES = {
    **dict.fromkeys(("layers", "num_q_heads", "num_kv_heads", "head_dim", "page_size"), 1 << 16),
    **dict.fromkeys(("context_tokens", "sliding_window"), 2**31 - 1),  # lengths are int32
}


def check_sizes() -> None:
    """Raises ValueError where a flag's size is so large that the run would hang or fail deep inside."""
    for name, largest in _LARGEST_SIZES.items():
        at_most(largest, **{name: flags.FLAGS[name].value})


def check_head_counts() -> None:
    """Raises ValueError where the query heads are not the same number for each key/value head."""
    q, kv = NUM_Q_HEADS.value, NUM_KV_HEADS.value
    require(q % kv == 0, "--num_q_heads", q, f"must be a multiple of --num_kv_heads={kv}")


def whole_numbers(texts: Sequence[str]) -> list[int] | None:
    """The numbers of a list flag, in its order; None where one is no whole number, or where there are none."""
    return list(map(int, texts)) if texts and all(text.strip().isdecimal() for text in texts) else None


def check_host_memory(argument: str, value: object, need: int) -> None:
    """Raises ValueError where this host has less than `need` bytes of memory; `argument` is the likeliest cause."""
    have = host.memory_bytes()
    rule = f"takes {gigabytes(need)}, where this host has {gigabytes(have)}"
    require(need <= have, argument, value, rule, "give smaller sizes")


def check_hbm_flag() -> None:
    """Raises ValueError where --hbm_gib is no HBM of a chip."""
    gib = HBM_GIB.value
    require(gib is None or 0 < gib < 2**20, "--hbm_gib", gib, "must be above 0 and below 2**20")


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
    """Whether the file system of `folder` takes files; root may write in every folder, says os.access."""
    if folder.startswith(("/proc", "/sys")):  # the kernel's, which hold no files of ours
        return False
    return not os.statvfs(folder).f_flag & os.ST_RDONLY
