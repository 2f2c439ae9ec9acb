"""Command line of the bootstrap peer: swarm-bootstrap, or python -m bootstrap."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from swarm.flags import (
    announce_option,
    config_option,
    configure_logging,
    initial_peers_option,
    listen_option,
    log_level_option,
)


@click.command(context_settings={"auto_envvar_prefix": "SHARDSWARM_BOOTSTRAP", "help_option_names": ["-h", "--help"]})
@config_option
@listen_option
@announce_option
@click.option(
    "--identity",
    type=click.Path(path_type=Path),
    required=True,
    help="File with the key; made if missing. Keeps the address the same after a restart.",
)
@initial_peers_option(required=False)
@log_level_option("info")
def bootstrap(
    listen: tuple[str, ...], announce: tuple[str, ...], identity: Path, initial_peers: tuple[str, ...], log_level: str
) -> None:
    """Run the peer by which others find the swarm: a member of the DHT, and a relay for nodes behind NAT.

    Prints "READY {json}" on stdout, and on stderr the command for joining. Give --initial-peers to be a further bootstrap peer of a
    swarm that exists.
    """
    configure_logging(log_level)
    from bootstrap.runtime import run_bootstrap
    from swarm.p2p.host import HostConfig

    sys.exit(
        run_bootstrap(
            HostConfig(listen=listen, announce=announce, identity_path=identity, is_relay=True), initial_peers
        )
    )


def main() -> None:
    bootstrap(prog_name="swarm-bootstrap")
