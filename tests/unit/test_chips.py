"""The table of chips agrees with what the installed jax knows of each generation."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice

from paged_dist._compat import tpu_info_of
from paged_dist.kernels import chips
from paged_dist.kernels.chips import CHIP_FACTS, ChipFacts, chip_facts, has_megacore
from paged_dist.kernels.target import TARGETS, Target

KINDS = {
    "v4": "TPU v4",
    "v5e": "TPU v5 lite",
    "v5p": "TPU v5",
    "v6e": "TPU v6 lite",
    "7x": "TPU7x",
    "8i": "TPU8i",
    "8t": "TPU8t",
}
CORES = {"v4": (1, 2), "v5p": (1, 2)}  # that a device of a generation can have; others one
BEYOND_0_10 = ("8t",)

device = lambda name, cores: SimpleNamespace(device_kind=KINDS[name], num_cores=cores)


@pytest.mark.parametrize(("name", "cores"), [(name, n) for name in KINDS for n in CORES.get(name, (1,))])
def test_the_table_says_what_jax_says(name, cores):
    info = tpu_info_of(name, cores)
    if info is None:
        assert name in BEYOND_0_10 and jax.__version_info__ < (0, 12)
        pytest.skip(f"jax {jax.__version__} has no figures of {name}")
    facts = chip_facts(device(name, cores))
    assert dataclasses.asdict(facts) == dict(
        name=str(info.chip_version),
        num_cores=cores,
        vmem_bytes=info.vmem_capacity_bytes,
        smem_bytes=info.smem_capacity_bytes,
        sublanes=info.num_sublanes,
        multiplies_int8=info.int8_ops_per_second > 0,
        multiplies_fp8=info.fp8_ops_per_second > 0,
        hbm_bytes=cores * info.hbm_capacity_bytes,
        hbm_bytes_per_s=cores * info.mem_bw_bytes_per_second,
    )


def test_every_generation_that_jax_knows_from_v4_on_is_in_the_table_or_has_no_such_pods():
    known = {str(version) for version in pltpu.ChipVersion}
    assert known - set(CHIP_FACTS) == {"v2", "v3", "v4i", "7"}
    assert set(CHIP_FACTS) - known <= set(BEYOND_0_10)


@pytest.mark.parametrize("name", KINDS)
def test_an_attached_chip_is_asked_and_tells_what_the_table_says(name, monkeypatch):
    cores = max(CORES.get(name, (1,)))
    info = tpu_info_of(name, cores)
    if info is None:
        pytest.skip(f"jax {jax.__version__} has no figures of {name}")
    asked = []
    jax.devices()  # starts the back end that the next lines hide
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(jax, "devices", lambda: [device(name, cores)])
    monkeypatch.setattr(pltpu, "get_tpu_info", lambda: asked.append(name) or info)
    assert chip_facts(device(name, cores)) == CHIP_FACTS[name] and asked == [name]
    other = next(n for n in KINDS if n != name)  # an absent chip, which a host with a TPU compiles for
    assert chip_facts(device(other, max(CORES.get(other, (1,))))) == CHIP_FACTS[other] and asked == [name]


def test_a_chip_that_is_attached_and_in_no_table_has_jax_s_facts(monkeypatch):
    new = SimpleNamespace(device_kind="TPU v99", num_cores=1)
    assert chip_facts(new) is None
    info = dataclasses.replace(tpu_info_of("v6e", 1), vmem_capacity_bytes=1)
    jax.devices()
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(jax, "devices", lambda: [new])
    monkeypatch.setattr(pltpu, "get_tpu_info", lambda: info)
    assert chip_facts(new).vmem_bytes == 1


def test_what_is_no_tpu_has_no_facts():
    assert chip_facts(None) is None and chip_facts(jax.devices("cpu")[0]) is None and not has_megacore(None)


@pytest.mark.parametrize(
    ("name", "cores", "target"),
    [
        ("v4", 2, Target(2, multiplies_fp8=False)),
        ("v4", 1, Target(1, multiplies_fp8=False)),
        ("v5e", 1, Target()),
        ("v5p", 2, Target(2)),
        ("v5p", 1, Target()),
        ("v6e", 1, Target()),
        ("7x", 1, Target(outruns_core=True)),
        ("8i", 1, Target(outruns_core=True)),
        ("8t", 1, Target(outruns_core=True)),
    ],
)
def test_the_kernel_s_decisions_follow_from_the_facts(name, cores, target):
    assert Target.of(device(name, cores)) == Target.of(AbstractDevice(KINDS[name], cores, platform="tpu")) == target
    assert target in TARGETS
    assert has_megacore(device(name, cores)) == (cores == 2)


def test_scalar_memory_is_counted_by_the_smallest_chip():
    assert all(facts.smem_bytes >= chips.SMEM_BYTES for facts in CHIP_FACTS.values())
    assert isinstance(CHIP_FACTS["v4"], ChipFacts)


@pytest.mark.parametrize("name", KINDS)
def test_fp8_pages_are_widened_where_the_compiler_does_not_take_them(name):
    """jax says which products a chip does natively; v4's compiler alone has no conversion of float8_e4m3fn."""
    info = tpu_info_of(name, max(CORES.get(name, (1,))))
    if info is not None and info.is_matmul_supported(jnp.bfloat16, jnp.float8_e4m3fn):
        assert Target.of(device(name, 1)).multiplies_fp8
