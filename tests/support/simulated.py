"""The Pallas kernels on the CPU: TPU interpret mode with race detection."""

from __future__ import annotations

from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu


def simulated(cores: int = 1, **options) -> pltpu.InterpretParams:
    """TPU interpret mode: DMAs that land when waited for, memory that starts as NaN, races detected."""
    return pltpu.InterpretParams(detect_races=True, num_cores_or_threads=cores, **options)


RACES = simulated()


def assert_no_races() -> None:
    """That the last simulated launch had its races looked for, and none was found (jax 0.12 raises at one)."""
    races = interpret_pallas_call.races
    assert races is not None and not races.races_found, "races_found"
