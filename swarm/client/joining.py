"""Joining: a client's place in the DHT, for commands that only ask what is there. Imports neither torch nor transformers."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from swarm.client.config import ClientConfig
from swarm.p2p.directory import Directory
from swarm.p2p.host import Host, HostConfig, running_host


@contextlib.asynccontextmanager
async def open_directory(config: ClientConfig) -> AsyncIterator[tuple[Host, Directory]]:
    """Join the swarm's DHT as a client. Raises JoinFailed."""
    async with running_host(HostConfig(listen=config.listen)) as host:
        directory = await Directory.join(
            host, list(config.initial_peers), serves=False, timeout_s=config.join_timeout_s
        )
        try:
            yield host, directory
        finally:
            await directory.close()
