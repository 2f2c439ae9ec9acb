"""`swarm export`: the weights of a run, from its members' disks alone, as a Hugging Face checkpoint, or as PEFT has adapters."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import uvloop
from torch import Tensor

from swarm.client.config import ClientConfig
from swarm.client.connect import open_directory
from swarm.epoch.messages import Commit, Place
from swarm.errors import PeerFailed, UserError
from swarm.member_record import MemberRecord
from swarm.p2p.directory import Directory
from swarm.p2p.host import Host
from swarm.run_spec import RunSpec
from swarm.run_store import RunStore
from swarm.terminal import ProgressBar
from swarm.training.artifacts import fetch_artifacts
from swarm.training.find_run import find_run
from swarm.training.hf_checkpoint import write_hf_checkpoint
from swarm.training.layout import Layout, layout_of
from swarm.training.peft_checkpoint import write_peft_checkpoint
from swarm.training.rollback import complete_places, newest, saved_by_stage
from swarm.training.saved_transfer import donors_of, fetch_saved

log = logging.getLogger(__name__)

_LOOK_AGAIN_S = 1.0


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written."""

    place: Place
    num_parameters: int
    loss: float | None
    """Mean per token over the epoch that led there."""


def export_run(
    run_id: bytes,
    initial_peers: Sequence[str],
    out: Path,
    *,
    epoch: int | None = None,
    dtype: torch.dtype = torch.float32,
    timeout_s: float = 30.0,
    cache_dir: Path | None = None,
) -> Exported:
    """Write the newest checkpoint that all stages and the ends have on some disk, or that of an epoch, to the folder `out`.

    Raises UserError, JoinFailed or PeerFailed, each with what to do about it.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists: choose another folder, or remove it")

    async def fetch(host: Host, directory: Directory) -> tuple[RunStore, Place, Commit | None, list[Tensor]]:
        store = await find_run(directory, run_id, cache_dir)
        await fetch_artifacts(host, directory, store)
        layout = layout_of(store.spec)
        deadline = time.monotonic() + timeout_s
        while True:
            records, place = await _find_complete(directory, store.spec, run_id, epoch, timeout_s)
            try:
                return store, place, *await fetch_stages(host, store, layout, records, place)
            except PeerFailed:
                if time.monotonic() > deadline:
                    raise
            await asyncio.sleep(_LOOK_AGAIN_S)  # members forget older states, and their records tell of it later

    async def fetch_stages(
        host: Host, store: RunStore, layout: Layout, records: Sequence[MemberRecord], place: Place
    ) -> tuple[Commit | None, list[Tensor]]:
        values, commit = [], None
        for stage in range(store.spec.num_stages):
            donors = donors_of(records, stage, place)
            size = layout.size(stage)
            what = "the ends" if stage == store.spec.ends_stage else f"stage {stage}"
            with ProgressBar(f"fetching {what} of epoch {place.epoch}", 4 * size) as bar:
                try:
                    head, vectors = await fetch_saved(host, run_id, stage, place, donors, size, on_bytes=bar.advance)
                except PeerFailed as error:
                    raise PeerFailed(f"{error}: try again when a member that has it is back") from error
            commit = commit or head.saved.commit
            values.append(vectors[0])
        return commit, values

    async def run() -> tuple[RunStore, Place, Commit | None, list[Tensor]]:
        config = ClientConfig(model="run", initial_peers=tuple(initial_peers), join_timeout_s=timeout_s)
        async with open_directory(config) as (host, directory):
            return await fetch(host, directory)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        store, place, commit, values = runner.run(run())
    loss, eval_loss = (None, None) if commit is None else (commit.loss, commit.eval_loss)
    write = write_hf_checkpoint if store.spec.lora is None else write_peft_checkpoint
    write(store, values, out, epoch=place.epoch, lineage=place.lineage, dtype=dtype, loss=loss, eval_loss=eval_loss)
    return Exported(place, sum(len(vector) for vector in values), loss)


async def _find_complete(
    directory: Directory, spec: RunSpec, run_id: bytes, epoch: int | None, timeout_s: float
) -> tuple[list[MemberRecord], Place]:
    """The members' records, and the newest place of which all stages have the state on some disk. Raises UserError."""
    deadline = time.monotonic() + timeout_s
    while True:
        records = await directory.find_members(run_id, range(spec.num_stages))
        saved = saved_by_stage(records)
        complete = complete_places(saved, spec.num_stages)
        place = newest(place for place in complete if epoch in (None, place.epoch))
        if place is not None:
            return records, place
        if time.monotonic() > deadline:
            raise UserError(_what_is_missing(spec, saved, complete, epoch))
        await asyncio.sleep(_LOOK_AGAIN_S)


def _what_is_missing(
    spec: RunSpec, saved: Mapping[int, set[Place]], complete: Collection[Place], epoch: int | None
) -> str:
    if complete:
        have = ", ".join(str(one) for one in sorted({place.epoch for place in complete}))
        return f"there is no complete checkpoint of epoch {epoch}; there are those of {have}: choose one with --epoch"
    empty = [stage for stage in range(spec.num_stages) if not saved.get(stage)]
    names = ["the ends" if stage == spec.ends_stage else f"stage {stage}" for stage in empty]
    if not names:
        return "no epoch has been saved by all stages: try again when the next checkpoint is due"
    return (
        f"no member that can be reached has a saved state of {', '.join(names)}: members save every {spec.checkpoint_every} epochs, "
        "at the run's end and when they leave; try again then"
    )
