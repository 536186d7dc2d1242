"""`MultiPageAsyncCopyDescriptor`: the copy of several pages of one head from HBM to VMEM."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
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

    Example:
      A kernel that loads the two pages whose ids stand at 1 and 2 of its table.

      >>> from jax.experimental import pallas as pl
      >>> from jax.experimental.pallas import tpu as pltpu
      >>> def load(table, pages, out, buffer, sem):
      ...     copy = kernels.MultiPageAsyncCopyDescriptor(pages, buffer, sem, table, 1, 2, 0)
      ...     copy.start()
      ...     out[...] = copy.wait_and_get_loaded()
      >>> pages = jnp.broadcast_to(jnp.arange(4.0)[None, :, None, None], (1, 4, 8, 128))  # page n holds n
      >>> grid = pltpu.PrefetchScalarGridSpec(
      ...     num_scalar_prefetch=1, grid=(1,), in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
      ...     out_specs=pl.BlockSpec((16, 128)), scratch_shapes=[pltpu.VMEM((2, 8, 128), jnp.float32),
      ...     pltpu.SemaphoreType.DMA])
      >>> out = jax.ShapeDtypeStruct((16, 128), jnp.float32)
      >>> made = pl.pallas_call(load, grid_spec=grid, out_shape=out, interpret=True)(jnp.array([0, 3, 1]), pages)
      >>> made[::8, 0].tolist()
      [3.0, 1.0]
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
        """Starts the copies. An id outside the pool, which only a wrong table has, reads the pool's nearest page."""
        last = self._pages.shape[0] - 1
        self._for_each(lambda i: self._copy(i, jnp.clip(self._table[self._offset + i], 0, last)).start())

    def wait(self) -> None:
        """Waits for the copies."""

        # A wait only counts bytes, so any page of the pool stands for the source, and the buffer for all of them.
        def wait_for_all():
            pltpu.make_async_copy(self._buffer, self._buffer, self._sem).wait()

        self._for_each(lambda i: self._copy(i, 0).wait(), wait_for_all)

    def wait_and_get_loaded(self) -> jax.Array:
        """Waits for the copies. Returns the whole buffer as f32 [pages * P, D]."""
        self.wait()
        return self._buffer[...].astype(jnp.float32).reshape(-1, self._buffer.shape[-1])

    def _copy(self, i, page):
        return pltpu.make_async_copy(self._pages.at[page], self._buffer.at[i], self._sem)

    def _for_each(self, do, do_all=None) -> None:
        """`do(i)` for each page; a full buffer, the usual case, without a loop, or by `do_all()` where given."""
        size = self._buffer.shape[0]

        def unrolled(count):
            for i in range(count):
                do(i)

        full = do_all or functools.partial(unrolled, size)
        if isinstance(self._count, int | np.integer):
            full() if self._count == size else unrolled(self._count)
            return
        pl.when(self._count == size)(full)

        @pl.when(self._count < size)
        def _some():
            lax.fori_loop(0, self._count, lambda i, _: do(i), None)
