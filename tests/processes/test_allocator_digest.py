"""PageAllocator.digest: the same in another process, another after any other call."""

import os
import subprocess
import sys

from small_allocators import small_allocator

DIGEST_CALLS = """
from jax.sharding import AbstractMesh
from paged_dist.pages import PageAllocator
from paged_dist.cache import CacheSpec
a = PageAllocator(CacheSpec(1, 128, 16, 8), AbstractMesh((2, 1, 1), ("data", "context", "model")), 4, 4)
a.allocate(0, 17); a.allocate(3, 9); a.grow(0, 9); a.truncate(3, 2); a.allocate(1, 4); a.free(0)
print(a.digest())
"""


def test_digest_is_the_same_in_another_process_and_differs_after_any_differing_call():
    """PYTHONHASHSEED differs between the processes: an order that came from a set would show."""
    seen = {
        subprocess.run(
            [sys.executable, "-c", DIGEST_CALLS],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in "12"
    }
    assert len(seen) == 1
    digests = set()
    for last in (
        lambda a: None,
        lambda a: a.allocate(1, 0),
        lambda a: a.allocate(1, 1),
        lambda a: a.allocate(2, 1),
        lambda a: a.grow(0),
        lambda a: a.truncate(0, 4),
        lambda a: a.truncate(0, 0),
        lambda a: a.free(0),
    ):
        a = small_allocator(2)
        a.allocate(0, 5)
        last(a)
        digests.add(a.digest())
    assert len(digests) == 8
    assert (
        small_allocator(2).digest()
        != small_allocator(2, columns=5).digest()
        != small_allocator(2, page_size=16).digest()
    )
