"""Eight simulated CPU devices for every test, set before jax starts."""

import os

import pytest

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
# TPU interpret mode waits for all simulated devices at once, each of them and its callbacks on a thread of this pool:
# with 8 threads for 8 devices it hung now and then, on both jax versions.
os.environ["PJRT_NPROC"] = "32"


@pytest.fixture(scope="session", autouse=True)
def eight_devices():
    """JAX starts before a test runs that sets XLA_FLAGS, as a launcher does that is called in this process."""
    import jax

    assert jax.device_count() == 8
