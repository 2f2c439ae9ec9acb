"""Command line of the node: swarm-node, or python -m node."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from node.config import PRECISIONS, NodeConfig
from swarm.allocator import share_one_arena
from swarm.errors import SwarmError
from swarm.flags import (
    BlocksType,
    RunIdType,
    announce_option,
    config_option,
    configure_logging,
    initial_peers_option,
    listen_option,
    log_level_option,
)
from swarm.light_start import leave_out, quick_imports
from swarm.openmp import spin_shortly
from swarm.training.member_config import MembershipConfig

MIB = 2**20
_FIELD_OF = {
    "run": "run_ids",
    "relay": "use_relay",
    "sessions": "serves_sessions",
    "session_idle": "session_idle_s",
    "stash_expiry": "stash_expiry_s",
    "join_timeout": "join_timeout_s",
    "drain_timeout": "drain_timeout_s",
    "record_lifetime": "record_lifetime_s",
}


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Host a part of a language model for a shardswarm."""


@cli.command(context_settings={"auto_envvar_prefix": "SHARDSWARM_NODE", "show_default": True})
@config_option
@click.option("--model", default="", help="Alias (smollm2-135m), hub id, directory or GGUF file.")
@click.option(
    "--run",
    type=RunIdType(),
    multiple=True,
    help="Train a stage of this run instead of serving a model's blocks. May be given several times.",
)
@initial_peers_option(required=False)
@click.option("--blocks", type=BlocksType(), help="Blocks to host. Default: those that the swarm serves worst.")
@click.option(
    "--num-blocks", type=int, help="How many blocks to host when --blocks is not given. Default: what fits the memory."
)
@listen_option
@announce_option
@click.option("--relay", is_flag=True, help="Be reachable through the initial peers (behind NAT).")
@click.option(
    "--identity",
    type=click.Path(path_type=Path),
    help="File with this node's key; made if missing. Default: a new one each time.",
)
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    default="auto",
    help="Numeric class of the blocks; auto: the fastest one here that keeps to --max-perplexity-change. With --run: of sessions.",
)
@click.option(
    "--max-perplexity-change",
    type=float,
    default=0.1,
    metavar="PERCENT",
    help="What --precision auto may cost: 0.1 allows fp32 and bf16, 0.5 int8, too, 8 also int4.",
)
@click.option("--device", default="cpu", help="cpu, cuda or cuda:NUMBER.")
@click.option(
    "--threads",
    type=int,
    help="Threads for computing. Default: measured at start, and followed as the machine gets busy.",
)
@click.option("--cache-mib", type=int, default=512, help="Budget for the KV caches of all sessions.")
@click.option(
    "--max-memory-mib",
    type=int,
    help="Weights and caches together, when choosing blocks. Default: 60 % of what is free.",
)
@click.option(
    "--sessions/--no-sessions",
    default=True,
    help="With --run: also serve generation, with copies of its stage's weights.",
)
@click.option(
    "--donor-mib",
    type=float,
    default=32.0,
    help="With --run: MiB per second, 1 or more, that it gives of its states to newcomers, copies and exports, all together.",
)
@click.option(
    "--copies/--no-copies",
    default=True,
    help="With --run: also keep copies of other stages' checkpoints that are on one disk only.",
)
@click.option(
    "--serving-share",
    type=float,
    default=0.5,
    help="With --run: part of the computing time that sessions get as long as both they and the training want it.",
)
@click.option("--max-sessions", type=int, default=64)
@click.option("--max-sessions-per-peer", type=int, default=16)
@click.option(
    "--session-idle",
    type=int,
    default=300,
    metavar="SECONDS",
    help="Close sessions that are silent for so long.",
)
@click.option(
    "--stash-mib",
    type=int,
    default=1024,
    help="Budget for what is kept of microbatches between forward and backward; 0: compute them again.",
)
@click.option(
    "--stash-expiry", type=int, default=120, metavar="SECONDS", help="Drop microbatches without a backward for so long."
)
@click.option("--max-microbatch-tokens", type=int, default=4096, help="Rows x tokens that one microbatch may have.")
@click.option("--join-timeout", type=float, default=15.0, metavar="SECONDS")
@click.option(
    "--drain-timeout",
    type=float,
    default=10.0,
    metavar="SECONDS",
    help="After SIGTERM let sessions finish for so long.",
)
@click.option(
    "--record-lifetime",
    type=float,
    default=60.0,
    metavar="SECONDS",
    help="How long others believe in this node after its last word.",
)
@click.option("--cache-dir", type=click.Path(path_type=Path), help="Where converted models are kept.")
@log_level_option("info")
def run(
    log_level: str, cache_mib: int, stash_mib: int, max_memory_mib: int | None, donor_mib: float, **flags: Any
) -> None:
    """Join a swarm and serve blocks of a model, or train a stage of a run, until SIGTERM (or Ctrl-C).

    Prints "READY {json}" on stdout when it can serve.
    """
    try:
        # Parameters are called as their flags, since environment and file use these names; some fields say their unit, too.
        renamed = {_FIELD_OF.get(name, name): value for name, value in flags.items()}
        config = NodeConfig(
            cache_bytes=cache_mib * MIB,
            stash_bytes=stash_mib * MIB,
            max_memory_bytes=None if max_memory_mib is None else max_memory_mib * MIB,
            membership=MembershipConfig(donor_mib_per_s=donor_mib),
            **renamed,
        )
    except SwarmError as error:
        raise click.UsageError(str(error)) from error
    configure_logging(log_level)
    spin_shortly()
    if config.run_ids:
        share_one_arena()
    # oneDNN keeps a kernel of 0.6 MB for each shape of linear and each number of rows that it was used with: 1024 unless told otherwise,
    # and torch as many once more. A kernel is made again in some 0.4 ms.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "1")
    with quick_imports():
        from node.runtime import run_node

        if config.run_ids:
            import node.training.runtime  # noqa: F401  which run_node would import
    sys.exit(run_node(config))


def main() -> None:
    leave_out()
    cli(prog_name="swarm-node")
