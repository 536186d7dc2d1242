"""Folders of saved caches, in the present format and in the one before."""

from __future__ import annotations

import json
import os

from paged_dist.transfer import files
from paged_dist.transfer import manifest as manifests


def as_format_1(folder) -> None:
    """Makes of a save what was written before format 2: manifest.json, and the files that it names beside it."""
    data, manifest = manifests.read_newest(os.fspath(folder))
    for name in os.listdir(data):
        os.rename(os.path.join(data, name), os.path.join(folder, name))
    os.rmdir(data)
    next(folder.glob("manifest-*")).unlink()
    text = json.dumps(manifest | {"format": "paged-dist cache 1"}, sort_keys=True)
    outer = {"digest": files.digest(text.encode()), "manifest": text}
    (folder / "manifest.json").write_text(json.dumps(outer))
