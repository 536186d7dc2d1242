"""Decoding with paged attention over a whole TPU pod, in JAX."""

import pathlib

_tree = pathlib.Path(__file__).resolve().parent.parent
if (_tree / "kernels" / "paged_attention").is_dir() and (_tree / "pyproject.toml").is_file():
    # A source tree: kernels/ and launch/ stand beside this folder, and `python -m paged_dist.launch.decode`
    # run from the tree's root finds this folder before any installed finder that knows where they are.
    __path__.append(str(_tree))
