"""The launchers' flags: in nobody's way where a launcher is imported, absl's where one runs."""

from __future__ import annotations

from types import SimpleNamespace

import flagsaver
import numpy as np
import pytest

from paged_dist.launch.common import chip_rates, flag_registry
from paged_dist.launch.serving import results


@pytest.mark.parametrize(
    ("kind", "told", "flag", "gib"),
    [
        ("NVIDIA H200", {"bytes_limit": 105 * 2**30}, None, 105),
        ("NVIDIA H200", None, None, 16),
        ("TPU v9", {"bytes_limit": 2**30}, None, 1),
        ("TPU v5p", {"bytes_limit": 2**30}, None, chip_rates.V5P.hbm_gib),
        ("TPU v5p", None, 20.0, 20),
    ],
)
def test_memory_of_a_chip_is_the_flag_s_or_the_table_s_or_the_device_s_own(kind, told, flag, gib):
    device = SimpleNamespace(device_kind=kind, process_index=0, platform="gpu", memory_stats=lambda: told)
    mesh = SimpleNamespace(devices=np.array([device]))
    flag_registry.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(hbm_gib=flag):
        assert results.chip_hbm_gib(mesh) == gib
