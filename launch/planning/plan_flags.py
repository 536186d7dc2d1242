"""The flags that describe an absent pod and the step to plan for it, and the settings that they make."""

from __future__ import annotations

from typing import Any

from paged_dist._errors import bad_value, require
from paged_dist.launch.common import flag_checks, shared_flags
from paged_dist.launch.common import flag_registry as flags
from paged_dist.launch.common.chip_rates import Chip
from paged_dist.launch.common.slices import bookable_slice
from paged_dist.launch.planning.pod_settings import PodSettings
from paged_dist.launch.serving import workload_flags

TOPOLOGY = flags.DEFINE_string(
    "topology",
    None,
    "The slice: v4:4x4x4, v5e:16x16, v5p:8x8x8, v6e:16x16, tpu7x:4x4x4, chips along each axis. Or its accelerator "
    "type: v4-128, v5litepod-256, v5p-1024, v6e-256, tpu7x-128, whose number counts the TensorCores of v4, v5p and "
    "tpu7x, two a chip, and the chips of v5e and v6e; of several shapes it is the one nearest a cube.",
)
NUM_SLICES = flags.DEFINE_integer("num_slices", 1, "So many slices of that shape; data alone runs between them.")
MODEL_PARALLELISM = flags.DEFINE_integer(
    "model_parallelism",
    None,
    "Devices to a sequence: model takes what divides the kv heads, context the rest. Default: model alone.",
)
WIDTH = flags.DEFINE_integer(
    "width",
    0,
    "Width of the model, to have the projections before and after attention in the step, split as in README's layer. "
    "0: no weights.",
)
MLP_WIDTH = flags.DEFINE_integer(
    "mlp_width", 0, "Hidden width of a gated MLP, three matrices, to have it in the step too; with --width. 0: none."
)


def pod_settings_from_flags(topology: str | None) -> PodSettings:
    """The settings that the flags name, of a slice of this name (None: --topology is missing).

    Raises:
      ValueError: a value outside its rule.
    """
    if topology is None:
        raise bad_value("--topology", None, "is missing", "name a slice, such as --topology=v5p:8x8x8")
    topology, chip = bookable_slice(topology)
    given = flags.FLAGS
    sizes = ("data", "context", "model", "layers", "num_q_heads", "num_kv_heads", "head_dim", "batch", "page_size")
    sizes += ("num_pages", "pages_per_sequence", "sliding_window", "model_parallelism", "num_slices", "context_tokens")
    flag_checks.at_least(1, **{name: given[name].value for name in sizes})
    flag_checks.at_least(0, width=WIDTH.value, mlp_width=MLP_WIDTH.value)
    hidden = MLP_WIDTH.value
    require(WIDTH.value > 0 or hidden == 0, "--mlp_width", hidden, "needs the model's width", "give --width too")
    flag_checks.check_head_counts()
    flag_checks.above_zero(soft_cap=shared_flags.SOFT_CAP.value)
    check_hbm_flag_of(chip)
    flag_checks.check_output(shared_flags.OUTPUT.value)
    requests, workload = workload_flags.requests_from_flags()
    tokens = shared_flags.CONTEXT_TOKENS.value
    if tokens is not None and not workload_flags.are_given():  # what was asked is counted, not what nobody asked
        requests, workload = [], ""
    same = ("data", "context", "model", "num_q_heads", "num_kv_heads", "head_dim", "soft_cap", "sliding_window")
    same += ("batch", "page_size", "num_pages", "pages_per_sequence")
    same += ("num_slices", "model_parallelism", "width", "mlp_width", "context_tokens", "hbm_gib")
    values: dict[str, Any] = {name: given[name].value for name in same}
    return PodSettings(
        **values,
        topology=topology,
        num_layers=shared_flags.NUM_LAYERS.value,
        dtype=flag_checks.kv_dtype(shared_flags.KV_DTYPE.value),
        requests=tuple(requests),
        workload=workload,
    )


def check_hbm_flag_of(chip: Chip) -> None:
    """Raises ValueError where --hbm_gib is no size of HBM, or more than a chip of this kind gives a program."""
    flag_checks.check_hbm_flag()
    value, most = shared_flags.HBM_GIB.value, chip.hbm_gib * chip.devices
    require(
        value is None or value <= most,
        "--hbm_gib",
        value,
        f"a {chip.name} chip gives a program {most:g} GiB",
        f"leave it out, or --hbm_gib={most:g} fits",
    )
