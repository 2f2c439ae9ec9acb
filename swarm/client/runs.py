"""The rules of runs and the DHT, for `swarm run`: publish them, fetch them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from swarm.client.config import ClientConfig
from swarm.client.joining import open_directory
from swarm.errors import RouteBroken, UserError
from swarm.p2p.directory import Directory
from swarm.p2p.host import Host
from swarm.records import MAX_LIFETIME_S
from swarm.run_spec import DataKind
from swarm.run_store import RunStore
from swarm.training.find_run import find_run

if TYPE_CHECKING:
    from swarm.training.run_folder import Restored

Answer = TypeVar("Answer")

_JOIN_TIMEOUT_S = 15.0


def publish_run(store: RunStore, initial_peers: Sequence[str], timeout_s: float) -> None:
    """Put the rules of a run into the DHT, for five minutes. Raises JoinFailed, or another UserError, in time."""

    async def publish(_: Host, directory: Directory) -> bool:
        return await directory.publish_run(store.raw, lifetime_s=MAX_LIFETIME_S)

    try:
        taken = in_swarm(initial_peers, timeout_s, publish)
    except UserError as error:
        raise UserError(f"run {store.run_id.hex()} is kept here but was not published: {error}") from error
    if not taken:
        raise UserError(
            f"no peer took the rules of run {store.run_id.hex()}: check that they run the same software and that this machine's clock is right"
        )


def fetch_run(run_id: bytes, initial_peers: Sequence[str], timeout_s: float, cache_dir: Path | None) -> RunStore:
    """The run from the DHT; it is kept. Raises UserError if nobody knows it, or JoinFailed, in time."""
    if not initial_peers:
        raise UserError(
            f"run {run_id.hex()} is not kept on this machine: give --initial-peers to look for it in the swarm"
        )
    return in_swarm(
        initial_peers, timeout_s, lambda _, directory: find_run(directory, run_id, cache_dir, patience_s=0.0)
    )


def in_swarm(
    initial_peers: Sequence[str], timeout_s: float, ask: Callable[[Host, Directory], Awaitable[Answer]]
) -> Answer:
    """What `ask` finds in the swarm, joined as a client. Raises JoinFailed, RouteBroken if it takes too long, or as `ask`."""
    config = ClientConfig(
        model="any", initial_peers=tuple(initial_peers), join_timeout_s=min(_JOIN_TIMEOUT_S, timeout_s)
    )

    async def run() -> Answer:
        async with open_directory(config) as (host, directory):
            try:
                async with asyncio.timeout(timeout_s):
                    return await ask(host, directory)
            except TimeoutError:
                raise RouteBroken(
                    f"the directory did not answer within {timeout_s:.0f} s; try another initial peer"
                ) from None

    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run())


def next_commands(store: RunStore, initial_peer: str) -> str:
    """What to type now, on this machine and on others."""
    run_id, spec = store.run_id.hex(), store.spec
    data = " --data FILE-OR-FOLDER" if spec.data.kind is DataKind.OWN else f" --data {spec.data.source}"
    if spec.held_out is not None:
        data += f" --held-out {spec.held_out.source}"
    return (
        f"Hold a stage:  swarm-node run --run {run_id} --initial-peers {initial_peer}\n"
        f"Train:         swarm train {run_id}{data} --initial-peers {initial_peer}\n"
        f"Its rules:     swarm run show {run_id} --initial-peers {initial_peer}"
    )


def commands_to_go_on(restored: Restored, initial_peer: str) -> str:
    """What to type where a run was restored."""
    store, spec = restored.store, restored.store.spec
    run_id, peers = store.run_id.hex(), f"--initial-peers {initial_peer}"
    lines = [f"epoch {restored.place.epoch} is here; start on this machine, for others to join from anywhere:"]
    for stage in restored.stages:
        if stage == spec.ends_stage:
            lines.append(f"The ends, and train:  swarm train {run_id} {peers}")
        else:
            blocks = f"--blocks {spec.stages[stage]}"
            lines.append(f"Stage {stage}:  swarm-node run --run {run_id} {blocks} {peers}")
    others = [stage for stage in range(spec.num_stages) if stage not in restored.stages]
    if others:
        names = ", ".join("ends" if stage == spec.ends_stage else str(stage) for stage in others)
        lines.append(f"Restore elsewhere, with --stage:  {names}")
    return "\n".join(lines)
