"""A run as a model: which of its saved weights are served, and their ends."""

from __future__ import annotations

import asyncio
import logging
import time

from swarm.client.config import ClientConfig
from swarm.ends import Ends
from swarm.epoch.messages import Place
from swarm.errors import PeerFailed, UserError
from swarm.p2p.directory import Directory
from swarm.p2p.host import Host
from swarm.records import ShardState
from swarm.run_store import RunStore
from swarm.training.artifacts import fetch_artifacts
from swarm.training.find_run import find_run
from swarm.training.layout import layout_of
from swarm.training.rollback import saved_by_stage
from swarm.training.run_model import RunModel, run_model_digest
from swarm.training.saved_transfer import donors_of, fetch_saved

log = logging.getLogger(__name__)

_LOOK_AGAIN_S = 0.5


async def served_places(directory: Directory, store: RunStore) -> list[Place]:
    """Of which places all blocks are served, and the ends are on some disk; the newest first."""
    spec = store.spec
    records = await directory.find_members(store.run_id, range(spec.num_stages))
    saved = saved_by_stage(records)
    places = sorted(saved.get(spec.ends_stage, ()), key=lambda place: place.rank)
    found = []
    for place in places:
        shards = await directory.find_blocks(run_model_digest(store.run_id, spec, place), range(spec.num_blocks))
        served = {block for shard in shards if shard.state == ShardState.ONLINE for block in shard.span}
        if len(served) == spec.num_blocks:
            found.append(place)
    return found


async def is_outdated(directory: Directory, model: RunModel) -> bool:
    """Whether newer weights of the run are served."""
    places = await served_places(directory, model.store)
    return bool(places) and model.place.is_behind(places[0])


async def open_run_model(
    host: Host, directory: Directory, run_id: bytes, epoch: int | None, config: ClientConfig
) -> tuple[RunModel, Ends]:
    """The newest weights that are served, or those of an epoch. Raises UserError or PeerFailed in time."""
    deadline = time.monotonic() + config.request_timeout_s
    store = await find_run(directory, run_id, config.cache_dir)
    await fetch_artifacts(host, directory, store)
    spec = store.spec
    layout = await asyncio.to_thread(layout_of, spec)
    while True:
        places = await served_places(directory, store)
        for place in (place for place in places if epoch in (None, place.epoch)):
            records = await directory.find_members(run_id, [spec.ends_stage])
            donors = donors_of(records, spec.ends_stage, place)
            try:
                _, vectors = await fetch_saved(
                    host, run_id, spec.ends_stage, place, donors, layout.size(spec.ends_stage)
                )
            except PeerFailed as error:
                log.info("ends not fetched epoch=%d reason=%s", place.epoch, error)
                continue
            model = RunModel(store, place, {spec.ends_stage: vectors[0]}, layout)
            return model, await asyncio.to_thread(Ends, model)
        if time.monotonic() > deadline:
            raise UserError(_what_is_served(store, places, epoch))
        await asyncio.sleep(_LOOK_AGAIN_S)


def _what_is_served(store: RunStore, places: list[Place], epoch: int | None) -> str:
    if places:
        return f"epoch {epoch} of this run is not served; {', '.join(str(place.epoch) for place in places)} is: leave out @{epoch}"
    return (
        f"no weights of run {store.run_id.hex()[:8]} are served for all blocks: nodes serve what they have saved, every "
        f"{store.spec.checkpoint_every} epochs; `swarm status --run` shows how far the run is"
    )
