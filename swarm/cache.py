"""The folder of converted models and remembered digests: where it is, who uses what, what may go.

    ROOT/models/KEY/         a safetensors directory made here, with entry.json; complete or not there at all.
                             Of codes of a model's blocks (node/backend/code_store.py): a file for each block, as they are made
    ROOT/models/KEY.partial/ being made by whoever holds the exclusive lock; left over if nobody does
    ROOT/models/KEY.lock     flock: exclusive while making or removing, shared while in use; its mtime is the last use
    ROOT/digests/            see `Sidecar`
    ROOT/runs/               see swarm/run_store.py

Models from the hub stay in the hub's own cache (`hf cache` lists them).
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from swarm.errors import UserError

ENTRY_FILE = "entry.json"
LOCK_POLL_S = 0.05
# Longer than any conversion takes: whoever holds the lock then is stopped, not busy.
LOCK_TIMEOUT_S = 1800.0
# A file changed this shortly before it was read may change again within one tick of the file system's clock.
SETTLED_AFTER_NS = 2_000_000_000


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """One converted model on this disk. last_used: seconds since the epoch."""

    name: str
    source: str
    bytes: int
    last_used: float
    path: Path
    in_use: bool = False


def cache_root(cache_dir: Path | None = None) -> Path:
    """The folder to use: the argument, else $SHARDSWARM_CACHE, else the platform's cache folder of this user."""
    if cache_dir is not None:
        return cache_dir.expanduser().absolute()
    if named := os.environ.get("SHARDSWARM_CACHE"):
        return Path(named).expanduser().absolute()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "shardswarm"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shardswarm"


class Lease:
    """A shared lock on a cache entry: while it is held the entry is not removed. Ends with the process at the latest."""

    def __init__(self, lock: IO[bytes]) -> None:
        self._lock = lock

    def release(self) -> None:
        self._lock.close()


def obtain(root: Path, key: str, make: Callable[[Path], tuple[str, str]]) -> tuple[Path, Lease]:
    """The entry `key`, made by `make(empty_folder) -> (name, source)` if it is not there, and a lease on it.

    Of several processes that want it at once, one makes it and the others wait. A failed `make` leaves nothing behind.
    """
    folder = root / "models" / key
    lock_path = folder.with_suffix(".lock")
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    try:
        lock_path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            if (folder / ENTRY_FILE).is_file():
                lock = _lock(lock_path, shared=True, deadline=deadline)
                if (folder / ENTRY_FILE).is_file():
                    os.utime(lock_path)
                    return folder, Lease(lock)
                lock.close()  # pruned in between
            try:
                # Not waited for: whoever made the entry keeps a shared lock on it for as long as it is in use.
                with _lock(lock_path, shared=False):
                    if not (folder / ENTRY_FILE).is_file():
                        _make_entry(folder, make)
            except BlockingIOError:
                _pause(lock_path, deadline)
    except OSError as error:
        raise disk_error(root, error) from error


def find(root: Path, key: str) -> tuple[Path, Lease] | None:
    """The entry `key` and a lease on it, if it is complete on this disk and nobody is removing it."""
    folder = root / "models" / key
    if not (folder / ENTRY_FILE).is_file():
        return None

    def refuse(_: Path) -> tuple[str, str]:
        raise FileNotFoundError(key)

    try:
        return obtain(root, key, refuse)
    except UserError:
        return None


def require_space(root: Path, needed_bytes: float, purpose: str) -> None:
    """Raise UserError if the disk of the cache has less than needed_bytes free."""
    root.mkdir(parents=True, exist_ok=True)
    free_bytes = shutil.disk_usage(root).free
    if free_bytes < needed_bytes:
        raise UserError(
            f"{purpose} needs {needed_bytes / 1e9:.1f} GB in {root} and {free_bytes / 1e9:.1f} GB are free: "
            "free some space, or set SHARDSWARM_CACHE to a folder on another disk"
        )


def list_cache(cache_dir: Path | None = None) -> list[CacheEntry]:
    """Every complete entry, the one used last first."""
    folder = cache_root(cache_dir) / "models"
    entries = [_read_entry(path.parent) for path in folder.glob(f"*/{ENTRY_FILE}")]
    return sorted((entry for entry in entries if entry), key=lambda entry: -entry.last_used)


def prune_cache(
    cache_dir: Path | None = None,
    *,
    names: Sequence[str] = (),
    unused_days: float | None = None,
    everything: bool = False,
) -> list[CacheEntry]:
    """Remove entries by name (or source, or folder name), or those unused for so many days, or all; return what went.

    Entries in use stay. Left-overs of conversions that died go with any call that removes by age or all.
    Raises UserError for a name that is not in the cache, or when no rule is given.
    """
    if not (names or unused_days is not None or everything):
        raise UserError("say what to remove: names of models, an age in days, or everything")
    root = cache_root(cache_dir)
    entries = list_cache(cache_dir)
    unknown = [name for name in names if not any(_is_called(entry, name) for entry in entries)]
    if unknown:
        known = ", ".join(sorted({entry.name for entry in entries})) or "nothing"
        raise UserError(f"{unknown[0]!r} is not in the cache {root}, which holds: {known}")
    oldest = time.time() - (unused_days if unused_days is not None else float("inf")) * 86_400
    doomed = [
        entry
        for entry in entries
        if everything or entry.last_used < oldest or any(_is_called(entry, name) for name in names)
    ]
    removed = [entry for entry in doomed if _remove(entry.path)]
    if everything or unused_days is not None:
        for leftover in (root / "models").glob("*.partial"):
            _remove(leftover.with_suffix(""))
        _prune_sidecars(root / "digests", time.time() if everything else oldest)
    return removed


class Sidecar:
    """Remembered digests of files, so that a second start does not read them all again.

    Each digest is kept with the path, size and mtime_ns of the files it was made of, and forgotten when one differs.
    """

    def __init__(self, root: Path, subject: str) -> None:
        self.path = root / "digests" / (hashlib.sha256(subject.encode()).hexdigest()[:32] + ".json")
        try:
            remembered = json.loads(self.path.read_bytes())
        except (OSError, ValueError):
            remembered = {}
        self._remembered: dict[str, Any] = remembered if isinstance(remembered, dict) else {}

    def get(self, key: str, files: Sequence[Path]) -> bytes | None:
        kept = self._remembered.get(key)
        try:
            if isinstance(kept, list) and kept[0] == _stamps(files):
                return bytes.fromhex(kept[1])
        except (OSError, ValueError, TypeError, IndexError):
            return None
        return None

    def put(self, digests: dict[str, tuple[Sequence[Path], bytes]]) -> None:
        """Remember them all with one write. A cache that cannot be written is no error: it is only slower."""
        try:
            now_ns = time.time_ns()
            for key, (files, digest) in digests.items():
                stamps = _stamps(files)
                if all(now_ns - stamp[2] > SETTLED_AFTER_NS for stamp in stamps):
                    self._remembered[key] = [stamps, digest.hex()]
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_suffix(f".{os.getpid()}.partial")
            partial.write_text(json.dumps(self._remembered))
            partial.replace(self.path)
        except OSError:
            return


def _make_entry(folder: Path, make: Callable[[Path], tuple[str, str]]) -> None:
    """Under the exclusive lock: nobody else can be writing the partial folder, so what is there is left over."""
    partial = folder.with_suffix(".partial")
    for stale in (partial, folder):
        if stale.exists():
            shutil.rmtree(stale)
    partial.mkdir()
    try:
        name, source = make(partial)
        (partial / ENTRY_FILE).write_text(json.dumps({"name": name, "source": source}))
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _lock(path: Path, *, shared: bool, deadline: float = 0.0) -> IO[bytes]:
    """An open, locked file. Taken by others: tried again until the deadline, or BlockingIOError at once without one."""
    while True:
        lock = open(path, "ab")  # noqa: SIM115
        try:
            fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            if path.exists() and os.fstat(lock.fileno()).st_ino == path.stat().st_ino:
                return lock  # else somebody removed the file between open and flock
            lock.close()
        except BlockingIOError:
            lock.close()
            if not deadline:
                raise
            _pause(path, deadline)
        except BaseException:
            lock.close()
            raise


def _pause(lock_path: Path, deadline: float) -> None:
    if time.monotonic() > deadline:
        raise UserError(f"another process has held {lock_path} for too long: end it, then try again")
    time.sleep(LOCK_POLL_S)


def _remove(folder: Path) -> bool:
    """Remove an entry or what is left of it, unless it is in use."""
    lock_path = folder.with_suffix(".lock")
    try:
        with _lock(lock_path, shared=False):
            (folder / ENTRY_FILE).unlink(missing_ok=True)
            for path in (folder, folder.with_suffix(".partial")):
                if path.exists():
                    shutil.rmtree(path)
            lock_path.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    except OSError as error:
        raise UserError(f"cannot remove {folder}: {error.strerror or error}") from error
    return True


def _read_entry(folder: Path) -> CacheEntry | None:
    try:
        described = json.loads((folder / ENTRY_FILE).read_bytes())
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        lock_path = folder.with_suffix(".lock")
        last_used = (lock_path if lock_path.exists() else folder).stat().st_mtime
        return CacheEntry(
            str(described["name"]), str(described["source"]), size, last_used, folder, _is_in_use(lock_path)
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_in_use(lock_path: Path) -> bool:
    if not lock_path.exists():
        return False
    try:
        _lock(lock_path, shared=False).close()
    except BlockingIOError:
        return True
    return False


def _is_called(entry: CacheEntry, name: str) -> bool:
    return name in (entry.name, entry.source, entry.path.name)


def _prune_sidecars(folder: Path, older_than: float) -> None:
    for path in folder.glob("*"):
        if path.stat().st_mtime <= older_than:
            path.unlink(missing_ok=True)


def _stamps(files: Sequence[Path]) -> list[list[Any]]:
    return [[str(path), (status := path.stat()).st_size, status.st_mtime_ns] for path in files]


def disk_error(root: Path, error: OSError) -> UserError:
    """What the user can do about an error of the disk that the cache is on."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"the disk of {root} is full: free some space, or set SHARDSWARM_CACHE to another folder")
    return UserError(
        f"cannot write the cache {root}: {error.strerror or error}; set SHARDSWARM_CACHE to a folder you can write"
    )
