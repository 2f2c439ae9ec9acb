"""Owner: what the owner of a run says to its members, and whether it came about. `Owner._steer` is the way of all commands."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from swarm.cache import cache_root
from swarm.client.runs import in_swarm
from swarm.epoch.messages import Place
from swarm.errors import PeerFailed, UserError
from swarm.identity import Identity
from swarm.member_record import MemberRecord
from swarm.p2p.directory import Directory
from swarm.p2p.host import Host
from swarm.records import ShardState
from swarm.run_creation import OWNER_FILE
from swarm.run_file import data_like
from swarm.run_orders import NOTICE_EPOCHS, Amendment, Orders, sign_orders
from swarm.run_spec import DataSpec
from swarm.run_store import RunStore
from swarm.training.artifacts import give_artifact
from swarm.training.find_run import find_run
from swarm.training.manifest import build_manifest
from swarm.training.rollback import complete_places, newest, saved_by_stage
from swarm.training.standing import Standing, ask_standings, most_common_place, newest_orders

log = logging.getLogger(__name__)

_LOOK_AGAIN_S = 0.3
_NUM_HANDED = 2
"""Members that are handed a file; the others get it from these."""
_HAND_OVER_S = 20.0
# How many epochs ahead a change is named: more, if the members were there before they heard of it.
_NOTICES = (NOTICE_EPOCHS, 8, 32, 128)


@dataclass(frozen=True, slots=True)
class Look:
    """The run at one moment."""

    records: tuple[MemberRecord, ...]
    """Of those who do not leave."""
    standings: Mapping[tuple[str, int], Standing]
    orders: Orders
    """The newest that somebody knows."""
    in_force: Orders
    """At the place."""
    place: Place
    """Where the run is."""


class Owner:
    """Each method says something to the run's members, waits until it is so, and returns a line for people.

    They raise UserError: the key is another's, nobody takes part, or what is asked for cannot be.
    """

    def __init__(
        self,
        run_id: bytes,
        initial_peers: Sequence[str],
        *,
        identity: Path | None = None,
        cache_dir: Path | None = None,
        timeout_s: float = 60.0,
    ) -> None:
        """timeout_s: for joining, and then for what is waited for."""
        self._run_id, self._initial_peers, self._timeout_s = run_id, initial_peers, timeout_s
        self._cache_dir = cache_dir
        path = identity or cache_root(cache_dir) / OWNER_FILE
        if not path.is_file():
            raise UserError(f"there is no key in {path}: say with --identity where the key is that signed the run")
        self._identity = Identity.load_or_create(path)

    def pause(self) -> str:
        async def steer(run: _Steering) -> str:
            look = await run.give(lambda look: look.orders.changed(is_paused=True))
            return f"paused: no epoch after {look.place.epoch} begins; `swarm run resume` lets the run go on"

        return self._steer(steer)

    def resume(self) -> str:
        async def steer(run: _Steering) -> str:
            look = await run.give(lambda look: look.orders.changed(is_paused=False))
            return f"the run goes on from epoch {look.place.epoch}"

        return self._steer(steer)

    def amend(
        self, changes: Mapping[str, float | int | None], epoch: int | None = None, *, data: Path | None = None
    ) -> str:
        """changes: of Amendment's fields. epoch: from which on; None: as soon as possible.

        data: a file or folder of other training data, of the kind that the run's rules say. It is read and tokenised first.
        """
        other = None if data is None else self._read_data(data)

        async def steer(run: _Steering) -> str:
            def change(orders: Orders, named: int) -> Orders:
                return orders.amended(Amendment(epoch=named, data=other, **changes))  # type: ignore[arg-type]

            if other is not None:
                run.store.learn(other)
                run.artifacts.append(other.manifest_digest)
            told = [f"{name} {value}" for name, value in changes.items() if value is not None]
            if other is not None:
                told.append(f"data {len(other.files)} file(s) with {other.num_samples} samples")
            is_end = changes.get("num_epochs") is not None
            named = await run.name_epoch(change, epoch, is_end=is_end)
            return f"from epoch {named} on: {', '.join(told)}{await run.in_force()}"

        return self._steer(steer)

    def _read_data(self, path: Path) -> DataSpec:
        """Other data of the run's kind; its manifest is kept here. UserError if it cannot be used."""
        store = RunStore.open(self._run_id, self._cache_dir)
        try:
            data, folder = data_like(store.spec, path)
        except ValueError as error:
            raise UserError(str(error)) from error
        manifest = build_manifest(data, folder, store.tokenizer(), store.spec.sequence_length)
        data = replace(data, manifest_digest=manifest.digest, num_samples=manifest.num_samples)
        store.learn(data)
        store.put(manifest.digest, manifest.to_bytes())
        return data

    def end(self, epoch: int | None = None) -> str:
        async def steer(run: _Steering) -> str:
            def change(orders: Orders, named: int) -> Orders:
                return orders.amended(Amendment(epoch=named, num_epochs=named))

            return f"the run ends after {await run.name_epoch(change, epoch, is_end=True)} epochs{await run.in_force()}"

        return self._steer(steer)

    def evaluate(self, epoch: int | None = None) -> str:
        async def steer(run: _Steering) -> str:
            if run.store.spec.held_out is None:
                raise UserError("this run has no held-out data: there is nothing to evaluate on")
            named = await run.name_epoch(Orders.with_eval, epoch)
            while True:
                look = await run.look()
                for standing in look.standings.values():
                    if standing.evaluation is not None and standing.evaluation[0] >= named:
                        return "epoch {}: held-out loss {:.4f}".format(*standing.evaluation)
                if look.place.epoch > named + 2:
                    raise UserError(f"epoch {named} is over without a finite held-out loss: the run may have diverged")
                await run.wait(
                    f"epoch {named}, which evaluates, is not over yet: `swarm run status` shows its loss later"
                )

        return self._steer(steer)

    def roll_back(self, epoch: int) -> str:
        async def steer(run: _Steering) -> str:
            goal: Place | None = None
            members: set[tuple[str, int]] = set()

            def decide(look: Look) -> Orders:
                nonlocal goal
                members.update(who for who, one in look.standings.items() if one.place == look.place)
                complete = complete_places(saved_by_stage(look.records), run.store.spec.num_stages)
                base = newest(place for place in complete if place.epoch == epoch)
                if base is None:
                    epochs = ", ".join(str(one) for one in sorted({place.epoch for place in complete})) or "none"
                    raise UserError(
                        f"not all stages have a state of epoch {epoch} on a disk that can be reached: choose one of {epochs}"
                    )
                goal = base.rolled_back(look.place.era + 1)
                return look.orders.changed(rollback=goal)

            await run.give(decide)
            assert goal is not None
            while True:
                look = await run.look()
                if all(one.place.era >= goal.era for who, one in look.standings.items() if who in members):
                    paused = "; it is paused" if look.orders.is_paused else ""
                    return f"the run went back to epoch {epoch}{paused}"
                await run.wait("not all members have gone back yet: `swarm run status` shows where they are")

        return self._steer(steer)

    def _steer(self, steer: Callable[[_Steering], Awaitable[str]]) -> str:
        async def ask(host: Host, directory: Directory) -> str:
            store = await find_run(directory, self._run_id, self._cache_dir, patience_s=0.0)
            if self._identity.peer_id != store.owner:
                raise UserError(
                    f"only the owner of the run ({store.owner[-8:]}) steers it, and this key is {self._identity.peer_id[-8:]}: "
                    "give the key that signed the run with --identity"
                )
            run = _Steering(host, directory, store, self._identity)
            try:
                async with asyncio.timeout(self._timeout_s):
                    return await steer(run)
            except TimeoutError:
                raise UserError(run.waits_for or "the members did not answer in time: try again") from None

        # What is waited for is bounded above; this bound is for the DHT.
        return in_swarm(self._initial_peers, 2 * self._timeout_s, ask)


class _Steering:
    """A connection to the members of a run, for one command of its owner."""

    def __init__(self, host: Host, directory: Directory, store: RunStore, identity: Identity) -> None:
        self._host, self._directory, self._identity = host, directory, identity
        self.store = store
        self.waits_for = ""
        """What to tell the owner if there is no more time."""
        self.artifacts: list[bytes] = []
        """Files that the orders name, to be handed to the members, by digest."""
        self._given: Orders | None = None

    async def look(self, raw: bytes = b"") -> Look:
        """How the run stands, after its members have heard these signed orders. UserError if none of them answers."""
        records = await self._directory.find_members(self.store.run_id, range(self.store.spec.num_stages))
        present = tuple(record for record in records if record.state != ShardState.LEAVING)
        standings = await ask_standings(self._host, self.store, present, raw)
        if not standings:
            raise UserError(
                "nobody who takes part in the run can be reached, so nobody would hear of it: "
                "see `swarm run status`, and try again when a node is back"
            )
        raws = [standing.orders for standing in standings.values()]
        raws += [standing.commit.orders for standing in standings.values() if standing.commit is not None]
        orders, _ = newest_orders([*raws, self.store.read_orders()], self.store)
        here = most_common_place(standings)
        commits = [one.commit for one in standings.values() if one.place == here and one.commit is not None]
        in_force, _ = newest_orders([one.orders for one in commits], self.store)
        return Look(present, standings, orders, in_force, here)

    async def give(self, decide: Callable[[Look], Orders]) -> Look:
        """Say what is decided, and look again. UserError if it makes no sense, or nobody took it."""
        look = await self.look()
        try:
            # What came too late to be in force would keep all later orders from it.
            orders = decide(replace(look, orders=look.orders.rebased(look.in_force, look.place.epoch)))
            for amendment in orders.amendments:
                orders.spec_at(self.store.spec, amendment.epoch)
            raw = sign_orders(orders, self.store.run_id, self._identity)
        except ValueError as error:
            raise UserError(str(error)) from error
        self._given = orders
        look = await self.look(raw)
        if look.orders.serial > orders.serial:
            raise UserError("the owner has said something else at the same time, from elsewhere: try again")
        takers = {who for who, standing in look.standings.items() if standing.orders == raw}
        if not takers:
            raise UserError("no member took the orders: it may run an older version of the software")
        self.store.keep_orders(raw)
        heard = [record for record in look.records if (record.peer_id, record.stage) in takers]
        await asyncio.gather(*(self._hand_out(digest, heard) for digest in self.artifacts))
        return look

    async def _hand_out(self, digest: bytes, members: Sequence[MemberRecord]) -> None:
        """Give a file to some members, if there are any to those of the ends, where others look for it first."""
        first = sorted(members, key=lambda record: record.stage != self.store.spec.ends_stage)[:_NUM_HANDED]

        async def give(record: MemberRecord) -> None:
            try:
                async with asyncio.timeout(_HAND_OVER_S):
                    await give_artifact(self._host, self.store, record, digest)
            except (PeerFailed, TimeoutError) as error:  # it may have the file already
                log.info("file not handed over peer=%s reason=%s", record.peer_id[-8:], error)

        await asyncio.gather(*map(give, first))

    async def name_epoch(
        self, change: Callable[[Orders, int], Orders], epoch: int | None, *, is_end: bool = False
    ) -> int:
        """Say that something is to happen in an epoch: in this one, or the next of which all can hear in time.

        change(orders, epoch named). is_end: what is to happen is the run's end, or another end.
        """
        for notice in _NOTICES if epoch is None else (0,):
            named = 0

            def decide(look: Look, notice: int = notice) -> Orders:
                nonlocal named
                now = look.place.epoch
                self._check_open(look)
                named = now + notice if epoch is None else epoch
                if named < now + NOTICE_EPOCHS:
                    raise UserError(f"the run is in epoch {now}: name epoch {now + NOTICE_EPOCHS} or a later one")
                end = look.orders.planned_end(self.store.spec)
                if named > end or (named == end and not is_end):
                    raise UserError(f"the run ends after {end} epochs, before the change in epoch {named} could hold")
                return change(look.orders, named)

            await self.give(decide)
            if await self._is_in_time(named):
                return named
        raise UserError(f"the run was past epoch {named} before its members heard of it: name a later epoch with --at")

    def _check_open(self, look: Look) -> None:
        if look.place.epoch >= look.in_force.num_epochs(self.store.spec, look.place.epoch):
            raise UserError(
                f"the run is over, after {look.place.epoch} epochs: go back to a checkpoint with `swarm run rollback`, or start "
                "another run from its export"
            )

    async def _is_in_time(self, named: int) -> bool:
        """Whether a Commit before that epoch carries the orders, or none came yet."""
        while True:
            look = await self.look()
            if self._are_in_force(look):
                return True
            assert self._given is not None
            if not self._given.may_follow(look.in_force, look.place.epoch):
                return False
            if look.place.epoch + NOTICE_EPOCHS < named or self._stands_still(look):
                return True  # there is time
            await asyncio.sleep(_LOOK_AGAIN_S)

    def _are_in_force(self, look: Look) -> bool:
        assert self._given is not None
        return look.in_force.serial >= self._given.serial

    def _stands_still(self, look: Look) -> bool:
        return look.orders.is_paused or min(standing.idle_s for standing in look.standings.values()) > 3.0

    async def in_force(self) -> str:
        """What is to be added to an answer, if it is not so yet."""
        look = await self.look()
        return "" if self._are_in_force(look) else "; the members know it, and take it up with the run's next step"

    async def wait(self, waits_for: str) -> None:
        """Before the next look. waits_for: what to tell the owner if there is no more time."""
        self.waits_for = waits_for
        await asyncio.sleep(_LOOK_AGAIN_S)
