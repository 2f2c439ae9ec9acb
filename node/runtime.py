"""Runtime: the life of a node, top to bottom. Read this first."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import psutil

from node.announcer import Announcer
from node.backend.step_engine import StepEngine
from node.claims import Claimant, claim_of_span
from node.config import NodeConfig
from node.device import check_device
from node.executor import Executor
from node.placement import block_rates, blocks_that_fit, choose_span
from node.precision import choose_class
from node.serving import load_engine, serve_shard
from node.shard import Shard, load_shard
from node.throughput import Throughput, measure_throughput
from swarm.allocator import return_freed_memory
from swarm.checkpoint import Checkpoint, open_checkpoint
from swarm.ending import cancelled
from swarm.errors import SwarmError, UserError
from swarm.messages import NODE_PROTOCOL, PROTOCOL_MAJOR, PROTOCOL_MINOR, SOFTWARE
from swarm.numeric_class import NUMERIC_CLASSES
from swarm.p2p.directory import Directory
from swarm.p2p.host import Host, HostConfig, running_host
from swarm.records import ShardRecord, ShardState
from swarm.signals import Signals
from swarm.span import Span

log = logging.getLogger(__name__)

T = TypeVar("T")


class Node:
    """One node process."""

    def __init__(self, config: NodeConfig) -> None:
        self.config = config
        self._executor = Executor(config.max_waiting_jobs)
        self._started_at = time.time()
        self._numeric_class = config.precision

    async def run(self) -> None:
        """Join, load, serve until SIGTERM or SIGINT, leave. Raises SwarmError with a line for the user."""
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

            checkpoint = await self._open_checkpoint(directory)
            self._numeric_class = await self._choose_class(checkpoint)
            announcer = await self._claim_span(host, directory, checkpoint)
            shard, engine, throughput = await self._load(checkpoint, announcer.record.span)
            service = serve_shard(shard, checkpoint.name, engine, self._executor, config, throughput)
            await host.serve(NODE_PROTOCOL, service.handle)

            await announcer.announce(
                state=ShardState.ONLINE,
                block_digests=shard.block_digests,
                decode_s_per_block=throughput.decode_s_per_block,
                prefill_tokens_per_s=throughput.prefill_tokens_per_s,
            )
            gc.collect()
            gc.freeze()  # the imports' million objects need not be looked at again between steps
            return_freed_memory()
            _print_ready(await host.addresses(), announcer.record, throughput, time.monotonic() - started)
            await self._serve_until(signals.stop, host, announcer)

            log.info("leaving")
            await announcer.leave()
            await service.drain(config.drain_timeout_s, signals.hurry)
            log.info("drained")

    async def _open_checkpoint(self, directory: Directory) -> Checkpoint:
        """The checkpoint to serve. An alias resolves first to what the swarm serves under that name."""
        served = await directory.find_name(self.config.model)
        sources = sorted({record.source for record in served if record.state == ShardState.ONLINE})
        return await self._on_device(
            lambda: open_checkpoint(self.config.model, prefer_sources=sources, cache_dir=self.config.cache_dir)
        )

    async def _choose_class(self, checkpoint: Checkpoint) -> str:
        config = self.config
        wanted, budget = config.precision, config.max_perplexity_change
        return await self._on_device(
            lambda: choose_class(wanted, budget, checkpoint.config, device=config.device, threads=config.threads)
        )

    async def _claim_span(self, host: Host, directory: Directory, checkpoint: Checkpoint) -> Announcer:
        """Choose the span (if not told) and announce JOINING for it; choose again if another joiner takes the same one."""
        spec = await self._on_device(lambda: checkpoint.spec)
        addresses = await host.record_addresses()
        peers_are_elsewhere = any("/127.0.0.1/" not in peer for peer in self.config.initial_peers)
        if peers_are_elsewhere and all("/127.0.0.1/" in address for address in addresses):
            log.warning(
                "others cannot reach this node: it listens on this machine only; "
                "add --listen /ip4/0.0.0.0/tcp/PORT, or --relay behind NAT"
            )
        blocks = self.config.blocks
        if blocks is not None and blocks.end > spec.num_blocks:
            raise UserError(
                f"blocks {blocks} do not exist: {checkpoint.name} has {spec.num_blocks} blocks (0:{spec.num_blocks})"
            )
        record = ShardRecord(
            peer_id=host.peer_id,
            model_name=checkpoint.name,
            source=_public_source(checkpoint.source),
            model_digest=spec.digest,
            num_blocks=spec.num_blocks,
            span=blocks or Span(0, spec.num_blocks),
            block_digests=(),
            numeric_class=self._numeric_class,
            state=ShardState.JOINING,
            started_at=self._started_at,
            expires_at=time.time() + self.config.record_lifetime_s,
            addresses=addresses,
            protocol_major=PROTOCOL_MAJOR,
            protocol_minor=PROTOCOL_MINOR,
            software=SOFTWARE,
        )
        announcer = Announcer(directory, record, self.config.record_lifetime_s)
        if blocks is not None:
            await announcer.announce()
            return announcer
        length = self._num_blocks_to_serve(checkpoint)
        await Claimant(
            host.peer_id,
            find=lambda: directory.find_blocks(spec.digest, range(spec.num_blocks)),
            choose=lambda others: choose_span(block_rates(others, spec.num_blocks), length),
            claim_of=claim_of_span,
            announce=lambda span: announcer.announce(span=span),
        ).claim()
        return announcer

    def _num_blocks_to_serve(self, checkpoint: Checkpoint) -> int:
        """As many as the user says, or as fit into memory. Raises UserError."""
        num_blocks = checkpoint.num_blocks
        length = self.config.num_blocks
        if length is None:
            budget = self.config.max_memory_bytes or int(0.6 * psutil.virtual_memory().available)
            width = NUMERIC_CLASSES[self._numeric_class].bytes_per_parameter
            sizes = [checkpoint.block_bytes(Span(b, b + 1), width) for b in range(num_blocks)]
            length = blocks_that_fit(sizes, budget - self.config.cache_bytes)
            if length == 0:
                raise UserError(
                    f"not one block of {checkpoint.name} ({max(sizes) / 2**20:.0f} MiB) fits into {budget / 2**20:.0f} MiB beside "
                    f"{self.config.cache_bytes / 2**20:.0f} MiB of cache; raise --max-memory-mib or lower --cache-mib"
                )
        if length > num_blocks:
            raise UserError(f"--num-blocks {length}: {checkpoint.name} has {num_blocks} blocks")
        return length

    async def _load(self, checkpoint: Checkpoint, span: Span) -> tuple[Shard, StepEngine, Throughput]:
        log.info("loading model=%s span=%s source=%s", checkpoint.name, span, checkpoint.source)
        config = self.config

        def load() -> tuple[Shard, StepEngine, Throughput]:
            shard = load_shard(
                checkpoint, span, precision=self._numeric_class, device=config.device, cache_dir=config.cache_dir
            )
            return shard, load_engine(shard, config), measure_throughput(shard.model, config.threads)

        return await self._on_device(load)

    async def _serve_until(self, stop: asyncio.Event, host: Host, announcer: Announcer) -> None:
        """Keep the record alive until a signal comes. Raises UserError if p2pd dies, for nothing works without it."""
        stopped = asyncio.create_task(stop.wait())
        p2pd_died = asyncio.create_task(host.wait_until_dead())
        renewal = asyncio.create_task(announcer.keep_alive())
        tasks = [stopped, p2pd_died, renewal]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if p2pd_died.done():
                raise UserError("the network daemon (p2pd) of this node died; start the node again")
            if renewal.done():
                renewal.result()
        finally:
            await cancelled(tasks)

    async def _on_device(self, function: Callable[[], T]) -> T:
        return await self._executor.run(function)


def _public_source(source: str) -> str:
    """Where the weights came from, for everybody to read: of files on this machine only the last part of the path."""
    kind, _, place = source.partition(":")
    return f"{kind}:{Path(place).name if kind in ('dir', 'gguf') else place}"[:200]


def host_config_of(config: NodeConfig) -> HostConfig:
    return HostConfig(
        listen=config.listen,
        announce=config.announce,
        identity_path=config.identity,
        relays=config.initial_peers if config.use_relay else (),
        max_streams_per_peer=config.max_sessions_per_peer + 8 * max(1, len(config.run_ids)),
    )


def _print_ready(addresses: list[str], record: ShardRecord, throughput: Throughput, ready_s: float) -> None:
    """One machine-readable line on stdout for whoever started us."""
    ready = {
        "peer_id": record.peer_id,
        "addresses": addresses,
        "model": record.model_name,
        "source": record.source,
        "span": str(record.span),
        "numeric_class": record.numeric_class,
        "threads": throughput.threads,
        "decode_ms_per_block": round(1000 * throughput.decode_s_per_block, 3),
        "prefill_tokens_per_s": round(throughput.prefill_tokens_per_s, 1),
        "ready_s": round(ready_s, 2),
        "pid": os.getpid(),
    }
    print("READY " + json.dumps(ready), flush=True)


def run_node(config: NodeConfig) -> int:
    """Run a node to its end. The exit code: 0 after SIGTERM, 1 after an error (said in one line on stderr)."""
    import uvloop

    try:
        check_device(config.device)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            if config.run_ids:
                from node.training.runtime import TrainingNode

                runner.run(TrainingNode(config).run())
            else:
                runner.run(Node(config).run())
    except SwarmError as error:
        print(f"swarm-node: {error}", file=sys.stderr)
        return 1
    return 0
