"""`swarm export --every`: each checkpoint of a run that comes, with moments, as long as the run or its process lasts."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import uvloop

from swarm.client.export import Exported, RunMembers, export_checkpoint, members_of, to_its_end
from swarm.ending import cancelled
from swarm.epoch.messages import Place
from swarm.errors import PeerFailed, UserError
from swarm.member_record import MemberRecord
from swarm.signals import Signals
from swarm.training.hf_checkpoint import disk_errors
from swarm.training.rollback import complete_places, newest, saved_by_stage
from swarm.training.run_folder import place_of

log = logging.getLogger(__name__)

LOOK_EVERY_S = 2.0
_PARTIAL = ".partial-"
_FOLDER_NAME = re.compile(r"epoch-[0-9]{6,}")


def export_checkpoints(
    run_id: bytes,
    initial_peers: Sequence[str],
    out: Path,
    *,
    every: int,
    keep: int | None = None,
    dtype: torch.dtype = torch.float32,
    timeout_s: float = 30.0,
    cache_dir: Path | None = None,
    on_exported: Callable[[Exported], None] = lambda exported: None,
) -> None:
    """Write each complete checkpoint of an epoch that is a multiple of `every`, and the run's last one, with moments.

    They are out/epoch-000120 and so on, whole or not there; at most the newest `keep` of them. Ends with the run, or at SIGINT or SIGTERM.
    Raises UserError or JoinFailed if it cannot begin, UserError if the run's last checkpoint could not be written.
    """

    async def export() -> None:
        async with contextlib.AsyncExitStack() as stack:
            signals = Signals(stack)
            stack.enter_context(_claimed(out))
            members = await stack.enter_async_context(members_of(run_id, initial_peers, timeout_s, cache_dir))
            exporting = asyncio.create_task(CheckpointSeries(members, out, every, keep, dtype, on_exported).write())
            stopping = asyncio.create_task(signals.stop.wait())
            try:
                await asyncio.wait([exporting, stopping], return_when=asyncio.FIRST_COMPLETED)
            finally:
                await cancelled([exporting, stopping])
            if not exporting.cancelled():
                exporting.result()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(export())


class CheckpointSeries:
    """Checkpoints of a run that are written one after another into a folder."""

    def __init__(
        self,
        members: RunMembers,
        out: Path,
        every: int,
        keep: int | None,
        dtype: torch.dtype,
        on_exported: Callable[[Exported], None],
    ) -> None:
        self._members, self._out, self._every, self._keep, self._dtype = members, out, every, keep, dtype
        self._on_exported = on_exported
        folders = [path for path in out.iterdir() if _FOLDER_NAME.fullmatch(path.name)]
        found = {folder: place_of(folder, members.store.run_id) for folder in folders}
        self._written = {folder: place for folder, place in found.items() if place is not None}
        self._is_last: dict[Place, bool] = {}
        self._failed: dict[Place, UserError] = {}
        """What is not tried again."""
        self._told: set[Place] = set()

    async def write(self) -> None:
        """Until the run's end. Raises UserError if its last checkpoint could not be written."""
        while True:
            records = await self._members.records()
            complete = complete_places(saved_by_stage(records), self._members.store.spec.num_stages)
            for place in sorted(complete):
                try:
                    await self._look_at(place, records)
                except PeerFailed as error:
                    level = logging.INFO if place in self._told else logging.WARNING
                    log.log(level, "checkpoint not exported yet epoch=%d reason=%s", place.epoch, error)
                    self._told.add(place)
            last = newest(place for place in complete if self._is_last.get(place))
            if last is not None and last in self._failed:
                raise self._failed[last]
            if last is not None and last in self._written.values():
                return
            await asyncio.sleep(LOOK_EVERY_S)

    async def _look_at(self, place: Place, records: Sequence[MemberRecord]) -> None:
        """Export it, if that is due. Raises PeerFailed if it is to be tried again."""
        if place not in self._is_last:
            self._is_last[place] = await self._members.is_last(records, place)
        folder = self._out / f"epoch-{place.epoch:06}"
        before = self._written.get(folder)  # of a history that the run has left since, perhaps
        if place in self._failed or not self._is_wanted(place) or (before is not None and not before.is_behind(place)):
            return
        try:
            if before is None and folder.exists():
                raise UserError(f"{folder} is there, and is no whole export of this run: move it away")
            fresh = folder if before is None else folder.with_name(f"{_PARTIAL}new-{folder.name}")
            exported = await export_checkpoint(self._members, records, place, fresh, self._dtype, with_moments=True)
            await to_its_end(lambda: self._settle(fresh, folder, place))
        except UserError as error:
            self._failed[place] = error
            log.error("checkpoint not exported epoch=%d reason=%s", place.epoch, error)
        else:
            self._on_exported(replace(exported, out=folder))

    def _is_wanted(self, place: Place) -> bool:
        num_newer = sum(place.is_behind(one) for one in self._written.values())
        is_due = place.epoch % self._every == 0 or self._is_last[place]
        return is_due and (self._keep is None or num_newer < self._keep)

    def _settle(self, fresh: Path, folder: Path, place: Place) -> None:
        """What was written is in its place, and older ones that are not kept are removed."""
        with disk_errors(folder):
            if fresh != folder:
                _remove(folder)
                fresh.replace(folder)
        self._written[folder] = place
        for old in sorted(self._written, key=lambda one: self._written[one].rank)[self._keep or len(self._written) :]:
            del self._written[old]
            with disk_errors(old):
                _remove(old)


def _remove(folder: Path) -> None:
    """None is ever half there under its name."""
    doomed = folder.with_name(f"{_PARTIAL}old-{folder.name}")
    with contextlib.suppress(FileNotFoundError):
        folder.replace(doomed)
        shutil.rmtree(doomed)


@contextlib.contextmanager
def _claimed(out: Path) -> Iterator[None]:
    """The folder is there, and nobody else writes checkpoints into it. What one that was killed left half-written is removed."""
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with disk_errors(out):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another process exports to {out}: choose another folder, or end that one") from None
        for path in out.glob(f"{_PARTIAL}*"):
            shutil.rmtree(path, ignore_errors=True)
        yield
    finally:
        os.close(descriptor)
