"""The settings of a plan: the absent pod, the model and its cache, and the requests to count."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from paged_dist.launch.serving.workload import Request


@dataclasses.dataclass(frozen=True)
class PodSettings:
    """What to plan. None: follows from the pod and the other settings."""

    topology: str
    num_slices: int
    data: int | None
    context: int | None
    model: int | None
    model_parallelism: int | None
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    soft_cap: float | None
    sliding_window: int | None
    width: int
    batch: int | None
    page_size: int
    num_pages: int | None
    pages_per_sequence: int | None
    context_tokens: int | None
    hbm_gib: float | None
    requests: tuple[Request, ...]  # to count, and to live as long as; none: sequences of context_tokens
    workload: str  # what to call them
    mlp_width: int = 0
    times: int = 1  # B is `batch` so many times: a weak point of a sweep
    batch_step: int = 1  # `batch` is a multiple of it: what divides over every mesh of a sweep

    def changed(self, changes: Mapping[str, Any]) -> PodSettings:
        """These settings with `changes`, by field."""
        return dataclasses.replace(self, **changes)
