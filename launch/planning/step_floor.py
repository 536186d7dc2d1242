"""The floor of a planned step: the least time that its bytes take over HBM and over the ICI links, projected."""

from __future__ import annotations

from jax.sharding import Mesh

from paged_dist.launch.common.chip_rates import Chip
from paged_dist.launch.planning.pod_settings import PodSettings
from paged_dist.launch.planning.sizing import Sizes


def floor_of(s: PodSettings, sizes: Sizes, mesh: Mesh, chip: Chip, collectives: list[dict], copies: list[dict]) -> dict:
    """The least time of a step: HBM and ICI one after the other, since a layer's merge waits for its attention.

    HBM, at peak bandwidth: live K and V (inside the window) and weights are read once; what the program copies besides
    is read and written. ICI: a ring sends over both directions of all the physical axes that the mesh axis runs over,
    at once; what stays between the cores of a chip costs nothing. Latency and DCN are not in it.
    """
    data, context, model = (mesh.shape[name] for name in ("data", "context", "model"))
    live = min(sizes.context_tokens, s.sliding_window or sizes.context_tokens)
    kv_bytes = sizes.batch // data * live * sizes.spec.bytes_per_token // (model * context)
    copied = 2 * sum(c["bytes"] * c["times"] for c in copies)
    hbm_s = (kv_bytes + sizes.weights_bytes + copied) / chip.device_hbm_bytes_per_s
    over_ici = [c for c in collectives if c["links"] == "ici" and c["torus_axes"]]
    sent = sum(c["bytes_sent"] for c in over_ici)
    ici_s = sum(c["bytes_sent"] / (2 * c["torus_axes"] * chip.link_bytes_per_s) for c in over_ici)
    return {
        "live_kv_bytes": kv_bytes,
        "copied_bytes": copied,
        "hbm_s": hbm_s,
        "ici_bytes_sent": sent,
        "ici_s": ici_s,
        "step_s": hbm_s + ici_s,
        "tokens_per_s": sizes.batch / (hbm_s + ici_s),
    }
