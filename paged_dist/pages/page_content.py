"""What a full page holds, as a hash: how one prompt's pages are found for the next prompt that begins alike."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

DIGEST_BYTES = 16


class PageContent(NamedTuple):
    """What a page holds: page `index` of every prompt whose first tokens hash to `digest`.

    Attributes:
      first: the context shard of the prompt's page 0. Page i is on context shard (first + i) mod C, so pages serve
        only prompts that begin on the same one.
      index: which page of the prompt.
      digest: of the namespace and all tokens up to this page's last; see `page_digests`.
      parent: the digest of the page before, b"" for page 0.
      namespace: what else decides the page's content: an adapter, an image, a version of the weights.
    """

    first: int
    index: int
    digest: bytes
    parent: bytes
    namespace: bytes = b""


def page_digests(token_ids: np.ndarray, page_size: int, namespace: bytes = b"") -> Iterator[bytes]:
    """The chained digest of each full page of a prompt: blake2b of the digest before and the page's tokens.

    Page 0 follows the digest of the namespace, or nothing where that is empty.
    """
    tokens, digest = np.ascontiguousarray(token_ids, "<i8"), b""
    if namespace:
        digest = hashlib.blake2b(namespace, digest_size=DIGEST_BYTES, person=b"namespace").digest()
    for start in range(0, len(tokens) // page_size * page_size, page_size):
        page = tokens[start : start + page_size].tobytes()
        digest = hashlib.blake2b(digest + page, digest_size=DIGEST_BYTES).digest()
        yield digest
