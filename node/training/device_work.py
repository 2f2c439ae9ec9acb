"""DeviceWork: what a node's memberships need of it: the thread that owns the weights. Samples are trainers' work."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from node.device_share import Purpose
from node.executor import Executor
from swarm.epoch import member as m
from swarm.epoch.messages import Commit, Place

T = TypeVar("T")


class DeviceWork:
    """swarm.training.membership.Work of a node."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    async def on_device(self, function: Callable[[], T]) -> T:
        """Never refused: without its steps the node would have to leave the run."""
        return await self._executor.run(function, purpose=Purpose.TRAINING, is_own=True)

    def run(self, order: m.Run, place: Place) -> None:
        raise AssertionError("a node is never given a lease")

    def stop_running(self, is_epoch_over: bool) -> None: ...

    def take_gradients(self, unit: int) -> None: ...

    def stepped(self, commit: Commit) -> None: ...
