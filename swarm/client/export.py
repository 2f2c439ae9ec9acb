"""`swarm export`: the weights of a run, from its members' disks alone, as a Hugging Face checkpoint, or as PEFT has adapters.

With moments, the folder `run` beside the weights has what `swarm run restore` needs (swarm/training/run_folder.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import uvloop
from torch import Tensor

from swarm.client.config import ClientConfig
from swarm.client.joining import open_directory
from swarm.epoch.messages import Commit, Place
from swarm.errors import BadReply, PeerFailed, UserError
from swarm.member_record import MemberRecord
from swarm.p2p.directory import Directory
from swarm.p2p.host import Host
from swarm.run_orders import Orders
from swarm.run_spec import RunSpec
from swarm.run_store import RunStore
from swarm.terminal import ProgressBar
from swarm.training.artifacts import fetch_artifacts
from swarm.training.course import RunCourse
from swarm.training.find_run import find_run
from swarm.training.hf_checkpoint import made_at_once, require_space, write_hf_checkpoint
from swarm.training.layout import Layout, layout_of
from swarm.training.parameters import num_vectors_of
from swarm.training.peft_checkpoint import write_peft_checkpoint
from swarm.training.rollback import complete_places, newest, saved_by_stage
from swarm.training.run_folder import RUN_FOLDER, states_of
from swarm.training.saved_transfer import donors_of, fetch_saved, fetch_state
from swarm.training.standing import hear_members

T = TypeVar("T")

_LOOK_AGAIN_S = 1.0


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written."""

    out: Path
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
    with_moments: bool = False,
    timeout_s: float = 30.0,
    cache_dir: Path | None = None,
) -> Exported:
    """Write the newest checkpoint that all stages and the ends have on some disk, or that of an epoch, to the folder `out`.

    with_moments: and what is needed to go on from it. Raises UserError, JoinFailed or PeerFailed, each with what to do about it.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists: choose another folder, or remove it")

    async def export() -> Exported:
        async with members_of(run_id, initial_peers, timeout_s, cache_dir) as members:
            deadline = time.monotonic() + timeout_s
            while True:
                records, place = await members.wait_for(epoch, timeout_s)
                try:
                    return await export_checkpoint(members, records, place, out, dtype, with_moments=with_moments)
                except PeerFailed:
                    if time.monotonic() > deadline:
                        raise
                await asyncio.sleep(_LOOK_AGAIN_S)  # members forget older states, and their records tell of it later

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(export())


class RunMembers:
    """The members of a run, and what is on their disks."""

    def __init__(self, host: Host, directory: Directory, store: RunStore, layout: Layout) -> None:
        self.store, self.layout = store, layout
        self._host, self._directory = host, directory

    async def records(self) -> list[MemberRecord]:
        return await self._directory.find_members(self.store.run_id, range(self.store.spec.num_stages))

    async def wait_for(self, epoch: int | None, timeout_s: float) -> tuple[list[MemberRecord], Place]:
        """Their records, and the newest place (of an epoch) of which all stages have the state on some disk. Raises UserError."""
        deadline = time.monotonic() + timeout_s
        spec = self.store.spec
        while True:
            records = await self.records()
            saved = saved_by_stage(records)
            complete = complete_places(saved, spec.num_stages)
            place = newest(place for place in complete if epoch in (None, place.epoch))
            if place is not None:
                return records, place
            if time.monotonic() > deadline:
                raise UserError(_what_is_missing(spec, saved, complete, epoch))
            await asyncio.sleep(_LOOK_AGAIN_S)

    async def is_last(self, records: Sequence[MemberRecord], place: Place) -> bool:
        """Whether the run ends at a place, as its owner has it. Raises PeerFailed if nobody tells."""
        donors, size = donors_of(records, 0, place), self.layout.size(0)
        head, _ = await fetch_saved(self._host, self.store.run_id, 0, place, donors, size, num_vectors=0)
        return place.epoch >= _orders_at(self.store, head.saved.commit).num_epochs(self.store.spec, place.epoch)

    async def fetch_artifacts(self) -> None:
        """Tokenizer and manifests. Raises PeerFailed: who has them may come."""
        try:
            await fetch_artifacts(self._host, self._directory, self.store)
        except UserError as error:
            raise PeerFailed(str(error)) from error

    async def fetch(
        self, records: Sequence[MemberRecord], stage: int, place: Place, run_folder: Path | None
    ) -> tuple[Commit | None, Tensor]:
        """The weights [size] of a stage. run_folder: keep its whole state there. Raises PeerFailed, or UserError if the disk is full."""
        run_id, spec = self.store.run_id, self.store.spec
        donors, size = donors_of(records, stage, place), self.layout.size(stage)
        what = "the ends" if stage == spec.ends_stage else f"stage {stage}"
        num_vectors = 1 if run_folder is None else num_vectors_of(spec)
        with ProgressBar(f"fetching {what} of epoch {place.epoch}", 4 * num_vectors * size) as bar:
            try:
                if run_folder is None:
                    head, vectors = await fetch_saved(
                        self._host, run_id, stage, place, donors, size, on_bytes=bar.advance
                    )
                    return head.saved.commit, vectors[0]
                head, state = await fetch_state(
                    self._host, run_id, stage, place, donors, size, num_vectors=num_vectors, on_bytes=bar.advance
                )
            except PeerFailed as error:
                raise PeerFailed(f"{error}: try again when a member that has it is back") from error
        states = states_of(run_folder, run_id, stage)
        await to_its_end(lambda: states.save(place, head.saved.commit, state))
        return head.saved.commit, state.values.clone()  # so that the moments' memory is given back

    async def hear_orders(self, records: Sequence[MemberRecord], commit: Commit | None) -> bytes:
        """The newest signed orders of the run's owner that somebody knows; what they name is among the run's files from now on."""
        course = RunCourse(self.store)
        if commit is not None:
            course.hear(commit.orders)
        await hear_members(self._host, course, records)
        return course.newest_raw


@contextlib.asynccontextmanager
async def members_of(
    run_id: bytes, initial_peers: Sequence[str], timeout_s: float, cache_dir: Path | None
) -> AsyncIterator[RunMembers]:
    """Join the swarm as a client, and get the run's rules. Raises UserError or JoinFailed."""
    config = ClientConfig(model="run", initial_peers=tuple(initial_peers), join_timeout_s=timeout_s)
    async with open_directory(config) as (host, directory):
        store = await find_run(directory, run_id, cache_dir)
        yield RunMembers(host, directory, store, await asyncio.to_thread(layout_of, store.spec))


async def export_checkpoint(
    members: RunMembers,
    records: Sequence[MemberRecord],
    place: Place,
    out: Path,
    dtype: torch.dtype,
    *,
    with_moments: bool,
) -> Exported:
    """Fetch and write it, all or nothing. Raises UserError if the disk is full or fails, PeerFailed if members do."""
    store, sizes = members.store, [members.layout.size(stage) for stage in range(members.store.spec.num_stages)]
    bytes_each = dtype.itemsize + (4 * num_vectors_of(store.spec) if with_moments else 0)
    with made_at_once(out) as folder:
        require_space(folder, bytes_each * sum(sizes))
        run_folder = folder.parent / RUN_FOLDER if with_moments else None
        await members.fetch_artifacts()
        found = [await members.fetch(records, stage, place, run_folder) for stage in range(len(sizes))]
        commit = found[0][0]
        in_force = _orders_at(store, commit)
        if run_folder is not None:
            orders = await members.hear_orders(records, commit)
            await members.fetch_artifacts()  # of data that they have brought
            kept = store.copy_to(run_folder)
            if orders:
                kept.keep_orders(orders)
        loss, eval_loss = (None, None) if commit is None else (commit.loss, commit.eval_loss)

        def write() -> None:
            write_weights = write_hf_checkpoint if store.spec.lora is None else write_peft_checkpoint
            write_weights(
                store, [values for _, values in found], folder, epoch=place.epoch, lineage=place.lineage, dtype=dtype,
                orders=in_force, loss=loss, eval_loss=eval_loss,
            )  # fmt: skip
            if run_folder is not None:
                run_folder.replace(folder / RUN_FOLDER)

        await to_its_end(write)
    return Exported(out, place, sum(sizes), loss)


def _orders_at(store: RunStore, commit: Commit | None) -> Orders:
    """In force after a commit. BadReply if the owner did not give them."""
    try:
        return store.open_orders(b"" if commit is None else commit.orders)
    except ValueError as error:
        raise BadReply(
            f"the state of epoch {0 if commit is None else commit.epoch + 1} cannot be used: {error}"
        ) from error


async def to_its_end(function: Callable[[], T]) -> T:
    """What a function returns that runs in a thread. Who is cancelled waits for its end, so that nothing is written after him."""
    running = asyncio.create_task(asyncio.to_thread(function))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        raise


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
