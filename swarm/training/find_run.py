"""From a run id to the run's rules: from this disk, or from the DHT, checked either way."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from swarm.errors import UserError
from swarm.p2p.directory import Directory
from swarm.run_store import RunStore


async def find_run(directory: Directory, run_id: bytes, cache_dir: Path | None, patience_s: float = 10.0) -> RunStore:
    """The run, kept on this disk from now on. Raises UserError if nobody knows it, or if what they know is not it."""
    store = RunStore.find(run_id, cache_dir)
    if store is not None:
        return store
    deadline = time.monotonic() + patience_s
    while (raw := await directory.find_run(run_id)) is None:
        if time.monotonic() > deadline:
            raise UserError(
                f"nobody in this swarm knows run {run_id.hex()}: check the id and the initial peers; its owner can bring it "
                "back with `swarm run publish`"
            )
        await asyncio.sleep(0.5)
    try:
        return RunStore.save(raw, run_id, cache_dir)
    except ValueError as error:
        raise UserError(f"the rules of run {run_id.hex()} cannot be used: {error}") from error
