"""The set-up of a decode run: model, mesh, cache and page tables that the flags ask for, checked before JAX compiles.

`model_from_flags` needs no device; `prepare_run` needs the devices of the run.
"""

from __future__ import annotations

import dataclasses
import math
import zlib

import jax
from jax.sharding import Mesh

from paged_dist import CacheSpec, make_pod_mesh
from paged_dist._errors import require
from paged_dist.launch.common import flag_checks, provenance, shared_flags
from paged_dist.launch.serving.fits import check_memory
from paged_dist.launch.serving.programs import Model
from paged_dist.launch.serving.row_schedule import Pool
from paged_dist.launch.serving.workload import ROWS_A_SHARD, Request, pages_needed, whole_pool
from paged_dist.mesh.pod_mesh import devices_to_simulate


@dataclasses.dataclass(frozen=True)
class DecodeRun:
    """A run of the benchmark, checked: it can be compiled.

    Attributes:
      workload: what a report calls the requests.
      pages_per_sequence: columns of the block table.
    """

    model: Model
    mesh: Mesh
    spec: CacheSpec
    pool: Pool
    requests: list[Request]
    workload: str
    pages_per_sequence: int


def model_from_flags() -> Model:
    """The model that the flags describe, checked as far as that needs no devices.

    Raises:
      ValueError: a flag outside its rule.
    """
    dtype = flag_checks.kv_dtype(shared_flags.KV_DTYPE.value)
    flag_checks.at_least(
        1,
        layers=shared_flags.NUM_LAYERS.value,
        num_q_heads=shared_flags.NUM_Q_HEADS.value,
        num_kv_heads=shared_flags.NUM_KV_HEADS.value,
        head_dim=shared_flags.HEAD_DIM.value,
        page_size=shared_flags.PAGE_SIZE.value,
        batch=shared_flags.BATCH.value,
        num_pages=shared_flags.NUM_PAGES.value,
        pages_per_sequence=shared_flags.PAGES_PER_SEQUENCE.value,
        sliding_window=shared_flags.SLIDING_WINDOW.value,
        data=shared_flags.DATA.value,
        context=shared_flags.CONTEXT.value,
        model=shared_flags.MODEL.value,
    )
    flag_checks.check_sizes()
    flag_checks.check_head_counts()
    flag_checks.above_zero(soft_cap=shared_flags.SOFT_CAP.value)
    require(
        shared_flags.IMPLEMENTATION.value in (None, "pallas", "pallas_interpret", "xla"),
        "--implementation",
        shared_flags.IMPLEMENTATION.value,
        "must be pallas, pallas_interpret or xla",
    )
    return Model(
        shared_flags.NUM_LAYERS.value,
        shared_flags.NUM_Q_HEADS.value,
        shared_flags.NUM_KV_HEADS.value,
        shared_flags.HEAD_DIM.value,
        dtype,
        shared_flags.SOFT_CAP.value,
        shared_flags.SLIDING_WINDOW.value,
        shared_flags.SEED.value,
    )


def mesh_from_flags(num_kv_heads: int) -> Mesh:
    """The mesh over all devices of the run. Where no flag gives it, model divides the kv heads; data takes the rest."""
    data, context, model = shared_flags.DATA.value, shared_flags.CONTEXT.value or 1, shared_flags.MODEL.value
    if model is None:
        model = math.gcd(num_kv_heads, jax.device_count() // ((data or 1) * context)) or 1
    sizes = dict(data=data, context=context, model=model, num_kv_heads=num_kv_heads)
    devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
    try:
        return make_pod_mesh(**sizes, devices=devices)
    except ValueError as e:
        count = devices_to_simulate(devices, **sizes)
        if count is None:
            raise
        raise ValueError(f"{e}; or --cpu_devices={count}") from None


def prepare_run(
    model: Model, requests: list[Request], workload: str, mesh: Mesh | None = None, batch: int | None = None
) -> DecodeRun:
    """Sizes cache and block tables over the mesh, and checks that everything divides and every request fits.

    Args:
      mesh, batch: None takes what the flags say.

    Raises:
      ValueError, NotImplementedError: something does not divide, does not fit, or is not served.
    """
    page_size = shared_flags.PAGE_SIZE.value
    mesh = mesh_from_flags(model.num_kv_heads) if mesh is None else mesh
    data, context = mesh.shape["data"], mesh.shape["context"]
    batch = batch or shared_flags.BATCH.value or ROWS_A_SHARD * data
    flag_checks.at_most(max(flag_checks.MOST_ROWS, ROWS_A_SHARD * data), batch=batch)
    require(batch % data == 0, "--batch", batch, f"must be a multiple of the mesh's data size {data}")
    longest = max(requests, key=lambda r: r.tokens)
    columns = shared_flags.PAGES_PER_SEQUENCE.value or pages_needed(longest.tokens, page_size)
    require(
        columns * page_size >= longest.tokens,
        "--pages_per_sequence",
        columns,
        f"holds {columns * page_size} tokens, request {longest.id} has {longest.tokens}",
        f"give at least {pages_needed(longest.tokens, page_size)}",
    )
    shards = data * context
    pages = shared_flags.NUM_PAGES.value
    if pages is None:
        pages = Pool(batch, data, context, 0, page_size).pages_that_never_wait(requests)
        pages = whole_pool(pages, page_size, model.dtype, shards)
    spec = CacheSpec(model.num_kv_heads, model.head_dim, pages, page_size, model.dtype, model.num_layers)
    spec.check_mesh(mesh)
    pool = Pool(batch, data, context, pages // shards, page_size)
    given = shared_flags.NUM_PAGES.value is not None
    check_memory(spec, mesh, pool, requests, columns, num_pages_given=given)
    pool.check_fits(requests, model.dtype)
    return DecodeRun(model, mesh, spec, pool, requests, workload, columns)


def flags_to_agree_on(requests: list[Request]) -> dict[str, object]:
    """What all processes must have been started with: flags, requests and versions, by name."""
    return {
        **shared_flags.given_flags(whole_run=True),
        "the requests' digest": f"{zlib.crc32(repr(requests).encode()):08x}",
        **{f"the version of {name}": version for name, version in provenance.versions().items()},
    }


def setup_to_agree_on(run: DecodeRun) -> dict[str, object]:
    """What all processes must have made of their flags, by name. Where one differed, all would hang in a collective."""
    return {
        "the model": run.model,
        "the mesh": dict(run.mesh.shape),
        "the cache": run.spec,
        "the pool": run.pool,
        "pages_per_sequence": run.pages_per_sequence,
    }
