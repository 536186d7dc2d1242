"""Settings of plan from a command line, and the advice that its errors give."""

import functools
import json
import re

import flagsaver
from jax.sharding import AbstractMesh

from paged_dist.launch import plan
from paged_dist.launch.common import flag_registry as flags
from paged_dist.launch.common.chip_rates import V5P
from paged_dist.launch.planning import sizing
from paged_dist.mesh.axes import AXIS_NAMES

# What is written, and what it means; or, in brackets, what is advised instead.
TOPOLOGIES = [
    ("v6e:1x1", "v6e:1x1"),
    ("v5e:1x1", "v5e:1x1"),
    ("tpu7x:1x1x1", "tpu7x:1x1x1"),
    ("v5p:12x24x24", "v5p:12x24x24"),
    ("tpu7x:4x4x64", "tpu7x:4x4x64"),
    ("v5p:4x4x560", "v5p:4x4x560"),
    ("tpu7x:16x24x24", "tpu7x:16x24x24"),
    ("v5p:28x16x20", "v5p:28x16x20"),  # axes in any order
    ("v5e:8x4", "v5e:8x4"),
    ("v5p-4x4x8", "v5p:4x4x8"),
    # Accelerator types: TensorCores of v4, v5p and tpu7x, chips of v5e and v6e. Shapes as on Google's pages.
    ("v6e-16", "v6e:4x4"),
    ("v6e-1", "v6e:1x1"),
    ("v5litepod-16", "v5e:4x4"),
    ("v5e-128", "v5e:8x16"),
    ("v5p-8", "v5p:2x2x1"),
    ("v5p-128", "v5p:4x4x4"),
    ("v5p-1536", "v5p:8x8x12"),
    ("v5p-3072", "v5p:8x12x16"),
    ("v5p-10368", "v5p:12x12x36"),
    ("v5p-13824", "v5p:12x24x24"),
    ("v4-32", "v4:2x2x4"),
    ("v4-1536", "v4:8x8x12"),
    ("tpu7x-2", "tpu7x:1x1x1"),
    ("tpu7x-256", "tpu7x:4x4x8"),
    # Nobody can book these, whatever libtpu compiles.
    ("v5p:16x20x32", ["v5p:16x20x28"]),
    ("v5p:8x8x7", ["v5p:8x8x8"]),
    ("v5p:3x3x3", ["v5p:4x4x4"]),
    ("v5p:3x4x4", ["v5p:4x4x4"]),
    ("v5p:1x1x1", ["v5p:2x2x1"]),
    ("v5p:1x2x2", ["v5p:2x2x1"]),  # the host's chips lie in the first two axes
    ("v5p:0x2x2", ["v5p:2x2x1"]),
    ("v5p:8x8", ["v5p:4x4x4"]),  # as many chips
    ("v6e:2x2x2", ["v6e:2x4"]),
    ("v5e:6x6", ["v5e:8x8"]),
    ("v5e:32x16", ["v5e:16x16"]),
    ("v5p-100", ["v5p-64", "v5p:2x4x4", "v5p-128", "v5p:4x4x4"]),
    ("v6e-512", ["v6e-256", "v6e:16x16"]),
    ("v5p-1", ["v5p-8"]),
    ("v7x:4x4x4", ["tpu7x"]),
    ("ironwood-8", ["tpu7x"]),
    ("v9:2x2", ["v4", "v5e"]),
    ("v5p", ["v5p:8x8x8", "v6e:16x16", "v5p-1024", "v6e-256"]),
    ("v5p:4x4x4x", ["v5p:8x8x8"]),
]


def plan_settings(*arguments, topology="v5p:4x4x4"):
    """The settings of a command line; the flags are as before afterwards."""
    with flagsaver.flagsaver():
        flags.FLAGS(["plan", f"--topology={topology}", *arguments])
        return plan.plan_settings()


def plan_sizes(s, shape=(4, 4, 4), chip=V5P):
    return sizing.sizes_of(s, AbstractMesh(shape, AXIS_NAMES), chip)


@functools.cache
def default_plan_settings():
    return plan_settings()


def advised_settings(error):
    """The settings that an error's advice changes."""
    found = re.findall(r"--(\w+)=([\d.]+)", str(error).partition("; ")[2])
    return {"num_layers" if name == "layers" else name: json.loads(value) for name, value in found}
