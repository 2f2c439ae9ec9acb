"""A private directory per process for sockets and scratch files.

Removed at a clean exit; what a killed process left is swept by the next start. A directory is alive as long as its owner holds the
lock on its `lock` file: the kernel drops it with the process, and pids that are reused cannot fool anybody.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from swarm.errors import UserError

# sockaddr_un holds 108 bytes, and p2pd's socket names take about 40 of them.
_LONGEST_ROOT = 60


def runtime_root() -> Path:
    """The folder that holds the private directories of all of this user's processes."""
    name = f"shardswarm-{os.getuid()}"
    candidate = Path(tempfile.gettempdir()) / name
    return candidate if len(str(candidate)) <= _LONGEST_ROOT else Path("/tmp") / name


@contextlib.contextmanager
def private_directory() -> Iterator[Path]:
    """A fresh directory, mode 0700, that lives as long as the context; sweeps those of dead owners first."""
    root = runtime_root()
    try:
        with _locked(root):
            sweep(root)
            directory = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=root))
            lock = (directory / "lock").open("w")
            fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:
        raise UserError(
            f"cannot make a private directory in {root}: {error.strerror}; set TMPDIR to a folder that works"
        ) from error
    try:
        yield directory
    finally:
        with contextlib.suppress(OSError), _locked(root):
            shutil.rmtree(directory, ignore_errors=True)
            root.rmdir()  # only the last process succeeds: the folder must be empty
        lock.close()


def sweep(root: Path) -> list[Path]:
    """Remove the directories below root whose owner is dead, and return them. The caller holds the root's lock."""
    swept = []
    for directory in root.iterdir():
        try:
            with (directory / "lock").open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue  # alive
        except FileNotFoundError:
            pass  # killed before it made its lock
        shutil.rmtree(directory, ignore_errors=True)
        swept.append(directory)
    return swept


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Hold the lock on root, which is made if need be; nobody makes, sweeps or removes directories meanwhile."""
    for _ in range(100):  # a leaving process may remove root between our mkdir and our lock
        root.mkdir(mode=0o700, exist_ok=True)
        if root.is_symlink() or root.stat().st_uid != os.getuid():
            raise UserError(f"{root} belongs to another user; remove it or set TMPDIR")
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                if root.exists() and os.fstat(descriptor).st_ino == root.stat().st_ino:
                    yield
                    return
            finally:
                os.close(descriptor)
    raise UserError(f"cannot lock {root}; remove it and try again")
