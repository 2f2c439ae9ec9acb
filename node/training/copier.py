"""Copier: keeps copies of checkpoints of stages that too few disks have (swarm/training/copies.py says which, and whose turn it is)."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Sequence

from swarm.errors import PeerFailed, UserError
from swarm.run_spec import RunSpec
from swarm.run_store import RunStore
from swarm.training.copies import Copy, CopyStore, CopyWatch
from swarm.training.layout import layout_of
from swarm.training.membership import Membership
from swarm.training.parameters import num_vectors_of
from swarm.training.requests import Donor
from swarm.training.run_host import RunHost
from swarm.training.saved_transfer import donors_of, fetch_state

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 3.0


class Copier:
    """Of a node in one run."""

    def __init__(self, run_host: RunHost, store: RunStore, membership: Membership, copies: CopyStore) -> None:
        self._run_host, self._store, self._membership, self._copies = run_host, store, membership, copies

    async def run(self) -> None:
        """Until it is cancelled."""
        spec, run_id, directory = self._store.spec, self._store.run_id, self._run_host.directory
        sizes = await asyncio.to_thread(_sizes_of, spec)
        watch = CopyWatch(self._run_host.peer_id, run_id, [4 * num_vectors_of(spec) * size for size in sizes])
        while True:
            await asyncio.sleep(_LOOK_EVERY_S * random.uniform(0.8, 1.2))
            await self._look()
            records = await directory.find_members(run_id, range(spec.num_stages))
            for copy in watch.look(records, time.monotonic()):
                try:
                    if await self._is_wanted(copy):
                        await self._make(copy, donors_of(records, copy.stage, copy.place), sizes[copy.stage])
                        break  # the records may be old by now
                except (PeerFailed, TimeoutError, UserError) as error:
                    log.info("no copy stage=%d epoch=%d reason=%s", copy.stage, copy.place.epoch, error)
                    watch.failed(copy, time.monotonic())

    async def _look(self) -> None:
        try:
            if await asyncio.to_thread(self._copies.look):
                self._membership.has_news()
        except UserError as error:
            log.warning("copies cannot be looked at: %s", error)

    async def _is_wanted(self, copy: Copy) -> bool:
        return self._copies.has_place_for(copy) and not await asyncio.to_thread(self._copies.is_here, copy)

    async def _make(self, copy: Copy, donors: Sequence[Donor], size: int) -> None:
        spec, states = self._store.spec, self._copies.states(copy.stage)
        num_vectors = num_vectors_of(spec)
        await asyncio.to_thread(states.require_room, 4 * num_vectors * size)
        head, state = await fetch_state(
            self._run_host.host, self._store.run_id, copy.stage, copy.place, donors, size, num_vectors
        )
        self._membership.hear_orders_of(head.saved.commit)
        await asyncio.to_thread(self._copies.keep, copy, head.saved.commit, state)
        log.info("copy kept stage=%d epoch=%d: few others have it", copy.stage, copy.place.epoch)
        self._membership.has_news()


def _sizes_of(spec: RunSpec) -> list[int]:
    """Parameters of each stage, and of the ends."""
    layout = layout_of(spec)
    return [layout.size(stage) for stage in range(spec.num_stages)]
