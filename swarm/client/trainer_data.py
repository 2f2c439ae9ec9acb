"""TrainerData: where a trainer's batches come from: the run's data, its held-out data, what its owner amends, or text of its own."""

from __future__ import annotations

import asyncio
import functools
import logging
from pathlib import Path
from typing import Protocol

from swarm.client.trainer_config import TrainerConfig
from swarm.errors import UserError
from swarm.p2p.directory import Directory
from swarm.p2p.host import Host
from swarm.run_orders import Orders
from swarm.run_spec import DataKind, DataSpec
from swarm.run_store import RunStore
from swarm.training.artifacts import fetch_artifacts
from swarm.training.data import Batch, OwnSource, SampleSource
from swarm.training.manifest import Manifest
from swarm.training.tokenizer_pool import TokenizerPool

log = logging.getLogger(__name__)

_FETCH_ROUNDS = 60
"""Half a second each: the owner hands a manifest over just after the orders that name it."""


class Samples(Protocol):
    """Where batches come from."""

    def batch(self, first: int, count: int) -> Batch: ...


class TrainerData:
    """Of one trainer. Each data is opened once, when it is first asked for or announced."""

    def __init__(
        self, host: Host, directory: Directory, store: RunStore, config: TrainerConfig, pool: TokenizerPool | None
    ) -> None:
        self._host, self._directory, self._store, self._config, self._pool = host, directory, store, config, pool
        self._opening: dict[bytes, asyncio.Task[Samples]] = {}

    async def of(self, data: DataSpec) -> Samples:
        """Raises UserError if the files are not where they should be, or not what they should be."""
        return await asyncio.shield(self._task_for(data))

    def prepare(self, orders: Orders, epoch: int) -> None:
        """Open what the owner amends the data with before it is needed; a line in the log if that is impossible.

        epoch: where the run is. What was in force before is not needed any more.
        """
        of_data = [amendment for amendment in orders.amendments if amendment.data is not None]
        begun = [amendment for amendment in of_data if amendment.epoch <= epoch]
        for amendment in of_data[max(len(begun) - 1, 0) :]:
            assert amendment.data is not None
            if amendment.data.manifest_digest not in self._opening:
                self._task_for(amendment.data).add_done_callback(functools.partial(_warn, amendment.epoch))

    async def aclose(self) -> None:
        for task in self._opening.values():
            task.cancel()
        await asyncio.gather(*self._opening.values(), return_exceptions=True)

    def _task_for(self, data: DataSpec) -> asyncio.Task[Samples]:
        task = self._opening.get(data.manifest_digest)
        if task is None or (task.done() and task.exception() is not None):
            task = self._opening[data.manifest_digest] = asyncio.create_task(self._open(data))
        return task

    async def _open(self, data: DataSpec) -> Samples:
        wanted = {*self._store.spec.tokenizer.values(), data.manifest_digest}
        await fetch_artifacts(self._host, self._directory, self._store, _FETCH_ROUNDS, wanted)
        return await asyncio.to_thread(self._read, data)

    def _read(self, data: DataSpec) -> Samples:
        spec, config = self._store.spec, self._config
        tokenizer = self._store.tokenizer()
        if data.kind is DataKind.OWN:
            if config.data is None:
                raise UserError("in this run every trainer brings its own text: give --data FILE-OR-FOLDER")
            return OwnSource(
                config.data, tokenizer, spec.sequence_length, spec.seed, text_field=data.text_field, pool=self._pool
            )
        is_held_out = data == spec.held_out
        folder = _folder_of(data, *((config.held_out, "--held-out") if is_held_out else (config.data, "--data")))
        manifest = Manifest.from_bytes(self._store.manifest(data), data.manifest_digest)
        return SampleSource(data, manifest, folder, tokenizer, spec.sequence_length, spec.seed, pool=self._pool)


def _folder_of(data: DataSpec, given: Path | None, flag: str) -> Path:
    folder = given or Path(data.source)
    missing = [name for name in data.files if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder} has no {missing[0]}, which the run's data consists of: say where it is with {flag} FOLDER"
        )
    return folder


def _warn(epoch: int, task: asyncio.Task[Samples]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.warning("the data that the run uses from epoch=%d on is not here: %s", epoch, error)
