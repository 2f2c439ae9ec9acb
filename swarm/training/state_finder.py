"""StateFinder: from where a member that has to go somewhere gets the state there: its own disk, replicas that run, or copies.

It tells by events of the membership, which installs what was found in its turn.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from swarm.epoch import member as m
from swarm.epoch.messages import Commit, Place
from swarm.errors import BadRequest, PeerFailed, UserError
from swarm.records import ShardState
from swarm.run_store import RunStore
from swarm.training.catch_up import ask_place, fetch_snapshot
from swarm.training.checkpoints import Checkpoints
from swarm.training.links import Links
from swarm.training.member_config import MembershipConfig
from swarm.training.member_name import member_name, peer_of
from swarm.training.parameters import StageParameters, StageState
from swarm.training.requests import Donor
from swarm.training.run_host import RunHost
from swarm.training.saved_transfer import donors_of, fetch_state

log = logging.getLogger(__name__)

_ASK_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """A replica's state has come, while the run went on with us."""

    place: Place
    commit: Commit | None
    state: StageState


@dataclass(frozen=True, slots=True, eq=False)
class FoundState:
    """The state at a place where we have to go."""

    place: Place
    commit: Commit | None
    state: StageState
    is_download: bool = False


class StateFinder:
    """Of one member."""

    def __init__(
        self,
        run_host: RunHost,
        store: RunStore,
        stage: int,
        parameters: StageParameters,
        checkpoints: Checkpoints | None,
        links: Links,
        config: MembershipConfig,
        hear_orders_of: Callable[[Commit | None], None],
        tell: Callable[[m.Event | Snapshot | FoundState], None],
    ) -> None:
        """hear_orders_of: raises BadReply if the run's owner did not give them."""
        self._host, self._directory = run_host.host, run_host.directory
        self._store, self._stage, self._name = store, stage, member_name(run_host.peer_id, stage)
        self._parameters, self._checkpoints = parameters, checkpoints
        self._links, self._config, self._hear_orders_of, self._tell = links, config, hear_orders_of, tell

    async def find(self, place: Place, known: Mapping[str, int]) -> None:
        """The state at a place or a later one. known: members and their stages, besides those of whom there are records.

        UserError if no replica gives its state in hours.
        """
        if await self.find_saved(place):
            return
        records = await self._directory.find_members(self._store.run_id, [self._stage])
        for record in records:
            self._links.know(member_name(record.peer_id, record.stage), record.addresses)
        others = {peer for peer, stage in known.items() if stage == self._stage}
        online = {member_name(r.peer_id, r.stage) for r in records if r.state == ShardState.ONLINE}
        candidates = sorted((online | others) - {self._name})
        random.shuffle(candidates)
        for name in candidates if self._checkpoints is not None else ():
            try:
                async with asyncio.timeout(_ASK_TIMEOUT_S):
                    donor = self._donor(name)
                    there, commit = await ask_place(self._host, donor, self._store.run_id, self._stage, place)
                self._hear_orders_of(commit)
            except (PeerFailed, TimeoutError) as error:
                log.info("no state from member=%s reason=%s", name[-10:], error)
                continue
            self._tell(m.Entered(there, commit))
            await self._fetch_snapshot(candidates, there)
            return
        if await self._find_copy(place):
            return
        log.warning("nobody gave the state of this stage stage=%d asked=%d", self._stage, len(candidates))
        await asyncio.sleep(self._config.tick_s)
        self._tell(m.InVain())

    async def _find_copy(self, goal: Place) -> bool:
        """Go to a place to which the run went back, with a checkpoint that is on others' disks. False: there is none."""
        records = await self._directory.find_members(self._store.run_id, range(self._store.spec.num_stages))
        places = {place for record in records for place in record.places_of(self._stage)}
        bases = [place for place in places if place.leads_to(goal)]
        for base in bases:
            donors = [donor for donor in donors_of(records, self._stage, base) if donor.peer_id != self._host.peer_id]
            try:
                head, state = await fetch_state(
                    self._host,
                    self._store.run_id,
                    self._stage,
                    base,
                    donors,
                    self._parameters.size,
                    len(self._parameters.state.tensors),
                )
                self._hear_orders_of(head.saved.commit)
            except (PeerFailed, BadRequest, TimeoutError) as error:
                log.info("no copy epoch=%d reason=%s", base.epoch, error)
                continue
            self._tell(FoundState(goal, head.saved.commit, state, is_download=True))
            return True
        return False

    async def _fetch_snapshot(self, candidates: Sequence[str], at_least: Place) -> None:
        """While the run goes on with us. Raises UserError if no replica gives it."""
        deadline = time.monotonic() + self._config.download_timeout_s
        while time.monotonic() < deadline:
            try:
                place, commit, state = await fetch_snapshot(
                    self._host,
                    list(map(self._donor, candidates)),
                    self._store.run_id,
                    self._stage,
                    at_least,
                    self._parameters,
                )
            except (PeerFailed, TimeoutError) as error:
                log.info("no snapshot yet reason=%s", error)
                await asyncio.sleep(self._config.tick_s)
                continue
            self._tell(Snapshot(place, commit, state))
            return
        raise UserError(
            f"no replica of stage {self._stage} gave its state within {self._config.download_timeout_s:.0f} s"
        )

    def _donor(self, name: str) -> Donor:
        return Donor(peer_of(name), self._links.addresses_of(name))

    async def find_saved(self, place: Place) -> bool:
        """Go to a place whose state is on our disk. False: it is not."""
        loaded = None if self._checkpoints is None else await self._checkpoints.load(place, self._parameters)
        if loaded is not None:
            self._tell(FoundState(place, loaded[1], loaded[0]))
        return loaded is not None
