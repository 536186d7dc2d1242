"""One process of a pod that saves, restores or reshards (test_store_pods.py): FOLDER ADDRESS PROCESSES INDEX STEPS."""

import hashlib
import os
import signal
import sys

import numpy as np
from jax.experimental import multihost_utils
from live_pages import MOVED_SPECS, fill_live_pages
from pod_meshes import simulated_pod

import paged_dist as pd

folder, address, processes, index, steps = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
if processes > 1:
    pd.initialize_distributed(address, processes, index)
SAVED_SPEC = pd.CacheSpec(**dict(num_kv_heads=4, head_dim=128, num_pages=512) | MOVED_SPECS["int8"])


def tell(cache: pd.PagedKVCache, pages: pd.PageAllocator) -> None:
    """Prints a digest of every row's tokens, and of the smoothing."""
    h = hashlib.sha256(pages.lengths.tobytes())
    whole = lambda x: np.asarray(multihost_utils.process_allgather(x, tiled=True) if processes > 1 else x)
    for x in (*cache.to_pages(), cache.key_smoothing):
        x = whole(x)
        if x.shape == SAVED_SPEC.key_smoothing_shape:
            h.update(x.tobytes())
            continue
        for row in pages.block_tables:
            h.update(np.ascontiguousarray(np.moveaxis(x, 2, 0)[row[row >= 0]]).tobytes())
    print("TOLD", h.hexdigest(), flush=True)


for step in steps.split(","):
    if step == "restore":
        tell(*pd.restore(os.path.join(folder, "saved"), simulated_pod(4, 1, 2)))
        continue
    cache, pages = fill_live_pages(SAVED_SPEC, simulated_pod(2, 2, 2), 8, 4)
    if step == "save":
        pd.save(os.path.join(folder, "saved"), cache, pages)
        tell(cache, pages)
    elif step == "reshard":
        tell(*pd.reshard(cache, pages, simulated_pod(1, 4, 2), chunk_bytes=1 << 20))
    elif step.startswith("die"):
        pages.free(0)
        tell(cache, pages)
        died, left = map(int, step.split("-")[1:])
        if index == died:

            def killed(_):
                global left
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1

            os.fsync = killed
        try:
            pd.save(os.path.join(folder, "saved"), cache, pages, overwrite=True)
        finally:
            os._exit(1)  # JAX would wait for the other
    elif step == "fail":
        if index == 1:

            def full(_):
                raise OSError(28, "No space left on device")

            os.fsync = full
        try:
            pd.save(os.path.join(folder, "saved"), cache, pages)
        except OSError as e:
            print("TOLD", e, flush=True)
