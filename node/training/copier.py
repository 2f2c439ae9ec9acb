"""Copier: keeps copies of checkpoints of stages that too few disks have (swarm/training/copies.py says which, and whose turn it is)."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Sequence

from swarm.errors import PeerFailed, UserError
from swarm.run_store import RunStore
from swarm.training.copies import Copy, CopyStore, CopyWatch
from swarm.training.layout import layout_of
from swarm.training.membership import Membership
from swarm.training.requests import Donor
from swarm.training.run_host import RunHost
from swarm.training.saved_transfer import donors_of, fetch_state

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 3.0


class Copier:
    """Of a node in one run."""

    def __init__(self, run_host: RunHost, store: RunStore, membership: Membership, copies: CopyStore) -> None:
        self._run_host, self._store, self._membership, self._copies = run_host, store, membership, copies
        self._watch = CopyWatch(run_host.peer_id, store.run_id, store.spec.num_stages)

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            await asyncio.sleep(_LOOK_EVERY_S * random.uniform(0.8, 1.2))
            records = await self._run_host.directory.find_members(
                self._store.run_id, range(self._store.spec.num_stages)
            )
            copy = self._watch.look(records, time.monotonic())
            if copy is None:
                continue
            donors = donors_of(records, copy.stage, copy.place)
            try:
                if not await asyncio.to_thread(self._copies.is_here, copy):
                    await self._make(copy, donors)
            except (PeerFailed, TimeoutError, UserError) as error:
                log.info("no copy stage=%d epoch=%d reason=%s", copy.stage, copy.place.epoch, error)

    async def _make(self, copy: Copy, donors: Sequence[Donor]) -> None:
        spec = self._store.spec
        size = await asyncio.to_thread(lambda: layout_of(spec).size(copy.stage))
        num_vectors = 4 if spec.delay else 3
        head, state = await fetch_state(
            self._run_host.host, self._store.run_id, copy.stage, copy.place, donors, size, num_vectors
        )
        self._membership.course.check(head.saved.commit)
        await asyncio.to_thread(self._copies.keep, copy, head.saved.commit, state)
        log.info("copy kept stage=%d epoch=%d: few others have it", copy.stage, copy.place.epoch)
        self._membership.has_news()
