"""Which files of a folder are a saved cache: a save counts once its manifest, which is written last, is whole.

    FOLDER/data-5ad0c1f2a97b3e64/pages-00000-00000.bin ...      what a save writes, under a name that no other has
    FOLDER/manifest-000001-5ad0c1f2a97b3e64.json                the names, sizes and digests of that, and its own digest

The newest whole manifest in a folder is the save. A manifest that was not written to its end lacks its own digest and
counts for nothing. The files that older manifests name are removed once a newer one is on the disk. Nothing is ever
renamed: a mount of a bucket refuses to rename a folder, and renames a file by copying it.

In format 1 the manifest is manifest.json, and its files lie beside it. Such a save is read and replaced like any other.
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
    """The number of a manifest, which grows from save to save: 0 in format 1, -1 for a file that is no manifest."""
    if name == _FORMAT_1_MANIFEST:
        return 0
    match = _MANIFEST.fullmatch(name)
    return int(match[1]) if match else -1


def _newest_first(folder: str) -> list[str]:
    """The names of the manifests in a folder, whole or not, the newest first."""
    return sorted((name for name in os.listdir(folder) if _order_of(name) >= 0), key=_order_of, reverse=True)


def data_folder(folder: str, name: str) -> str:
    """The folder of the files that the manifest `name` names."""
    match = _MANIFEST.fullmatch(name)
    return os.path.join(folder, f"data-{match[2]}") if match else folder


def load_manifest(folder: str, name: str) -> dict:
    """What a manifest says, checked by its own digest.

    Raises:
      Unfinished: it ends early, or cannot be read.
      ValueError: it is damaged, or of another format.
    """
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
    """(the folder of its files, what its manifest says) of the save in a folder: that of the newest whole manifest.

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
    """Whether a file or folder is left over from an interrupted save, if the folder holds nothing but such."""
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
    """A save that is being made: begun, then committed or withdrawn. Each process of a run has one.

    Process 0's alone does what is done once: it removes what is left over, and commits.

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
        """Makes the folder for the save's files. The first process removes the files of interrupted saves.

        Those are what no manifest names. Every process makes the folder: in a bucket, others may see a folder only once
        a file is in it.
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
        """Raises ValueError where another save is under way: its files would be removed as left over."""
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
        """Writes the manifest, which makes the save valid, then removes the saves that it replaces.

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
        """Removes what was written, unless a manifest has made it valid or might have. Returns whether it did."""
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
        """Removes the save of an older manifest, and last the manifest: until then it names what is to be removed."""
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
