"""The decode launcher's step compiled for an absent pod, and the peaks of absent chips."""

from __future__ import annotations

import pytest
from aot import collectives, needs_libtpu

from paged_dist import CacheSpec, make_pod_mesh
from paged_dist.launch.common import provenance
from paged_dist.launch.common.chip_rates import chip_of
from paged_dist.launch.serving.engine import Engine
from paged_dist.launch.serving.programs import Model


@needs_libtpu
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_the_step_has_no_collective_on_a_pod_and_holds_no_second_pool(dtype):
    mesh = make_pod_mesh(topology="v5p:4x4x4", model=8)
    model = Model(4, 32, 8, 128, dtype)
    spec = CacheSpec(8, 128, 8 * 512, 128, dtype, 4)
    engine = Engine(model, spec, mesh, 64, 64)
    for lowered in engine.lowered:
        compiled = lowered.compile()
        assert collectives(compiled.as_text()) == []
        assert compiled.memory_analysis().temp_size_in_bytes < spec.bytes_per_chip(mesh) / spec.num_layers


@needs_libtpu
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_every_generation_s_own_device_kind_has_a_peak(topology):
    mesh = make_pod_mesh(topology=topology)
    (kind,) = provenance.device_counts(mesh)
    assert chip_of(kind).name == topology.split(":")[0].replace("tpu7x", "v7x")
