"""SwarmClient: a client's place in the swarm. The async API; swarm.client.blocking is the same for code without an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterator

from swarm.checkpoint import Checkpoint, open_checkpoint
from swarm.client.config import ClientConfig
from swarm.client.joining import open_directory
from swarm.client.microbatch import RemoteBlocks
from swarm.client.router import Router
from swarm.client.run_client import open_run_model
from swarm.client.session import Session
from swarm.ends import Ends
from swarm.errors import RouteBroken
from swarm.numeric_class import head_class_for
from swarm.p2p.directory import Directory
from swarm.p2p.host import Host
from swarm.records import ShardRecord, ShardState
from swarm.training.run_model import RunModel, parse_run_model

log = logging.getLogger(__name__)


class SwarmClient:
    """Connected to a swarm, for one model. Made by `async with open_swarm(config)`."""

    def __init__(
        self,
        host: Host,
        directory: Directory,
        checkpoint: Checkpoint | RunModel,
        ends: Ends,
        router: Router,
        config: ClientConfig,
    ) -> None:
        self.host, self.directory, self.config = host, directory, config
        self.checkpoint, self.ends, self.router = checkpoint, ends, router
        self.blocks = RemoteBlocks(host, router, config)

    def session(self, *, batch: int = 1, max_length: int) -> Session:
        """A session of `batch` rows of at most max_length tokens; open it with `async with`."""
        return Session(self.host, self.router, self.config, batch=batch, max_length=max_length)


@contextlib.asynccontextmanager
async def open_swarm(config: ClientConfig) -> AsyncIterator[SwarmClient]:
    """Join, open the model's checkpoint and load its ends.

    An alias stands for the weights that most nodes of the swarm serve under that name.
    Raises JoinFailed, ModelNotFound or another UserError.
    """
    async with open_directory(config) as (host, directory):
        checkpoint: Checkpoint | RunModel
        if (run := parse_run_model(config.model)) is not None:
            checkpoint, ends = await open_run_model(host, directory, *run, config)
            router = Router(directory, checkpoint.spec, None, config)
        else:
            checkpoint, ends, router = await _open_served(directory, config)
        client = SwarmClient(host, directory, checkpoint, ends, router, config)
        try:
            yield client
        finally:
            await client.blocks.aclose()


async def _open_served(directory: Directory, config: ClientConfig) -> tuple[Checkpoint, Ends, Router]:
    served = await _find_name(directory, config, config.model)
    sources = [source for source, _ in Counter(r.source for r in served if r.state == ShardState.ONLINE).most_common()]

    def load() -> tuple[Checkpoint, Ends, list[bytes] | None]:
        checkpoint = open_checkpoint(config.model, prefer_sources=sources, cache_dir=config.cache_dir)
        return checkpoint, Ends(checkpoint), checkpoint.expected_digests()

    checkpoint, ends, expected = await asyncio.to_thread(load)
    namesakes = served if checkpoint.name == config.model else await _find_name(directory, config, checkpoint.name)
    classes = {record.numeric_class for record in namesakes if record.state == ShardState.ONLINE}
    head_class = head_class_for(classes) if config.precision == "auto" else config.precision
    await asyncio.to_thread(ends.quicken_head, head_class)
    return checkpoint, ends, Router(directory, checkpoint.spec, expected, config, namesakes)


async def _find_name(directory: Directory, config: ClientConfig, name: str) -> list[ShardRecord]:
    try:
        async with asyncio.timeout(config.request_timeout_s):
            return await directory.find_name(name)
    except TimeoutError:
        raise RouteBroken(
            f"the directory did not answer within {config.request_timeout_s:.0f} s; check the network and the initial peers"
        ) from None
