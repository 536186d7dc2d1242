"""Decoding with paged attention over a whole TPU pod, in JAX.

One decode step, in the order of the modules: `mesh` (which devices), `cache` (the page pools), `allocator` (which
pages), `copies` (what forks leave due), `write` (new keys and values), `attend` (attention over the pages). `move` and
`store` bring a cache elsewhere; `distributed` starts the hosts, `watchdog` sees that none is lost.
"""

import pathlib

_tree = pathlib.Path(__file__).resolve().parent.parent
if (_tree / "kernels" / "paged_attention").is_dir() and (_tree / "pyproject.toml").is_file():
    # A source tree: kernels/ and launch/ stand beside this folder, and `python -m paged_dist.launch.decode`
    # run from the tree's root finds this folder before any installed finder that knows where they are.
    __path__.append(str(_tree))

from paged_dist.allocator import OutOfPages, PageAllocator, PrefixMatch  # noqa: E402
from paged_dist.attend import paged_attention_local, sharded_paged_attention  # noqa: E402
from paged_dist.cache import CacheSpec, PagedKVCache  # noqa: E402
from paged_dist.copies import copy_pages, copy_pages_local  # noqa: E402
from paged_dist.describe import describe_mesh  # noqa: E402
from paged_dist.distributed import initialize_distributed  # noqa: E402
from paged_dist.kernels.quantization import calibrate_key_smoothing, dequantize_kv, quantize_kv  # noqa: E402
from paged_dist.mesh import MeshAxes, make_pod_mesh  # noqa: E402
from paged_dist.move import reshard, resize  # noqa: E402
from paged_dist.store import restore, save  # noqa: E402
from paged_dist.tables import check_block_tables  # noqa: E402
from paged_dist.watchdog import Disagreement, Watchdog  # noqa: E402
from paged_dist.write import append_kv, append_kv_local, write_prefill_kv, write_prefill_kv_local  # noqa: E402

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
