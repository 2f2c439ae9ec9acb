"""LiveModels: sessions and microbatches of anybody on a training node, with frozen copies of its stage's weights.

A copy is made of each state that the node saves; the newest two are served, as models of their own (RunModel). What was opened with
an older one ends when that goes.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import logging
import time

from torch import Tensor

from node.announcer import Announcer
from node.backend.step_engine import StepEngine
from node.config import NodeConfig
from node.device_share import Purpose
from node.executor import Executor
from node.job_queue import JobKind
from node.precision import class_of_run
from node.service import NodeService
from node.serving import load_engine, serve_shard
from node.shard import Shard, load_shard
from node.throughput import Throughput, measure_throughput
from node.training.frozen_blocks import FrozenBlocks
from swarm.allocator import return_freed_memory
from swarm.ending import cancelled
from swarm.epoch.messages import Place
from swarm.errors import SwarmError
from swarm.messages import PROTOCOL_MAJOR, PROTOCOL_MINOR, SOFTWARE
from swarm.records import ShardRecord, ShardState
from swarm.run_store import RunStore
from swarm.training.adapters import AdapterLayout
from swarm.training.layout import Layout, layout_of
from swarm.training.run_host import RunHost
from swarm.training.run_model import RunModel

log = logging.getLogger(__name__)

NUM_LIVE = 2


@dataclasses.dataclass(frozen=True, slots=True)
class _Live:
    place: Place
    service: NodeService
    announcer: Announcer
    renewal: asyncio.Task[None]


class LiveModels:
    """The models that a training node serves. `close` when it leaves."""

    def __init__(
        self,
        run_host: RunHost,
        store: RunStore,
        stage: int,
        executor: Executor,
        config: NodeConfig,
        frozen: FrozenBlocks,
    ) -> None:
        """frozen: where the blocks of adapter runs are."""
        self._run_host, self._store, self._stage, self._frozen = run_host, store, stage, frozen
        self._executor, self._config = executor, config
        self._live: collections.OrderedDict[bytes, _Live] = collections.OrderedDict()
        self._publishing: asyncio.Task[None] | None = None
        self._throughput: Throughput | None = None
        self._layout: Layout | None = None
        self._started_at = time.time()

    def find(self, model_digest: bytes | None = None) -> NodeService | None:
        """The service of a model, or of the newest one."""
        if model_digest is None:
            return next(reversed(self._live.values())).service if self._live else None
        live = self._live.get(model_digest)
        return None if live is None else live.service

    def begin(self, place: Place, values: Tensor, is_checkpoint: bool) -> None:
        """Serve these weights, float32 [size], from soon on; they are ours. Left out while earlier ones are still being made ready.

        Only checkpoints are served: of other places not everybody has the weights.
        """
        is_free = self._publishing is None or self._publishing.done()
        if self._config.serves_sessions and is_checkpoint and is_free:
            self._publishing = asyncio.create_task(self._publish(place, values))

    async def _publish(self, place: Place, values: Tensor) -> None:
        span, config = self._store.spec.stages[self._stage], self._config
        precision = class_of_run(config.precision, self._store.spec)

        def load() -> tuple[Shard, StepEngine, str]:
            self._layout = self._layout or layout_of(self._store.spec)
            model = RunModel(self._store, place, {self._stage: values}, self._layout)
            if isinstance(self._layout, AdapterLayout):
                shard = self._frozen.adapted_shard(model, self._layout, self._stage, precision, config.device)
            else:
                shard = load_shard(model, span, precision=precision, device=config.device)
            if self._throughput is None:
                self._throughput = measure_throughput(shard.model, config.threads)
            engine = load_engine(shard, config, num_models=NUM_LIVE)
            return_freed_memory()
            return shard, engine, model.name

        try:
            shard, engine, name = await self._executor.run(load, JobKind.BACKWARD)
        except SwarmError as error:
            log.warning("weights not served epoch=%d reason=%s", place.epoch, error)
            return
        if shard.model_digest in self._live:
            return
        assert self._throughput is not None
        service = serve_shard(shard, name, engine, self._executor, config, self._throughput, num_models=NUM_LIVE)
        announcer = Announcer(self._run_host.directory, await self._record(shard, name), config.record_lifetime_s)
        await announcer.announce()
        renewal = asyncio.create_task(announcer.keep_alive())
        self._live[shard.model_digest] = _Live(place, service, announcer, renewal)
        used_s = self._executor.share.used_s
        log.info(
            "serving the weights of epoch=%d device_s_serving=%.1f device_s_training=%.1f",
            place.epoch, used_s[Purpose.SERVING], used_s[Purpose.TRAINING],
        )  # fmt: skip
        while len(self._live) > NUM_LIVE:
            _, oldest = self._live.popitem(last=False)
            await self._retire(oldest, place)

    async def _record(self, shard: Shard, name: str) -> ShardRecord:
        assert self._throughput is not None
        return ShardRecord(
            peer_id=self._run_host.peer_id,
            model_name=name,
            source=f"run:{self._store.run_id.hex()}",
            model_digest=shard.model_digest,
            num_blocks=self._store.spec.num_blocks,
            span=shard.span,
            block_digests=shard.block_digests,
            numeric_class=shard.numeric_class,
            state=ShardState.ONLINE,
            started_at=self._started_at,
            expires_at=time.time() + self._config.record_lifetime_s,
            decode_s_per_block=self._throughput.decode_s_per_block,
            prefill_tokens_per_s=self._throughput.prefill_tokens_per_s,
            addresses=await self._run_host.host.record_addresses(),
            protocol_major=PROTOCOL_MAJOR,
            protocol_minor=PROTOCOL_MINOR,
            software=SOFTWARE,
        )

    async def _retire(self, live: _Live, successor: Place | None) -> None:
        what = "this node leaves" if successor is None else f"the run is at epoch {successor.epoch} by now"
        live.service.dismiss(f"the weights of epoch {live.place.epoch} are not served here any more: {what}")
        await cancelled([live.renewal])
        await live.announcer.leave()

    async def close(self) -> None:
        if self._publishing is not None:
            await cancelled([self._publishing])
        while self._live:
            await self._retire(self._live.popitem()[1], None)
