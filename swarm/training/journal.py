"""Journal: what the only replica of a stage writes down before it reports, so that a step is not lost with its process.

    FOLDER/stage3-epoch120-LINEAGE.sum       the averaged sum of the epoch that begins there, and whose attempt it was
    FOLDER/stage3-epoch120-LINEAGE.commit    the epoch's outcome, once it is known

After a restart the steps after the newest saved state are taken again, and a sum whose outcome is unknown is held again: whoever
stepped meanwhile gives the Commit.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import struct
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from google.protobuf.message import DecodeError
from torch import Tensor

from protos import training_pb2
from swarm.cache import disk_error
from swarm.epoch.messages import Commit, Place, Term
from swarm.errors import BadReply
from swarm.training.parameters import gradient_digest, square_norm
from swarm.training.wire import commit_from_wire, commit_to_wire, is_signed

log = logging.getLogger(__name__)

_MAGIC = b"shardswarm sum 1"
_FIXED = struct.Struct("<16sQIIQ")  # magic, term number, attempt, bytes of the term's peer, values
_MAX_PEER_BYTES = 500
_MAX_ROLLBACKS = 16
"""To one checkpoint, one after the other, that a restart looks for."""
_NAME = re.compile(r"stage[0-9]+-epoch[0-9]+-[0-9a-f]{64}\.(sum|commit)")


@dataclass(frozen=True, slots=True)
class KeptSum:
    """An averaged sum of gradients, float32 [size]."""

    term: Term
    attempt: int
    vector: Tensor

    @property
    def digest(self) -> bytes:
        return gradient_digest(self.vector)

    @property
    def square_norm(self) -> float:
        return square_norm(self.vector)


class Journal:
    """Of one stage of a run. Calls block. One thread writes and reads; a save in the background may drop meanwhile."""

    def __init__(self, folder: Path, run_id: bytes, stage: int, size: int) -> None:
        """size: values of the stage's vector."""
        self._folder, self._run_id, self._stage, self._size = folder, run_id, stage, size
        self._places: list[Place] = []
        self._changing = threading.Lock()

    def __len__(self) -> int:
        """Sums that were written and not dropped since."""
        return len(self._places)

    def write_sum(self, place: Place, term: Term, attempt: int, vector: Tensor) -> None:
        """Before it is reported. Raises UserError if the disk is full or broken."""
        peer = term.peer.encode()
        fixed = _FIXED.pack(_MAGIC, term.number, attempt, len(peer), vector.numel())
        self._write(place, "sum", [fixed + peer, vector.contiguous().numpy().data.cast("B")])
        self._note(place)

    def write_commit(self, commit: Commit) -> bool:
        """The outcome of an epoch; False if its sum was not written, though there is one. Raises as write_sum."""
        if commit.before not in self._places and not commit.is_skipped:
            return False
        self._write(commit.before, "commit", [commit_to_wire(commit).SerializeToString()])
        return True

    def drop_before(self, epoch: int) -> None:
        """Forget the sums of earlier epochs: a saved state holds them."""
        for path in self._paths():
            if int(path.name.split("-epoch")[1].split("-")[0]) < epoch:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
        with self._changing:
            self._places = [place for place in self._places if place.epoch >= epoch]

    def steps_after(self, place: Place) -> Iterator[tuple[Commit, KeptSum | None]]:
        """The steps that were taken from a place on, each with its sum (None: a skipped step)."""
        while True:
            place = self.went_on(place)
            commit = self._read_commit(place)
            if commit is None:
                return
            kept = None if commit.is_skipped else self.read_sum(place)
            if not commit.is_skipped:
                digests = commit.digests
                if kept is None or len(digests) <= self._stage or kept.digest != digests[self._stage]:
                    log.warning("journal ends early epoch=%d reason=the sum is damaged", place.epoch)
                    return
            self._note(place)
            yield commit, kept
            place = commit.after

    def read_sum(self, place: Place) -> KeptSum | None:
        """What was averaged there, whatever became of it; None if there is nothing whole."""
        place = self.went_on(place)
        try:
            with self._path(place, "sum").open("rb") as file:
                magic, number, attempt, peer_bytes, size = _FIXED.unpack(file.read(_FIXED.size))
                if magic != _MAGIC or size != self._size or peer_bytes > _MAX_PEER_BYTES:
                    return None
                peer = file.read(peer_bytes).decode()
                values = np.fromfile(file, "<f4", size)
        except (OSError, struct.error, UnicodeDecodeError):
            return None
        return KeptSum(Term(number, peer), attempt, torch.from_numpy(values)) if len(values) == size else None

    def went_on(self, place: Place) -> Place:
        """The place itself, or where the run went on after it had gone back to there."""
        later = (place.rolled_back(era) for era in range(place.era + _MAX_ROLLBACKS, place.era, -1))
        return next((goal for goal in later if self._path(goal, "sum").exists()), place)

    def _note(self, place: Place) -> None:
        with self._changing:
            if place not in self._places:
                self._places.append(place)

    def _read_commit(self, place: Place) -> Commit | None:
        try:
            raw = self._path(place, "commit").read_bytes()
            commit = commit_from_wire(training_pb2.Commit.FromString(raw))
        except (OSError, DecodeError, BadReply):
            return None
        return commit if commit.before == place and is_signed(commit, self._run_id) else None

    def _path(self, place: Place, kind: str) -> Path:
        return self._folder / f"stage{self._stage}-epoch{place.epoch}-{place.lineage.hex()}.{kind}"

    def _paths(self) -> list[Path]:
        try:
            paths = (path for kind in ("sum", "commit") for path in self._folder.glob(f"stage{self._stage}-*.{kind}"))
            return [path for path in paths if _NAME.fullmatch(path.name)]
        except OSError:
            return []

    def _write(self, place: Place, kind: str, parts: list[bytes | memoryview]) -> None:
        path = self._path(place, kind)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=f".stage{self._stage}-", suffix=".partial")
            try:
                with os.fdopen(descriptor, "wb") as file:
                    for part in parts:
                        file.write(part)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(partial, path)
            except BaseException:
                Path(partial).unlink(missing_ok=True)
                raise
        except OSError as error:
            raise disk_error(path.parent, error) from error
