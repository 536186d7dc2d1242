"""A save whose calls of the operating system fail, one by one, or that is killed at one: a whole save is left."""

from __future__ import annotations

import builtins
import contextlib
import errno
import fcntl
import os
import shutil
import threading
import warnings

import numpy as np
import pytest
from context_cases import pod
from test_store import as_format_1

import paged_dist as pd
from paged_dist.transfer import device_io, files, lockstep, saved_pages
from paged_dist.transfer import manifest as manifests

SPEC = pd.CacheSpec(2, 128, 8, 64, "float32")
CALLS = ("open", "write", "fsync", "close", "mkdir", "unlink", "rmdir", "listdir", "scandir", "rename", "replace")


REAL_OPEN = os.open


class Killed(BaseException):
    """In place of SIGKILL: nothing that the dead process still calls has an effect."""


class Faults:
    """Stands in for `os` and `open` of the store: the calls of one `process` are counted, and number `at` goes wrong.

    `kind`: "fails" with `error`, a write after half of its bytes; "killed" there, a write after half of its bytes;
    "short": every write takes half of what it is given. Or a set of names: each of these calls fails, always.
    """

    def __init__(self, at: int = -1, kind: str | set = "fails", error: int = errno.ENOSPC, process: int | None = None):
        self.at, self.kind, self.error, self.process = at, kind, error, process
        self.calls, self.dead, self.known = 0, set(), threading.local()
        self.opened: set[int] = set()  # descriptors, which the kernel closes where a process is killed

    @property
    def here(self) -> int:
        return getattr(self.known, "process", 0)

    def install(self, patch) -> None:
        patch.setattr(os, "fsync", lambda _: None)  # no power fails here, and a disk takes its time
        for name in CALLS:
            patch.setattr(os, name, self.wrapped(name, getattr(os, name)))
        for module in (files, manifests, saved_pages, device_io):
            patch.setattr(module, "open", self.wrapped("open", builtins.open), raising=False)

    def wrapped(self, name, real):
        def call(*args, **kwargs):
            if not hasattr(self.known, "process"):
                return real(*args, **kwargs)  # of a thread that saves nothing
            if self.here in self.dead:
                raise Killed
            if self.kind == "short" and name == "write":
                return real(args[0], args[1][: -(-len(args[1]) // 2)])
            now = self.kind not in ("short", "killed", "fails") and self.fails_always(name, args)
            if self.process in (None, self.here):
                now, self.calls = now or (self.calls == self.at and self.kind != "short"), self.calls + 1
            if not now:
                done = real(*args, **kwargs)
                if real is REAL_OPEN:
                    self.opened.add(done)
                if name == "close":
                    self.opened.discard(args[0])
                return done
            if name == "write":
                real(args[0], args[1][: len(args[1]) // 2])
            if name == "close":
                real(*args)
                self.opened.discard(args[0])
            if self.kind == "killed":
                self.dead.add(self.here)
                raise Killed
            raise OSError(self.error, os.strerror(self.error))

        return call

    def fails_always(self, name, args) -> bool:
        """Whether `kind` has this call: by its name, or as 'fsync_folder' or 'unlink_manifest'."""
        if name == "fsync" and "fsync_folder" in self.kind:
            return os.path.isdir(f"/proc/self/fd/{args[0]}")
        if name == "unlink" and "unlink_manifest" in self.kind:
            return "manifest-" in os.fspath(args[0])
        return name in self.kind


class Pod:
    """Saves of one process or of two, these as threads; what comes off the devices is a number in every element."""

    def __init__(self, patch, processes: int = 1):
        mesh = pod(1, 2, 1)
        self.processes, self.patch = processes, patch
        self.cache, self.pages = pd.PagedKVCache.create(SPEC, mesh), pd.PageAllocator(SPEC, mesh, 2, 4)
        self.pages.allocate(0, 150)
        self.pages.allocate(1, 70)
        self.mesh, self.value, self.faults = mesh, 0.0, Faults()
        patch.setattr(device_io, "zeros_like_cache", lambda *_: None)
        patch.setattr(device_io, "copy_between", lambda *_, **__: None)
        patch.setattr(device_io, "host_parts", self.host_parts)
        patch.setattr(lockstep, "is_first_process", lambda: self.faults.here == 0)
        patch.setattr(device_io, "own_files", lambda *_: [saved_pages.FileKey(s, 0) for s in self.shards])
        patch.setattr(lockstep, "shared_token", lambda _: self.token)
        patch.setattr(lockstep, "together", self.together)

    @property
    def shards(self) -> range:
        return range(2) if self.processes == 1 else range(self.faults.here, self.faults.here + 1)

    def host_parts(self, _, saved, slots):
        for shard in self.shards:
            parts = [np.full((slots, *shape), self.value, dtype) for shape, dtype in saved.parts.values()]
            yield saved_pages.FileKey(shard, 0), parts

    def together(self, step, otherwise=lambda: None):
        """As `lockstep.together`; a process that died breaks the others' meeting."""
        error = made = None
        try:
            made = step()
        except Exception as e:
            error = e
        except BaseException:
            self.barrier.abort()
            raise
        self.errors[self.faults.here] = error
        self.barrier.wait(60)
        failed = [e for e in self.errors if e is not None]
        self.barrier.wait(60)
        if failed:
            otherwise()
            raise error or failed[0]
        return made

    def save(self, folder, value: float, faults: Faults | None = None, **options) -> BaseException | None:
        """What the save raised on process 0, or on the one that was to fail."""
        self.value, self.faults, self.token = value, faults or Faults(), os.urandom(8)
        self.barrier, self.errors = threading.Barrier(self.processes), [None] * self.processes
        raised = [None] * self.processes

        def one(process):
            self.faults.known.process = process
            try:
                pd.save(folder, self.cache, self.pages, **options)
            except BaseException as e:
                raised[process] = e

        threads = [threading.Thread(target=one, args=(i,)) for i in range(self.processes)]
        with self.patch.context() as patch, warnings.catch_warnings(record=True) as self.warnings:
            warnings.simplefilter("always")
            self.faults.install(patch)
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(120)
        for fd in self.faults.opened:
            os.close(fd)
        return raised[self.faults.process or 0]


def value_of(folder) -> float:
    """The number that every element of the save in `folder` has; all of its files and digests are checked."""
    data, manifest = manifests.read_newest(os.fspath(folder))
    spec = pd.CacheSpec(**manifest["spec"])
    saved = saved_pages.SavedPages(os.fspath(folder), data, spec, manifest["model"], manifest["page_shards"])
    saved.check_files(manifest["files"])
    pages = pd.PageAllocator.from_state(manifest["allocator"], spec).live_pages.tolist()
    found = set()
    for page in pages:
        shard = page // (spec.num_pages // saved.page_shards)
        key = saved_pages.FileKey(shard, 0)
        with open(saved.path(saved.name(key)), "rb") as file:
            for part in saved.read_record(file, key, page).values():
                found |= set(np.unique(part).tolist())
    assert len(pages) == 5 and len(found) == 1, found
    return found.pop()


def names(folder) -> list[str]:
    """What lies in a folder, tokens and numbers left out."""
    return sorted(name.partition("-")[0] for name in os.listdir(folder))


@pytest.mark.parametrize("kind", ["fails", "killed"])
@pytest.mark.parametrize(
    ("before", "processes", "process"),
    [
        *((before, 1, 0) for before in (None, 1, 2)),
        *((2, 2, process) for process in (0, 1)),
        *(pytest.param(before, 2, process, marks=pytest.mark.slow) for before in (None, 1) for process in (0, 1)),
    ],
)
def test_a_fault_at_any_call_leaves_the_old_save_or_the_new(tmp_path, monkeypatch, processes, process, kind, before):
    pods, folder, n, wrong = Pod(monkeypatch, processes), tmp_path / "saved", 0, 0
    old = tmp_path / "old"
    if before is not None:
        assert pods.save(old, 1.0) is None
        if before == 1:
            as_format_1(old)
    while True:
        if before is not None:
            shutil.copytree(old, folder)
        faults = Faults(n, kind, process=process)
        raised = pods.save(folder, 2.0, faults, overwrite=before is not None)
        if faults.calls <= n:
            break
        if before is not None:
            assert value_of(folder) in (1.0, 2.0)
        if raised is None:  # what failed was of no consequence but for what it should have removed
            assert value_of(folder) == 2.0
        elif before is None:
            with contextlib.suppress(ValueError):
                assert value_of(folder) == 2.0
        wrong += raised is not None
        if not (raised is None or isinstance(raised, Killed)):
            assert isinstance(raised, OSError), raised
            assert "No space left" in str(raised)
        # The next save goes through, with no more leave than the first had, and clears up.
        was_there = before is not None or any(map(_is_whole, folder.glob("manifest-*")))
        assert pods.save(folder, 3.0, overwrite=was_there) is None, n
        assert value_of(folder) == 3.0
        assert names(folder) == ["data", "manifest"], n
        shutil.rmtree(folder)
        n += 1
    assert raised is None and value_of(folder) == 2.0 and names(folder) == ["data", "manifest"]
    assert wrong >= 8


def _is_whole(path) -> bool:
    try:
        manifests.load_manifest(os.fspath(path.parent), path.name)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("before", [None, 1, 2], ids=["new", "over_format_1", "over_format_2"])
@pytest.mark.parametrize("error", [errno.EINVAL, errno.ENOTSUP, errno.EPERM, errno.EACCES, errno.EBADF, errno.ENOSYS])
def test_a_mount_that_renames_nothing_and_syncs_no_folder_is_saved_to(tmp_path, monkeypatch, before, error):
    pods, folder = Pod(monkeypatch), tmp_path / "saved"
    if before is not None:
        assert pods.save(folder, 1.0) is None
        if before == 1:
            as_format_1(folder)
    for value in (2.0, 3.0):
        faults = Faults(kind={"rename", "replace", "fsync_folder"}, error=error)
        assert pods.save(folder, value, faults, overwrite=True) is None
        assert value_of(folder) == value and names(folder) == ["data", "manifest"] and not pods.warnings


def test_a_mount_that_removes_nothing_keeps_the_old_save_beside_the_new(tmp_path, monkeypatch):
    pods, folder = Pod(monkeypatch), tmp_path / "saved"
    for value in (1.0, 2.0, 3.0):
        faults = Faults(kind={"unlink", "rmdir"}, error=errno.EPERM)
        assert pods.save(folder, value, faults, overwrite=value > 1) is None
        assert value_of(folder) == value
        said = [str(w.message) for w in pods.warnings]
        assert len(said) == value - 1 and all("saved; what manifest-" in text for text in said)
    assert pods.save(folder, 4.0, overwrite=True) is None and names(folder) == ["data", "manifest"]


def test_where_neither_writing_nor_removing_is_sure_nothing_that_may_be_valid_is_removed(tmp_path, monkeypatch):
    pods, folder, n = Pod(monkeypatch), tmp_path / "saved", 0
    assert pods.save(folder, 1.0) is None
    faults, seen = Faults(n, {"unlink_manifest"}), set()
    while faults.calls >= n:
        faults = Faults(n, {"unlink_manifest"})
        pods.save(folder, 2.0, faults, overwrite=True)
        seen.add(value_of(folder))
        assert pods.save(folder, 1.0, overwrite=True) is None and names(folder) == ["data", "manifest"]
        n += 1
    assert seen == {1.0, 2.0}


def test_writes_that_take_a_part_only_are_gone_on_with(tmp_path, monkeypatch):
    pods = Pod(monkeypatch, 2)
    assert pods.save(tmp_path / "saved", 5.0, Faults(kind="short")) is None
    assert value_of(tmp_path / "saved") == 5.0


def test_an_error_after_everything_was_written_says_what_is_there(tmp_path, monkeypatch):
    """The last sync of the folder fails: both saves are whole. The manifest's own: the old one is."""
    pods, folder = Pod(monkeypatch), tmp_path / "saved"
    assert pods.save(folder, 1.0) is None
    seen = set()
    for n in range(100):
        faults = Faults(n, error=errno.EIO)
        raised = pods.save(folder, 2.0, faults, overwrite=True)
        if faults.calls <= n:
            break
        if "the save is whole, and so is one before it" in str(raised):
            seen.add("synced")
            assert value_of(folder) == 2.0 and names(folder) == ["data", "data", "manifest", "manifest"]
        elif "the manifest could not be written" in str(raised):
            seen.add("written")
            assert "nothing of this save is left, one before it is as it was" in str(raised)
            assert value_of(folder) == 1.0 and names(folder) == ["data", "manifest"]
        assert pods.save(folder, 1.0, overwrite=True) is None
    assert seen == {"synced", "written"}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("times", [1, 2])
def test_a_link_and_a_file_are_refused_before_anything_is_written(tmp_path, monkeypatch, overwrite, times):
    pods = Pod(monkeypatch)
    real, link, dangling, file = (tmp_path / name for name in ("real", "link", "dangling", "file"))
    assert pods.save(real, 1.0) is None
    link.symlink_to(real)
    dangling.symlink_to(tmp_path / "nowhere")
    file.write_text("mine")
    there = sorted(tmp_path.rglob("*"))
    for _ in range(times):
        for path, says in (
            (link, f"link': is a symbolic link; name the folder itself, {real}"),
            (dangling, "dangling': is a symbolic link"),
            (file, "file': is a file; name a folder"),
        ):
            raised = pods.save(path, 2.0, overwrite=overwrite)
            assert isinstance(raised, ValueError) and says in str(raised)
    assert sorted(tmp_path.rglob("*")) == there and file.read_text() == "mine"
    assert value_of(real) == value_of(link) == 1.0


def test_another_save_to_a_folder_is_refused_while_one_is_under_way(tmp_path, monkeypatch):
    pods, folder = Pod(monkeypatch), tmp_path / "saved"
    assert pods.save(folder, 1.0) is None
    under_way = folder / ("data-" + "0" * 16)
    under_way.mkdir()
    fd = os.open(folder, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    for _ in range(2):
        assert "another save is being written to it" in str(pods.save(folder, 2.0, overwrite=True))
        assert under_way.is_dir() and value_of(folder) == 1.0 and names(folder) == ["data", "data", "manifest"]
    os.close(fd)
    assert pods.save(folder, 2.0, overwrite=True) is None
    assert value_of(folder) == 2.0 and names(folder) == ["data", "manifest"]


def test_an_empty_folder_is_saved_to_and_foreign_files_are_let_be(tmp_path, monkeypatch):
    pods, empty, foreign = Pod(monkeypatch), tmp_path / "empty", tmp_path / "foreign"
    empty.mkdir()
    assert pods.save(empty, 1.0) is None and value_of(empty) == 1.0
    foreign.mkdir()
    (foreign / "notes").write_text("mine")
    assert "exists; pass overwrite=True" in str(pods.save(foreign, 1.0))
    for value in (1.0, 2.0):
        assert pods.save(foreign, value, overwrite=True) is None
        assert value_of(foreign) == value and names(foreign) == ["data", "manifest", "notes"]
    assert (foreign / "notes").read_text() == "mine"
