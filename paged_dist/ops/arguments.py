"""The arguments that all ops take, and the checks of them: arrays, page tables, mesh axes, the implementation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractMesh, Mesh
from jax.typing import ArrayLike

from paged_dist._errors import require
from paged_dist.kernels.dispatch import Interpret
from paged_dist.mesh import MeshAxes

Implementation = str | pltpu.InterpretParams | None
_INTERPRET: dict[str | None, Interpret] = {None: None, "pallas": False, "pallas_interpret": True, "xla": "xla"}


def interpret_of(implementation: Implementation) -> Interpret:
    """The kernels' `interpret` for a sharded op's `implementation`; InterpretParams pass through (race detection).

    Raises:
      ValueError: no such implementation.
    """
    if isinstance(implementation, pltpu.InterpretParams):
        return implementation
    require(implementation in _INTERPRET, "implementation", implementation, f"must be one of {tuple(_INTERPRET)}")
    return _INTERPRET[implementation]


def as_arrays(*values: ArrayLike) -> tuple[jax.Array, ...]:
    """Each value as a jax array; lists too."""
    return tuple(jnp.asarray(x) for x in values)


def as_optional_arrays(*values: ArrayLike | None) -> tuple[jax.Array | None, ...]:
    """Each value as a jax array, lists too; None stays None."""
    return tuple(None if x is None else jnp.asarray(x) for x in values)


def check_axes(axes: MeshAxes) -> None:
    """Raises ValueError where `axes` is no MeshAxes."""
    require(
        isinstance(axes, MeshAxes), "axes", axes, "must be a MeshAxes", "MeshAxes(data=..., context=..., model=...)"
    )


def check_batch(batch: int, mesh: Mesh | AbstractMesh, axes: MeshAxes, argument: str) -> None:
    """Raises ValueError where `batch` rows do not divide over the data axis."""
    data = axes.size(mesh, "data")
    require(
        batch % data == 0,
        argument,
        batch,
        f"rows must be a multiple of the mesh's data size {data}",
        "pad the batch with empty rows (length 0): they cost nothing",
    )


def check_table_shape(block_tables: jax.Array, batch: int, of: str) -> None:
    """Raises ValueError unless `block_tables` is [batch, S], S >= 1: a row for each row of argument `of`."""
    require(
        block_tables.ndim == 2 and block_tables.shape[0] == batch and block_tables.shape[1] >= 1,
        "block_tables.shape",
        block_tables.shape,
        f"must be [{batch}, pages_per_sequence], one row for each of {of}'s and at least one column",
    )


def check_int32(**arrays: jax.Array | None) -> None:
    """Raises ValueError for the first of `arrays`, given by their argument's name, that is not int32; None passes."""
    for name, array in arrays.items():
        require(
            array is None or array.dtype == jnp.int32,
            f"{name}.dtype",
            str(getattr(array, "dtype", None)),
            "must be int32",
        )
