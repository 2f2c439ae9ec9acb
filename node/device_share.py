"""DeviceShare: whether sessions or the training go next on the device. Pure bookkeeping: seconds are handed in. Not thread-safe."""

from __future__ import annotations

import enum
from collections.abc import Collection

MAX_LEAD_S = 10.0
"""So much of the other's time at most a purpose has to wait for to make up for a job of its own, however long that was."""


class Purpose(enum.IntEnum):
    """Whom a job is for."""

    SERVING = 0
    """Sessions and microbatches of clients."""
    TRAINING = 1
    """The run that the node takes part in."""

    @property
    def other(self) -> Purpose:
        return Purpose(1 - self)


class DeviceShare:
    """Splits the device's time by a share, as long as jobs of both purposes wait.

    Start-time fair queueing (Goyal, Vin, Cheng, SIGCOMM 1996) over measured seconds. Each purpose has a clock: its seconds on the
    device divided by its share. Whose clock is behind goes next, at a tie serving. A purpose that waits alone gets the device at
    once, and pulls the other's clock up to its own: time that nobody else wanted costs nothing later, time that one did not
    want is not saved up.

    Jobs run to their end. So whoever comes while a job of the other runs waits for that one, and then for as much as it takes to
    make up for its own last job: at most MAX_LEAD_S of the other's time, and the rest of the job in which that is over. Only a
    purpose whose single jobs are longer than MAX_LEAD_S x its share / the other's gets more than its share.
    """

    def __init__(self, serving: float = 0.5) -> None:
        """serving: more than 0, less than 1; the rest is training's."""
        if not 0 < serving < 1:
            raise ValueError(f"need 0 < share < 1, got {serving}")
        self.of = {Purpose.SERVING: serving, Purpose.TRAINING: 1 - serving}
        self.used_s = dict.fromkeys(Purpose, 0.0)
        """Seconds on the device so far."""
        self._clocks = dict.fromkeys(Purpose, 0.0)

    def choose(self, waiting: Collection[Purpose]) -> Purpose:
        """Whose turn it is, of those who have a job that waits: one or both."""
        if len(waiting) > 1:
            return min(Purpose, key=self._clocks.__getitem__)
        (alone,) = waiting
        self._clocks[alone.other] = max(self._clocks[alone.other], self._clocks[alone])
        return alone

    def charge(self, purpose: Purpose, seconds: float) -> None:
        """A job took so long."""
        self.used_s[purpose] += seconds
        furthest = self._clocks[purpose.other] + MAX_LEAD_S / self.of[purpose.other]
        self._clocks[purpose] = min(self._clocks[purpose] + seconds / self.of[purpose], furthest)
