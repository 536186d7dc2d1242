"""Decoding with paged attention over a whole TPU pod, in JAX."""

import pathlib

_tree = pathlib.Path(__file__).resolve().parent.parent
if (_tree / "kernels" / "paged_attention").is_dir() and (_tree / "pyproject.toml").is_file():
    # A source tree: kernels/ and launch/ stand beside this folder, and `python -m paged_dist.launch.decode`
    # run from the tree's root finds this folder before any installed finder that knows where they are.
    __path__.append(str(_tree))

from paged_dist.attend import paged_attention_local, sharded_paged_attention  # noqa: E402
from paged_dist.cache import CacheSpec, PagedKVCache  # noqa: E402
from paged_dist.mesh import MeshAxes  # noqa: E402
from paged_dist.write import append_kv, append_kv_local, write_prefill_kv, write_prefill_kv_local  # noqa: E402

__all__ = [
    "CacheSpec",
    "MeshAxes",
    "PagedKVCache",
    "append_kv",
    "append_kv_local",
    "paged_attention_local",
    "sharded_paged_attention",
    "write_prefill_kv",
    "write_prefill_kv_local",
]
