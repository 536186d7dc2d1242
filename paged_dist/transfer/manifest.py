"""Which files of a folder are a saved cache: the manifest, written last, says so.

    FOLDER/data-5ad0c1f2a97b3e64/pages-00000-00000.bin ...      what a save writes, under a name that no other has
    FOLDER/manifest-000001-5ad0c1f2a97b3e64.json                the names, sizes and digests of that, and its own digest

The save of a folder is that of its newest whole manifest. Nothing is ever renamed: a mount of a bucket refuses to
rename a folder, and what it calls the renaming of a file is a copy. A manifest that was not written to its end does not
hold its own digest and counts for nothing. What older manifests name is removed once a newer one is on the disk.

In format 1 the manifest is manifest.json and the data lies beside it; it is read, and replaced, like any other.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import warnings

from paged_dist._errors import bad_value, require
from paged_dist.transfer.files import digest, sync_folder, try_lock, write_file

FORMAT = "paged-dist cache 2"
FORMAT_1 = "paged-dist cache 1"
_FORMAT_1_MANIFEST = "manifest.json"
_MANIFEST = re.compile(r"manifest-(\d{6,})-([0-9a-f]{16})\.json")
_DATA = re.compile(r"data-([0-9a-f]{16})")
TOKEN_BYTES = 8


class Unfinished(ValueError):
    """A manifest that was not written to its end, or is damaged so that it looks like one."""


def _order_of(name: str) -> int:
    """Which of a folder's manifests it is, in the order they were written; 0 in format 1, -1 for another file."""
    if name == _FORMAT_1_MANIFEST:
        return 0
    match = _MANIFEST.fullmatch(name)
    return int(match[1]) if match else -1


def _newest_first(folder: str) -> list[str]:
    """The names of the manifests in a folder, whole or not."""
    return sorted((name for name in os.listdir(folder) if _order_of(name) >= 0), key=_order_of, reverse=True)


def data_folder(folder: str, name: str) -> str:
    """Where the files lie that manifest `name` names."""
    match = _MANIFEST.fullmatch(name)
    return os.path.join(folder, f"data-{match[2]}") if match else folder


def load_manifest(folder: str, name: str) -> dict:
    """A manifest, checked by its own digest. Raises ValueError where it is damaged, Unfinished where it ends early."""
    try:
        with open(os.path.join(folder, name), "rb") as f:
            outer = json.loads(f.read())
        text, told = outer["manifest"], outer["digest"]
        whole = digest(text.encode()) == told
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        rule = f"{name} is damaged: it cannot be read ({type(e).__name__})"
        raise Unfinished(str(bad_value("folder", folder, rule))) from e
    require(whole, "folder", folder, f"{name} is damaged: it is not what was written")
    manifest = json.loads(text)
    known = manifest.get("format") == (FORMAT if _order_of(name) else FORMAT_1)
    require(known, "folder", folder, f"is of format {manifest.get('format')!r}, not {FORMAT!r}")
    return manifest


def read_newest(folder: str) -> tuple[str, dict]:
    """(where its files lie, the manifest) of the save in a folder.

    Raises:
      ValueError: no finished save there, or its manifest is damaged.
    """
    unfinished = None
    for name in _newest_first(folder) if os.path.isdir(folder) else ():
        try:
            return data_folder(folder, name), load_manifest(folder, name)
        except Unfinished as e:  # of a save that was interrupted: the one before counts
            unfinished = unfinished or e
    if unfinished is not None:
        raise unfinished
    before = os.path.join(folder + ".replaced", _FORMAT_1_MANIFEST)  # an interrupted save of format 1
    works = f"{folder}.replaced is the save before, rename it back" if os.path.isfile(before) else None
    raise bad_value("folder", folder, "holds no finished save: there is no manifest in it", works)


def check_place(folder: str, overwrite: bool) -> None:
    """Raises ValueError where a save cannot go to `folder`; writes nothing."""
    real = os.path.realpath(folder)
    require(not os.path.islink(folder), "folder", folder, "is a symbolic link", f"name the folder itself, {real}")
    if not os.path.lexists(folder):
        parent = os.path.dirname(folder)
        require(os.path.isdir(parent), "folder", folder, f"{parent} is not a folder that this process sees")
        return
    require(os.path.isdir(folder), "folder", folder, "is a file", "name a folder, or what does not exist yet")
    free = overwrite or all(_is_of_interrupted(folder, name) for name in os.listdir(folder))
    require(free, "folder", folder, "exists", "pass overwrite=True to replace it")


def _is_of_interrupted(folder: str, name: str) -> bool:
    """Whether a file or folder, where nothing but its like is there, is left over from a save that was interrupted."""
    if _DATA.fullmatch(name):
        return True
    if _order_of(name) < 1:
        return False
    try:
        load_manifest(folder, name)
    except Unfinished:
        return True
    except ValueError:
        pass
    return False


class NewSave:
    """A save that is being made. Each process of a run has one; process 0's does what is done once.

    Attributes:
      data: the folder to write its files into.
    """

    def __init__(self, folder: str, token: bytes):
        self._folder, self._token = folder, token.hex()
        self.data = os.path.join(folder, f"data-{self._token}")
        self._manifest: str | None = None  # the path of its manifest, once that is being written
        self._made = False  # whether this process has made the folder
        self._lock: int | None = None  # a descriptor of the folder
        self._may_be_valid = False  # whether a manifest names the files, as far as can be known

    def begin(self, is_first: bool) -> None:
        """Makes the folder for its files, and removes those of interrupted saves, which no manifest names.

        Every process makes it: a bucket's folder may be seen by others only when a file is in it.
        """
        with contextlib.suppress(FileExistsError):
            os.mkdir(self._folder)
            self._made = True
        if is_first:
            self._lock_folder()
            names = os.listdir(self._folder)
            named = {match[2] for name in names if (match := _MANIFEST.fullmatch(name))} | {self._token}
            for name in names:
                if (match := _DATA.fullmatch(name)) and match[1] not in named:
                    shutil.rmtree(os.path.join(self._folder, name), ignore_errors=True)
        with contextlib.suppress(FileExistsError):
            os.mkdir(self.data)

    def _lock_folder(self) -> None:
        """Raises ValueError where another save is under way: its files would be taken for left over."""
        with contextlib.suppress(OSError):  # a mount without locks: one at a time is the caller's duty then
            self._lock = os.open(self._folder, os.O_RDONLY | os.O_CLOEXEC)
        is_free = self._lock is None or try_lock(self._lock) is not False
        require(is_free, "folder", self._folder, "another save is being written to it", "wait for its end")

    def close(self) -> None:
        """Lets other saves to the folder begin."""
        if self._lock is not None:
            with contextlib.suppress(OSError):
                os.close(self._lock)

    def commit(self, manifest: dict) -> None:
        """Writes the manifest, from when on the save is valid; then removes what it replaces.

        Raises:
          OSError: says which saves are there.
        """
        for some in (self.data, self._folder, os.path.dirname(self._folder)):
            sync_folder(some)
        text = json.dumps({"format": FORMAT} | manifest, sort_keys=True)
        number = 1 + max(map(_order_of, _newest_first(self._folder)), default=0)
        name = f"manifest-{number:06d}-{self._token}.json"
        path = self._manifest = os.path.join(self._folder, name)
        try:
            write_file(path, json.dumps({"digest": digest(text.encode()), "manifest": text}).encode())
        except OSError as e:
            gone = self.withdraw()
            left = (
                "nothing of this save is left, one before it is as it was"
                if gone
                else f"its pages are in {self.data}; restore takes them if the manifest is whole, else the save before"
            )
            raise OSError(e.errno, f"{e.strerror}: the manifest could not be written; {left}", path) from e
        self._may_be_valid = True
        try:
            sync_folder(self._folder)
        except OSError as e:
            what = "the save is whole, and so is one before it, but a loss of power may undo it: could not be synced"
            raise OSError(e.errno, f"{e.strerror}: {what}", self._folder) from e
        for other in reversed(_newest_first(self._folder)):
            if _order_of(other) < number:
                self._remove(other)

    def withdraw(self) -> bool:
        """Removes what was written, unless a manifest has made it valid, or might have; whether it did."""
        if self._may_be_valid:
            return False
        if self._manifest is not None:
            try:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._manifest)
                sync_folder(self._folder)
            except OSError:
                self._may_be_valid = True
                return False
        shutil.rmtree(self.data, ignore_errors=True)
        if self._made:
            with contextlib.suppress(OSError):
                os.rmdir(self._folder)
        return True

    def _remove(self, name: str) -> None:
        """Removes the save of an older manifest, that last: until then it tells what is left to remove."""
        try:
            if _order_of(name):
                with contextlib.suppress(FileNotFoundError):
                    shutil.rmtree(data_folder(self._folder, name))
            else:
                for file in load_manifest(self._folder, name)["files"]:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(os.path.join(self._folder, os.path.basename(file)))
            os.unlink(os.path.join(self._folder, name))
        except (OSError, ValueError) as e:
            warnings.warn(f"{self._folder}: saved; what {name} names could not all be removed: {e}", stacklevel=6)
