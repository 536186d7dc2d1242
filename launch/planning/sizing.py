"""Sizes that fit into a pod's HBM: the cache, the rows of a step, the weights; and what would fit, where they do not.

No device and no compiler is needed: everything follows from `PodSettings`, the sizes of a mesh, and a `Chip`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from jax.sharding import AbstractMesh, Mesh

from paged_dist import CacheSpec
from paged_dist._errors import bad_value
from paged_dist.launch.common.chip_rates import Chip
from paged_dist.launch.common.number_formats import gib
from paged_dist.launch.planning.pod_settings import PodSettings
from paged_dist.launch.planning.step_weights import weights_bytes
from paged_dist.launch.serving.workload import MOST_TOKENS, ROWS_A_SHARD, Request, pages_needed, whole_pool

KEPT = 0.02  # of HBM, for what the program needs beside cache and weights, where --num_pages does not say
_INT32 = 2**31 - 1  # the largest number of pages: their ids are int32


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of a plan on its pod: the cache, the rows, and what they take of a device's HBM."""

    spec: CacheSpec
    batch: int
    pages_per_sequence: int
    context_tokens: int  # live tokens of each row
    hbm_bytes: int  # of a device
    weights_bytes: int  # on a device


_FLAGS = {"num_layers": "layers"}  # where a setting's flag has another name


class Way(NamedTuple):
    """A change that may make settings fit: `field` set to the largest multiple of `step`, at most `most`, that fits."""

    field: str  # of PodSettings
    most: int
    step: int = 1
    beside: Mapping[str, int] = {}  # other settings to change with it

    def best(self, fits: Callable[[Mapping[str, int]], bool]) -> dict[str, int] | None:
        """The changes, found by bisection: where `fits` holds for a value, it is taken to hold for smaller ones."""
        changed = lambda n: {**self.beside, self.field: n * self.step}
        low, high = 0, self.most // self.step  # low fits, or is 0
        if high >= 1 and fits(changed(high)):
            return changed(high)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(changed(middle)) else (low, middle)
        return changed(low) if low else None


class Refused(NamedTuple):
    """Settings that do not fit: the parts of `_errors.bad_value`, and ways out; the first that works is advised."""

    argument: str
    value: int | float | str | None
    rule: str
    ways: tuple[Way, ...]
    otherwise: str | None = None  # what to say where none works

    def error(self, fits: Callable[[Mapping[str, int]], bool]) -> ValueError:
        """The error to raise. It advises a change that was tried with `fits`."""
        for way in self.ways:
            if found := way.best(fits):
                flags = " ".join(f"--{_FLAGS.get(name, name)}={value}" for name, value in found.items())
                return bad_value(
                    self.argument, self.value, self.rule, f"{flags} {'fits' if len(found) == 1 else 'fit'}"
                )
        return bad_value(self.argument, self.value, self.rule, self.otherwise)


def sizes_of(
    s: PodSettings,
    mesh: Mesh | AbstractMesh,
    chip: Chip,
    kept: int | None = None,
    fits: Callable[[Mapping[str, int]], bool] = lambda changes: True,
) -> Sizes:
    """Sizes the cache to the pod's HBM, or checks the one that was asked for against it.

    Args:
      mesh: only its sizes are read.
      kept: bytes of a device's HBM that cache and weights leave to the program; default 2%.
      fits: what else must hold of changed settings before they are advised.

    Raises:
      ValueError: what does not fit, by which limit, and the nearest that does.
    """
    found = fit(s, mesh, chip, kept)
    if isinstance(found, Refused):
        raise found.error(lambda changes: fits_with(s, mesh, chip, changes, kept) and fits(changes))
    return found


def fits_with(
    s: PodSettings, mesh: Mesh | AbstractMesh, chip: Chip, changes: Mapping[str, int], kept: int | None = None
) -> bool:
    """Whether the settings fit, with `changes` made to them."""
    try:
        return isinstance(fit(s.changed(changes), mesh, chip, kept), Sizes)
    except ValueError:
        return False


def fit(s: PodSettings, mesh: Mesh | AbstractMesh, chip: Chip, kept: int | None = None) -> Sizes | Refused:
    """The sizes of a plan, or why there are none. Arguments: as `sizes_of` has them.

    Raises:
      ValueError: heads that do not divide, or what no cache may be.
    """
    data, context, model = (mesh.shape[name] for name in ("data", "context", "model"))
    shards = data * context
    if s.num_q_heads % model:
        raise bad_value("--num_q_heads", s.num_q_heads, f"must be a multiple of model {model}")
    hbm = chip.device_hbm_bytes if s.hbm_gib is None else int(s.hbm_gib * 2**30) // chip.devices
    weight_bytes = weights_bytes(s, mesh)
    unit = whole_pool(1, s.page_size, s.dtype)
    cache = lambda pages: CacheSpec(s.num_kv_heads, s.head_dim, pages, s.page_size, s.dtype, s.num_layers)
    page_bytes = cache(unit).bytes_per_token * s.page_size // model  # on each device that holds it
    room = lambda size: min(max(size, 0) // page_bytes // unit, _INT32 // shards // unit) * unit * shards  # in pages

    longest, mean = _lengths(s.requests)
    columns = s.pages_per_sequence or pages_needed(max(longest, s.context_tokens or 0), s.page_size)
    tokens = s.context_tokens or mean
    step = math.lcm(s.batch_step, data // math.gcd(data, s.times))  # of --batch: data divides B
    batch = s.batch or ROWS_A_SHARD * data // s.times
    most = room(hbm - weight_bytes - (int(hbm * KEPT) if kept is None else kept))
    out = _ways_out(s, Way("batch", -(-batch // step) * step, step), tokens, most, unit * shards)
    over = model * context
    if s.mlp_width % over:
        up = -(-s.mlp_width // over) * over
        ways = Way("mlp_width", up), *(_beside(way, mlp_width=up) for way in out)
        return Refused("--mlp_width", s.mlp_width, f"must be a multiple of model x context = {over}", ways)
    if tokens > columns * s.page_size:
        rule = f"a row's {columns} pages hold {columns * s.page_size}"
        longer = Way("pages_per_sequence", pages_needed(tokens, s.page_size))
        ways = longer, Way("context_tokens", columns * s.page_size), *out
        return Refused("--context_tokens", tokens, rule, ways)
    if batch % step:
        of = f"the mesh's data size {data}" if s.times == 1 else f"{step}: {s.times} times it is split over data {data}"
        return Refused("--batch", batch, f"must be a multiple of {of}", out)
    if most == 0:
        argument, value = ("--width", s.width) if weight_bytes else ("--layers", s.num_layers)
        rule = f"{gib(weight_bytes)} of weights and the program leave" if weight_bytes else "the program leaves"
        rule += f" no room for a page of {s.num_layers} layers in the {gib(hbm)} of a device's HBM"
        ways = Way("num_layers", s.num_layers), *out
        return Refused(argument, value, rule, ways, "it wants more chips to a sequence: a larger --model or --context")
    pages = s.num_pages or most
    if pages % (unit * shards):
        rule = f"must be a multiple of the mesh's data x context size {data} x {context}"
        rule += f" with {unit} pages on each, whose scales fill whole tiles" if unit > 1 else ""
        nearest = Way("num_pages", _nearest(pages, unit * shards, most))
        return Refused("--num_pages", pages, rule, (nearest, *out))
    if pages > room(hbm - weight_bytes):
        rule = f"a cache of {gib(pages // shards * page_bytes)} a device"
        rule += f" and {gib(weight_bytes)} of weights" if weight_bytes else ""
        rule += f", where its HBM gives a program {gib(hbm)}"
        rule = f"page ids are int32, at most {_INT32}" if pages > _INT32 else rule
        return Refused("--num_pages", pages, rule, (Way("num_pages", most), *out))
    # An allocator begins each sequence on the context shard where the last one ended: all of a data shard's pages fill.
    a_row, there = pages_needed(tokens, s.page_size), pages // data
    if s.batch is None and s.times == 1:  # rows that nobody asked for are as many as there is room for
        batch = min(batch, max(there // a_row, 1) * data // s.times)
    rows = batch * s.times // data
    if rows * a_row > there:
        of = f"{rows} row{'s' * (rows > 1)} of {tokens} tokens"
        rule = f"{of} on a data shard take {rows * a_row} pages, it has {there}"
        return Refused("--batch", batch, rule, out, "give a larger slice")
    return Sizes(cache(pages), batch * s.times, columns, tokens, hbm, weight_bytes)


@functools.lru_cache(maxsize=4)
def _lengths(requests: tuple[Request, ...]) -> tuple[int, int]:
    """(tokens of the longest request, mean tokens of all when half of the answer is there); 0 without requests."""
    mean = sum(r.context + r.generated / 2 for r in requests) / max(len(requests), 1)
    return max((r.tokens for r in requests), default=0), round(mean)


def _ways_out(s: PodSettings, rows: Way, tokens: int, most: int, page_step: int) -> tuple[Way, ...]:
    """The changes to try where something does not fit, the smallest change first.

    `rows`: of --batch; `most`: the pages that fit, in steps of `page_step`.
    """
    few = {rows.field: rows.step}  # a row on each data shard
    shorter = Way("context_tokens", min(tokens, MOST_TOKENS), beside=few)
    fewer_layers = Way("num_layers", s.num_layers, beside=few)
    least = Way("num_layers", s.num_layers, beside={**few, "context_tokens": 1})
    out = rows, shorter, fewer_layers, least
    if s.num_pages is None:
        return out
    found = list(out)  # with the pages that were asked for, with as many as can be, with all that fit
    for pages in (_nearest(s.num_pages, page_step, most), most):
        found += [Way("num_pages", pages), *(_beside(way, num_pages=pages) for way in out)]
    return tuple(found)


def _nearest(pages: int, step: int, most: int) -> int:
    """The number of pages nearest to `pages` from above that is a multiple of `step`, and `most` at most."""
    return min(-(-pages // step) * step, most)


def _beside(way: Way, **changes: int) -> Way:
    """`way`, with `changes` of other settings made too."""
    return way._replace(beside={**changes, **way.beside})
