"""Checkpoints: when a member of a run saves its state, and which of its saved states it keeps. The files are saved_states.py's."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping, Sequence

from swarm.epoch.messages import Commit, Place
from swarm.errors import BadRequest, UserError
from swarm.run_store import RunStore
from swarm.training.parameters import StageParameters, StageState
from swarm.training.saved_states import SavedAt, SavedStates

log = logging.getLogger(__name__)

NUM_COMPLETE = 2
"""So many complete checkpoints are kept."""
_MAX_KEPT = 4


def is_complete(place: Place, seen: Mapping[int, Collection[Place]], num_stages: int) -> bool:
    """Whether every stage and the ends (num_stages together) have this state on somebody's disk."""
    return all(place in seen.get(stage, ()) for stage in range(num_stages))


def states_to_keep(own: Sequence[Place], seen: Mapping[int, Collection[Place]], num_stages: int) -> set[Place]:
    """Of a member's saved states (newest first): the newest complete ones, the newest of all, and newer ones that may become complete.

    seen: what each stage has on some disk, this member's own included.
    """
    complete = [place for place in own if is_complete(place, seen, num_stages)][:NUM_COMPLETE]
    oldest = complete[-1] if len(complete) == NUM_COMPLETE else None
    newer = [place for place in own if oldest is None or place.epoch >= oldest.epoch]
    return {*complete, *newer[: _MAX_KEPT - len(complete)]}


class Checkpoints:
    """Of one member: every so many epochs, as the run's rules say, at the run's end, and when it leaves."""

    def __init__(self, store: RunStore, stage: int) -> None:
        self.states = SavedStates(store.folder / "states", store.run_id, stage)
        self._every, self._num_epochs = store.spec.checkpoint_every, store.spec.num_epochs
        self._saving: asyncio.Task[None] | None = None
        self.places: tuple[Place, ...] = ()
        """What is on this disk, newest first."""

    def resume(self, parameters: StageParameters) -> SavedAt | None:
        """Go on from the newest state on this disk, if there is one. Raises UserError if the folder cannot be read."""
        self._look()
        newest = self.states.newest_whole(parameters)
        if newest is None:
            return None
        saved, state = newest
        try:
            parameters.install(state)
        except BadRequest as error:
            log.warning("saved state not used file=%s reason=%s", saved.path, error)
            return None
        log.info("going on from this disk epoch=%d", saved.place.epoch)
        return saved

    def _look(self) -> None:
        self.places = tuple(saved.place for saved in self.states.found())

    def is_due(self, place: Place) -> bool:
        return place.epoch > 0 and (place.epoch % self._every == 0 or place.epoch >= self._num_epochs)

    def begin(self, place: Place, commit: Commit | None, state: StageState) -> None:
        """Save in the background; the state is ours from now on. With the last one still under way this one is left out."""
        if self._saving is not None and not self._saving.done():
            log.warning("state not saved epoch=%d reason=the disk is still busy with the last one", place.epoch)
            return
        self._saving = asyncio.create_task(self.save(place, commit, state))

    async def save(self, place: Place, commit: Commit | None, state: StageState) -> None:
        """A disk that is full or broken costs a line in the log; what was saved before is as it was."""
        try:
            await asyncio.to_thread(self.states.save, place, commit, state)
            await asyncio.to_thread(self._look)
        except UserError as error:
            log.error("state not saved epoch=%d reason=%s", place.epoch, error)
            return
        log.info("state saved epoch=%d", place.epoch)

    async def prune(self, seen: Mapping[int, Collection[Place]], stage: int, num_stages: int) -> None:
        """seen: what the others have on their disks."""
        own = self.places
        everywhere = {**seen, stage: {*seen.get(stage, ()), *own}}
        keep = states_to_keep(own, everywhere, num_stages)
        if set(own) - keep and (self._saving is None or self._saving.done()):
            await asyncio.to_thread(self.states.prune, keep)
            await asyncio.to_thread(self._look)

    async def wait(self) -> None:
        """Until nothing is being saved."""
        if self._saving is not None:
            await asyncio.wait([self._saving])
