"""Membership: carries out what the state machine of swarm.epoch decides, for a node or a trainer. Read `run` and `_perform` first.

One task feeds events and performs actions in their order, so a step is over before the hello of the next epoch leaves.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import math
import random
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor

from protos import training_pb2
from swarm.ending import cancelled
from swarm.epoch import member as m
from swarm.epoch.ledger import Ledger
from swarm.epoch.messages import Commit, Hello, Mail, Message, Ordered, Place, Rate, Term
from swarm.errors import BadReply, BadRequest, UserError
from swarm.exchange import ExchangeFailed, ExchangeMember
from swarm.member_record import MAX_SAVED, MemberRecord
from swarm.messages import PROTOCOL_MAJOR, PROTOCOL_MINOR, SOFTWARE
from swarm.p2p.averaging import Exchanged, plan_exchange
from swarm.p2p.framing import FramedStream
from swarm.p2p.shares import share_out
from swarm.records import MAX_LIFETIME_S, ShardState
from swarm.run_orders import Orders
from swarm.run_spec import RunSpec
from swarm.run_store import RunStore
from swarm.training.artifacts import send_artifact, take_artifact
from swarm.training.catch_up import send_place
from swarm.training.checkpoints import Checkpoints, Resumed, Saving
from swarm.training.copies import CopyStore, safe_place
from swarm.training.course import RunCourse, UnitSamples
from swarm.training.links import Links
from swarm.training.member_config import MembershipConfig
from swarm.training.member_name import member_name, peer_of, stage_of
from swarm.training.outcome import apply_commit
from swarm.training.pace import Pace
from swarm.training.parameters import GradientSum, StageParameters, StageState, gradient_digest, square_norm
from swarm.training.rollback import Watch, saved_by_stage
from swarm.training.run_host import RunHost
from swarm.training.saved_transfer import send_saved
from swarm.training.standing import Standing, send_standing
from swarm.training.state_finder import FoundState, Snapshot, StateFinder
from swarm.training.wire import is_signed, place_from_wire, sign_commit

log = logging.getLogger(__name__)

T = TypeVar("T")

_LEAST_ANNOUNCE_PAUSE_S = 0.5
TERM_STEP = 2**20


class Work(Protocol):
    """What a member does besides: a trainer runs microbatches, a node serves its stage."""

    async def on_device(self, function: Callable[[], T]) -> T:
        """Run a function on the thread that owns the weights."""
        ...

    def run(self, order: m.Run, place: Place) -> None:
        """Begin a microbatch; tell by Membership.feed(Ran or DidNotRun)."""
        ...

    def stop_running(self, is_epoch_over: bool) -> None: ...

    def take_gradients(self, unit: int) -> list[Tensor | None] | None:
        """The kept gradient of the ends; it is not kept any longer."""
        ...

    def stepped(self, commit: Commit) -> None:
        """The weights have changed: graphs that were made before are worth nothing."""
        ...


@dataclass(slots=True)
class Counters:
    """For people and benchmarks."""

    num_steps: int = 0
    num_skipped: int = 0
    num_downloads: int = 0
    """Of states, from others."""
    num_aborted_rounds: int = 0
    averaging_s: float = 0.0
    bytes_averaged: int = 0
    """Sent in exchanges."""


class Membership:
    """This process as a member of a run, with a replica of one stage."""

    def __init__(
        self,
        run_host: RunHost,
        store: RunStore,
        stage: int,
        parameters: StageParameters,
        work: Work,
        *,
        capacity: int = 0,
        is_keeper: bool = False,
        is_reachable: bool = True,
        checkpoints: Checkpoints | None = None,
        copies: CopyStore | None = None,
        resumed: Resumed | None = None,
        config: MembershipConfig | None = None,
    ) -> None:
        """resumed: where the parameters are; None: the run's initial weights."""
        self.run_host, self.stage = run_host, stage
        self.host, self.directory = run_host.host, run_host.directory
        self.name = member_name(run_host.peer_id, stage)
        self.spec, self.run_id, self._store = store.spec, store.run_id, store
        self.course = RunCourse(store)
        spec, run_id = self.spec, self.run_id
        self.parameters, self.work = parameters, work
        self.config = config or MembershipConfig()
        self.counters = Counters()
        self.is_keeper = is_keeper
        if checkpoints is not None:
            checkpoints.on_saved.append(lambda *_: self._has_news.set())
        self.checkpoints, self.copies = checkpoints, copies
        self.last_commit = resumed.commit if resumed is not None else None
        self.tokens_per_s = 0.0
        self._sums: list[tuple[Ledger, GradientSum]] = []
        ledger, early = self._new_ledger(), self._new_ledger() if spec.delay else None
        start = resumed.place if resumed is not None else Place(0, run_id)
        self.weights_at: tuple[Place, Commit | None] = (start, self.last_commit)
        """Which step the weights are at; changed on the device thread, together with them."""
        self.member = m.Member(
            self.name, stage, self.course, ledger, start, {}, commit=self.last_commit, early=early, capacity=capacity, is_reachable=is_reachable, share_out=share_out,
            term_step=TERM_STEP,
        )  # fmt: skip
        self.on_commit: list[Callable[[Commit], None]] = []
        self.on_orders: list[Callable[[Orders], None]] = []
        self._events: asyncio.Queue[m.Event | Snapshot | FoundState] = asyncio.Queue()
        self._held: dict[tuple[Term, int], Exchanged] = {}
        if resumed is not None and resumed.held is not None:
            kept = resumed.held
            self._held[kept.term, kept.attempt] = Exchanged(kept.vector, None, 0, 0, 0.0, {})
            self.member.hold(kept.term, kept.attempt, kept.digest, kept.square_norm)
        self._pace = Pace(self.config.donor_mib_per_s * 2**20)
        self._watch = Watch(spec.num_stages, self.config.roll_back_after_s)
        self._residual: Tensor | None = None
        self._averaging: tuple[tuple[Term, int], asyncio.Task[None]] | None = None
        self._download: asyncio.Task[None] | None = None
        self._on_done: Callable[[asyncio.Task[None]], None] = lambda task: None
        self._state = ShardState.JOINING
        self._was_at_work, self._has_news, self._search_now = False, asyncio.Event(), asyncio.Event()
        self._stepped_at_s = time.monotonic()
        self._evaluation: tuple[int, float] | None = None
        self._addresses: tuple[str, ...] = ()
        self._leaderless_ticks = 0
        self._lost_at: dict[str, float] = {}
        self._foreign_majors: set[int] = set()
        self._links = Links(
            run_host,
            run_id,
            stage,
            on_message=self._on_message,
            on_found=self._on_found,
            on_lost=self._on_lost,
            on_request=self._on_request,
            config=self.config.links,
        )
        self._finder = StateFinder(
            run_host,
            store,
            stage,
            parameters,
            checkpoints,
            self._links,
            self.config,
            self.hear_orders_of,
            self._events.put_nowait,
        )

    def _new_ledger(self) -> Ledger:
        total = GradientSum(self.parameters)
        ledger = Ledger(lambda: secrets.randbits(63), total.clear)
        self._sums.append((ledger, total))
        return ledger

    def ledger_of(self, ledger_id: int) -> tuple[Ledger, GradientSum] | None:
        """The ledger with this id and its sum of gradients; None if there is none any more."""
        return next((pair for pair in self._sums if pair[0].ledger_id == ledger_id), None)

    @property
    def ledger(self) -> Ledger:
        """Of this epoch."""
        return self.member.ledger

    @property
    def gradient(self) -> GradientSum:
        """What is in the ledger of this epoch."""
        return next(total for ledger, total in self._sums if ledger is self.member.ledger)

    @property
    def place(self) -> Place:
        return self.member.place

    @property
    def _is_at_work(self) -> bool:
        """Whether it has somebody to follow, and the weights to do so."""
        return self._has_weights and bool(self.member.term.peer or self.member.last_commit)

    @property
    def _has_weights(self) -> bool:
        """Whether the weights are where the member is."""
        return self.member.is_ready and not self.member.is_downloading

    @property
    def is_over(self) -> bool:
        """Whether the run has come to its end, as far as this member knows."""
        return self.place.epoch >= self.spec_here.num_epochs

    @property
    def spec_here(self) -> RunSpec:
        """The rules of this epoch, as the owner has amended them."""
        return self.course.spec_after(self.member.last_commit)

    def samples_of(self, unit: int) -> UnitSamples:
        """The samples of a microbatch of this epoch."""
        return self.course.samples_of(self.place.epoch, unit, self.member.last_commit)

    def addresses_of(self, peer_id: str) -> tuple[str, ...]:
        return self._links.addresses_of(peer_id)

    def feed(self, event: m.Event) -> None:
        """Tell the state machine; the actions follow in their turn."""
        self._events.put_nowait(event)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Take part while the body runs; leave at its end. Raises what made it impossible to go on."""
        self._addresses = await self.host.record_addresses()
        self._links.start()
        body = asyncio.current_task()
        assert body is not None
        failures: list[BaseException] = []
        tasks = [asyncio.create_task(part()) for part in (self._run, self._tick, self._search, self._announce)]

        def on_done(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and (failure := task.exception()) is not None:
                failures.append(failure)
                body.cancel()

        self._on_done = on_done
        for task in tasks:
            task.add_done_callback(on_done)
        try:
            yield
        except asyncio.CancelledError:
            if not failures:
                raise
            body.uncancel()
            raise failures[0] from None
        finally:
            await self._links.flush(2.0)
            await self._end(tasks)
            await self._links.aclose()
            await self._save_last()
            if self.checkpoints is not None:
                await asyncio.to_thread(self.checkpoints.forget_kept)
            self._state = ShardState.LEAVING
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(3):
                    await self.directory.publish_member(self.record())

    async def _end(self, tasks: list[asyncio.Task[None]]) -> None:
        pending = set(tasks)
        if self._averaging is not None:
            pending.add(self._averaging[1])
        if self._download is not None:
            pending.add(self._download)
        await cancelled(pending)

    def record(self) -> MemberRecord:
        commit = self.last_commit
        return MemberRecord(
            peer_id=self.host.peer_id,
            run_id=self.run_id,
            stage=self.stage,
            state=ShardState.JOINING if self._state is ShardState.ONLINE and not self._is_at_work else self._state,
            epoch=self.place.epoch,
            lineage=self.place.lineage,
            era=self.place.era,
            expires_at=time.time() + self.config.record_lifetime_s,
            tokens_per_s=self.tokens_per_s,
            loss=None if commit is None else commit.loss,
            addresses=self._addresses,
            is_keeper=self.is_keeper,
            saved=() if self.checkpoints is None else self.checkpoints.places[:MAX_SAVED],
            copies=() if self.copies is None else self.copies.places,
            protocol_major=PROTOCOL_MAJOR,
            protocol_minor=PROTOCOL_MINOR,
            software=SOFTWARE,
        )

    # The tasks.

    async def _run(self) -> None:
        await self._perform(self.member.start())
        while True:
            event = await self._events.get()
            if isinstance(event, Snapshot):
                await self._catch_up(event)
                continue
            if isinstance(event, FoundState):
                await self._go_to(event)
                continue
            await self._perform(self.member.apply(event))
            if self._is_at_work is not self._was_at_work:
                self._has_news.set()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(self.config.tick_s)
            self.feed(m.Tick())
            leader = self.member.term.peer
            self._leaderless_ticks = 0 if leader and leader not in self.member.lost else self._leaderless_ticks + 1
            if self._leaderless_ticks >= self.config.impatient_after_ticks:
                self._leaderless_ticks = 0
                self.feed(m.Impatient())

    async def _search(self) -> None:
        """Look for members that we have no link to."""
        pause_s = 0.3
        while True:
            self._search_now.clear()
            await self._roll_back()
            records = await self.directory.find_members(self.run_id, range(self.spec.num_stages))
            self._warn_of_versions(records)
            await self._prune(records)
            await self._look_back(records)
            for record in records:
                if record.peer_id != self.host.peer_id and record.state != ShardState.LEAVING:
                    self._links.know(member_name(record.peer_id, record.stage), record.addresses)
                    self._links.probe(member_name(record.peer_id, record.stage))
            # The network may have been cut in two, and the records of the other half have expired meanwhile.
            for peer, lost_at in list(self._lost_at.items()):
                if time.monotonic() - lost_at > self.config.give_up_s:
                    del self._lost_at[peer]
                elif self._links.addresses_of(peer):
                    self._links.probe(peer)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s * random.uniform(0.8, 1.2)):
                    await self._search_now.wait()
            pause_s = min(1.5 * pause_s, self.config.search_every_s)

    def _warn_of_versions(self, records: Sequence[MemberRecord]) -> None:
        majors = {record.protocol_major for record in records if record.state != ShardState.LEAVING} - {PROTOCOL_MAJOR}
        if majors - self._foreign_majors:
            log.warning(
                "other members of the run speak protocol %s, this software speaks %d: they and we do not train together "
                "until the older side is upgraded", ", ".join(map(str, sorted(majors))), PROTOCOL_MAJOR,
            )  # fmt: skip
        self._foreign_majors = majors

    async def _prune(self, records: Sequence[MemberRecord]) -> None:
        if self.checkpoints is None:
            return
        try:
            safe = safe_place(records, self.spec.num_stages)
            await self.checkpoints.prune(saved_by_stage(records), safe)
        except UserError as error:
            log.warning("saved states cannot be looked at: %s", error)

    async def _roll_back(self) -> None:
        """Go back to a checkpoint if the owner says so; who lacks it follows the others."""
        goal = self.course.newest.rollback
        if goal is not None and self.place.is_behind(goal) and await self._finder.find_saved(goal):
            log.warning("the run goes back to epoch=%d: its owner says so", goal.epoch)

    async def _look_back(self, records: Sequence[MemberRecord]) -> None:
        """Go back to a checkpoint if the run cannot go on."""
        others = [record for record in records if (record.peer_id, record.stage) != (self.host.peer_id, self.stage)]
        decision = self._watch.look([*others, self.record()], self.place, time.monotonic())
        if decision is None or self.checkpoints is None or not self.place.is_behind(decision.goal):
            return
        log.warning(
            "the run goes back from epoch=%d to epoch=%d: nobody has the newest state of stages=%s",
            decision.newest.epoch, decision.goal.epoch, ",".join(map(str, decision.lost)),
        )  # fmt: skip
        await self._finder.find_saved(decision.goal)

    async def _announce(self) -> None:
        self._state = ShardState.ONLINE
        republish_at = 0.0
        while True:
            self._has_news.clear()
            self._was_at_work = self._is_at_work
            if not await self.directory.publish_member(self.record()):
                log.warning("member record not stored")
            if time.monotonic() > republish_at:  # so that the owner may be away
                await self.directory.publish_run(self._store.raw)
                republish_at = time.monotonic() + MAX_LIFETIME_S / 3
            await asyncio.sleep(_LEAST_ANNOUNCE_PAUSE_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.config.record_lifetime_s / 3 * random.uniform(0.8, 1.0)):
                    await self._has_news.wait()

    # Actions.

    async def _perform(self, actions: list[m.Action]) -> None:
        for action in actions:
            if isinstance(action, m.Send):
                self._links.send(action.peer, self._signed(action.message))
            elif isinstance(action, m.Run):
                self.work.run(action, self.place)
            elif isinstance(action, m.StopRunning):
                self.work.stop_running(action.is_epoch_over)
            elif isinstance(action, m.AddEnds):
                await self._add_ends(action)
            elif isinstance(action, m.Average):
                self._start_averaging(action)
            elif isinstance(action, m.StopAveraging):
                self._stop_averaging((action.term, action.attempt))
            elif isinstance(action, m.Step):
                await self._step(action.commit)
            elif isinstance(action, m.Download):
                log.info("missed a step, downloading epoch=%d", action.place.epoch)
                self._begin_fetching(action)
            else:
                log.info("%s", action.text)

    def _signed(self, message: Message) -> Message:
        if isinstance(message, Commit) and message.term.peer == self.name and not message.signature:
            return sign_commit(message, self.run_id, self.host.identity)
        return message

    def _on_message(self, peer: str, message: Mail) -> None:
        if isinstance(message, Ordered):
            self.hear_orders(message.orders)
            return
        if isinstance(message, Commit):
            if not is_signed(message, self.run_id):
                raise BadReply(f"peer {peer[-8:]} sent a commit that its leader did not sign")
            self.hear_orders_of(message)
        if isinstance(message, Hello) and message.stage != stage_of(peer):
            raise BadReply(f"member {peer[-10:]} says that it is of stage {message.stage}")
        self.feed(m.Received(peer, message))

    def hear_orders(self, raw: bytes) -> None:
        """What the owner says. BadReply if it was not the owner."""
        if not self.course.hear(raw):
            return
        log.info("the owner has given orders serial=%d paused=%s", self.course.newest.serial, self.course.is_paused)
        for peer in self.member.known.keys() - self.member.lost - {self.name}:
            self._links.send(peer, Ordered(raw))
        self._search_now.set()
        for callback in self.on_orders:
            callback(self.course.newest)
        self.feed(m.Steered())

    def hear_orders_of(self, commit: Commit | None) -> None:
        """Those that a commit carries: perhaps they came no other way. BadReply if the owner did not give them."""
        if commit is not None:
            self.hear_orders(commit.orders)

    def has_news(self) -> None:
        """Something in the record has changed."""
        self._has_news.set()

    def _on_found(self, peer: str) -> None:
        self._lost_at.pop(peer, None)
        if self.course.newest_raw:
            self._links.send(peer, Ordered(self.course.newest_raw))
        self.feed(m.Found(peer, stage_of(peer)))

    def _on_lost(self, peer: str) -> None:
        self._lost_at.setdefault(peer, time.monotonic())
        self.feed(m.Lost(peer))

    async def _add_ends(self, action: m.AddEnds) -> None:
        gradients = self.work.take_gradients(action.unit)
        found = self.ledger_of(action.ledger_id)
        if action.is_first and gradients is not None and found is not None:
            kept, (_, total) = gradients, found
            await self.work.on_device(lambda: total.add(kept))

    def _start_averaging(self, order: m.Average) -> None:
        if self._averaging is not None:
            self._averaging[1].cancel()
        self._averaging = (order.term, order.attempt), asyncio.create_task(self._average(order, self.place))

    def _stop_averaging(self, attempt: tuple[Term, int]) -> None:
        self._held.pop(attempt, None)
        if self._averaging is not None and self._averaging[0] == attempt:
            if not self._averaging[1].done():
                self.counters.num_aborted_rounds += 1
            self._averaging[1].cancel()

    async def _average(self, order: m.Average, place: Place) -> None:
        own = next(one for one in order.group if one.peer == self.name)
        named = (self.run_id, place.lineage, f"{place.epoch}/{self.stage}/{order.term}/{order.attempt}".encode())
        names = {peer_of(one.peer): one.peer for one in order.group}
        members = [
            ExchangeMember(peer_of(one.peer), self.addresses_of(one.peer), one.has_gradient) for one in order.group
        ]
        started = time.monotonic()
        try:
            await self.work.on_device(lambda: None)  # whatever was being added is in now
            round_id = hashlib.sha256(b"\0".join(named)).digest()
            shares = [one.share for one in order.group]
            vector = self.gradient.vector if own.has_gradient else None
            if self.parameters.size:
                plan = plan_exchange(round_id, members, shares, self.parameters.size, self.spec.averaging)
                done = await self.run_host.averager.average(
                    plan, vector, residual=self._residual, timeout_s=self.config.round_timeout_s
                )
            else:  # ends that are frozen: of nothing everybody has the sum
                done = Exchanged(self.gradient.vector.clone(), None, 0, 0, 0.0, {})
            if vector is not None and done.vector.data_ptr() == vector.data_ptr():
                done = Exchanged(vector.clone(), done.residual, 0, 0, done.seconds, {})

            digest, norm = await asyncio.to_thread(lambda: (gradient_digest(done.vector), square_norm(done.vector)))
        except ExchangeFailed as error:
            culprits = frozenset(names.get(peer_id, peer_id) for peer_id in error.culprits)
            self.feed(m.NotAveraged(order.term, order.attempt, culprits))
            return
        except (BadRequest, ValueError) as error:
            log.error("cannot take part in the exchange epoch=%d reason=%s", place.epoch, error)
            self.feed(m.NotAveraged(order.term, order.attempt, frozenset({self.name})))
            return
        if len(order.group) == 1 and self.checkpoints is not None:
            await self.checkpoints.keep_sum(place, order.term, order.attempt, done.vector, self._saving)
        self.counters.averaging_s += time.monotonic() - started
        self.counters.bytes_averaged += done.bytes_sent
        if done.rates:
            self.member.measured = tuple(
                Rate(names[peer_id], int(rate)) for peer_id, rate in sorted(done.rates.items())
            )
        self._held[order.term, order.attempt] = done
        self.feed(m.Averaged(order.term, order.attempt, digest, norm))

    async def _step(self, commit: Commit) -> None:
        held = self._held.pop((commit.term, commit.attempt), None)
        self._held.clear()
        if not self.member.is_ready:
            await self._keep_step(commit, held)
            return

        def compute() -> None:
            apply_commit(self.parameters, self._store, commit, None if held is None else held.vector)
            self.weights_at = commit.after, commit

        await self.work.on_device(compute)
        if held is not None:
            self._residual = held.residual
        if self.checkpoints is not None:
            await self.checkpoints.keep_commit(self._sign_kept(commit))
            if self.checkpoints.is_due(commit):
                self.checkpoints.begin(*await self._saving())
        self.counters.num_steps += not commit.is_skipped
        self.counters.num_skipped += commit.is_skipped
        self._tell(commit)

    def _tell(self, commit: Commit) -> None:
        self.last_commit, self._stepped_at_s = commit, time.monotonic()
        if commit.eval_loss is not None:
            self._evaluation = commit.epoch, commit.eval_loss
        self.work.stepped(commit)
        loss = math.nan if commit.loss is None else commit.loss
        log.info(
            "step epoch=%d loss=%.4f norm=%.4f members=%d attempt=%d%s",
            commit.epoch, loss, commit.norm, len(commit.members), commit.attempt, " skipped" if commit.is_skipped else "",
        )  # fmt: skip
        for callback in self.on_commit:
            callback(commit)

    # State from and for other replicas.

    def _begin_fetching(self, order: m.Download) -> None:
        if self._download is not None:
            self._download.cancel()
        self._download = asyncio.create_task(self._finder.find(order.place, self.member.known))
        self._download.add_done_callback(self._on_done)

    async def _keep_step(self, commit: Commit, held: Exchanged | None) -> None:
        assert self.checkpoints is not None
        self.last_commit = commit
        try:
            await self.checkpoints.keep_step(self._sign_kept(commit), None if held is None else held.vector)
        except UserError as error:
            log.error("step not kept epoch=%d reason=%s", commit.epoch, error)

    async def _catch_up(self, snapshot: Snapshot) -> None:
        """The weights came: take the steps that were taken since, and begin to work."""
        if self.member.is_ready or self.member.is_downloading:
            return  # it came too late
        self.counters.num_downloads += 1
        checkpoints, here = self.checkpoints, self.member.place
        assert checkpoints is not None

        def compute() -> tuple[Place, Commit | None]:
            self.parameters.install(snapshot.state)
            place, commit = checkpoints.apply_kept(snapshot.place, self.parameters)
            self.weights_at = place, commit or snapshot.commit
            return self.weights_at

        place, commit = await self.work.on_device(compute)
        await asyncio.to_thread(checkpoints.forget_kept)
        if place != here:
            log.warning("steps are missing since the snapshot epoch=%d here=%d", place.epoch, here.epoch)
            self._begin_fetching(m.Download(here, ""))
            return
        self._residual = None
        log.info("state installed epoch=%d of a snapshot of epoch=%d", place.epoch, snapshot.place.epoch)
        if commit is not None:
            self._tell(commit)
        await self._perform(self.member.apply(m.Ready()))
        checkpoints.begin(*await self._saving())

    async def _go_to(self, found: FoundState) -> None:
        """In its turn among the events: no step is taken meanwhile."""
        place, commit = found.place, found.commit
        if not (self.member.is_downloading or self.place.is_behind(place)):
            return  # it came too late
        self.counters.num_downloads += found.is_download
        if self._download is not None:
            self._download.cancel()

        def install() -> None:
            self.parameters.install(found.state)
            self.weights_at = place, commit

        await self.work.on_device(install)
        self._residual = None
        self._held.clear()
        log.info("state installed epoch=%d", place.epoch)
        if commit is not None:
            self._tell(commit)
        await self._perform(self.member.apply(m.Installed(place, commit)))

    async def _on_request(self, stage: int, request: training_pb2.MemberMessage, stream: FramedStream) -> None:
        if request.WhichOneof("kind") == "get_artifact":
            await send_artifact(stream, self._store, request.get_artifact.digest)
            return
        if request.WhichOneof("kind") == "put_artifact":
            await take_artifact(stream, self._store, request.put_artifact)
            return
        if request.WhichOneof("kind") == "put_orders":
            if request.put_orders.orders:
                self.hear_orders(request.put_orders.orders)
            await send_standing(stream, self._standing())
            return
        if request.WhichOneof("kind") == "get_saved" and self.checkpoints is not None:
            if stage == self.stage:
                await send_saved(stream, self.checkpoints.states, request.get_saved, self._pace)
                return
            if self.copies is not None:
                await send_saved(stream, self.copies.states(stage), request.get_saved, self._pace)
                return
        if request.WhichOneof("kind") == "get_place" and self._has_weights:
            place, commit = self.weights_at
            await send_place(stream, place, None if commit is None else self._sign_kept(commit))
            return
        if request.WhichOneof("kind") == "get_snapshot" and self._has_weights and self.checkpoints is not None:
            found = await self.checkpoints.snapshot(place_from_wire(request.get_snapshot.at_least), self._saving)
            if found is None:
                await stream.fail("there is no snapshot of that place, or not yet")
            else:
                await send_place(stream, found, None)
            return
        await stream.fail("this member has no such thing, or not yet")

    def _standing(self) -> Standing:
        commit = self.member.last_commit
        return Standing(
            self.place,
            None if commit is None else self._sign_kept(commit),
            self.course.newest_raw,
            self._evaluation,
            time.monotonic() - self._stepped_at_s,
        )

    async def _saving(self) -> Saving:
        """The state as it is, copied."""

        def copy() -> tuple[Place, Commit | None, StageState]:
            place, commit = self.weights_at
            return place, commit, self.parameters.snapshot()

        place, commit, state = await self.work.on_device(copy)
        return place, None if commit is None else self._sign_kept(commit), state

    async def _save_last(self) -> None:
        """At the end: a restart goes on from here."""
        if self.checkpoints is None or self.weights_at[1] is None or not self._has_weights:
            return
        await self.checkpoints.wait()
        place, commit = self.weights_at
        assert commit is not None
        self.checkpoints.on_saved.clear()
        if not self.checkpoints.has_saved(place):
            await self.checkpoints.save(place, self._sign_kept(commit), self.parameters.state)

    def _sign_kept(self, commit: Commit) -> Commit:
        signed = self._signed(commit)
        assert isinstance(signed, Commit)
        return signed
