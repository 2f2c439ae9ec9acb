"""A run of members without a network: messages wait in a bag from which chance draws, loses and doubles them.

Faults: crashes, freezes, partitions, false suspicions, joiners. `settle` ends all faults; after it the run must go on.
`run_schedule(seed)` is one random world under random faults, checked.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from swarm.epoch import member
from swarm.epoch.coordinator import Phase
from swarm.epoch.ledger import Added, AddTag, Ledger
from swarm.epoch.member import Member
from swarm.epoch.messages import EARLY, Commit, Place, Rules, UnitResult
from swarm.run_orders import NO_ORDERS, Amendment, Orders

START = Place(0, b"start")


@dataclass(frozen=True)
class Faults:
    """Chances, each per step of the simulation."""

    lose: float = 0.0
    double: float = 0.0
    crash: float = 0.0
    crash_busy_leader: float = 0.0
    """Of one that runs the round or hands out a Commit, which are short."""
    freeze: float = 0.0
    partition: float = 0.0
    suspect: float = 0.0
    join: float = 0.0
    poison: float = 0.0
    break_exchange: float = 0.0
    order: float = 0.0
    """The owner says something: no fault, but what comes at any moment, too."""


class SimulatedCourse:
    """Of one member, to whom orders come some time. What a Commit carries is a serial number."""

    def __init__(self, rules: Rules, all_orders: list[Orders]) -> None:
        self._rules, self._all_orders = rules, all_orders
        self.newest = NO_ORDERS

    def orders_of(self, raw: bytes) -> Orders:
        return self._all_orders[int(raw or b"0")]

    @property
    def is_paused(self) -> bool:
        return self.newest.is_paused

    def num_units(self, orders: Orders, epoch: int) -> int:
        batches = [one.target_batch for one in orders.amendments if one.epoch <= epoch]
        return batches[-1] or 0 if batches else self._rules.num_units

    def rules_at(self, place: Place, orders: bytes) -> Rules:
        known = self.orders_of(orders)
        return replace(
            self._rules,
            num_units=self.num_units(known, place.epoch),
            num_next_units=self.num_units(known, place.epoch + 1),
            eval_epochs=frozenset(known.eval_epochs),
        )

    def next_orders(self, place: Place, orders: bytes) -> bytes:
        may_follow = self.newest.may_follow(self.orders_of(orders), place.epoch)
        return str(self.newest.serial).encode() if may_follow else orders

    def allows(self, place: Place, orders: bytes, following: bytes) -> bool:
        return following == orders or self.orders_of(following).may_follow(self.orders_of(orders), place.epoch)


@dataclass
class Process:
    """A member, and what its process would hold."""

    member: Member
    stage: int
    course: SimulatedCourse
    sums: dict[int, Counter[int]] = field(default_factory=dict)
    """Of each ledger, by its identity."""
    held: dict[tuple[Any, int], Counter[int]] = field(default_factory=dict)
    averaging: tuple[Any, ...] | None = None
    frozen: bool = False
    history: list[bytes] = field(default_factory=list)
    num_downloads: int = 0
    entered: int = 0
    """Steps of its history that it has not kept."""

    @property
    def sum(self) -> Counter[int]:
        return self.sums[id(self.member.ledger)]

    def sum_for_ledger(self, ledger_id: int) -> Counter[int]:
        """None's, if there is no such ledger any more."""
        return next((self.sums[id(one)] for one in self.member._ledgers if one.ledger_id == ledger_id), Counter())

    def sum_for(self, unit: int) -> Counter[int]:
        return self.sums[id(self.member._ledger_for(unit))]


def has_weights(process: Process) -> bool:
    """Whether it holds the state of the place where it is."""
    return process.member.is_ready and not process.member.is_downloading


class World:
    """Everybody."""

    def __init__(
        self, seed: int, *, stages: int = 2, replicas: int = 2, trainers: int = 2, units: int = 6, **rules: Any
    ) -> None:
        self.dice = random.Random(seed)
        self.rules = Rules(num_stages=stages + 1, num_units=units, **rules)
        self.all_orders = [NO_ORDERS]
        self.processes: dict[str, Process] = {}
        self.bag: list[Callable[[], None]] = []
        self.unreliable: dict[int, Callable[[], None]] = {}
        self.groups: dict[str, int] = {}
        self.ids = itertools.count(1)
        self.names = itertools.count()
        self.committed: dict[bytes, Commit] = {}
        self.followers: dict[bytes, set[str]] = {}
        self.sums: dict[tuple[bytes, int], Counter[int]] = {}
        self.fired: Counter[str] = Counter()
        self.max_epoch = 0
        self.num_deliveries = 0
        self.poison = 0.0
        self.plant: Callable[[Process, Counter[int]], None] = lambda process, total: None
        roster = {f"n{next(self.names)}": stage for stage in range(stages) for _ in range(replicas)}
        roster |= {f"t{next(self.names)}": stages for _ in range(trainers)}
        for name, stage in roster.items():
            self._add(name, stage, START, roster)
        for name in roster:
            self._act(name, self.processes[name].member.start())

    def _add(self, name: str, stage: int, place: Place, members: dict[str, int]) -> Process:
        capacity = 2 if stage == self.rules.ends_stage else 0
        course = SimulatedCourse(self.rules, self.all_orders)
        process = Process(member=None, stage=stage, course=course)  # type: ignore[arg-type]
        ledger, early = (self._new_ledger(process) for _ in range(2))
        process.member = Member(
            name, stage, course, ledger, place, members,
            early=early if self.rules.delay else None, capacity=capacity,
        )  # fmt: skip
        self.processes[name] = process
        self.groups[name] = 0
        return process

    def _new_ledger(self, process: Process) -> Ledger:
        total: Counter[int] = Counter()
        ledger = Ledger(lambda: next(self.ids), total.clear)
        process.sums[id(ledger)] = total
        return ledger

    # Running.

    def run(self, steps: int, faults: Faults) -> None:
        self.poison = faults.poison
        for _ in range(steps):
            self._break_something(faults)
            if self.bag and self.dice.random() < 0.9:
                self._deliver(faults)
            else:
                self._feed(self._any_name(), member.Tick())

    def settle(self, epochs: int = 2, max_steps: int = 60_000) -> bool:
        """End all faults; whether the run then takes so many epochs more."""
        self.poison = 0.0
        self._order(self.all_orders[-1].changed(is_paused=False))
        for name, process in self.processes.items():
            self.groups[name] = 0
            process.frozen = False
        for name in list(self.processes):
            self._meet_everybody(name)
        target, calm = max(p.member.place.epoch for p in self.processes.values()) + epochs, Faults()
        for step in range(max_steps):
            if self.bag and self.dice.random() < 0.97:
                self._deliver(calm)
            else:
                name = self._any_name()
                self._feed(name, member.Tick())
                if not self.processes[name].member.term.peer and self.dice.random() < 0.02:
                    self._feed(name, member.Impatient())
            if step % 5000 == 4999:  # processes look for lost peers again and again
                for name in list(self.processes):
                    self._meet_everybody(name)
            if step % 20 == 0 and self._are_all_at(target):
                return True
        # Nobody keeps what is nowhere: crashes and partitions may take a stage's last state of the longest history.
        longest = max(p.member.place.epoch for p in self.processes.values())
        stages: dict[Place, set[int]] = {}
        for process in self.processes.values():
            if process.member.place.epoch == longest and has_weights(process):
                stages.setdefault(process.member.place, set()).add(process.stage)
        if all(len(alive) < self.rules.num_stages for alive in stages.values()):
            self.fired["stage lost"] += 1
            return True
        return False

    def _are_all_at(self, target: int) -> bool:
        first, *others = (p.member.place for p in self.processes.values())
        return first.epoch >= target and all(place == first for place in others)

    def _deliver(self, faults: Faults) -> None:
        self.num_deliveries += 1
        index = self.dice.randrange(len(self.bag))
        delivery = self.bag[index]
        if id(delivery) in self.unreliable and self.dice.random() < faults.double:
            self.fired["double"] += 1
            delivery()
            return
        self.bag[index] = self.bag[-1]
        self.bag.pop()
        if id(delivery) not in self.unreliable:
            delivery()
            return
        on_loss = self.unreliable.pop(id(delivery))
        if self.dice.random() < faults.lose:
            self.fired["lose"] += 1
            on_loss()
            return
        delivery()

    def _post(self, delivery: Callable[[], None], on_loss: Callable[[], None] = lambda: None) -> None:
        """What may be lost or come twice; everything else in the bag happens within a process."""
        self.unreliable[id(delivery)] = on_loss
        self.bag.append(delivery)

    def _any_name(self) -> str:
        return self.dice.choice(list(self.processes))

    def _can_talk(self, one: str, other: str) -> bool:
        return (
            one in self.processes
            and other in self.processes
            and self.groups[one] == self.groups[other]
            and not self.processes[one].frozen
        )

    def _feed(self, name: str, event: Any) -> None:
        process = self.processes.get(name)
        if process is None:
            return
        if process.frozen:
            self.bag.append(lambda: self._feed(name, event))
            return
        self._act(name, process.member.apply(event))

    # Faults.

    def _break_something(self, faults: Faults) -> None:
        draw = self.dice.random
        if draw() < faults.crash:
            self._crash_if_others_are_there(self._any_name())
        if draw() < faults.crash_busy_leader:
            busy = [name for name in self.leaders() if self.processes[name].member.leader.phase is not Phase.COLLECTING]
            if busy:
                self._crash_if_others_are_there(self.dice.choice(busy))
        if draw() < faults.freeze:
            name = self._any_name()
            self.processes[name].frozen = not self.processes[name].frozen
            self.fired["freeze"] += self.processes[name].frozen
            if self.processes[name].frozen:
                self._fail_exchanges(name)
                for other in list(self.processes):
                    if other != name:
                        self.bag.append(lambda other=other: self._feed(other, member.Lost(name)))
            else:
                self._meet_everybody(name)
        if draw() < faults.partition:
            if any(self.groups.values()):
                self.groups = dict.fromkeys(self.groups, 0)
                for name in list(self.processes):
                    self._meet_everybody(name)
            else:
                self.fired["partition"] += 1
                self.groups = {name: self.dice.randrange(2) for name in self.groups}
                for one, other in itertools.permutations(list(self.processes), 2):
                    if not self._can_talk(one, other):
                        self.bag.append(lambda one=one, other=other: self._feed(one, member.Lost(other)))
                        self._fail_exchanges(other)
        if draw() < faults.suspect:
            self.fired["suspect"] += 1
            one, other = self._any_name(), self._any_name()
            self._feed(one, member.Lost(other))
            stage = self.processes[other].stage
            self.bag.append(lambda: self._find(one, other, stage))
        if draw() < faults.join and len(self.processes) < 12:
            self.fired["join"] += 1
            self._join()
        if draw() < faults.break_exchange:
            self._fail_exchanges(self._any_name())
        if draw() < faults.order:
            self.fired["order"] += 1
            newest, epoch = self.all_orders[-1], self.max_epoch + self.dice.randint(0, 5)
            kind = self.dice.randrange(3)
            if kind == 0:
                self._order(newest.changed(is_paused=not newest.is_paused))
            elif kind == 1:
                self._order(newest.with_eval(epoch))
            elif len(newest.amendments) < 20:
                self._order(newest.amended(Amendment(epoch=max(1, epoch), target_batch=self.dice.randint(1, 7))))

    def _order(self, orders: Orders) -> None:
        """The owner says something, and everybody hears it some time."""
        self.all_orders.append(orders)
        for name in self.processes:
            self.bag.append(lambda name=name: self._hear(name, orders))

    def _hear(self, name: str, orders: Orders) -> None:
        process = self.processes.get(name)
        if process is not None and orders.serial > process.course.newest.serial:
            process.course.newest = orders
            self._feed(name, member.Steered())

    def leaders(self) -> list[str]:
        return [name for name, process in self.processes.items() if process.member.leader is not None]

    def crash(self, name: str) -> None:
        """A process is gone; everybody learns it some time."""
        leader = self.processes[name].member.leader
        self.fired["crash" if leader is None else f"crash of a leader, {leader.phase.value}"] += 1
        del self.processes[name]
        self._fail_exchanges(name)
        for other in self.processes:
            self.bag.append(lambda other=other: self._feed(other, member.Lost(name)))

    def _crash_if_others_are_there(self, name: str) -> None:
        """At the same place and of the same stage, with the same outcome: what nobody else has nobody can bring back."""
        process = self.processes[name]
        leaders = [p.member.leader for p in self.processes.values() if p.member.leader is not None]
        outcomes = [
            leader.commit.members
            for leader in leaders
            if leader.commit is not None
            and leader.place == process.member.place
            and (name, process.stage) in leader.commit.members
        ]
        twins = [
            p
            for n, p in self.processes.items()
            if n != name
            and p.stage == process.stage
            and p.member.place == process.member.place
            and has_weights(p)
            and all((n, p.stage) in members for members in outcomes)
        ]
        if twins or not has_weights(process):
            self.crash(name)

    def _meet_everybody(self, name: str) -> None:
        for other in list(self.processes):
            if other != name and self._can_talk(name, other):
                stage, own = self.processes[other].stage, self.processes[name].stage
                self.bag.append(lambda other=other, stage=stage: self._find(name, other, stage))
                self.bag.append(lambda other=other, own=own: self._find(other, name, own))

    def _find(self, one: str, other: str, stage: int) -> None:
        if self._can_talk(one, other):
            self._feed(one, member.Found(other, stage))

    def _join(self) -> None:
        stage = self.dice.randrange(self.rules.num_stages)
        donors = [n for n, p in self.processes.items() if p.stage == stage and has_weights(p)]
        if not donors:
            return
        donor = self.dice.choice(donors)
        name = f"{'t' if stage == self.rules.ends_stage else 'n'}{next(self.names)}"
        process = self._add(name, stage, START, {n: p.stage for n, p in self.processes.items()})
        self.groups[name] = self.groups[donor]
        process.member.is_downloading = True
        self.bag.append(lambda: self._install(name, donor, START))
        orders = self.all_orders[-1]
        self.bag.append(lambda: self._hear(name, orders))

    # Carrying out.

    def _act(self, name: str, actions: list[Any]) -> None:
        process = self.processes[name]
        for action in actions:
            if isinstance(action, member.Send):
                self._post(lambda a=action: self._arrive(name, a.peer, a.message))
            elif isinstance(action, member.Run):
                place = process.member.place
                self._send_to_hop(name, action, place, self.rules.ends_stage - 1, {})
            elif isinstance(action, member.AddEnds):
                if action.is_first:
                    process.sum_for_ledger(action.ledger_id)[action.unit % EARLY] += 1
            elif isinstance(action, member.Average):
                self._average(name, process, action)
            elif isinstance(action, member.StopAveraging):
                process.held.pop((action.term, action.attempt), None)
                if process.averaging is not None and process.averaging[1:3] == (action.term, action.attempt):
                    self._fail_exchanges(name)
                    process.averaging = None
            elif isinstance(action, member.Step):
                self._step(name, process, action.commit)
            elif isinstance(action, member.Download):
                process.num_downloads += 1
                self.bag.append(lambda a=action: self._install(name, a.peer, a.place))

    def _arrive(self, sender: str, receiver: str, message: Any) -> None:
        known = self.processes.get(receiver)
        if known is None:  # whoever connects in vain learns it
            self.bag.append(lambda: self._feed(sender, member.Lost(receiver)))
            return
        if sender in self.processes and not self._can_talk(sender, receiver):
            return
        if sender not in self.processes and sender in known.member.lost:
            return  # the connection had broken off before
        self._feed(receiver, member.Received(sender, message))

    def _hop(self, trainer: str, run: member.Run, place: Place, stage: int, ledgers: dict[int, int]) -> None:
        """The backward of one hop, from the last to the first, each a message."""
        if trainer not in self.processes:
            return
        if self.processes[trainer].member.rules.num_units <= run.unit < EARLY:
            self._feed(trainer, member.Ran(run.unit, run.serial, (), UnitResult(run.unit, 5, 1.0)))
            return
        if stage < 0:
            is_poisoned = self.dice.random() < self.poison
            self.fired["poison"] += is_poisoned
            loss = float("nan") if is_poisoned else 1.0 + run.unit % EARLY
            result = UnitResult(run.unit, 10 + run.unit % EARLY, loss)
            ids = tuple(ledgers[s] for s in range(self.rules.ends_stage))
            self._feed(trainer, member.Ran(run.unit, run.serial, ids, result))
            return
        owner = run.owners[stage]
        process = self.processes.get(owner.peer)
        if process is None or not self._can_talk(trainer, owner.peer) or process.frozen:
            culprit = owner.peer if self.dice.random() < 0.5 else ""
            self._feed(trainer, member.DidNotRun(run.unit, run.serial, culprit, "gone"))
            return
        tag = AddTag(place, run.term, owner.ledger_id, run.unit)
        ledger, total = process.member._ledger_for(run.unit), process.sum_for(run.unit)
        answer = ledger.add(tag, lambda: total.update([run.unit % EARLY]))
        if answer is Added.OUTDATED:
            self._feed(trainer, member.DidNotRun(run.unit, run.serial, "", "outdated"))
            return
        ledgers = {**ledgers, stage: owner.ledger_id}
        self._send_to_hop(trainer, run, place, stage - 1, ledgers)

    def _send_to_hop(self, trainer: str, run: member.Run, place: Place, stage: int, ledgers: dict[int, int]) -> None:
        self._post(
            lambda: self._hop(trainer, run, place, stage, ledgers),
            lambda: self._feed(trainer, member.DidNotRun(run.unit, run.serial, "", "no answer")),
        )

    def _average(self, name: str, process: Process, action: member.Average) -> None:
        group = tuple(m.peer for m in action.group)
        key = (process.member.place, action.term, action.attempt, process.stage, group)
        process.averaging = key
        here = [self.processes[m] for m in group if m in self.processes and self.processes[m].averaging == key]
        if len(here) == len(group):
            total: Counter[int] = Counter()
            for one, told in zip(here, action.group, strict=True):
                assert told.has_gradient == bool(+one.sum), (told, one.sum, one.member.ledger.units)
                total.update(one.sum)
            self.plant(process, total)
            for peer in group:
                self.bag.append(lambda peer=peer: self._averaged(peer, key, total))

    def _averaged(self, name: str, key: tuple[Any, ...], total: Counter[int]) -> None:
        process = self.processes.get(name)
        if process is None or process.averaging != key:
            return
        if process.frozen:
            self.bag.append(lambda: self._averaged(name, key, total))
            return
        process.held[key[1], key[2]] = Counter(total)
        digest = repr(sorted(total.items())).encode()
        self._feed(name, member.Averaged(key[1], key[2], digest, float(sum(total.values()))))

    def _fail_exchanges(self, name: str) -> None:
        """Whoever averages with this one fails, and says because of whom."""
        for other, process in self.processes.items():
            key = process.averaging
            if key is not None and key[1:3] not in process.held and other != name and name in key[4]:
                self.fired["broken exchange"] += 1
                event = member.NotAveraged(key[1], key[2], frozenset({name}))
                self.bag.append(lambda other=other, event=event: self._feed(other, event))

    def _step(self, name: str, process: Process, commit: Commit) -> None:
        lineage = commit.lineage
        self.committed[lineage] = commit
        self.followers.setdefault(lineage, set()).add(name)
        self.max_epoch = max(self.max_epoch, commit.epoch + 1)
        if not commit.is_skipped:
            held = process.held.get((commit.term, commit.attempt))
            assert held is not None, f"{name} stepped without a sum"
            known = self.sums.setdefault((lineage, process.stage), held)
            assert known == held, f"replicas of stage {process.stage} stepped with other sums"
        process.history.append(lineage)

    def _install(self, name: str, donor: str, place: Place) -> None:
        """A download: of any replica of the stage that is at the place or beyond. Again later if there is none."""
        process = self.processes.get(name)
        if process is None or not process.member.is_downloading:
            return
        donors = [
            p
            for n, p in self.processes.items()
            if n != name
            and p.stage == process.stage
            and self._can_talk(n, name)
            and has_weights(p)
            and (p.member.place == place or p.member.place.epoch > place.epoch)
        ]
        if not donors:
            if self.dice.random() < 0.2:  # in vain: back to where it was, to look again
                self._feed(name, member.InVain())
            else:
                self.bag.append(lambda: self._install(name, donor, place))
            return
        source = self.dice.choice(donors)
        process.history = list(source.history)
        if self.dice.random() < 0.5:
            self.fired["joined before the weights"] += 1
            process.entered = len(process.history)
            self._feed(name, member.Entered(source.member.place, source.member.last_commit))
            self.bag.append(lambda: self._get_weights(name, process))
            return
        self._feed(name, member.Installed(source.member.place, source.member.last_commit))

    def _get_weights(self, name: str, process: Process) -> None:
        """A state at or after the place where it entered; what followed it has kept."""
        if self.processes.get(name) is not process or process.member.is_ready or process.member.is_downloading:
            return
        for other, source in self.processes.items():
            steps = source.history
            is_donor = other != name and source.stage == process.stage and has_weights(source)
            is_ours = process.entered <= len(steps) and process.history[: len(steps)] == steps
            if is_donor and is_ours and self._can_talk(other, name) and self.dice.random() < 0.5:
                self._feed(name, member.Ready())
                return
        self.bag.append(lambda: self._get_weights(name, process))

    # What must hold.

    def check(self) -> None:
        """Every unit exactly once in every stage's committed sum; nobody followed two Commits of one epoch; histories are chains."""
        for lineage, commit in self.committed.items():
            if commit.is_skipped:
                continue
            course = SimulatedCourse(self.rules, self.all_orders)
            rules = course.rules_at(commit.before, commit.orders)
            parent = self.committed.get(commit.parent)
            before = course.rules_at(commit.before, b"" if parent is None else parent.orders)
            assert before.units_of(commit.epoch) == rules.units_of(commit.epoch), (
                "orders changed an epoch that had begun"
            )
            stages = {stage for (line, stage) in self.sums if line == lineage}
            for stage in stages:
                total = self.sums[lineage, stage]
                expected = Counter(range(rules.num_units))
                assert total == expected, f"epoch {commit.epoch}, stage {stage}: {total}"
            units = range(rules.num_units)
            assert commit.num_loss_tokens == sum(10 + unit for unit in units)
            assert commit.loss_sum == sum(1.0 + unit for unit in units)
            num_eval_units = len(rules.units_of(commit.epoch)) - rules.num_units
            assert (commit.num_eval_tokens, commit.eval_loss_sum) == (5 * num_eval_units, 1.0 * num_eval_units)
        for one, other in itertools.combinations(self.committed.values(), 2):
            if one.parent == other.parent:
                both = self.followers[one.lineage] & self.followers[other.lineage]
                assert not both, f"{both} followed two Commits of epoch {one.epoch}"

        for name, process in self.processes.items():
            if process.member.is_downloading:
                continue
            line = [START.lineage, *process.history]
            assert process.member.place == Place(len(process.history), line[-1]), f"{name} is not where it stepped to"
            for parent, lineage in itertools.pairwise(line):
                assert self.committed[lineage].parent == parent, f"{name} has a gap in its history"

    def tally(self) -> Counter[str]:
        """What happened."""
        parents = Counter(commit.parent for commit in self.committed.values())
        num_skipped = sum(commit.is_skipped for commit in self.committed.values())
        counts = {
            "epochs": self.max_epoch,
            "deliveries": self.num_deliveries,
            "commits": len(self.committed),
            "skipped steps": num_skipped,
            "commits beside another": sum(count - 1 for count in parents.values()),
            "commits of a later term": sum(commit.term.number > 1 for commit in self.committed.values()),
            "commits with new orders": len({commit.orders for commit in self.committed.values()}) - 1,
            "commits of a later attempt": sum(commit.attempt > 0 for commit in self.committed.values()),
            "downloads": sum(process.num_downloads for process in self.processes.values()),
        }
        return Counter(counts) + self.fired


FAULTS = Faults(
    lose=0.03,
    double=0.05,
    crash=0.002,
    crash_busy_leader=0.01,
    freeze=0.004,
    partition=0.002,
    suspect=0.004,
    join=0.004,
    break_exchange=0.02,
    order=0.003,
)


def random_world(seed: int) -> World:
    """Of up to twelve processes, with and without evaluation, with and without one epoch of delay."""
    dice = random.Random(seed)
    rules = {"num_eval_units": dice.randint(1, 3), "eval_every": dice.randint(0, 3)} if dice.random() < 0.3 else {}
    rules["delay"] = int(dice.random() < 0.4)
    return World(
        seed,
        stages=dice.randint(1, 3),
        replicas=dice.randint(1, 3),
        trainers=dice.randint(1, 3),
        units=dice.randint(1, 7),
        **rules,
    )


def run_schedule(seed: int, *, max_settle_steps: int = 60_000) -> World:
    """One random schedule, checked. AssertionError with the seed if anything is wrong."""
    dice = random.Random(~seed)
    faults = replace(FAULTS, poison=0.05) if dice.random() < 0.2 else FAULTS
    try:
        world = random_world(seed)
        world.run(dice.randint(100, 700), faults)
        world.check()
        assert world.settle(epochs=dice.choice((1, 1, 2)), max_steps=max_settle_steps), (
            "the run does not go on after all faults have ended"
        )
        world.check()
    except Exception as error:
        raise AssertionError(f"schedule with seed {seed}: {type(error).__name__}: {error}") from error
    return world
