"""States of a run's stages on this disk: taken at certain epochs and at a clean exit, so that a node restarts from its own disk.

    FOLDER/stage3-epoch120-LINEAGE.state     one replica's weights and moments at one place; whole, or not there at all
    FOLDER/.stage3-XXXXXXXX.partial          being written by whoever holds a lock (flock) on it; left over if nobody does

Several members, of one stage or of several, may share the folder. A file, all numbers little-endian:

    24 bytes    "shardswarm saved state 1"
    32          run id
     4  4  4    stage; number of vectors, 3 or 4; bytes H of the next but one
    32          SHA-256 of the table of pieces
     H          StateHeader (protos/training.proto): place, commit, sizes, StageState.digest()
    32          SHA-256 of all of the above
    32 each     table of pieces: the SHA-256 of each 1 MiB of what follows; the last piece may be shorter
    4 S each    float32 vectors of S parameters: weights, first moments, second moments, and weights before the last step

Nothing in a file is believed before it is checked, and no size before it fits the file's; nothing is unpickled. The commit proves
that the history is one of this run, the digest that the bytes are those that were saved. That whoever saved them computed rightly
is not proven: whoever can write the folder can forge a state, as a replica can that is asked for one.

Replicas that are equal to the bit write files that are equal to the bit, so that pieces from several of them fit together.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import re
import shutil
import stat
import struct
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Literal

import torch
from google.protobuf.message import DecodeError

from protos import training_pb2
from swarm.cache import disk_error
from swarm.epoch.messages import LINEAGE_BYTES, Commit, Place
from swarm.errors import BadReply, UserError
from swarm.run_id import RUN_ID_BYTES
from swarm.training.parameters import StageParameters, StageState
from swarm.training.wire import (
    MAX_MESSAGE_BYTES,
    commit_from_wire,
    commit_to_wire,
    is_signed,
    place_from_wire,
    place_to_wire,
)

log = logging.getLogger(__name__)

PIECE_BYTES = 2**20
MAX_HEADER_BYTES = MAX_MESSAGE_BYTES  # of StateHeader: its commit came in a message
_MAGIC = b"shardswarm saved state 1"
_FIXED = struct.Struct("<24s32sIII32s")
_HASH_BYTES = 32
_NAME = re.compile(r"stage(0|[1-9][0-9]*)-epoch(0|[1-9][0-9]*)-([0-9a-f]{64})\.state")
_PARTIAL_NAME = re.compile(r"\.stage[0-9]+-\w+\.partial")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, slots=True)
class SavedAt:
    """A saved state, as its header describes it. The header is checked; what it says of the pieces and vectors is not yet."""

    place: Place
    commit: Commit | None = field(compare=False)  # the lineage says it all, and a loss that is NaN equals nothing
    """That led there; None at the start of the run."""
    digest: bytes
    """StageState.digest()."""
    num_parameters: int
    num_steps: int
    num_vectors: int
    table_digest: bytes
    """SHA-256 of the table of pieces. Who has it from somebody trusted can take the table, and then pieces, from anybody."""
    path: Path
    num_bytes: int
    """Of the file."""

    @property
    def payload_bytes(self) -> int:
        """Of all vectors together."""
        return 4 * self.num_vectors * self.num_parameters

    @property
    def num_pieces(self) -> int:
        return -(-self.payload_bytes // PIECE_BYTES)

    def piece_bytes(self, number: int) -> int:
        """Of one piece: PIECE_BYTES, but for the last."""
        return min(PIECE_BYTES, self.payload_bytes - PIECE_BYTES * number)


@dataclass(frozen=True, slots=True)
class SavedHead:
    """What a file holds before its vectors, perhaps from a stranger: enough to check every piece of it."""

    raw: bytes
    saved: SavedAt
    table: bytes

    @classmethod
    def parse(cls, raw: bytes, run_id: bytes, stage: int) -> SavedHead:
        """ValueError if it is not the head of a state of this run and stage."""
        if len(raw) < _FIXED.size:
            raise ValueError("it is too short")
        header_end = _FIXED.size + _FIXED.unpack_from(raw)[4] + _HASH_BYTES
        if not raw.startswith(_MAGIC) or not header_end <= min(len(raw), _FIXED.size + MAX_HEADER_BYTES + _HASH_BYTES):
            raise ValueError("it is no saved state, or of another version")
        saved = SavedStates(Path(), run_id, stage)._parse(raw[:header_end], Path())
        table = raw[header_end:]
        if len(table) != _HASH_BYTES * saved.num_pieces or _sha256(table) != saved.table_digest:
            raise ValueError("its table of pieces is not the one that the header names")
        return cls(raw, saved, table)

    def fits(self, number: int, piece: bytes) -> bool:
        """Whether these are the bytes of a piece."""
        num_bytes = self.saved.piece_bytes(number)
        digest = self.table[_HASH_BYTES * number : _HASH_BYTES * (number + 1)]
        return len(piece) == num_bytes and _sha256(piece) == digest


class SavedStates:
    """The saved states of one stage of a run. Calls block for as long as the disk takes; any thread may make them."""

    def __init__(self, folder: Path, run_id: bytes, stage: int) -> None:
        """The folder need not exist. Raises UserError on machines whose numbers are not as the files have them."""
        if sys.byteorder != "little":
            raise UserError(
                "states cannot be saved or loaded on a big-endian machine: take part in the run from another"
            )
        if len(run_id) != RUN_ID_BYTES:
            raise ValueError(f"a run id has {RUN_ID_BYTES} bytes, got {len(run_id)}")
        self.folder = folder
        self._run_id, self._stage = run_id, stage
        self._damaged: set[tuple[int, ...]] = set()
        """Files whose table or vectors turned out to be wrong."""
        self._told: set[tuple[Path, str, tuple[int, ...]]] = set()

    def save(self, place: Place, commit: Commit | None, state: StageState) -> SavedAt:
        """Keep a state, which nobody may change meanwhile. Nothing is written if it is there already, and whole.

        commit: the one that led there, signed; None at the start of the run. ValueError if it does not prove the place.
        Raises UserError if the disk has no room or fails; then everything is as it was.
        """
        vectors = [tensor.contiguous().numpy().data.cast("B") for tensor in state.tensors]
        if any(len(vector) != 4 * state.values.numel() for vector in vectors):
            raise ValueError("the vectors of a state must be float32 and equally long")
        table = b"".join(_sha256(*parts) for parts in _pieces(vectors))
        header = training_pb2.StateHeader(
            place=place_to_wire(place),
            commit=None if commit is None else commit_to_wire(commit),
            num_parameters=state.values.numel(),
            num_steps=state.num_steps,
            digest=state.digest(),
        )
        raw_header = self._pack(header, len(vectors), _sha256(table))
        saved = self._parse(raw_header, self.folder / self._name(place))
        if not self._is_whole(saved):
            self._write(saved, [raw_header, table, *vectors])
        return saved

    def require_room(self, num_bytes: int) -> None:
        """Raise UserError unless the disk has room for a state of so many bytes."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            free_bytes = shutil.disk_usage(self.folder).free
        except OSError as error:
            raise disk_error(self.folder, error) from error
        if free_bytes < num_bytes:
            raise self._no_room("a state", num_bytes, free_bytes, os.strerror(errno.ENOSPC))

    def found(self) -> list[SavedAt]:
        """Every saved state whose header is right and whose size fits it, the newest first: as Place.rank says.

        Whatever else lies there is skipped with a line in the log, once, but for files of other stages; and so is what was
        found to be damaged when it was read. Raises UserError if the folder cannot be read.
        """
        found = []
        for path in self._list():
            if self._is_neighbour(path.name):
                continue
            try:
                with _open(path) as file:
                    if _identity(os.fstat(file.fileno())) not in self._damaged:
                        found.append(self._read_header(file, path))
            except FileNotFoundError:
                continue  # another member has just removed it
            except (OSError, ValueError) as error:
                self._tell_skipped(path, _reason(error))
        return sorted(found, key=lambda saved: saved.place.rank)

    def load(self, saved: SavedAt, parameters: StageParameters) -> StageState:
        """The state, in memory of its own. Raises UserError if the file is damaged or gone, or of another kind of stage."""
        if (saved.num_parameters, saved.num_vectors) != (parameters.size, len(parameters.state.tensors)):
            raise UserError(
                f"{saved.path} has {saved.num_vectors} vectors of {saved.num_parameters} parameters, this stage has "
                f"{len(parameters.state.tensors)} of {parameters.size}: remove the file"
            )
        try:
            return self._read(saved, parameters.empty_state(saved.num_steps))
        except (OSError, ValueError) as error:
            raise _damaged(saved.path, error) from error

    def read(self, saved: SavedAt) -> StageState:
        """As `load`, of a stage that is not here to compare it with."""
        try:
            values, first, second, *previous = (torch.empty(saved.num_parameters) for _ in range(saved.num_vectors))
            return self._read(saved, StageState(values, first, second, saved.num_steps, *previous))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{saved.path} cannot be used ({_reason(error)}): copy it again, or take an older one"
            ) from error

    def _read(self, saved: SavedAt, state: StageState) -> StageState:
        """The state, whose memory is filled. ValueError or OSError if the file is damaged or gone."""
        with self._reopen(saved) as file:
            file.seek(saved.num_bytes - saved.payload_bytes)
            for tensor in state.tensors:
                _fill(file, tensor.numpy().data.cast("B"))
            if state.digest() != saved.digest:
                self._damaged.add(_identity(os.fstat(file.fileno())))
                raise ValueError("the vectors do not have the digest that the header names")
        return state

    def newest_whole(self, parameters: StageParameters) -> tuple[SavedAt, StageState] | None:
        """The newest state that can be loaded; a line in the log for each newer one. Raises UserError as `found`."""
        for saved in self.found():
            try:
                return saved, self.load(saved, parameters)
            except UserError as error:
                self._tell_skipped(saved.path, str(error))
        return None

    def _tell_skipped(self, path: Path, reason: str) -> None:
        """Once for each file: members look at the folder again and again."""
        with contextlib.suppress(FileNotFoundError):
            what = path, reason, _identity(path.lstat())
            if what not in self._told:
                self._told.add(what)
                log.warning("saved state skipped file=%s reason=%s", path, reason)

    def open(self, saved: SavedAt) -> OpenState:
        """Its pieces, to send them to others; to be closed. Raises UserError if the file is damaged or gone."""
        try:
            with contextlib.ExitStack() as stack:
                file = stack.enter_context(self._reopen(saved))
                table_bytes = _HASH_BYTES * saved.num_pieces
                table = _read_at(file, saved.num_bytes - saved.payload_bytes - table_bytes, table_bytes)
                identity = _identity(os.fstat(file.fileno()))
                if _sha256(table) != saved.table_digest:
                    self._damaged.add(identity)
                    raise ValueError("the table of pieces does not have the digest that the header names")
                stack.pop_all()
                return OpenState(saved, table, file, lambda: self._damaged.add(identity))
        except (OSError, ValueError) as error:
            raise _damaged(saved.path, error) from error

    def prune(self, keep: Collection[Place]) -> None:
        """Remove this stage's states, damaged ones too, but for those at these places; and what dead processes left half written.

        Whoever has a state open can read on. What cannot be removed stays, with a line in the log.
        """
        names = {self._name(place) for place in keep}
        for path in self._list():
            if _NAME.fullmatch(path.name) and not self._is_neighbour(path.name) and path.name not in names:
                _remove(path)
        self._remove_leftovers()

    def _name(self, place: Place) -> str:
        return f"stage{self._stage}-epoch{place.epoch}-{place.lineage.hex()}.state"

    def _is_neighbour(self, name: str) -> bool:
        """Whether the name is that of another stage's state, or of one that is being written."""
        match = _NAME.fullmatch(name)
        return match[1] != str(self._stage) if match else _PARTIAL_NAME.fullmatch(name) is not None

    def _list(self) -> list[Path]:
        try:
            return sorted(self.folder.iterdir())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise disk_error(self.folder, error) from error

    def _pack(self, header: training_pb2.StateHeader, num_vectors: int, table_digest: bytes) -> bytes:
        raw = header.SerializeToString(deterministic=True)
        if len(raw) > MAX_HEADER_BYTES:
            raise ValueError(f"the header has {len(raw)} bytes, at most {MAX_HEADER_BYTES} are allowed")
        fixed = _FIXED.pack(_MAGIC, self._run_id, self._stage, num_vectors, len(raw), table_digest)
        return fixed + raw + _sha256(fixed, raw)

    def _read_header(self, file: FileIO, path: Path) -> SavedAt:
        """ValueError if it is not the header of a state of this stage, or does not fit the name or size of the file."""
        fixed = _read_at(file, 0, _FIXED.size)
        header_bytes = _FIXED.unpack(fixed)[4]
        if not fixed.startswith(_MAGIC):
            raise ValueError("it is no saved state, or of another version")
        if header_bytes > MAX_HEADER_BYTES:
            raise ValueError(f"its header has {header_bytes} bytes, at most {MAX_HEADER_BYTES} are allowed")
        saved = self._parse(fixed + _read_at(file, _FIXED.size, header_bytes + _HASH_BYTES), path)
        if path.name != self._name(saved.place):
            raise ValueError(f"it should be called {self._name(saved.place)}")
        if (num_bytes := os.fstat(file.fileno()).st_size) != saved.num_bytes:
            raise ValueError(f"it has {num_bytes} bytes and should have {saved.num_bytes}")
        return saved

    def _parse(self, raw: bytes, path: Path) -> SavedAt:
        """What a header says, from the first byte of the file to its own digest. ValueError if it cannot be right."""
        _, run_id, stage, num_vectors, _, table_digest = _FIXED.unpack_from(raw)
        content, digest = raw[:-_HASH_BYTES], raw[-_HASH_BYTES:]
        if _sha256(content) != digest:
            raise ValueError("its header is damaged")
        if (run_id, stage) != (self._run_id, self._stage):
            raise ValueError(f"it is of stage {stage} of run {run_id.hex()}")
        try:
            header = training_pb2.StateHeader.FromString(content[_FIXED.size :])
            commit = commit_from_wire(header.commit) if header.HasField("commit") else None
        except (DecodeError, BadReply) as error:
            raise ValueError(f"its header makes no sense: {error}") from error
        place = place_from_wire(header.place)
        self._check_proof(place, commit)
        if num_vectors not in (3, 4) or len(header.digest) != _HASH_BYTES:
            raise ValueError("its header makes no sense")
        payload_bytes = 4 * num_vectors * header.num_parameters
        num_pieces = -(-payload_bytes // PIECE_BYTES)
        return SavedAt(
            place=place,
            commit=commit,
            digest=header.digest,
            num_parameters=header.num_parameters,
            num_steps=header.num_steps,
            num_vectors=num_vectors,
            table_digest=table_digest,
            path=path,
            num_bytes=len(raw) + _HASH_BYTES * num_pieces + payload_bytes,
        )

    def _check_proof(self, place: Place, commit: Commit | None) -> None:
        is_signed_by_leader = commit is None or is_signed(commit, self._run_id)
        is_proven = is_signed_by_leader and place.follows(commit, self._run_id)
        if not is_proven or len(place.lineage) != LINEAGE_BYTES:
            raise ValueError(f"no signed commit proves how the run came to epoch {place.epoch}")

    def _reopen(self, saved: SavedAt) -> FileIO:
        """The file, at its begin. ValueError or OSError if it is not any longer what it was."""
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(_open(saved.path))
            if self._read_header(file, saved.path) != saved:
                raise ValueError("another state has taken its place")
            stack.pop_all()
            return file

    def _is_whole(self, saved: SavedAt) -> bool:
        try:
            with self.open(saved) as opened:
                for number in range(saved.num_pieces):
                    opened.read_piece(number)
        except UserError:
            return False
        return True

    def _write(self, saved: SavedAt, parts: Sequence[bytes | memoryview]) -> None:
        free_bytes = 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()
            free_bytes = shutil.disk_usage(self.folder).free
            if free_bytes < saved.num_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            with self._partial_file() as (descriptor, partial):
                for part in parts:
                    _write_all(descriptor, memoryview(part))
                os.fsync(descriptor)
                os.replace(partial, saved.path)
            self._sync_folder()
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise disk_error(self.folder, error) from error
            what = f"the state of epoch {saved.place.epoch}"
            raise self._no_room(what, saved.num_bytes, free_bytes, error.strerror or str(error)) from error

    def _no_room(self, what: str, num_bytes: int, free_bytes: int, reason: str) -> UserError:
        return UserError(
            f"saving {what} needs {num_bytes:,} bytes in {self.folder} and {free_bytes:,} are free ({reason}): free some space, "
            "keep fewer states, raise this process's limits, or set SHARDSWARM_CACHE to a folder on another disk"
        )

    @contextlib.contextmanager
    def _partial_file(self) -> Iterator[tuple[int, Path]]:
        """A new file, locked so that it can be told from what a dead process left; gone afterwards unless it was moved."""
        while True:
            descriptor, name = tempfile.mkstemp(dir=self.folder, prefix=f".stage{self._stage}-", suffix=".partial")
            partial = Path(name)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                if os.fstat(descriptor).st_nlink:  # else it was taken for a leftover before it was locked
                    yield descriptor, partial
                    return
            finally:
                partial.unlink(missing_ok=True)
                os.close(descriptor)

    def _sync_folder(self) -> None:
        descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _remove_leftovers(self) -> None:
        for path in self._list():
            if _PARTIAL_NAME.fullmatch(path.name):
                with contextlib.suppress(OSError, ValueError), _open(path, "r+b") as file:  # locked: its writer lives
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    _remove(path)


class OpenState:
    """A saved state's pieces, each checked as it is read. Stays readable when the file is pruned; any thread may read."""

    def __init__(self, saved: SavedAt, table: bytes, file: FileIO, on_damaged: Callable[[], None]) -> None:
        self.saved = saved
        self.table = table
        """The SHA-256 of each piece, 32 bytes each."""
        self._file, self._on_damaged = file, on_damaged

    def read_head(self) -> bytes:
        """All before the vectors, as SavedHead.parse takes it. Raises UserError if it cannot be read."""
        try:
            return _read_at(self._file, 0, self.saved.num_bytes - self.saved.payload_bytes)
        except (OSError, ValueError) as error:
            raise _damaged(self.saved.path, error) from error

    def read_piece(self, number: int) -> bytes:
        """Bytes number * PIECE_BYTES, ... of the payload. Raises UserError if they are damaged, IndexError beyond the last piece."""
        if not 0 <= number < self.saved.num_pieces:
            raise IndexError(f"piece {number} of {self.saved.num_pieces}")
        start = number * PIECE_BYTES
        num_bytes = self.saved.piece_bytes(number)
        try:
            piece = _read_at(self._file, self.saved.num_bytes - self.saved.payload_bytes + start, num_bytes)
            if _sha256(piece) != self.table[_HASH_BYTES * number : _HASH_BYTES * (number + 1)]:
                self._on_damaged()
                raise ValueError(f"piece {number} does not have the digest that the table names")
        except (OSError, ValueError) as error:
            raise _damaged(self.saved.path, error) from error
        return piece

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> OpenState:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _pieces(vectors: Sequence[memoryview]) -> Iterator[list[memoryview]]:
    """The parts of each piece: a piece may begin in one vector and end in another."""
    parts: list[memoryview] = []
    room = PIECE_BYTES
    for vector in vectors:
        start = 0
        while start < len(vector):
            parts.append(vector[start : start + room])
            start, room = start + len(parts[-1]), room - len(parts[-1])
            if room == 0:
                yield parts
                parts, room = [], PIECE_BYTES
    if parts:
        yield parts


def _sha256(*parts: bytes | memoryview) -> bytes:
    hasher = hashlib.sha256()
    for part in parts:
        hasher.update(part)
    return hasher.digest()


def _open(path: Path, mode: Literal["rb", "r+b"] = "rb") -> FileIO:
    """A plain file: no link, and no pipe that would be waited for. ValueError or OSError if it is none."""

    def open_plainly(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK)

    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(path, mode, buffering=0, opener=open_plainly))
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is no plain file")
        stack.pop_all()
        return file


def _identity(status: os.stat_result) -> tuple[int, ...]:
    """Of a file as it is: who writes its state again makes another one."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _read_at(file: FileIO, start: int, num_bytes: int) -> bytes:
    """Leaves the file's position alone. ValueError if the file ends before."""
    parts, end = [], start + num_bytes
    while start < end:
        parts.append(os.pread(file.fileno(), end - start, start))
        start += len(parts[-1])
        if not parts[-1]:
            raise ValueError("it ends too early")
    return b"".join(parts)


def _fill(file: FileIO, target: memoryview) -> None:
    while target:
        num_bytes = file.readinto(target)
        if not num_bytes:
            raise ValueError("it ends too early")
        target = target[num_bytes:]


def _write_all(descriptor: int, content: memoryview) -> None:
    while content:
        content = content[os.write(descriptor, content[:PIECE_BYTES]) :]


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("saved state not removed file=%s reason=%s", path, _reason(error))


def _reason(error: OSError | ValueError) -> str:
    if isinstance(error, OSError):
        return "it is a symbolic link" if error.errno == errno.ELOOP else error.strerror or str(error)
    return str(error)


def _damaged(path: Path, error: OSError | ValueError) -> UserError:
    return UserError(
        f"{path} cannot be used ({_reason(error)}): an older saved state or another replica's is used instead; remove it"
    )
