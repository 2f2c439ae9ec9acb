"""Pace: lets bytes go at a rate, over all streams together, so that giving leaves room for one's own work."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import time
from collections.abc import Callable, Iterator

from swarm.errors import Busy

_BURST_S = 0.1
_LONGEST_WAIT_S = 10.0
"""Of a piece; askers give up after three times that."""
_MOST_STREAMS = 32
_MOST_STREAMS_OF_PEER = 4


class Pace:
    """Of one member."""

    def __init__(self, bytes_per_s: float, piece_bytes: int = 2**20) -> None:
        """piece_bytes: at most, of what is taken at once."""
        self._bytes_per_s = bytes_per_s
        self._free_at_s = 0.0
        self._turn = asyncio.Lock()
        """First come, first served. A stream has one piece waiting at most, so a stream waits for one piece of each other."""
        self._streams: collections.Counter[str] = collections.Counter()
        self._max_streams = min(_MOST_STREAMS, max(1, int(bytes_per_s * _LONGEST_WAIT_S / piece_bytes)))

    @contextlib.contextmanager
    def stream(self, peer_id: str) -> Iterator[None]:
        """While a peer is given something. Busy if so many are that another one would only slow all down."""
        if self._streams.total() >= self._max_streams or self._streams[peer_id] >= _MOST_STREAMS_OF_PEER:
            raise Busy("this member is busy: it gives its states to as many as it can; try later")
        self._streams[peer_id] += 1
        try:
            yield
        finally:
            self._streams[peer_id] -= 1
            self._streams += collections.Counter()  # forgets those that have none

    async def take(self, num_bytes: int, is_wanted: Callable[[], bool] = lambda: True) -> None:
        """Return when so many bytes more may go, or at once when it is their turn and nobody wants them any more."""
        async with self._turn:
            if not is_wanted():
                return
            now = time.monotonic()
            free_at_s = max(self._free_at_s, now - _BURST_S) + num_bytes / self._bytes_per_s
            if free_at_s > now:
                await asyncio.sleep(free_at_s - now)
            self._free_at_s = free_at_s
