"""What only a TPU can answer: `./run test_device`, on each host of a slice; `--rehearse` tries the tests on a CPU."""

import os
import pathlib

import pytest


def pytest_addoption(parser):
    parser.addoption(
        "--rehearse", action="store_true", help="on this host's CPU, at small shapes: tries the tests, measures nothing"
    )


def pytest_collection_modifyitems(items):
    here = pathlib.Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.device)


@pytest.fixture(scope="session")
def rehearsed(request) -> bool:
    """Whether the tests run on a CPU, at small shapes. Skips the test where neither a TPU nor --rehearse is there."""
    import jax

    import paged_dist as pd
    from paged_dist.mesh.topology import has_tpu_chips

    if request.config.getoption("--rehearse"):
        if "JAX_NUM_PROCESSES" in os.environ:  # as several hosts: each process runs the same tests
            numbers = (int(os.environ[name]) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
            pd.initialize_distributed(os.environ["JAX_COORDINATOR_ADDRESS"], *numbers)
        return True
    if not has_tpu_chips():
        pytest.skip("no TPU is attached to this host: no chip of Google's on its PCI bus (--rehearse runs on the CPU)")
    pd.initialize_distributed()
    if jax.default_backend() != "tpu":
        pytest.skip(f"JAX found {jax.default_backend()} and no TPU: is libtpu installed and the TPU free?")
    return False
