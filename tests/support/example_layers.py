"""The decoder layers of examples/, both behind one interface."""

from __future__ import annotations

import functools
import importlib.util
import pathlib
import sys

import jax
import pytest
from flax import nnx

EXAMPLES_FOLDER = pathlib.Path(__file__).parents[2] / "examples"


@functools.cache
def example_module(name: str):
    """The module of examples/, which is no package."""
    found = importlib.util.spec_from_file_location(name, EXAMPLES_FOLDER / f"{name}.py")
    sys.modules[name] = module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


class PlainJax:
    """What the tests need: `step(x, cache, positions, lengths, block_tables)`, and the weights under plain names."""

    module = example_module("plain_jax_layer")

    def __init__(self, config, mesh):
        self.weights = self.module.init_weights(config, mesh)
        self.step = functools.partial(self.module.decode_step, self.weights)

    @classmethod
    def abstract_step(cls, config, mesh):
        return cls.module.decode_step, (cls.module.abstract_weights(config, mesh),)


class FlaxNnx:
    module = example_module("flax_nnx_layer")

    def __init__(self, config, mesh):
        with jax.set_mesh(mesh):
            graph, params = nnx.split(self.module.stacked_layers(config))
        self.step = functools.partial(self.module.decode_step, graph, params)
        self.weights = {name: params[name]["scale"][...] for name in ("attention_norm", "mlp_norm")}
        self.weights |= {name: params[name]["kernel"][...] for name in ("wq", "wk", "wv", "wo")}
        self.weights |= {f"w_{name}": params[name]["kernel"][...] for name in ("gate", "up", "down")}

    @classmethod
    def abstract_step(cls, config, mesh):
        graph, params = nnx.get_abstract_model(lambda: cls.module.stacked_layers(config), mesh)
        return functools.partial(cls.module.decode_step, graph), (params,)


BOTH_EXAMPLES = pytest.mark.parametrize("layers", [PlainJax, FlaxNnx])
