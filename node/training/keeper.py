"""Keeper: a node's second part in a run, a replica of the ends through which it trains no samples: the ends outlive the trainers.

It takes part in the rounds of the ends with nothing in its ledger, and so has what the trainers have after every step.
"""

from __future__ import annotations

import asyncio
import logging
import random

from node.device_share import Purpose
from node.executor import Executor
from node.training.device_work import DeviceWork
from node.training.placement import is_keeper_needed
from swarm.errors import SwarmError, UserError
from swarm.run_store import RunStore
from swarm.training.artifacts import fetch_artifacts
from swarm.training.checkpoints import Checkpoints, Resumed
from swarm.training.ends_replica import load_ends_parameters
from swarm.training.member_config import MembershipConfig
from swarm.training.membership import Membership
from swarm.training.parameters import StageParameters
from swarm.training.run_host import RunHost

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 5.0
_FETCH_EVERY_S = 0.5


class Keeper:
    """Holds the ends whenever it is this node's turn."""

    def __init__(
        self, run_host: RunHost, store: RunStore, executor: Executor, config: MembershipConfig, *, is_reachable: bool
    ) -> None:
        self._run_host, self._store, self._executor, self._config = run_host, store, executor, config
        self._is_reachable = is_reachable
        self.membership: Membership | None = None
        """While the ends are held."""

    async def run(self) -> None:
        """Until it is cancelled, or the ends cannot be held here."""
        pause_s = 0.5
        while self._store.spec.keepers:
            if await self._is_needed():
                try:
                    await self._keep()
                except SwarmError as error:
                    log.warning("the ends cannot be kept here: %s", error)
                    return
            await asyncio.sleep(pause_s * random.uniform(0.8, 1.2))
            pause_s = min(2 * pause_s, _LOOK_EVERY_S)

    async def _is_needed(self) -> bool:
        spec = self._store.spec
        members = await self._run_host.directory.find_members(self._store.run_id, range(spec.num_stages))
        return is_keeper_needed(
            self._run_host.peer_id,
            members,
            self._store.run_id,
            spec.ends_stage,
            spec.keepers,
            self.membership is not None,
        )

    async def _keep(self) -> None:
        spec = self._store.spec

        def load() -> tuple[StageParameters, Checkpoints, Resumed | None]:
            parameters = load_ends_parameters(spec)
            checkpoints = Checkpoints(self._store, spec.ends_stage, parameters.size)
            return parameters, checkpoints, checkpoints.resume(parameters)

        parameters, checkpoints, resumed = await self._executor.run(load, purpose=Purpose.TRAINING, is_own=True)
        self.membership = Membership(
            self._run_host, self._store, spec.ends_stage, parameters, DeviceWork(self._executor),
            is_keeper=True, is_reachable=self._is_reachable, checkpoints=checkpoints, resumed=resumed, config=self._config,
        )  # fmt: skip
        try:
            async with self.membership.running():
                log.info("keeping the ends")
                while await self._is_needed():
                    has_all = await self._fetch_artifacts()
                    await asyncio.sleep((_LOOK_EVERY_S if has_all else _FETCH_EVERY_S) * random.uniform(0.8, 1.2))
                log.info("other nodes keep the ends by now")
        finally:
            self.membership = None

    async def _fetch_artifacts(self) -> bool:
        """New trainers need the run's files from somebody when all others are gone. False: nobody has them yet."""
        try:
            await fetch_artifacts(self._run_host.host, self._run_host.directory, self._store, 1)
        except UserError:
            return False
        return True
