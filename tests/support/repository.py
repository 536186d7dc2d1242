"""Where the tree is that the tests stand in."""

import pathlib

TREE = pathlib.Path(__file__).resolve().parents[2]
