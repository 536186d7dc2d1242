"""Sizes that fit, tried out: the kernel's launch takes them, and the program compiles for the pod with them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping

from jax.sharding import Mesh

from paged_dist._errors import BadValue, require
from paged_dist.launch.common.chip_rates import Chip
from paged_dist.launch.common.number_formats import gib
from paged_dist.launch.planning.pod_settings import PodSettings
from paged_dist.launch.planning.pod_step import CompiledStep, attention_launch, compile_step
from paged_dist.launch.planning.sizing import KEPT, Refused, Sizes, Way, sizes_of


def checked_sizes(
    s: PodSettings,
    mesh: Mesh,
    chip: Chip,
    kept: int | None = None,
    fits: Callable[[Mapping[str, int]], bool] | None = None,
) -> Sizes:
    """The sizes that `sizing.sizes_of` makes, with its arguments, where the attention kernel's launch takes them too.

    Raises:
      ValueError: what does not fit, with the nearest that does.
    """

    def holds(changes: Mapping[str, int]) -> bool:
        changed = s.changed(changes)
        try:
            attention_launch(changed, sizes_of(changed, mesh, chip, kept), mesh)
        except ValueError:
            return False
        return fits is None or fits(changes)

    sizes = sizes_of(s, mesh, chip, kept, holds)
    try:
        attention_launch(s, sizes, mesh)
    except ValueError as e:
        given = [name for name in ("context_tokens", "pages_per_sequence") if getattr(s, name)]
        if not given:  # the requests, or the shapes: no number of ours would help
            raise
        ways = tuple(Way(name, getattr(s, name)) for name in given)
        raise Refused(f"--{given[0]}", getattr(s, given[0]), str(e), ways).error(holds) from e
    return sizes


def compile_what_fits(
    s: PodSettings, mesh: Mesh, chip: Chip, fits: Callable[[Mapping[str, int]], bool] | None = None
) -> tuple[Sizes, CompiledStep]:
    """Compiles the step; where the program needs more room than `sizing` left it, with a smaller cache.

    `fits`: as in `sizing.sizes_of`.

    Raises:
      ValueError: --num_pages leaves the program too little room: names the most pages that compile.
      RuntimeError: the compiler refused the program for another reason.
    """
    sizes = checked_sizes(s, mesh, chip, None, fits)
    for _ in range(4):
        try:
            compiled = compile_step(s, sizes, mesh)
        except (BadValue, NotImplementedError):
            raise
        except Exception as e:
            text = " ".join(str(e).split())
            over = re.search(r"\(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)", text)
            if over is None:
                raise RuntimeError(f"the compiler refused the program: {text[:500]}") from e
            needs, has = (float(x) * 2**30 for x in over.groups())
            less = needs - has + KEPT * sizes.hbm_bytes
            kept = sizes.hbm_bytes - sizes.weights_bytes - sizes.spec.bytes_per_chip(mesh) + int(less)
            sizes = checked_sizes(dataclasses.replace(s, num_pages=None), mesh, chip, kept, fits)
            continue
        require(
            s.num_pages in (None, sizes.spec.num_pages),
            "--num_pages",
            s.num_pages,
            f"cache and step take more than the {gib(sizes.hbm_bytes)} that a device's HBM gives a program",
            f"--num_pages={sizes.spec.num_pages} fits",
        )
        return sizes, compiled
    raise RuntimeError("the compiler refused the program for want of HBM, with four sizes of the cache")
