"""The decode launcher under JAX's strict settings."""

from __future__ import annotations

import os
import subprocess
import sys

DECODE = ("--cpu_devices=2", "--num_requests=2", "--length_scale=0.02", "--layers=1", "--context=2", "--model=1")


def decode_strictly(program: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"JAX_NUMPY_RANK_PROMOTION": "raise", "JAX_NUMPY_DTYPE_PROMOTION": "strict"}
    command = [sys.executable, "-P", "-c", program, *DECODE]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)


def test_the_decode_launcher_works():
    done = decode_strictly("from paged_dist.launch import decode; decode.cli()")
    assert done.returncode == 0, done.stderr
    assert "oracle" in done.stdout and "ok" in done.stdout


def test_an_error_that_jax_raises_is_no_flags_fault():
    program = """
import jax.numpy as jnp
from paged_dist.launch import decode
from paged_dist.launch.serving import engine
engine.prefill_chunks = lambda *_: lambda cache, chunks, tables: jnp.zeros((2, 3)) + jnp.zeros(3)
decode.cli()
"""
    done = decode_strictly(program)
    assert done.returncode == 1, done.stderr
    assert "Traceback" in done.stderr and "rank_promotion" in done.stderr
