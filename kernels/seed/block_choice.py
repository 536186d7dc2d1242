"""How a seed kernel's launch is cut: sequences a launch, pages a block, what two cores share; and the checks of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from paged_dist._errors import require
from paged_dist.kernels.arithmetic import round_up
from paged_dist.kernels.attention.problem import Problem
from paged_dist.kernels.chips import MEGACORE_CORES, SMEM_LIMIT, has_megacore
from paged_dist.kernels.dispatch import Interpret
from paged_dist.kernels.target import target_device
from paged_dist.kernels.tiling import LANES, SUBLANES

MEGACORE_MODES = (None, "kv_head", "batch")

_BLOCK_VMEM = 15 << 20  # of the 16 MiB that Mosaic gives a kernel by default on the smallest chips
# Of the default block: half the core time a token of 1024 (v6e, projected), short beside long sequences.
_BLOCK_TOKENS = 2048
_BLOCK_BYTES = 10 << 20  # of vector memory, at most


def cores_of(megacore_mode: str | None) -> int:
    """The cores that a launch in this mode runs on."""
    return 1 if megacore_mode is None else MEGACORE_CORES


def check_megacore(problem: Problem, megacore_mode: str | None) -> None:
    """Raises ValueError for an unknown mode, or heads or sequences that two cores cannot share evenly."""
    require(megacore_mode in MEGACORE_MODES, "megacore_mode", megacore_mode, f"must be one of {MEGACORE_MODES}")
    for mode, name, count in (("kv_head", "kv heads", problem.num_kv_heads), ("batch", "sequences", problem.batch)):
        require(
            megacore_mode != mode or count % MEGACORE_CORES == 0,
            "megacore_mode",
            megacore_mode,
            f"needs an even number of {name}, not {count}",
            "None runs on one core",
        )


def check_megacore_target(megacore_mode: str | None, interpret: Interpret, *arrays: jax.Array) -> None:
    """Raises ValueError where a megacore program over `arrays` is for a TPU, real or simulated, without two cores."""
    if megacore_mode is None:
        return
    if isinstance(interpret, pltpu.InterpretParams):
        require(
            interpret.num_cores_or_threads == MEGACORE_CORES,
            "interpret",
            interpret,
            f"megacore_mode={megacore_mode!r} simulates {MEGACORE_CORES} cores",
            f"pass InterpretParams(num_cores_or_threads={MEGACORE_CORES})",
        )
        return
    device = target_device(*arrays)
    kind = getattr(device, "device_kind", "")
    if not kind.startswith("TPU"):
        return
    require(
        has_megacore(device),
        "megacore_mode",
        megacore_mode,
        f"the program is for a {kind!r} of one core a device; megacore exists on v4 and v5p only",
        "pass None",
    )


def launch_smem_bytes(batch: int, pages_per_sequence: int) -> int:
    """Scalar memory of one launch: lengths, flat table, layer and the two flags, each padded."""
    return sum(round_up(4 * n, 512) for n in (batch, batch * pages_per_sequence, 1, 1, 1))


def check_smem(problem: Problem, rows: int | None = None) -> None:
    """Raises ValueError where lengths and table, or `rows` rows of them, do not fit in one launch's scalar memory."""
    rows = problem.batch if rows is None else rows
    need, there = launch_smem_bytes(rows, problem.pages_per_sequence), SMEM_LIMIT
    what, works = (
        ("the table and context_lens need", "split the batch, or use larger pages")
        if rows == problem.batch
        else (f"{rows} of its rows need", "use larger pages")
    )
    require(
        need <= there,
        "block_tables.shape",
        (problem.batch, problem.pages_per_sequence),
        f"{what} {need} bytes of SMEM, of which there are {there}",
        works,
    )


def sequences_per_launch(problem: Problem, multiple: int) -> int:
    """The most sequences, a multiple of `multiple`, whose part of the table fits in one launch; 0 if none do."""
    rows = -(-problem.batch // multiple) * multiple
    while rows and launch_smem_bytes(rows, problem.pages_per_sequence) > SMEM_LIMIT:
        rows -= multiple
    return rows


def block_vmem_bytes(problem: Problem, pages_per_compute_block: int) -> int:
    """Vector memory of one launch: double buffers of K, V and the grid's blocks, and a block's f32 values."""
    p, size = problem, jnp.dtype(problem.cache_dtype).itemsize
    rows = p.tokens_per_row * p.group
    lanes = round_up(p.width, LANES)
    buffers = 4 * pages_per_compute_block * round_up(p.rows, SUBLANES * 4 // size) * lanes * size
    tokens = pages_per_compute_block * p.rows
    values = 2 * tokens * lanes * 4 + 3 * round_up(rows, SUBLANES) * round_up(tokens, LANES) * 4
    blocks = 2 * round_up(rows, 2 * SUBLANES) * (2 * lanes + 2 * LANES) * 4
    return buffers + values + blocks


def choose_pages_per_compute_block(problem: Problem) -> int:
    """Pages a block where the caller names none: about two thousand tokens, less where VMEM is short."""
    most = max(1, min(problem.pages_per_sequence, _BLOCK_TOKENS // problem.page_size))
    while most > 1 and block_vmem_bytes(problem, most) > _BLOCK_BYTES:
        most -= 1
    return most


def check_pages_per_compute_block(problem: Problem, pages: int) -> int:
    """`pages`, cut to the table's width. Raises ValueError for none, or more than VMEM holds."""
    whole = isinstance(pages, int | np.integer) and not isinstance(pages, bool)
    require(whole and pages >= 1, "pages_per_compute_block", pages, "must be None or a whole number, at least 1")
    pages = min(int(pages), problem.pages_per_sequence)
    need = block_vmem_bytes(problem, pages)
    require(
        block_vmem_bytes(problem, 1) <= _BLOCK_VMEM,
        "page_size",
        problem.page_size,
        f"a block of one page needs {block_vmem_bytes(problem, 1)} bytes of VMEM, of which there are {_BLOCK_VMEM}",
        "use smaller pages",
    )
    require(
        need <= _BLOCK_VMEM,
        "pages_per_compute_block",
        pages,
        f"needs {need} bytes of VMEM, of which there are {_BLOCK_VMEM}",
        f"{choose_pages_per_compute_block(problem)} is the default here",
    )
    return pages
