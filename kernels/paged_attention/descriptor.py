"""The copy of several pages of one head from HBM to VMEM."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import tpu as pltpu


class MultiPageAsyncCopyDescriptor:
    """An asynchronous copy of consecutive table entries' pages into a VMEM buffer, one DMA a page.

    After JAX's descriptor of the same name (jax.experimental.pallas.ops.tpu.paged_attention), without scales.

    Args:
      pages_hbm_ref: pages in HBM, [Hkv, N, P, D], or [N, P, D] with `head_index=None`.
      vmem_buffer: [pages, P, D] in the pages' dtype; page i of the copy lands in row i.
      sem: the DMA semaphore that counts the copies' bytes.
      block_tables: flat int32 page ids in SMEM.
      page_indices_start_offset: where in `block_tables` the first page's id stands.
      num_pages_to_load: pages to copy, at most the buffer's. An int, or a traced int32: ids behind it are then
        neither read nor fetched, and the rest of the buffer keeps what it held.
      head_index: the kv head, may be traced.
    """

    def __init__(
        self, pages_hbm_ref, vmem_buffer, sem, block_tables, page_indices_start_offset, num_pages_to_load, head_index
    ):
        self._pages = pages_hbm_ref if head_index is None else pages_hbm_ref.at[head_index]
        self._buffer = vmem_buffer
        self._sem = sem
        self._table = block_tables
        self._offset = page_indices_start_offset
        self._count = num_pages_to_load

    def start(self) -> None:
        """Starts the copies."""
        self._for_each(lambda i: self._copy(i, self._table[self._offset + i]).start())

    def wait_and_get_loaded(self) -> jax.Array:
        """Waits for the copies. Returns the whole buffer as f32 [pages * P, D]."""
        # A wait only counts bytes, so any page of the pool stands for the source.
        self._for_each(lambda i: self._copy(i, 0).wait())
        return self._buffer[...].astype(jnp.float32).reshape(-1, self._buffer.shape[-1])

    def _copy(self, i, page):
        return pltpu.make_async_copy(self._pages.at[page], self._buffer.at[i], self._sem)

    def _for_each(self, do) -> None:
        if isinstance(self._count, int | np.integer):
            for i in range(self._count):
                do(i)
        else:
            lax.fori_loop(0, self._count, lambda i, _: do(i), None)
