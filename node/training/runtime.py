"""TrainingNode: the life of a node that hosts stages of training runs, top to bottom."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import json
import logging
import os
import time
from collections.abc import Sequence

from node.config import NodeConfig
from node.device_share import DeviceShare, Purpose
from node.executor import Executor
from node.runtime import host_config_of
from node.training.frozen_blocks import FrozenBlocks
from node.training.hosted_run import HostedRun, NodeParts
from node.training.service import StageServices
from swarm.ending import cancelled
from swarm.errors import SwarmError, UserError
from swarm.messages import NODE_PROTOCOL
from swarm.p2p.directory import Directory
from swarm.p2p.host import Host, running_host
from swarm.signals import Signals
from swarm.training.find_run import find_run
from swarm.training.run_host import run_host

log = logging.getLogger(__name__)


class TrainingNode:
    """One node process, in one run or in several that do not see each other."""

    def __init__(self, config: NodeConfig) -> None:
        assert config.run_ids
        self.config = config
        self._executor = Executor(config.max_waiting_jobs, DeviceShare(config.serving_share))

    async def run(self) -> None:
        """Join, take a stage of each run, train until SIGTERM or SIGINT, leave. Raises SwarmError with a line for the user."""
        config = self.config
        started = time.monotonic()
        async with contextlib.AsyncExitStack() as stack:
            signals = Signals(stack)
            stack.callback(self._executor.close)
            host = await stack.enter_async_context(running_host(host_config_of(config)))
            directory = await Directory.join(
                host, list(config.initial_peers), serves=not config.use_relay, timeout_s=config.join_timeout_s
            )
            stack.push_async_callback(directory.close)
            stores = [await find_run(directory, run_id, config.cache_dir) for run_id in config.run_ids]
            shared = await stack.enter_async_context(run_host(host, directory))
            parts = NodeParts(_part_of(config), shared, self._executor, FrozenBlocks())
            runs = [await HostedRun.load(parts, store) for store in stores]
            services = StageServices([run.service for run in runs])
            await host.serve(NODE_PROTOCOL, services.handle)
            taking_part = {asyncio.create_task(run.take_part(signals.stop)): run for run in runs}
            died = asyncio.create_task(host.wait_until_dead())
            try:
                await _until_ready(taking_part)
                gc.collect()
                gc.freeze()
                self._print_ready(await host.addresses(), runs, host, time.monotonic() - started)
                await _until_over(taking_part, died)
            finally:
                await cancelled([*taking_part, died])
            log.info("leaving")

    def _print_ready(self, addresses: list[str], runs: Sequence[HostedRun], host: Host, ready_s: float) -> None:
        ready = {
            "peer_id": host.peer_id,
            "addresses": addresses,
            **runs[0].as_json(),
            "runs": [run.as_json() for run in runs],
            "serving_share": self._executor.share.of[Purpose.SERVING],
            "ready_s": round(ready_s, 2),
            "pid": os.getpid(),
        }
        print("READY " + json.dumps(ready), flush=True)


def _part_of(config: NodeConfig) -> NodeConfig:
    """The config with what each of several runs gets of the budgets."""
    count = len(config.run_ids)
    return dataclasses.replace(config, cache_bytes=config.cache_bytes // count, stash_bytes=config.stash_bytes // count)


async def _until_ready(taking_part: dict[asyncio.Task[None], HostedRun]) -> None:
    """Raises what kept one of the runs from its begin."""
    for task, run in taking_part.items():
        ready = asyncio.create_task(run.is_ready.wait())
        try:
            await asyncio.wait([task, ready], return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
        finally:
            await cancelled([ready])


async def _until_over(taking_part: dict[asyncio.Task[None], HostedRun], died: asyncio.Task[None]) -> None:
    """Until all runs have ended here. One that cannot go on leaves the others alone; the last failure is raised."""
    pending = set(taking_part)
    while pending:
        done, _ = await asyncio.wait([*pending, died], return_when=asyncio.FIRST_COMPLETED)
        if died in done:
            raise UserError("the network daemon (p2pd) of this node died; start the node again")
        for task in done:
            pending.remove(task)
            failure = task.exception()
            if failure is not None and (not pending or not isinstance(failure, SwarmError)):
                raise failure
            if failure is not None:
                log.error("run ended here run=%s reason=%s", taking_part[task].store.run_id.hex()[:8], failure)
