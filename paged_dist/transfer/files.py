"""Writing files so that they are on the disk, whole, when the call returns; their digests; locks."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os

# The errors of a mount that cannot sync, such as a bucket's, where a file is stored when it is closed.
_CANNOT_SYNC = frozenset((errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP))
_CANNOT_SYNC_FOLDERS = _CANNOT_SYNC | {errno.EACCES, errno.EPERM, errno.EBADF, errno.EISDIR}


def write_all(fd: int, data: bytes) -> None:
    """Writes all of `data`: one write may take a part only."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def sync(fd: int) -> None:
    """Waits until everything written to `fd` is on the disk, where its mount can tell."""
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno not in _CANNOT_SYNC:
            raise


def sync_folder(path: str) -> None:
    """Waits until the names in a folder are on the disk, where its mount can tell."""
    try:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as e:
        if e.errno not in _CANNOT_SYNC_FOLDERS:
            raise


def create(path: str) -> int:
    """Makes a file and returns a descriptor to write to it. Raises FileExistsError where it exists."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def write_file(path: str, data: bytes) -> None:
    """Makes a file that holds `data`; it is on the disk when this returns."""
    fd = create(path)
    try:
        write_all(fd, data)
        sync(fd)
    finally:
        os.close(fd)


def try_lock(fd: int) -> bool | None:
    """Locks a file or folder, against others that lock it too, until it is closed.

    Returns:
      True; False where another has the lock, None where the mount has no locks.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def digest(data: bytes) -> str:
    """blake2b of `data`, in hex: the digest that manifests and records have."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def digest_of_file(path: str) -> str:
    """`digest` of a file's content."""
    h = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            h.update(block)
    return h.hexdigest()
