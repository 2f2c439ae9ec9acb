"""Runtime: the life of a bootstrap peer. It keeps records and relays connections; it never sees weights or tokens."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys

from swarm.errors import SwarmError, UserError
from swarm.p2p.directory import Directory
from swarm.p2p.host import HostConfig, running_host

log = logging.getLogger(__name__)

JOIN_TIMEOUT_S = 15.0


async def serve_bootstrap(config: HostConfig, initial_peers: tuple[str, ...]) -> None:
    """Serve until SIGTERM or SIGINT. Raises SwarmError with a line for the user."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with running_host(config) as host:
        # SHARDSWARM_INITIAL_PEERS names this very peer on the machine where it was first started.
        others = [peer for peer in initial_peers if not peer.endswith(f"/p2p/{host.peer_id}")]
        directory = await Directory.join(host, others, serves=True, timeout_s=JOIN_TIMEOUT_S)
        addresses = await host.addresses()
        print("READY " + json.dumps({"peer_id": host.peer_id, "addresses": addresses, "pid": os.getpid()}), flush=True)
        print(_how_to_join(addresses), file=sys.stderr, flush=True)
        stopped, p2pd_died = asyncio.create_task(stop.wait()), asyncio.create_task(host.wait_until_dead())
        await asyncio.wait([stopped, p2pd_died], return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        p2pd_died.cancel()
        await asyncio.wait([stopped, p2pd_died])
        if not stop.is_set():
            raise UserError("the network daemon (p2pd) of this bootstrap peer died; start it again")
        await directory.close()


def _how_to_join(addresses: list[str]) -> str:
    """The commands for joining, with an address that other machines can use if there is one."""
    elsewhere = [address for address in addresses if "/127.0.0.1/" not in address]
    address = (elsewhere or addresses)[0]
    listen = "--listen /ip4/0.0.0.0/tcp/0 " if elsewhere else ""
    return (
        f"Host blocks:  swarm-node run --model smollm2-135m {listen}--initial-peers {address}\n"
        f'Generate:     swarm generate --model smollm2-135m --initial-peers {address} "The capital of France is"'
    )


def run_bootstrap(config: HostConfig, initial_peers: tuple[str, ...]) -> int:
    """Run to the end. The exit code: 0 after SIGTERM, 1 after an error (said in one line on stderr)."""
    import uvloop

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve_bootstrap(config, initial_peers))
    except SwarmError as error:
        print(f"swarm-bootstrap: {error}", file=sys.stderr)
        return 1
    return 0
