"""Files that are on the disk, whole, when the call that writes them returns."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os

# What a mount says that cannot do it: a bucket's, say, whose files are stored as they are closed.
_CANNOT_SYNC = frozenset((errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP))
_CANNOT_SYNC_FOLDERS = _CANNOT_SYNC | {errno.EACCES, errno.EPERM, errno.EBADF, errno.EISDIR}


def write_all(fd: int, data: bytes) -> None:
    """Writes all of `data`: one write may take a part only."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def sync(fd: int) -> None:
    """What was written to `fd` is on the disk when this returns, where its mount can say so."""
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno not in _CANNOT_SYNC:
            raise


def sync_folder(path: str) -> None:
    """The names in a folder are on the disk when this returns, where its mount can say so."""
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
    """A descriptor of a new file, to write to; FileExistsError where there is one."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def write_file(path: str, data: bytes) -> None:
    """Makes a file of `data`."""
    fd = create(path)
    try:
        write_all(fd, data)
        sync(fd)
    finally:
        os.close(fd)


def try_lock(fd: int) -> bool | None:
    """Locks a file or folder until it is closed, against others that ask too: False where another has it, None where
    its mount has no locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def digest(data: bytes) -> str:
    """The digest of `data` that manifests hold."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def digest_of_file(path: str) -> str:
    """`digest` of what a file holds."""
    h = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            h.update(block)
    return h.hexdigest()
