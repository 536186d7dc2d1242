"""`Problem`: the static half of a paged-attention call, all that shapes and dtypes say."""

from __future__ import annotations

import dataclasses

from paged_dist.kernels.quantization import is_quantized


@dataclasses.dataclass(frozen=True)
class Problem:
    """The sizes and dtypes of a call; the letters are those of the arrays' shapes."""

    batch: int  # B
    num_q_heads: int  # Hq
    num_kv_heads: int  # Hkv
    head_dim: int  # D
    num_layers: int  # L
    num_pages: int  # N
    rows: int  # R, stored rows a page
    width: int  # W, stored lanes a row
    pages_per_sequence: int  # S
    query_dtype: str
    cache_dtype: str
    num_queries: int = 1  # Q, new tokens a sequence

    @property
    def is_quantized(self) -> bool:
        """Whether the pages are 8-bit, with scales."""
        return is_quantized(self.cache_dtype)

    @property
    def group(self) -> int:
        """G, query heads that share a kv head."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def rows_per_head(self) -> int:
        """Query rows that are multiplied by one kv head's K: a group's heads, of each of the new tokens."""
        return self.group * self.num_queries

    @property
    def tokens_per_row(self) -> int:
        """Tokens side by side in one stored row."""
        return self.width // self.head_dim

    @property
    def page_size(self) -> int:
        """P, tokens a page."""
        return self.rows * self.tokens_per_row

    def replace(self, **changes) -> Problem:
        """This problem with other values in some fields."""
        return dataclasses.replace(self, **changes)
