"""The ops of a decode step, each sharded over the mesh: append, prefill, attention, copies of pages, table checks."""

from paged_dist.ops.append import append_kv, append_kv_local
from paged_dist.ops.attention import paged_attention_local, sharded_paged_attention
from paged_dist.ops.collectives import attention_collectives
from paged_dist.ops.page_copies import copy_pages, copy_pages_local
from paged_dist.ops.prefill import write_prefill_kv, write_prefill_kv_local
from paged_dist.ops.table_check import check_block_tables

__all__ = [
    "append_kv",
    "append_kv_local",
    "attention_collectives",
    "check_block_tables",
    "copy_pages",
    "copy_pages_local",
    "paged_attention_local",
    "sharded_paged_attention",
    "write_prefill_kv",
    "write_prefill_kv_local",
]
