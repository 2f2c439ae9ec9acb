"""Executor: the one thread that owns the device. The event loop hands it functions and waits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

from protos import node_pb2
from swarm.messages import Refused

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Timed(Generic[T]):
    """A result with the seconds that it waited for the device and that it took there."""

    value: T
    queue_s: float
    compute_s: float


class Executor:
    """Runs functions on the device thread, first come first served, with a bound on how many wait."""

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._waiting = 0
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="device")

    async def run(self, function: Callable[[], T]) -> Timed[T]:
        """Raises Refused (no room) if max_waiting functions wait already, and whatever function raises."""
        if self._waiting >= self._max_waiting:
            raise Refused(
                node_pb2.THIS_NODE_HAS_NO_ROOM,
                f"{self._waiting} steps wait for the device already; try another node or later",
            )
        submitted = time.monotonic()

        def timed() -> Timed[T]:
            started = time.monotonic()
            value = function()
            return Timed(value, started - submitted, time.monotonic() - started)

        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, timed)
        finally:
            self._waiting -= 1

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
