"""HostedRun: what a node process is in one run: a replica of a stage, at times a keeper of the ends, and a server of its weights."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass
from typing import Any

from node.claims import Claimant, claim_of_stage
from node.config import NodeConfig
from node.device_share import Purpose
from node.executor import Executor
from node.microbatches import microbatch_limits_of
from node.throughput import measure_throughput
from node.training.copier import Copier
from node.training.device_work import DeviceWork
from node.training.frozen_blocks import FrozenBlocks
from node.training.keeper import Keeper
from node.training.live import LiveModels
from node.training.placement import choose_stage, withdrawn
from node.training.service import StageService
from node.training.stage import TrainableStage
from swarm.ending import cancelled
from swarm.errors import UserError
from swarm.log_label import log_label
from swarm.member_record import MemberRecord
from swarm.messages import PROTOCOL_MAJOR, PROTOCOL_MINOR, SOFTWARE
from swarm.records import ShardState
from swarm.run_store import RunStore
from swarm.training.checkpoints import Checkpoints, Resumed, saved_stages
from swarm.training.copies import CopyStore
from swarm.training.initial import open_initial_weights
from swarm.training.membership import Membership
from swarm.training.run_host import RunHost

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class NodeParts:
    """What the runs of one process share."""

    config: NodeConfig
    """With the part of each budget that one run gets."""
    run_host: RunHost
    executor: Executor
    frozen: FrozenBlocks


class HostedRun:
    """`load`, serve `service`, then `take_part`."""

    def __init__(
        self,
        parts: NodeParts,
        store: RunStore,
        stage: TrainableStage,
        stage_number: int,
        checkpoints: Checkpoints,
        copies: CopyStore,
        resumed: Resumed | None,
    ) -> None:
        config, executor = parts.config, parts.executor
        self.store, self.stage, self.stage_number = store, stage, stage_number
        self.is_ready = asyncio.Event()
        self._parts, self._checkpoints, self._resumed = parts, checkpoints, resumed
        self.membership = Membership(
            parts.run_host, store, stage_number, stage.parameters, DeviceWork(executor),
            is_reachable=not config.use_relay, checkpoints=checkpoints, copies=copies, resumed=resumed,
            config=config.membership,
        )  # fmt: skip
        self._copier = Copier(parts.run_host, store, self.membership, copies) if config.copies else None
        self._live = LiveModels(parts.run_host, store, stage_number, executor, config, parts.frozen)
        checkpoints.on_saved.append(self._live.begin)
        self.service = StageService(stage, self.membership, executor, microbatch_limits_of(config), self._live)
        self.membership.on_commit.append(lambda commit: self.service.forget_graphs())
        self._keeper = Keeper(parts.run_host, store, executor, config.membership, is_reachable=not config.use_relay)

    @classmethod
    async def load(cls, parts: NodeParts, store: RunStore) -> HostedRun:
        """Choose a stage and load it, as it began or as this disk has it. Raises UserError."""
        _check_limits(parts.config, store)
        number = await _choose_stage(parts, store)

        def load() -> tuple[TrainableStage, float, Checkpoints, CopyStore, Resumed | None]:
            log.info("loading run=%s stage=%d", store.run_id.hex()[:8], number)
            source = open_initial_weights(store.spec)
            stage = TrainableStage(source, store.spec, number, parts.config.device, parts.frozen)
            # A backward takes twice a forward's time.
            tokens_per_s = measure_throughput(stage.model, parts.config.threads).prefill_tokens_per_s / 3
            copies = CopyStore(store, number)
            checkpoints = Checkpoints(store, number, stage.parameters.size)
            return stage, tokens_per_s, checkpoints, copies, checkpoints.resume(stage.parameters)

        stage, tokens_per_s, checkpoints, copies, resumed = await parts.executor.run(
            load, purpose=Purpose.TRAINING, is_own=True
        )
        hosted = cls(parts, store, stage, number, checkpoints, copies, resumed)
        hosted.membership.tokens_per_s = tokens_per_s
        return hosted

    async def take_part(self, stop: asyncio.Event) -> None:
        """Train, keep and serve until `stop`, and leave. Raises what made it impossible to go on."""
        if len(self._parts.config.run_ids) > 1:
            log_label.set(f"run={self.store.run_id.hex()[:8]} ")
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(self._live.close)
            await self._serve_saved()
            await stack.enter_async_context(self.membership.running())
            self.is_ready.set()
            stopped = asyncio.create_task(stop.wait())
            besides = [asyncio.create_task(part.run()) for part in (self._keeper, self._copier) if part is not None]
            try:
                pending = {stopped, *besides}
                while not stopped.done():
                    done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        task.result()  # its bugs; else it has nothing to do any more
            finally:
                await cancelled([stopped, *besides])

    async def _serve_saved(self) -> None:
        """The newest checkpoint on this disk, so that sessions need not wait for the next one."""
        checkpoints, parameters = self._checkpoints, self.stage.parameters
        place = checkpoints.newest_checkpoint()
        if place is None or not self._parts.config.serves_sessions:
            return
        if self._resumed is not None and self._resumed.place == place:
            values = await self._parts.executor.run(parameters.state.values.clone, is_own=True)
            self._live.begin(place, values, is_checkpoint=True)
        elif (loaded := await checkpoints.load(place, parameters)) is not None:
            self._live.begin(place, loaded[0].values, is_checkpoint=True)

    def as_json(self) -> dict[str, Any]:
        """For the READY line."""
        return {
            "run": self.store.run_id.hex(),
            "stage": self.stage_number,
            "span": str(self.stage.span),
            "num_parameters": self.stage.parameters.size,
        }


def _check_limits(config: NodeConfig, store: RunStore) -> None:
    needed, granted = store.spec.microbatch * store.spec.sequence_length, config.max_microbatch_tokens
    if needed > granted:
        raise UserError(
            f"this run's microbatches have {store.spec.microbatch} x {store.spec.sequence_length} tokens, this node takes "
            f"{granted}: give --max-microbatch-tokens {needed}, if the memory is there"
        )


async def _choose_stage(parts: NodeParts, store: RunStore) -> int:
    """The stage with the least throughput, unless the user named blocks, or some are here already."""
    stages, wanted = store.spec.stages, parts.config.blocks
    if wanted is not None:
        if wanted not in stages:
            raise UserError(
                f"--blocks {wanted} is no stage of run {store.run_id.hex()[:8]}; its stages are {', '.join(map(str, stages))}"
            )
        return stages.index(wanted)
    directory, own = parts.run_host.directory, parts.run_host.peer_id
    here = saved_stages(store) or parts.frozen.stages_here(store.spec)
    addresses = await parts.run_host.host.record_addresses()
    claims: list[MemberRecord] = []

    async def announce(stage: int) -> None:
        if claims and claims[-1].stage != stage:
            await directory.publish_member(withdrawn(claims[-1]))
        claim = MemberRecord(
            peer_id=own, run_id=store.run_id, stage=stage, state=ShardState.JOINING, epoch=0, lineage=b"",
            expires_at=time.time() + parts.config.membership.record_lifetime_s, addresses=addresses, software=SOFTWARE,
            protocol_major=PROTOCOL_MAJOR, protocol_minor=PROTOCOL_MINOR,
        )  # fmt: skip
        claims.append(claim)
        await directory.publish_member(claim)

    return await Claimant(
        own,
        find=lambda: directory.find_members(store.run_id, range(len(stages))),
        choose=lambda others: choose_stage(others, len(stages), here),
        claim_of=claim_of_stage,
        announce=announce,
    ).claim()
