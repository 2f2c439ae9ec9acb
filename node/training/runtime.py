"""TrainingNode: the life of a node that hosts a stage of a training run, top to bottom."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import time

from node.config import NodeConfig
from node.device_share import DeviceShare, Purpose
from node.executor import Executor
from node.microbatches import microbatch_limits_of
from node.runtime import host_config_of
from node.throughput import measure_throughput
from node.training.device_work import DeviceWork
from node.training.frozen_blocks import FrozenBlocks
from node.training.keeper import Keeper
from node.training.live import LiveModels
from node.training.placement import choose_stage
from node.training.service import StageService
from node.training.stage import TrainableStage
from swarm.ending import cancelled
from swarm.errors import UserError
from swarm.messages import NODE_PROTOCOL
from swarm.p2p.directory import Directory
from swarm.p2p.host import Host, running_host
from swarm.run_store import RunStore
from swarm.signals import Signals
from swarm.training.checkpoints import Checkpoints, Resumed, saved_stages
from swarm.training.find_run import find_run
from swarm.training.initial import open_initial_weights
from swarm.training.membership import Membership
from swarm.training.parameters import StageParameters
from swarm.training.run_host import run_host

log = logging.getLogger(__name__)


class TrainingNode:
    """One node process in a run."""

    def __init__(self, config: NodeConfig) -> None:
        assert config.run_id is not None
        self.config, self.run_id = config, config.run_id
        self._frozen = FrozenBlocks()
        self._executor = Executor(config.max_waiting_jobs, DeviceShare(config.serving_share))

    async def run(self) -> None:
        """Join, take a stage, train until SIGTERM or SIGINT, leave. Raises SwarmError with a line for the user."""
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
            store = await find_run(directory, self.run_id, config.cache_dir)
            self._check_limits(store)
            stage_number = await self._choose(directory, store)
            stage, tokens_per_s = await self._executor.run(
                lambda: self._load(store, stage_number), purpose=Purpose.TRAINING
            )
            shared = await stack.enter_async_context(run_host(host, directory))
            checkpoints = Checkpoints(store, stage_number, stage.parameters.size)
            resumed = await self._executor.run(lambda: checkpoints.resume(stage.parameters), purpose=Purpose.TRAINING)
            membership = Membership(
                shared, store, stage_number, stage.parameters, DeviceWork(self._executor),
                is_reachable=not config.use_relay, checkpoints=checkpoints, resumed=resumed, config=config.membership,
            )  # fmt: skip
            membership.tokens_per_s = tokens_per_s
            live = LiveModels(shared, store, stage_number, self._executor, config, self._frozen)
            stack.push_async_callback(live.close)
            checkpoints.on_saved.append(live.begin)
            await self._serve_saved(live, checkpoints, stage.parameters, resumed)
            service = StageService(stage, membership, self._executor, microbatch_limits_of(config), live)
            membership.on_commit.append(lambda commit: service.forget_graphs())
            await host.serve(NODE_PROTOCOL, service.handle)
            await stack.enter_async_context(membership.running())
            gc.collect()
            gc.freeze()
            self._print_ready(await host.addresses(), stage_number, stage, host, time.monotonic() - started)
            keeper = Keeper(shared, store, self._executor, config.membership, is_reachable=not config.use_relay)
            await self._train_until(signals.stop, host, keeper)
            log.info("leaving")

    def _check_limits(self, store: RunStore) -> None:
        needed, granted = store.spec.microbatch * store.spec.sequence_length, self.config.max_microbatch_tokens
        if needed > granted:
            raise UserError(
                f"this run's microbatches have {store.spec.microbatch} x {store.spec.sequence_length} tokens, this node takes "
                f"{granted}: give --max-microbatch-tokens {needed}, if the memory is there"
            )

    async def _choose(self, directory: Directory, store: RunStore) -> int:
        """The stage with the least throughput, unless the user named blocks."""
        stages = store.spec.stages
        if self.config.blocks is not None:
            if self.config.blocks not in stages:
                raise UserError(
                    f"--blocks {self.config.blocks} is no stage of this run; its stages are {', '.join(map(str, stages))}"
                )
            return stages.index(self.config.blocks)
        members = await directory.find_members(self.run_id, range(len(stages)))
        return choose_stage(members, len(stages), saved_stages(store))

    def _load(self, store: RunStore, number: int) -> tuple[TrainableStage, float]:
        """The stage, and about how many tokens per second it trains: a backward takes twice a forward's time."""
        log.info("loading run=%s stage=%d", self.run_id.hex()[:8], number)
        stage = TrainableStage(open_initial_weights(store.spec), store.spec, number, self.config.device, self._frozen)
        return stage, measure_throughput(stage.model, self.config.threads).prefill_tokens_per_s / 3

    async def _serve_saved(
        self, live: LiveModels, checkpoints: Checkpoints, parameters: StageParameters, resumed: Resumed | None
    ) -> None:
        """The newest checkpoint on this disk, so that sessions need not wait for the next one."""
        place = next((place for place in checkpoints.places if checkpoints.is_checkpoint(place)), None)
        if place is None or not self.config.serves_sessions:
            return
        if resumed is not None and resumed.place == place:
            live.begin(place, await self._executor.run(parameters.state.values.clone), is_checkpoint=True)
        elif (loaded := await checkpoints.load(place, parameters)) is not None:
            live.begin(place, loaded[0].values, is_checkpoint=True)

    async def _train_until(self, stop: asyncio.Event, host: Host, keeper: Keeper) -> None:
        stopped, died = asyncio.create_task(stop.wait()), asyncio.create_task(host.wait_until_dead())
        keeping = asyncio.create_task(keeper.run())
        try:
            await asyncio.wait([stopped, died, keeping], return_when=asyncio.FIRST_COMPLETED)
            if keeping.done():
                keeping.result()  # its bugs; else it had nothing to keep
                await asyncio.wait([stopped, died], return_when=asyncio.FIRST_COMPLETED)
            if died.done():
                raise UserError("the network daemon (p2pd) of this node died; start the node again")
        finally:
            await cancelled([stopped, died, keeping])

    def _print_ready(
        self, addresses: list[str], number: int, stage: TrainableStage, host: Host, ready_s: float
    ) -> None:
        ready = {
            "peer_id": host.peer_id,
            "addresses": addresses,
            "run": self.run_id.hex(),
            "stage": number,
            "span": str(stage.span),
            "num_parameters": stage.parameters.size,
            "serving_share": self._executor.share.of[Purpose.SERVING],
            "ready_s": round(ready_s, 2),
            "pid": os.getpid(),
        }
        print("READY " + json.dumps(ready), flush=True)
