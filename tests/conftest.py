"""Eight simulated CPU devices for every test, set before jax starts."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
# Pallas' TPU interpret mode on jax 0.10 waits for all simulated devices at once: as many threads as devices.
os.environ["PJRT_NPROC"] = "8"
