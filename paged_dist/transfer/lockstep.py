"""All processes of a run in lockstep: one step after another, which fails on all of them where it fails on one."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np

StepResult = TypeVar("StepResult")


def is_first_process() -> bool:
    """Whether this is process 0, which does what is done once."""
    return jax.process_index() == 0


def shared_token(num_bytes: int) -> bytes:
    """Random bytes, the same on every process: those of process 0."""
    token = os.urandom(num_bytes)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        token = np.asarray(multihost_utils.process_allgather(np.frombuffer(token, np.uint8)))[0].tobytes()
    return token


def together(step: Callable[[], StepResult], otherwise: Callable[[], object] = lambda: None) -> StepResult:
    """`step()` on every process. Where it raised on any, all raise: none waits for another that gave up.

    Before they raise they call `otherwise()`. Where the processes cannot reach each other, no process calls it: one
    might think that all failed, and another that none did.
    """
    error: Exception | None = None
    made: list[StepResult] = []
    try:
        made.append(step())
    except Exception as e:
        error = e
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        failed = np.asarray(multihost_utils.process_allgather(np.bool_(error is not None))).ravel()
        if error is None and failed.any():
            who = ", ".join(map(str, np.flatnonzero(failed)))
            error = OSError(f"process {who} could not go on; what it was, it says itself")
    if error is not None:
        otherwise()
        raise error
    return made[0]
