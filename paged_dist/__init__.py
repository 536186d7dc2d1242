"""Decoding with paged attention over a whole TPU pod, in JAX.

The packages, in the order of a decode step: `mesh` (which devices), `cache` (the pools of pages), `pages` (which
sequence holds which page), `ops` (write new keys and values, attend over the pages). The ops run `kernels` on each
chip. Beside the step: `transfer` moves live pages to another pool, mesh or disk; `cluster` starts a pod's hosts and
notices when one is lost; `launch` holds the programs.
"""

from paged_dist.cache import CacheSpec, PagedKVCache
from paged_dist.cluster import Disagreement, Watchdog, initialize_distributed
from paged_dist.describe import describe_mesh
from paged_dist.kernels.quantization import calibrate_key_smoothing, dequantize_kv, quantize_kv
from paged_dist.mesh import MeshAxes, make_pod_mesh
from paged_dist.ops import (
    append_kv,
    append_kv_local,
    check_block_tables,
    copy_pages,
    copy_pages_local,
    paged_attention_local,
    sharded_paged_attention,
    write_prefill_kv,
    write_prefill_kv_local,
)
from paged_dist.pages import OutOfPages, PageAllocator, PrefixMatch
from paged_dist.transfer.checkpoint import restore, save
from paged_dist.transfer.reshard import reshard
from paged_dist.transfer.resize import resize

__version__ = "0.1.0"

__all__ = [
    "CacheSpec",
    "Disagreement",
    "MeshAxes",
    "OutOfPages",
    "PageAllocator",
    "PagedKVCache",
    "PrefixMatch",
    "Watchdog",
    "append_kv",
    "append_kv_local",
    "calibrate_key_smoothing",
    "check_block_tables",
    "copy_pages",
    "copy_pages_local",
    "dequantize_kv",
    "describe_mesh",
    "initialize_distributed",
    "make_pod_mesh",
    "paged_attention_local",
    "quantize_kv",
    "reshard",
    "resize",
    "restore",
    "save",
    "sharded_paged_attention",
    "write_prefill_kv",
    "write_prefill_kv_local",
]
