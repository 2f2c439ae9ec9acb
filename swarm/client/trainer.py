"""Trainer: feeds leased microbatches through the stages of a run, and holds a replica of the ends.

run_trainer(TrainerConfig(run_id=..., initial_peers=...))      what `swarm train` does
async with open_trainer(config) as trainer: await trainer.done.wait()
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from swarm.client.config import ClientConfig
from swarm.client.stage_hop import StageHops, StageTask
from swarm.client.trainer_config import TrainerConfig
from swarm.client.trainer_data import TrainerData
from swarm.client.training_ends import HeadResult, TrainableEnds, sum_gradients
from swarm.epoch import member as m
from swarm.epoch.messages import EARLY, Commit, Place, UnitResult
from swarm.errors import BadRequest, Outdated, SwarmError, UserError
from swarm.p2p.directory import Directory
from swarm.p2p.host import HostConfig, running_host
from swarm.run_orders import Orders
from swarm.run_spec import Precision
from swarm.run_store import RunStore
from swarm.tensors import WireFormat
from swarm.training.artifacts import fetch_artifacts
from swarm.training.checkpoints import Checkpoints, Resumed
from swarm.training.course import UnitSamples
from swarm.training.find_run import find_run
from swarm.training.initial import open_initial_weights
from swarm.training.membership import Membership
from swarm.training.run_host import RunHost, run_host
from swarm.training.standing import newest_rules
from swarm.training.tokenizer_pool import TokenizerPool

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(slots=True)
class TrainerCounters:
    """For people and benchmarks."""

    num_microbatches: int = 0
    num_failed: int = 0
    num_tokens: int = 0


class Trainer:
    """A running trainer."""

    def __init__(
        self,
        run_host: RunHost,
        store: RunStore,
        ends: TrainableEnds,
        data: TrainerData,
        config: TrainerConfig,
        *,
        checkpoints: Checkpoints | None = None,
        resumed: Resumed | None = None,
    ) -> None:
        self.store, self.spec, self.ends, self.config = store, store.spec, ends, config
        self.counters = TrainerCounters()
        self.done = asyncio.Event()
        """The run has come to its end, or something failed for good (`failure`)."""
        self.failure: SwarmError | None = None
        self._data = data
        self._device = ThreadPoolExecutor(1, thread_name_prefix="device")
        self._units: dict[int, asyncio.Task[None]] = {}
        self._kept: dict[int, list[Tensor | None]] = {}
        self.membership = Membership(
            run_host, store, store.spec.ends_stage, ends.parameters, self,
            capacity=config.max_in_flight, checkpoints=checkpoints, resumed=resumed, config=config.membership,
        )  # fmt: skip
        is_bf16 = store.spec.precision is Precision.BF16
        client = ClientConfig(
            model="run", initial_peers=config.initial_peers, microbatch_timeout_s=config.microbatch_timeout_s
        )
        self.hops = StageHops(run_host.host, store.run_id, client, WireFormat.BF16 if is_bf16 else WireFormat.FP32)

    # Work, as Membership asks for it.

    async def on_device(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._device, function)

    def run(self, order: m.Run, place: Place) -> None:
        earlier = self._units.pop(order.unit, None)
        if earlier is not None:
            earlier.cancel()
        self._kept.pop(order.unit, None)
        is_eval = self.membership.member.rules.num_units <= order.unit < EARLY
        samples = self.membership.samples_of(order.unit)
        task = asyncio.create_task(self._run_unit(order, place, samples, is_eval=is_eval))
        task.add_done_callback(self._on_unit_done)
        self._units[order.unit] = task

    def stop_running(self, is_epoch_over: bool) -> None:
        for task in self._units.values():
            task.cancel()
        self._units.clear()
        if is_epoch_over:
            self._kept.clear()

    def take_gradients(self, unit: int) -> list[Tensor | None] | None:
        return self._kept.pop(unit, None)

    def stepped(self, commit: Commit) -> None:
        if commit.epoch + 1 >= self.membership.course.spec_after(commit).num_epochs:
            self.done.set()

    # Microbatches.

    async def _run_unit(self, order: m.Run, place: Place, samples: UnitSamples, *, is_eval: bool) -> None:
        culprit, reason = "", ""
        try:
            result = await self._through_all(order, place, samples, is_eval=is_eval)
        except Outdated as error:
            reason = str(error)
        except _Failed as failed:
            culprit, reason = failed.peer, str(failed)
        except UserError as error:  # our data, our disk: nobody else can help
            self.failure = error
            self.done.set()
            culprit, reason = self.membership.name, str(error)
        else:
            self.counters.num_microbatches += 1
            self.counters.num_tokens += result.num_loss_tokens
            ledgers = tuple(owner.ledger_id for owner in order.owners)
            self.membership.feed(m.Ran(order.unit, order.serial, ledgers, result))
            return
        self.counters.num_failed += 1
        log.info("microbatch failed unit=%d culprit=%s reason=%s", order.unit, culprit[-8:] or "-", reason)
        await asyncio.sleep(0.02)
        self.membership.feed(m.DidNotRun(order.unit, order.serial, culprit, reason[:200]))

    def _on_unit_done(self, task: asyncio.Task[None]) -> None:
        """What nobody has foreseen ends the trainer: with its unit neither done nor failed the epoch would never end."""
        if task.cancelled() or (error := task.exception()) is None:
            return
        log.error("microbatch failed by a bug", exc_info=error)
        self.failure = self.failure or BadRequest(
            f"this trainer has a bug ({type(error).__name__}: {str(error)[:200]}): report it, with the log"
        )
        self.done.set()

    async def _through_all(self, order: m.Run, place: Place, samples: UnitSamples, *, is_eval: bool) -> UnitResult:
        """Forward through all stages, the loss, and backward. The gradient of the ends is kept until its AddEnds."""
        source = await self._data.of(samples.data)
        batch = await asyncio.to_thread(source.batch, samples.indices.start, len(samples.indices))
        # Evaluations are of the weights as they are, as are microbatches of the next epoch.
        previous = order.unit < EARLY and not is_eval

        def check_place() -> None:
            """On the device thread, where steps are taken, too: a step in between would leave the ends with other weights."""
            own = self.membership.weights_at[0]
            if own != place:
                raise Outdated(f"the ends are at epoch {own.epoch}, the microbatch is of {place.epoch}")

        def embed() -> Tensor:
            check_place()
            self.ends.parameters.show(previous=previous)
            return self.ends.embed(batch.input_ids)

        embedded = await self.on_device(embed)
        inputs = [embedded.detach()]
        tasks = [
            StageTask(place, order.term, order.unit, stage, owner, samples.indices.start)
            for stage, owner in enumerate(order.owners)
        ]
        for task in tasks:
            addresses = self.membership.addresses_of(task.owner.peer)
            with _blaming(task):
                inputs.append(await self.hops.forward(task, addresses, inputs[-1], wants_gradients=not is_eval))
        if is_eval:

            def evaluate() -> tuple[float, int]:
                self.ends.parameters.show(previous=False)
                return self.ends.evaluate(inputs[-1], batch.labels)

            loss_sum, num_tokens = await self.on_device(evaluate)
            return UnitResult(order.unit, num_tokens, loss_sum)

        def compute_loss() -> HeadResult:
            check_place()
            self.ends.parameters.show(previous=previous)
            return self.ends.loss(inputs[-1], batch.labels)

        head = await self.on_device(compute_loss)
        not_finite = UnitResult(order.unit, head.num_tokens, math.nan)
        gradient = head.hidden_gradient
        if not (math.isfinite(head.loss_sum) and bool(torch.isfinite(gradient).all())):
            return not_finite
        for task in reversed(tasks):
            addresses = self.membership.addresses_of(task.owner.peer)
            with _blaming(task):
                gradient, is_finite = await self.hops.backward(task, addresses, gradient, inputs[task.stage])
            if not is_finite:
                return not_finite

        def embed_backward() -> list[Tensor | None]:
            if not self.spec.delay:
                return self.ends.embed_backward(embedded, gradient)
            return self.ends.embed_backward(embed(), gradient)  # other weights may have been shown in between

        of_embedding = await self.on_device(embed_backward)
        self._kept[order.unit] = sum_gradients(head.gradients, of_embedding)
        return UnitResult(order.unit, head.num_tokens, head.loss_sum)

    async def aclose(self) -> None:
        self.stop_running(is_epoch_over=True)
        await self.hops.aclose()
        self._device.shutdown()


class _Failed(Exception):
    """A microbatch failed at a peer."""

    def __init__(self, peer: str, reason: str) -> None:
        super().__init__(reason)
        self.peer = peer


@contextlib.contextmanager
def _blaming(task: StageTask):  # type: ignore[no-untyped-def]
    """Whatever goes wrong at a stage is its owner's, unless it is only in another epoch by now."""
    try:
        yield
    except Outdated:
        raise
    except SwarmError as error:
        raise _Failed(task.owner.peer, str(error)) from error


@contextlib.asynccontextmanager
async def open_trainer(config: TrainerConfig, pool: TokenizerPool | None = None) -> AsyncIterator[Trainer]:
    """Join the swarm and the run, and train while the body runs. Raises SwarmError with a line for the user.

    pool: processes that tokenise, started before this.
    """
    async with contextlib.AsyncExitStack() as stack:
        host = await stack.enter_async_context(
            running_host(HostConfig(listen=config.listen, announce=config.announce, identity_path=config.identity))
        )
        directory = await Directory.join(host, list(config.initial_peers), serves=True, timeout_s=config.join_timeout_s)
        stack.push_async_callback(directory.close)
        store = await find_run(directory, config.run_id, config.cache_dir)
        await fetch_artifacts(host, directory, store)
        told, epoch = await newest_rules(host, directory, store)
        data = TrainerData(host, directory, store, config, pool)
        stack.push_async_callback(data.aclose)

        def load() -> tuple[TrainableEnds, Checkpoints, Resumed | None]:
            if config.threads is not None:
                torch.set_num_threads(config.threads)
            ends = TrainableEnds(open_initial_weights(store.spec), store.spec)
            checkpoints = Checkpoints(store, store.spec.ends_stage, ends.parameters.size)
            return ends, checkpoints, checkpoints.resume(ends.parameters)

        ends, checkpoints, resumed = await asyncio.to_thread(load)
        rules = told.spec_at(store.spec, epoch if resumed is None else max(epoch, resumed.place.epoch))
        for one in (rules.data, rules.held_out):
            if one is not None:
                await data.of(one)  # it is better to fail now
        shared = await stack.enter_async_context(run_host(host, directory))
        trainer = Trainer(shared, store, ends, data, config, checkpoints=checkpoints, resumed=resumed)

        def prepare(orders: Orders) -> None:
            data.prepare(orders, trainer.membership.place.epoch)

        trainer.membership.on_orders.append(prepare)
        data.prepare(told, max(epoch, trainer.membership.place.epoch))
        if trainer.membership.is_over:
            trainer.done.set()
        stack.push_async_callback(trainer.aclose)
        await stack.enter_async_context(trainer.membership.running())
        yield trainer
        if trainer.done.is_set() and trainer.failure is None:
            await _linger(trainer)


async def _linger(trainer: Trainer) -> None:
    """At the end of a run: stay until the others have heard of the last step, for a few seconds at most."""
    deadline = time.monotonic() + trainer.config.linger_s
    while time.monotonic() < deadline:
        records = await trainer.membership.directory.find_members(trainer.store.run_id, range(trainer.spec.num_stages))
        if all(record.epoch >= trainer.membership.place.epoch for record in records):
            return
        await asyncio.sleep(0.5)
