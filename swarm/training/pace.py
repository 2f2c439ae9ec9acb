"""Pace: lets bytes go at a rate, over all streams together, so that giving leaves room for one's own work."""

from __future__ import annotations

import asyncio
import time

_BURST_S = 0.1


class Pace:
    """Of one member."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_at_s = 0.0

    async def take(self, num_bytes: int) -> None:
        """Return when so many bytes more may go. Who asks first goes first."""
        now = time.monotonic()
        self._free_at_s = max(self._free_at_s, now - _BURST_S) + num_bytes / self._bytes_per_s
        if self._free_at_s > now:
            await asyncio.sleep(self._free_at_s - now)
