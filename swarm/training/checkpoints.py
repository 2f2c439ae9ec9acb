"""Checkpoints: when a member of a run saves its state, and which of its saved states it keeps. The files are saved_states.py's."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import re
import shutil
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import psutil
from torch import Tensor

from swarm.epoch.messages import Commit, Place, Term, place_after
from swarm.errors import BadRequest, UserError
from swarm.run_store import RunStore
from swarm.training.journal import Journal, KeptSum
from swarm.training.outcome import apply_commit
from swarm.training.parameters import StageParameters, StageState
from swarm.training.saved_states import SavedStates

log = logging.getLogger(__name__)

Saving: TypeAlias = tuple[Place, Commit | None, StageState]
"""What is to be saved; the commit is signed, and the state nobody else's."""
NUM_COMPLETE = 2
"""So many complete checkpoints are kept."""
_MAX_KEPT = 4
_LEAST_SNAPSHOT_PAUSE_S = 2.0
_MAX_JOURNAL = 16
"""Sums in the journal; then the state is saved instead."""


@dataclass(frozen=True, slots=True)
class Resumed:
    """Where a member goes on from its own disk; its parameters are there."""

    place: Place
    commit: Commit | None
    """That led there; None at the start of the run."""
    held: KeptSum | None = None
    """What was averaged there last, with an outcome that is not known here."""


def is_complete(place: Place, seen: Mapping[int, Collection[Place]], num_stages: int) -> bool:
    """Whether every stage and the ends (num_stages together) have this state on somebody's disk."""
    return all(place in seen.get(stage, ()) for stage in range(num_stages))


def states_to_keep(
    own: Sequence[Place], seen: Mapping[int, Collection[Place]], num_stages: int, safe: Place | None = None
) -> set[Place]:
    """Of a member's saved states (newest first): the newest complete ones, the newest of all, and newer ones that may become complete.

    A state of a history that the run has left is not counted as complete: nobody goes back to it, but the one before may be wanted.
    seen: what each stage has on some disk, this member's own included. safe: the newest of which no state hangs on one disk.
    """
    still_followed = [place for place in own if not any(_was_left_for(place, other) for other in own)]
    complete = [place for place in still_followed if is_complete(place, seen, num_stages)][:NUM_COMPLETE]
    oldest = complete[-1] if len(complete) == NUM_COMPLETE else None
    kept = {*complete, *(place for place in own if place == safe)}
    newer = [place for place in own if (oldest is None or place.rank <= oldest.rank) and place not in kept]
    return {*kept, *newer[: _MAX_KEPT - len(kept)]}


def _was_left_for(place: Place, other: Place) -> bool:
    """Whether the run has gone back behind a place: it has come as far again in a newer era."""
    return other.era > place.era and other.epoch <= place.epoch


class Checkpoints:
    """Of one member: every so many epochs, as the run's rules say, at the run's end, and when it leaves."""

    def __init__(self, store: RunStore, stage: int, size: int) -> None:
        """size: values of the stage's vector."""
        self.states = SavedStates(store.folder / "states", store.run_id, stage)
        self._journal = Journal(store.folder / "journal", store.run_id, stage, size)
        self._queue: Journal | None = None
        """Of this process alone: steps that wait for the weights."""
        self._queue_folder = store.folder / f"queue-{os.getpid()}-{stage}"
        self._stage, self._size = stage, size
        _sweep_queues(store.folder)
        self._journal_end: Place | None = None
        """Up to which a restart comes by the journal."""
        self._store, self._run_id = store, store.run_id
        self._snapshots = asyncio.Lock()
        self._last_snapshot_s = -math.inf
        self.on_saved: list[Callable[[Place, Tensor, bool], None]] = []
        """Are given the weights, which nobody else changes any more, and whether all others save the state there, too."""
        self._saving: asyncio.Task[None] | None = None
        self.places: tuple[Place, ...] = ()
        """What is on this disk, newest first."""

    def resume(self, parameters: StageParameters) -> Resumed | None:
        """Go on from what is on this disk, if there is something. Raises UserError if the folder cannot be read."""
        place, commit = Place(0, self._run_id), None
        newest = self.states.newest_whole(parameters)
        self._look()
        if newest is not None:
            saved, state = newest
            try:
                parameters.install(state)
                place, commit = saved.place, saved.commit
            except BadRequest as error:
                log.warning("saved state not used file=%s reason=%s", saved.path, error)
        place, last = self._replay(self._journal, place, parameters)
        if last is not None:
            commit, self._journal_end = last, place
        place = self._journal.went_on(place)
        held = self._journal.read_sum(place)
        if commit is None and held is None:
            return None
        log.info("going on from this disk epoch=%d", place.epoch)
        return Resumed(place, commit, held)

    async def load(self, place: Place, parameters: StageParameters) -> tuple[StageState, Commit | None] | None:
        """The saved state at a place, or at the one that was rolled back to there; None if it is not here, or damaged."""

        def read() -> tuple[StageState, Commit | None] | None:
            for saved in self.states.found():
                if place == saved.place or place.follows(saved.commit, self._run_id):
                    try:
                        return self.states.load(saved, parameters), saved.commit
                    except UserError:
                        self._look()  # else the others would count on it
                        raise
            return None

        try:
            return await asyncio.to_thread(read)
        except UserError as error:
            log.warning("saved state not used epoch=%d reason=%s", place.epoch, error)
            return None

    async def keep_sum(
        self, place: Place, term: Term, attempt: int, vector: Tensor, state_here: Callable[[], Awaitable[Saving]]
    ) -> None:
        """Before the only replica of a stage reports: what it would take to step again. state_here: the state at that place."""
        if place != self._journal_end and not self._can_resume_at(place):
            await self.wait()
            await self.save(*await state_here())
            if not self._can_resume_at(place):
                return  # without that state the sum is worth nothing
        try:
            await asyncio.to_thread(self._journal.write_sum, place, term, attempt, vector)
        except UserError as error:
            log.error("sum not kept epoch=%d reason=%s", place.epoch, error)

    def _can_resume_at(self, place: Place) -> bool:
        """Whether a restart could begin there: where the run began needs no state on this disk."""
        return self.has_saved(place) or Place(0, self._run_id).leads_to(place)

    def has_saved(self, place: Place) -> bool:
        """Whether the state there is on this disk."""
        return any(one.leads_to(place) for one in self.places)

    async def keep_commit(self, commit: Commit) -> None:
        """After the step: the outcome of a sum that was kept."""
        try:
            if await asyncio.to_thread(self._journal.write_commit, commit):
                self._journal_end = commit.after
        except UserError as error:
            log.error("commit not kept epoch=%d reason=%s", commit.epoch, error)

    def _look(self) -> None:
        self.places = tuple(saved.place for saved in self.states.found())

    async def keep_step(self, commit: Commit, vector: Tensor | None) -> None:
        """Of a member whose weights are on their way: what is to be done once they are here. Raises UserError."""

        def write() -> None:
            if self._queue is None:
                self._queue = Journal(self._queue_folder, self._run_id, self._stage, self._size)
            if vector is not None:
                self._queue.write_sum(commit.before, commit.term, commit.attempt, vector)
            self._queue.write_commit(commit)

        await asyncio.to_thread(write)

    def apply_kept(self, place: Place, parameters: StageParameters) -> tuple[Place, Commit | None]:
        """Take the kept steps after a place, where the parameters are. Where they are then, and the last commit (None: no step)."""
        return (place, None) if self._queue is None else self._replay(self._queue, place, parameters)

    def _replay(self, journal: Journal, place: Place, parameters: StageParameters) -> tuple[Place, Commit | None]:
        last: Commit | None = None
        for commit, kept in journal.steps_after(place):
            apply_commit(parameters, self._store, commit, None if kept is None else kept.vector)
            place, last = commit.after, commit
        return place, last

    def forget_kept(self) -> None:
        """The kept steps are taken, or of no use any more."""
        if self._queue is not None:
            shutil.rmtree(self._queue_folder, ignore_errors=True)
            self._queue = None

    async def snapshot(self, at_least: Place, state_here: Callable[[], Awaitable[Saving]]) -> Place | None:
        """Of which place, that one or a later one, there is a state on this disk, made now if need be. None: of none."""
        async with self._snapshots:
            if (found := self._found_for(at_least)) is not None:
                return found
            if time.monotonic() - self._last_snapshot_s < _LEAST_SNAPSHOT_PAUSE_S:
                return None
            self._last_snapshot_s = time.monotonic()
            await self.wait()
            await self.save(*await state_here())
            return self._found_for(at_least)

    def _found_for(self, at_least: Place) -> Place | None:
        return next((one for one in self.places if one.leads_to(at_least) or not one.is_behind(at_least)), None)

    def is_due(self, commit: Commit) -> bool:
        """Whether the state after a commit is to be saved."""
        return self.is_checkpoint(commit) or len(self._journal) >= _MAX_JOURNAL

    def is_checkpoint(self, commit: Commit) -> bool:
        """Whether all stages and the ends save the state after a commit."""
        spec, epoch = self._store.spec, commit.after.epoch
        end = self._store.open_orders(commit.orders).num_epochs(spec, epoch)
        return epoch % spec.checkpoint_every == 0 or epoch >= end

    def newest_checkpoint(self) -> Place | None:
        """Of those on this disk that all stages save."""
        found = self.states.found()
        return next((one.place for one in found if one.commit is not None and self.is_checkpoint(one.commit)), None)

    def begin(self, place: Place, commit: Commit | None, state: StageState) -> None:
        """Save in the background; the state is ours from now on. With the last one still under way this one is left out."""
        if self._saving is not None and not self._saving.done():
            log.warning("state not saved epoch=%d reason=the disk is still busy with the last one", place.epoch)
            return
        self._saving = asyncio.create_task(self.save(place, commit, state))

    async def save(self, place: Place, commit: Commit | None, state: StageState) -> None:
        """A disk that is full or broken costs a line in the log; what was saved before is as it was.

        A state to which the run went back is saved as that of the checkpoint, which it is: from there one can go back again.
        """
        place = place_after(commit, self._run_id)

        def write() -> None:
            self.states.save(place, commit, state)
            self._journal.drop_before(place.epoch)
            self._look()

        try:
            await asyncio.to_thread(write)
        except UserError as error:
            log.error("state not saved epoch=%d reason=%s", place.epoch, error)
            return
        log.info("state saved epoch=%d", place.epoch)
        for callback in self.on_saved:
            callback(place, state.values, commit is not None and self.is_checkpoint(commit))

    async def prune(self, seen: Mapping[int, Collection[Place]], safe: Place | None = None) -> None:
        """seen: what the others have on their disks. safe: a place to keep besides."""
        own = self.places
        everywhere = {**seen, self._stage: {*seen.get(self._stage, ()), *own}}
        keep = states_to_keep(own, everywhere, self._store.spec.num_stages, safe)
        if set(own) - keep and (self._saving is None or self._saving.done()):
            await asyncio.to_thread(self.states.prune, keep)
            await asyncio.to_thread(self._look)

    async def wait(self) -> None:
        """Until nothing is being saved."""
        if self._saving is not None:
            await asyncio.wait([self._saving])


def _sweep_queues(folder: Path) -> None:
    """Remove what processes that are dead had kept."""
    for path in folder.glob("queue-*"):
        pid = path.name.split("-")[1]
        if pid.isdigit() and int(pid) != os.getpid() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def saved_stages(store: RunStore) -> set[int]:
    """Stages of which a state is on this disk, by the names of the files alone."""
    names = (path.name for path in (store.folder / "states").glob("stage*-epoch*.state"))
    return {int(match[1]) for name in names if (match := re.match(r"stage([0-9]+)-", name))}
