"""Announcer: keeps this node's record in the DHT alive and true."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import random
import time

from swarm.p2p.directory import Directory
from swarm.records import ShardRecord, ShardState

log = logging.getLogger(__name__)

_LEAVE_TIMEOUT_S = 3.0


class Announcer:
    """Publishes the record at every change and every third of its lifetime, with jitter so that nodes do not march in step."""

    def __init__(self, directory: Directory, record: ShardRecord, lifetime_s: float) -> None:
        self._directory = directory
        self._lifetime_s = lifetime_s
        self.record = record

    async def announce(self, **changes: object) -> None:
        """Change fields of the record and publish it now."""
        self.record = dataclasses.replace(self.record, **changes, expires_at=time.time() + self._lifetime_s)  # type: ignore[arg-type]
        if not await self._directory.publish(self.record):
            log.warning("record not stored under every key state=%s", self.record.state.name)

    async def keep_alive(self) -> None:
        """Publish for ever; ends only by cancellation."""
        while True:
            await asyncio.sleep(self._lifetime_s / 3 * random.uniform(0.8, 1.0))
            await self.announce()

    async def leave(self) -> None:
        """Say LEAVING, so that nobody opens a session here any more; for a few seconds at most, as others may be gone already."""
        try:
            async with asyncio.timeout(_LEAVE_TIMEOUT_S):
                await self.announce(state=ShardState.LEAVING)
        except TimeoutError:
            log.info("left without telling everybody after_s=%.0f", _LEAVE_TIMEOUT_S)
