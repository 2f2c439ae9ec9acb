"""The epoch's state machine: random schedules, exact ones, planted bugs that the simulation must notice, and its rules one by one."""

from __future__ import annotations

import dataclasses
import inspect
import math
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from swarm.epoch import member
from swarm.epoch.coordinator import Coordinator, Letter, Phase
from swarm.epoch.ledger import Added, AddTag, Ledger
from swarm.epoch.member import Member
from swarm.epoch.messages import (
    EARLY,
    NO_TERM,
    Abort,
    Commit,
    Committed,
    Confirm,
    Course,
    Done,
    Excluded,
    Failed,
    FixedCourse,
    Hello,
    Lead,
    Lease,
    Owner,
    Place,
    Prepare,
    Rate,
    Redirect,
    Report,
    RoundFailed,
    Rules,
    Term,
    UnitResult,
    Void,
    Where,
    equal_shares,
    rank_leaders,
)
from swarm.run_orders import Orders
from tests.support.epoch_simulation import START, Faults, SimulatedCourse, World, run_schedule

NUM_SCHEDULES = 800
FAULTS_THAT_MUST_FIRE = (
    "order",
    "commits with new orders",
    "lose",
    "double",
    "crash",
    "crash of a leader, collecting",
    "crash of a leader, round",
    "crash of a leader, committed",
    "freeze",
    "partition",
    "suspect",
    "join",
    "poison",
    "broken exchange",
)


# Random schedules ------------------------------------------------------------------------------------------------------


def test_random_schedules_count_every_microbatch_once_and_go_on_afterwards() -> None:
    tally: Counter[str] = Counter()
    for seed in range(NUM_SCHEDULES):
        tally += run_schedule(seed).tally()
    assert [name for name in FAULTS_THAT_MUST_FIRE if not tally[name]] == []
    assert tally["epochs"] > NUM_SCHEDULES and tally["skipped steps"] and tally["downloads"]
    assert tally["commits of a later term"] and tally["commits of a later attempt"]
    assert tally["stage lost"] <= 0.005 * NUM_SCHEDULES, tally


def test_a_seed_names_one_schedule() -> None:
    assert run_schedule(7).tally() == run_schedule(7).tally()
    assert run_schedule(7).committed.keys() == run_schedule(7).committed.keys()


@pytest.mark.parametrize(
    ("faults", "fired"),
    [
        (Faults(double=0.5), ("double",)),
        (Faults(lose=0.3), ("lose",)),
        (Faults(lose=0.05, double=0.1, break_exchange=0.3), ("lose", "double", "broken exchange")),
        (Faults(suspect=0.1), ("suspect",)),
        (Faults(crash_busy_leader=0.2), ("crash of a leader, round",)),
        (Faults(freeze=0.05), ("freeze",)),
        (Faults(join=0.05), ("join",)),
        (Faults(poison=0.2), ("poison",)),
    ],
    ids=lambda value: "" if isinstance(value, tuple) else ", ".join(f for f, chance in vars(value).items() if chance),
)
def test_much_of_one_fault_is_survived(faults: Faults, fired: tuple[str, ...]) -> None:
    tally: Counter[str] = Counter()
    for seed in range(30):
        world = World(seed, stages=2, replicas=3, trainers=3)
        world.run(400, faults)
        world.check()
        assert world.settle(epochs=1), f"seed {seed}"
        world.check()
        tally += world.tally()
    assert all(tally[name] for name in fired), tally
    assert tally["stage lost"] <= 1


def test_after_a_partition_in_which_both_sides_stepped_everybody_follows_one_history() -> None:
    num_forks = num_lost = 0
    for seed in range(40):
        world = World(seed, stages=1, replicas=2, trainers=2, units=2)
        sides = {name: index % 2 for index, name in enumerate(world.processes)}
        cut(world, sides)
        world.run(500, Faults())
        world.check()
        tips = {(process.member.place, sides[name]) for name, process in world.processes.items()}
        num_forks += len({side for place, side in tips if place.epoch > 0}) == 2
        assert world.settle(epochs=1), f"seed {seed}"
        world.check()
        num_lost += world.fired["stage lost"]
        num_lineages = len({process.member.place.lineage for process in world.processes.values()})
        assert num_lineages == 1 or world.fired["stage lost"], f"seed {seed}"
    assert num_forks > 10
    assert num_lost <= 1  # of one stage all follow the other side while only the other stage takes the last step


def cut(world: World, sides: dict[str, int]) -> None:
    world.groups = dict(sides)
    for one in sides:
        for other in sides:
            if sides[one] != sides[other]:
                world._feed(one, member.Lost(other))


# Exact schedules -------------------------------------------------------------------------------------------------------


def calm_world(seed: int, num_deliveries: int) -> World:
    """Without a fault, stopped after so many deliveries."""
    world = World(seed, stages=1, replicas=2, trainers=2, units=2)
    while world.num_deliveries < num_deliveries:
        world.run(1, Faults())
    return world


def one_epoch(seed: int) -> int:
    """Deliveries until everybody has taken the first step."""
    world = calm_world(seed, 0)
    while any(process.member.place.epoch < 1 for process in world.processes.values()):
        world.run(1, Faults())
    return world.num_deliveries


@pytest.mark.parametrize("is_leader", [True, False], ids=["the leader", "another"])
def test_a_crash_after_any_delivery_is_survived(is_leader: bool) -> None:
    fired: Counter[str] = Counter()
    for seed in range(2):
        for num_deliveries in range(one_epoch(seed) + 5):
            world = calm_world(seed, num_deliveries)
            leaders = world.leaders()
            candidates = [name for name in world.processes if (name in leaders) == is_leader]
            if not candidates:
                continue
            world.crash(candidates[num_deliveries % len(candidates)])
            assert world.settle(epochs=1), f"seed {seed}, delivery {num_deliveries}"
            world.check()
            assert not world.fired["stage lost"]
            assert world.tally()["commits beside another"] == 0
            fired += world.fired
    assert all(fired[f"crash of a leader, {phase.value}"] for phase in Phase) or not is_leader, fired


def test_a_suspicion_after_any_delivery_is_survived() -> None:
    for num_deliveries in range(one_epoch(0)):
        world = calm_world(0, num_deliveries)
        leader = next(iter(world.leaders()), "n0")
        for other in [name for name in world.processes if name != leader]:
            world._feed(other, member.Lost(leader))
        assert world.settle(epochs=1), f"delivery {num_deliveries}"
        world.check()


def test_of_two_coordinators_the_higher_term_wins() -> None:
    world = calm_world(3, 20)
    (leader,) = world.leaders()
    other = rank_leaders(START, [name for name in world.processes if name != leader])[0]
    world._feed(other, member.Lost(leader))
    assert set(world.leaders()) == {leader, other}
    assert world.settle(epochs=1)
    world.check()
    first = next(commit for commit in world.committed.values() if commit.epoch == 0)
    assert first.term == Term(2, other)


def test_a_joiner_in_mid_epoch_takes_part_and_steps_with_the_others() -> None:
    world = calm_world(4, 25)
    world.run(1, Faults(join=1.0))
    joiner = list(world.processes)[-1]
    assert world.fired["join"] == 1
    assert world.settle(epochs=2)
    world.check()
    assert world.processes[joiner].history
    assert any(joiner in followers for followers in world.followers.values())


def test_a_trainer_lost_between_two_stages_has_its_microbatch_run_again_and_counted_once() -> None:
    for seed in range(60):
        world = World(seed, stages=2, replicas=1, trainers=2, units=1)
        stages = [next(p for p in world.processes.values() if p.stage == stage) for stage in range(2)]
        while not stages[1].member.ledger.units:
            world.run(1, Faults())
        if not stages[0].member.ledger.units:
            (lease,) = next(p for p in world.processes.values() if p.member.leader).member.leader._leases.values()
            if lease.trainer in world.leaders():
                continue
            world.crash(lease.trainer)
            assert world.settle(epochs=1)
            world.check()
            return
    raise AssertionError("no trainer was between two stages")


# Planted bugs ----------------------------------------------------------------------------------------------------------


def plant(monkeypatch: pytest.MonkeyPatch, method: Callable[..., Any], *changes: tuple[str, str]) -> None:
    """Put the method in again with other text in its source."""
    source = textwrap.dedent(inspect.getsource(method))
    for old, new in changes:
        assert source.count(old) == 1, f"the planted bug does not fit the source any more: {old!r}"
        source = source.replace(old, new)
    module = sys.modules[method.__module__]
    names: dict[str, Any] = {}
    exec(compile(f"from __future__ import annotations\n{source}", method.__qualname__, "exec"), vars(module), names)
    owner = getattr(module, method.__qualname__.split(".")[0])
    monkeypatch.setattr(owner, method.__name__, names[method.__name__])


BUGS: dict[str, tuple[Callable[..., Any], tuple[tuple[str, str], ...]]] = {
    "a repeated microbatch is added again": (Ledger._answer, (("if tag.unit in self.units:", "if False:"),)),
    "a Done counts for a ledger that does not own the microbatch": (
        Coordinator._on_done,
        (("if self._counts.owner.get((stage, unit)) == ledger_id:", "if True:"),),
    ),
    "every gradient of the ends is the first": (
        Coordinator._confirm,
        (("is_first = self._counts.held.get(key) ==", "is_first = True or"),),
    ),
    "a fenced ledger still counts": (Coordinator._fence, (("self._counts.forget(ledger_id)", "pass"),)),
    "a ledger is not emptied when it is void": (Member._on_void, (("self.ledger.void()", "pass"),)),
    "a round begins with whatever the ledger holds": (
        Member._on_prepare,
        (("prepare.ledger_id != self.ledger.ledger_id or prepare.units != self.ledger.units", "False"),),
    ),
    "a Commit needs no agreement of the replicas": (
        Coordinator._on_report,
        (("if self._reports.keys() != self._group.keys():", "if not self._reports:"),),
    ),
    "an outcome is decided while microbatches are missing": (
        Coordinator._is_done,
        (
            (
                "in self._counts.held for stage in range(self.rules.num_stages)",
                "in self._counts.held for stage in range(1)",
            ),
        ),
    ),
    "orders change an epoch that has begun": (
        Orders.may_follow,
        (("begun = epoch + NOTICE_EPOCHS", "begun = epoch"),),
    ),
    "a leader takes the newest orders for the rules": (
        SimulatedCourse.rules_at,
        (("known = self.orders_of(orders)", "known = self.newest"),),
    ),
    "a lost replica's microbatches still count": (
        Coordinator.lose,
        (("letters += self._fence(gone.ledger_id)", "pass"),),
    ),
    "two ledgers may hold the same microbatch": (
        Coordinator._on_hello,
        ((" or (hello.stage, unit) in self._counts.held", ""),),
    ),
}


def schedules_until_noticed(max_schedules: int) -> int | None:
    for seed in range(max_schedules):
        try:
            run_schedule(seed, max_settle_steps=20_000)
        except AssertionError:
            return seed + 1
    return None


@pytest.mark.parametrize("bug", BUGS)
def test_random_schedules_notice_a_planted_bug(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method, changes = BUGS[bug]
    plant(monkeypatch, method, *changes)
    assert schedules_until_noticed(300) is not None


# The rules, one by one -------------------------------------------------------------------------------------------------

PLACE, TERM = START, Term(1, "n0")
ROSTER = {"n0": 0, "n1": 0, "t2": 1, "t3": 1}
RULES = Rules(num_stages=2, num_units=4)


def ledger_of(peer: str) -> int:
    return int(peer[1:]) + 100


def hello(peer: str, roster: dict[str, int] = ROSTER, **changes: Any) -> Hello:
    is_trainer = roster[peer] == max(roster.values())
    plain = Hello(PLACE, TERM, roster[peer], ledger_of(peer), frozenset(), capacity=2 if is_trainer else 0)
    return dataclasses.replace(plain, **changes)


class Led:
    """A coordinator with its members, all of whom obey; every letter that it writes is kept."""

    def __init__(
        self,
        rules: Rules = RULES,
        roster: dict[str, int] = ROSTER,
        share_out: Callable[[Sequence[float | None]], Sequence[int]] = equal_shares,
        course: Course | None = None,
        **hellos: dict[str, Any],
    ) -> None:
        self.roster = roster
        self.coordinator = Coordinator("n0", PLACE, TERM, course or FixedCourse(rules), b"", roster, share_out)
        self.letters: list[Letter] = self.coordinator.start()
        for peer in roster:
            self.say(peer, hello(peer, roster, **hellos.get(peer, {})))

    def say(self, peer: str, message: Any) -> list[Letter]:
        return self.note(self.coordinator.receive(peer, message))

    def note(self, letters: list[Letter]) -> list[Letter]:
        self.letters += letters
        return letters

    def told(self, kind: type) -> list[tuple[str, Any]]:
        return [(peer, message) for peer, message in self.letters if isinstance(message, kind)]

    def leases(self) -> dict[int, tuple[str, Lease]]:
        """The last of each unit."""
        return {lease.unit: (peer, lease) for peer, lease in self.told(Lease)}

    def finish(self, unit: int, *, loss: float = 1.0, ledgers: tuple[int, ...] | None = None) -> list[Letter]:
        trainer, lease = self.leases()[unit]
        owners = tuple(owner.ledger_id for owner in lease.owners) if ledgers is None else ledgers
        result = UnitResult(unit, 10, loss)
        return self.say(trainer, Done(PLACE, TERM, lease.serial, owners, ledger_of(trainer), result))

    def finish_all(self) -> None:
        while self.coordinator.phase is Phase.COLLECTING:
            missing = [unit for unit in self.leases() if unit in self.coordinator._leases]
            assert missing
            self.finish(missing[0])

    def report(self, square_norm: float = 4.0, **digests: bytes) -> None:
        attempt = self.coordinator.attempt
        for peer in sorted(self.coordinator._group):
            digest = digests.get(peer, f"stage {self.roster[peer]}".encode())
            self.say(peer, Report(PLACE, TERM, attempt, digest, square_norm))


def test_leading_is_told_to_everybody_and_nothing_is_leased_before_all_have_said_hello() -> None:
    led = Led(roster=ROSTER)
    assert {peer for peer, _ in led.told(Lead)} == ROSTER.keys()
    first_lease = next(i for i, (_, message) in enumerate(led.letters) if isinstance(message, Lease))
    assert first_lease >= len(ROSTER)
    waiting = Coordinator("n0", PLACE, TERM, FixedCourse(RULES), b"", ROSTER)
    for peer in ("n0", "n1", "t2"):
        assert waiting.receive(peer, hello(peer)) == []
    assert waiting.waits_for == {"t3"}
    assert [message for _, message in waiting.lose("t3") if isinstance(message, Lease)]


def test_one_who_never_says_hello_is_waited_for_only_so_long() -> None:
    coordinator = Coordinator("n0", PLACE, TERM, FixedCourse(RULES), b"", ROSTER)
    for peer in ("n0", "n1", "t2"):
        coordinator.receive(peer, hello(peer))
    ticks = [coordinator.tick() for _ in range(11)]
    assert [any(isinstance(message, Lease) for _, message in letters) for letters in ticks] == [False] * 10 + [True]


def test_leases_go_to_who_has_most_room() -> None:
    led = Led(Rules(num_stages=2, num_units=6), t2={"capacity": 1}, t3={"capacity": 3})
    given = Counter(peer for peer, _ in led.leases().values())
    assert given == {"t2": 1, "t3": 3}
    assert not Led(Rules(num_stages=2, num_units=6), t2={"capacity": 0}, t3={"capacity": 0}).leases()


def test_owners_are_balanced_and_the_same_for_a_lease_that_is_given_again() -> None:
    led = Led()
    owners = {unit: lease.owners for unit, (_, lease) in led.leases().items()}
    assert Counter(owner.peer for (owner,) in owners.values()) == {"n0": 2, "n1": 2}
    trainer, lease = led.leases()[0]
    led.say(trainer, Failed(PLACE, TERM, 0, lease.serial, "", "no answer"))
    _, again = led.leases()[0]
    assert again.serial > lease.serial and again.owners == owners[0] == (Owner("n0", 100),)


def test_a_microbatch_counts_only_in_the_ledger_that_owns_it() -> None:
    led = Led()
    _, lease = led.leases()[0]
    wrong = 100 + 101 - lease.owners[0].ledger_id
    led.finish(0, ledgers=(wrong,))
    assert led.coordinator.num_done == 0
    _, again = led.leases()[0]
    assert again.owners == lease.owners
    led.finish(0)
    assert led.coordinator.num_done == 1


def test_only_the_first_gradient_of_the_ends_is_confirmed() -> None:
    led = Led()
    trainer, lease = led.leases()[0]
    other = "t3" if trainer == "t2" else "t2"
    led.finish(0)
    owners = tuple(owner.ledger_id for owner in lease.owners)
    led.say(other, Done(PLACE, TERM, 77, owners, ledger_of(other), UnitResult(0, 10, 1.0)))
    confirms = [(peer, confirm.is_first) for peer, confirm in led.told(Confirm) if confirm.unit == 0]
    assert confirms == [(trainer, True), (other, False)]


def test_a_trainer_that_tells_of_what_it_cannot_have_run_is_excluded() -> None:
    led = Led()
    led.say("t2", Done(PLACE, TERM, 1, (100,), 102, UnitResult(99, 10, 1.0)))
    led.say("n1", Done(PLACE, TERM, 1, (100,), 101, UnitResult(0, 10, 1.0)))
    assert led.coordinator.excluded.keys() == {"t2", "n1"}
    assert {peer for peer, _ in led.told(Excluded)} == {"t2", "n1"}


def test_a_lost_replicas_microbatches_are_missing_again_and_are_run_through_all_hops() -> None:
    led = Led()
    led.finish_all()
    assert led.coordinator.phase is Phase.ROUND
    of_n1 = {unit for unit, (_, lease) in led.leases().items() if lease.owners[0].peer == "n1"}
    letters = led.note(led.coordinator.lose("n1"))
    assert led.coordinator.phase is Phase.COLLECTING and led.coordinator.attempt == 1
    assert {peer for peer, message in letters if isinstance(message, Abort)} == {"n0", "t2", "t3"}
    leases = [message for _, message in letters if isinstance(message, Lease)]
    assert {lease.unit for lease in leases} == of_n1 != set()
    assert all(lease.owners == (Owner("n0", 100),) for lease in leases)


def test_a_fenced_ledger_is_void_when_its_owner_comes_back() -> None:
    led = Led()
    led.note(led.coordinator.lose("n1"))
    assert [(peer, message) for peer, message in led.say("n1", hello("n1"))] == [("n1", Void(PLACE, TERM, 101))]
    led.say("n1", hello("n1", ledger_id=555))
    assert led.coordinator.num_peers[0] == 2


def test_of_two_ledgers_that_hold_the_same_microbatch_one_is_void() -> None:
    held = {"units": frozenset({0})}
    led = Led(n0=held, n1=held)
    assert led.told(Void) == [("n1", Void(PLACE, TERM, 101))]
    led.say("n1", hello("n1", ledger_id=555))
    assert led.leases()[0][1].owners == (Owner("n0", 100),)


def test_a_hello_that_names_another_ones_ledger_does_not_touch_that_ledger() -> None:
    led = Led()
    led.finish(0)
    held = dict(led.coordinator._counts.held)
    answer = led.say("n9", Hello(PLACE, TERM, 0, ledger_of("n0"), frozenset({0})))
    assert answer == [("n9", Void(PLACE, TERM, ledger_of("n0")))]
    assert led.coordinator._counts.held == held and not led.coordinator._fenced
    assert led.say("n0", hello("n0", units=frozenset({0}))) == []


def test_who_has_no_weights_yet_is_given_nothing_but_takes_part_in_the_round() -> None:
    led = Led(Rules(num_stages=2, num_units=8), n1={"is_ready": False})
    assert {owner.peer for _, lease in led.leases().values() for owner in lease.owners} == {"n0"}
    led.say("n1", hello("n1"))
    led.finish(0)
    led.finish(1)
    owners = {unit: lease.owners[0].peer for unit, (_, lease) in led.leases().items()}
    assert set(owners.values()) == {"n0", "n1"}
    led.say("n1", hello("n1", is_ready=False))  # an older letter that comes late
    unit = next(unit for unit, owner in owners.items() if owner == "n1")
    trainer, lease = led.leases()[unit]
    led.say(trainer, Failed(PLACE, TERM, unit, lease.serial, "", "no answer"))
    _, again = led.leases()[unit]
    assert again.serial > lease.serial and again.owners == lease.owners, "a ledger that may hold it keeps a microbatch"


def test_shares_follow_what_was_measured_of_each_replica_and_who_cannot_be_reached_sums_nothing() -> None:
    seen: list[Sequence[float | None]] = []

    def share_out(rates: Sequence[float | None]) -> list[int]:
        seen.append(rates)
        return equal_shares(rates)

    roster = {"n0": 0, "n1": 0, "n2": 0, "t3": 1}
    measured = {
        "n0": {"measured": (Rate("n1", 300), Rate("n0", 10**9))},  # of oneself nobody measures anything
        "n1": {"measured": (Rate("n0", 100),)},
        "n2": {"measured": (Rate("n1", 200), Rate("t3", 7)), "is_reachable": False},
    }
    led = Led(Rules(num_stages=2, num_units=1), roster, share_out, **measured)
    led.finish_all()
    (_, prepare), *_ = led.told(Prepare)
    assert seen == [[100.0, 500.0, 0.0], [None]]
    assert [(one.peer, one.share) for one in prepare.group] == [("n0", 1), ("n1", 1), ("n2", 0)]


def test_a_trainers_ledger_without_results_or_with_unsound_ones_is_void() -> None:
    for results in ((), (UnitResult(0, 10, math.nan),), (UnitResult(0, -1, 1.0),)):
        led = Led(t2={"units": frozenset({0}), "results": results})
        assert led.told(Void) == [("t2", Void(PLACE, TERM, 102))]


def test_an_early_microbatch_in_a_run_without_delay_spoils_only_the_ledger_of_who_tells_of_it() -> None:
    led = Led(n1={"units": frozenset({EARLY})})
    assert led.told(Void) == [("n1", Void(PLACE, TERM, 101))]
    led.say("n1", hello("n1", ledger_id=555))
    assert len(led.told(Void)) == 1 and led.coordinator.num_peers == {0: 2, 1: 2} and led.leases()


def test_what_a_new_leader_finds_in_ledgers_is_not_run_again() -> None:
    units = {"units": frozenset(range(4))}
    results = {"results": tuple(UnitResult(unit, 10, 1.0) for unit in range(4))}
    led = Led(n1=units, t3=units | results)
    assert not led.leases() and led.coordinator.phase is Phase.ROUND
    groups = {peer: prepare.group for peer, prepare in led.told(Prepare)}
    assert [(one.peer, one.has_gradient) for one in groups["n0"]] == [("n0", False), ("n1", True)]
    assert [(one.peer, one.has_gradient) for one in groups["t2"]] == [("t2", False), ("t3", True)]


def test_a_replica_without_microbatches_takes_part_and_must_report() -> None:
    roster = {"n0": 0, "n1": 0, "n2": 0, "t3": 1}
    led = Led(Rules(num_stages=2, num_units=1), roster)
    led.finish_all()
    (group,) = {prepare.group for peer, prepare in led.told(Prepare) if peer.startswith("n")}
    assert [one.has_gradient for one in group] == [True, False, False]
    for peer in ("n0", "n1", "t3"):
        led.say(peer, Report(PLACE, TERM, 0, str(roster[peer]).encode(), 1.0))
        assert led.coordinator.commit is None
    led.say("n2", Report(PLACE, TERM, 0, b"0", 1.0))
    assert led.coordinator.commit is not None


def test_the_commit_says_what_was_counted() -> None:
    led = Led()
    led.finish_all()
    led.report(square_norm=200.0)
    commit = led.coordinator.commit
    assert commit is not None and not commit.is_skipped
    assert (commit.num_loss_tokens, commit.loss_sum, commit.norm) == (40, 4.0, 20 / 40)
    assert commit.members == (("n0", 0), ("n1", 0), ("t2", 1), ("t3", 1))
    assert commit.digests == (b"stage 0", b"stage 1")
    assert {peer for peer, _ in led.told(Commit)} == {
        "n1",
        "t2",
        "t3",
    }  # the leader follows when the first other one has
    assert led.say("t2", Committed(commit.after)) == [("n0", commit)]
    assert {peer for peer, _ in led.coordinator.tick()} == {"n1", "t3"}


@pytest.mark.parametrize("square_norm", [math.inf, math.nan])
def test_a_norm_that_is_not_finite_skips_the_step(square_norm: float) -> None:
    led = Led()
    led.finish_all()
    led.report(square_norm=square_norm)
    commit = led.coordinator.commit
    assert commit is not None and (commit.is_skipped, commit.norm, commit.digests) == (True, 0.0, ())


def test_a_poisoned_microbatch_skips_the_step_without_a_round() -> None:
    led = Led()
    led.finish(0, loss=math.nan)
    while led.coordinator.commit is None:
        led.finish(next(iter(led.coordinator._leases)))
    assert led.coordinator.commit.is_skipped and not led.told(Prepare)
    assert led.coordinator.commit.num_loss_tokens == 30


def test_digests_that_disagree_abort_and_then_exclude_the_minority() -> None:
    roster = {"n0": 0, "n1": 0, "n4": 0, "t2": 1, "t3": 1}
    led = Led(roster=roster)
    led.finish_all()
    led.report(n4=b"other")
    assert led.coordinator.attempt == 1 and not led.coordinator.excluded
    assert {peer for peer, _ in led.told(Abort)} == roster.keys()
    led.report(n4=b"other")
    assert led.coordinator.excluded.keys() == {"n4"}
    led.finish_all()
    led.report()
    assert led.coordinator.commit is not None and ("n4", 0) not in led.coordinator.commit.members


def test_a_report_of_an_earlier_attempt_does_not_count() -> None:
    led = Led()
    led.finish_all()
    led.say("n1", RoundFailed(PLACE, TERM, 0, frozenset({"n0"})))
    assert led.coordinator.attempt == 1
    for peer in ROSTER:
        led.say(peer, Report(PLACE, TERM, 0, b"d", 1.0))
    assert led.coordinator.commit is None


def test_a_failed_exchange_blames_only_peers_of_the_same_stage() -> None:
    led = Led()
    led.finish_all()
    for _ in range(2):
        led.say("n1", RoundFailed(PLACE, TERM, led.coordinator.attempt, frozenset({"t2", "nobody"})))
    assert led.coordinator.excluded.keys() == {"n1"}  # who blames others for nothing is the culprit


def test_a_ledger_that_does_not_hold_what_was_counted_is_fenced() -> None:
    led = Led()
    led.finish_all()
    letters = led.say("n1", RoundFailed(PLACE, TERM, 0, frozenset(), is_mismatch=True))
    assert ("n1", Void(PLACE, TERM, 101)) in letters and led.coordinator.phase is Phase.COLLECTING
    assert led.coordinator.num_done == 2 and not led.coordinator.excluded


def test_the_last_replica_of_a_stage_is_not_excluded_for_ever() -> None:
    roster = {"n0": 0, "n1": 1, "t2": 2}
    led = Led(Rules(num_stages=3, num_units=1), roster)
    led.note(led.coordinator.exclude("n1", "it spoils"))
    assert led.say("n1", hello("n1", roster, ledger_id=555)) == [("n1", Excluded(PLACE, TERM, "it spoils"))]
    led.note(led.coordinator.tick())
    led.say("n1", hello("n1", roster, ledger_id=555))
    assert led.coordinator.num_peers[1] == 1 and not led.coordinator.excluded
    led.finish_all()
    assert led.coordinator.phase is Phase.ROUND


def test_an_excluded_peer_stays_out_while_its_stage_has_others_and_the_leader_never_excludes_itself() -> None:
    led = Led()
    assert led.coordinator.exclude("n0", "itself") == []
    led.note(led.coordinator.exclude("n1", "it spoils"))
    led.note(led.coordinator.tick())
    assert led.say("n1", hello("n1", ledger_id=555)) == [("n1", Excluded(PLACE, TERM, "it spoils"))]


def test_a_culprit_at_which_three_leases_fail_is_excluded_and_nobody_is_for_a_few_outdated_ones() -> None:
    led = Led()
    for culprit, num_failures in (("", 5), ("n1", 3)):
        for _ in range(num_failures):
            unit, (trainer, lease) = next(
                (unit, given) for unit, given in led.leases().items() if given[1].owners[0].peer == "n1"
            )
            led.say(trainer, Failed(PLACE, TERM, unit, lease.serial, culprit, "no answer"))
    assert led.coordinator.excluded.keys() == {"n1"}


def test_one_that_did_not_own_the_lease_cannot_be_blamed() -> None:
    led = Led()
    for _ in range(3):
        trainer, lease = led.leases()[0]
        led.say(trainer, Failed(PLACE, TERM, 0, lease.serial, "n1" if lease.owners[0].peer == "n0" else "n0", "lies"))
        if trainer in led.coordinator.excluded:
            break
    assert "n0" not in led.coordinator.excluded and "n1" not in led.coordinator.excluded


def test_held_out_microbatches_have_no_owner_in_ledgers_and_are_in_the_commit() -> None:
    led = Led(Rules(num_stages=2, num_units=1, num_eval_units=2, eval_every=2))
    led.finish_all()
    prepared = {peer: prepare.units for peer, prepare in led.told(Prepare)}
    assert set().union(*prepared.values()) == {0}
    led.report()
    commit = led.coordinator.commit
    assert commit is not None
    assert (commit.num_loss_tokens, commit.num_eval_tokens, commit.eval_loss_sum) == (10, 20, 2.0)
    assert [confirm.is_first for _, confirm in led.told(Confirm) if confirm.unit > 0] == [False, False]
    assert list(led.coordinator.rules.units_of(1)) == [0] and list(led.coordinator.rules.units_of(2)) == [0, 1, 2]


def test_a_held_out_loss_that_is_not_finite_is_not_tried_again() -> None:
    led = Led(Rules(num_stages=2, num_units=1, num_eval_units=1, eval_every=2))
    trainer, lease = led.leases()[1]
    led.say(trainer, Done(PLACE, TERM, lease.serial, (), ledger_of(trainer), UnitResult(1, 10, math.nan)))
    unit, (other, lease) = 0, led.leases()[0]
    ledgers = (lease.owners[0].ledger_id,)
    led.say(other, Done(PLACE, TERM, lease.serial, ledgers, ledger_of(other), UnitResult(unit, 10, 1.0)))
    led.report()
    commit = led.coordinator.commit
    assert commit is not None and [lease.unit for _, lease in led.told(Lease)] == [0, 1]
    assert commit.eval_loss is None and commit.loss == 0.1


def test_the_first_epoch_waits_for_the_least_number_of_replicas() -> None:
    rules = Rules(num_stages=2, num_units=1, min_replicas=2)
    led = Led(rules, {"n0": 0, "n1": 0, "t2": 1})
    assert not led.leases()
    assert [m for _, m in led.say("t3", hello("t3")) if isinstance(m, Lease)]
    later = dataclasses.replace(PLACE, epoch=1)
    coordinator = Coordinator("n0", later, TERM, FixedCourse(rules), b"", {"n0": 0, "t2": 1})
    coordinator.receive("n0", hello("n0", place=later))
    assert [m for _, m in coordinator.receive("t2", hello("t2", place=later)) if isinstance(m, Lease)]


def test_after_the_last_epoch_nothing_is_leased() -> None:
    assert Led(dataclasses.replace(RULES, num_epochs=1)).leases()
    assert not Led(dataclasses.replace(RULES, num_epochs=0)).leases()


def test_a_stage_that_does_not_exist_is_refused() -> None:
    led = Led()
    (letter,) = led.say("n9", hello("n1", stage=7, ledger_id=9))
    assert isinstance(letter[1], Excluded)


def test_a_lost_peer_does_not_hold_up_the_commit() -> None:
    led = Led()
    led.finish_all()
    led.report()
    assert led.coordinator.lose("n1") == led.coordinator.lose("t2") == []
    assert led.coordinator.lose("t3") == [("n0", led.coordinator.commit)]


def test_a_leader_does_not_wait_for_one_that_came_too_late_to_hold_a_sum() -> None:
    led = Led()
    led.finish_all()
    led.say("n9", hello("n1", ledger_id=9))
    led.report()
    for peer in ("n1", "t2"):
        assert not led.coordinator.lose(peer)
    assert led.coordinator.lose("t3") == [("n0", led.coordinator.commit)]


# Members.


class One:
    """A member, with what it did."""

    def __init__(self, name: str = "n1", roster: dict[str, int] = ROSTER, rules: Rules = RULES) -> None:
        self.cleared = 0
        ids = iter(range(1000, 2000))
        ledger = Ledger(lambda: next(ids), self._clear)
        capacity = 2 if roster[name] == rules.ends_stage else 0
        self.member = Member(name, roster[name], FixedCourse(rules), ledger, PLACE, roster, capacity=capacity)

    def _clear(self) -> None:
        self.cleared += 1

    def gets(self, peer: str, message: Any) -> list[Any]:
        return self.does(member.Received(peer, message))

    def does(self, event: Any) -> list[Any]:
        return self.member.apply(event)

    def obeys(self, term: Term) -> None:
        self.gets(term.peer, Lead(PLACE, term))
        assert self.member.term == term

    def holds(self, term: Term, attempt: int = 0, digest: bytes = b"mine") -> list[Any]:
        """Take part in a round to its end."""
        ledger = self.member.ledger
        prepare = Prepare(PLACE, term, attempt, (), ledger.ledger_id, frozenset(ledger.units))
        actions = self.gets(term.peer, prepare)
        assert [a for a in actions if isinstance(a, member.Average)]
        return self.does(member.Averaged(term, attempt, digest, 1.0))


def sent(actions: list[Any], kind: type) -> list[tuple[str, Any]]:
    return [(a.peer, a.message) for a in actions if isinstance(a, member.Send) and isinstance(a.message, kind)]


def of_kind(actions: list[Any], kind: type) -> list[Any]:
    return [action for action in actions if isinstance(action, kind)]


def commit_of(term: Term, attempt: int = 0, digest: bytes = b"mine", **changes: Any) -> Commit:
    plain = Commit(
        epoch=0,
        parent=PLACE.lineage,
        term=term,
        attempt=attempt,
        num_loss_tokens=40,
        norm=1.0,
        is_skipped=False,
        digests=(digest, digest),
        members=tuple(sorted(ROSTER.items())),
        loss_sum=4.0,
    )
    return dataclasses.replace(plain, **changes)


OLD, NEW = Term(1, "n0"), Term(2, "t2")


def test_a_leader_whose_commit_takes_back_what_the_owner_said_is_passed_over() -> None:
    one = One()
    one.obeys(NEW)
    one.holds(NEW)
    commit = commit_of(NEW, orders=b"forged")  # those in force are none, and FixedCourse allows no others
    actions = one.gets("t2", commit)
    assert not of_kind(actions, member.Step) and one.member.place == PLACE
    assert [tell for tell in of_kind(actions, member.Tell) if "takes back" in tell.text]
    assert of_kind(one.gets("t2", commit_of(NEW)), member.Step), "one that is right is still followed"


def test_of_terms_the_highest_is_obeyed_and_an_old_one_refused() -> None:
    one = One()
    one.obeys(NEW)
    assert sent(one.gets("n0", Lead(PLACE, OLD)), Redirect) == [("n0", Redirect(PLACE, NEW))]
    assert one.member.term == NEW
    order = Void(PLACE, OLD, one.member.ledger.ledger_id)
    assert sent(one.gets("n0", order), Redirect) == [("n0", Redirect(PLACE, NEW))]
    assert one.cleared == 1  # at the beginning
    one.gets("n0", Lead(PLACE, Term(9, "t3")))  # of another's term: that one must say so himself
    assert one.member.term == NEW


def test_an_order_of_the_right_term_counts_only_from_its_leader() -> None:
    one = One()
    one.obeys(NEW)
    ledger_id = one.member.ledger.ledger_id
    one.gets("t3", Void(PLACE, NEW, ledger_id))
    assert one.member.ledger.ledger_id == ledger_id
    one.gets("t2", Void(PLACE, NEW, ledger_id))
    assert one.member.ledger.ledger_id != ledger_id


def test_who_leads_again_where_it_has_led_leads_under_a_new_term() -> None:
    roster = {"n0": 0, "t1": 1}
    first = rank_leaders(PLACE, list(roster))[0]
    one = Member(
        first,
        roster[first],
        FixedCourse(Rules(num_stages=2, num_units=1)),
        Ledger(lambda: 7, lambda: None),
        PLACE,
        roster,
    )
    one.start()
    assert one.term == Term(1, first)
    one.apply(member.Received("n9", Where(Place(7, b"w" * 5))))
    assert one.is_downloading
    one.apply(member.InVain())
    assert one.leader is not None and one.term == Term(2, first), "leases of term 1 have other serials"


def test_terms_that_are_far_apart_differ_from_those_of_an_earlier_life() -> None:
    roster = {"n0": 0, "t1": 1}
    first = rank_leaders(PLACE, list(roster))[0]
    terms = set()
    for _ in range(20):
        one = Member(
            first,
            roster[first],
            FixedCourse(Rules(num_stages=2, num_units=1)),
            Ledger(lambda: 7, lambda: None),
            PLACE,
            roster,
            term_step=2**20,
        )
        one.start()
        terms.add(one.term)
        assert one.term.number // 2**20 == 1
    assert len(terms) > 15


def test_who_is_told_of_a_term_of_an_earlier_life_beats_it() -> None:
    one = One()
    one.gets("t2", Redirect(PLACE, Term(7, "n1")))
    assert one.member.term == Term(8, "n1") and one.member.leader is not None


def test_who_is_first_in_the_order_leads_and_the_next_when_that_one_is_lost() -> None:
    order = rank_leaders(PLACE, list(ROSTER))
    ones = {name: One(name) for name in order}
    for one in ones.values():
        one.member.start()
    assert [name for name, one in ones.items() if one.member.leader is not None] == order[:1]
    ones[order[1]].does(member.Lost(order[0]))
    assert ones[order[1]].member.leader is not None
    ones[order[2]].does(member.Impatient())
    assert ones[order[2]].member.leader is None  # it is not its turn yet
    ones[order[2]].does(member.Impatient())
    assert ones[order[2]].member.leader is not None


def test_when_the_leader_is_lost_the_next_ones_are_asked_and_passed_over_in_turn() -> None:
    order = rank_leaders(PLACE, list(ROSTER))
    last = One(order[-1])
    last.obeys(Term(1, order[0]))
    last.does(member.Lost(order[0]))
    assert {peer for peer, _ in sent(last.does(member.Tick()), Hello)} == set(order[1:-1])
    for _ in order[1:-1]:
        assert last.member.leader is None
        last.does(member.Impatient())
    assert last.member.leader is not None and last.member.term == Term(2, order[-1])


def test_a_step_needs_the_sum_that_the_commit_names() -> None:
    for digest, attempt in ((b"other", 0), (b"mine", 1)):
        one = One()
        one.obeys(OLD)
        one.holds(OLD)
        actions = one.gets("n0", commit_of(OLD, attempt, digest))
        assert not of_kind(actions, member.Step) and of_kind(actions, member.Download)
    one = One()
    one.obeys(OLD)
    one.holds(OLD)
    commit = commit_of(OLD)
    actions = one.gets("n0", commit)
    assert of_kind(actions, member.Step) == [member.Step(commit)]
    assert sent(actions, Committed) == [("n0", Committed(commit.after))]
    assert one.member.place == commit.after


def test_a_skipped_step_needs_no_sum_but_membership() -> None:
    skipped = commit_of(OLD, is_skipped=True, digests=())
    one = One()
    one.obeys(OLD)
    assert of_kind(one.gets("n0", skipped), member.Step)
    other = One()
    other.obeys(OLD)
    without = dataclasses.replace(skipped, members=(("n0", 0), ("t2", 1)))
    assert of_kind(other.gets("n0", without), member.Download)


def test_a_commit_comes_twice_and_is_followed_once() -> None:
    one = One()
    one.obeys(OLD)
    one.holds(OLD)
    one.gets("n0", commit_of(OLD))
    actions = one.gets("n0", commit_of(OLD))
    assert not of_kind(actions, member.Step) and sent(actions, Committed)


def test_a_commit_of_a_term_before_the_reported_one_is_refused_unless_the_new_leader_follows_it() -> None:
    one = One()
    one.obeys(OLD)
    one.holds(OLD)
    one.obeys(NEW)
    one.holds(NEW, digest=b"later")
    refused = one.gets("n0", commit_of(OLD))
    assert not of_kind(refused, member.Step) and sent(refused, Redirect) == [("n0", Redirect(PLACE, NEW))]
    assert of_kind(one.gets("t2", commit_of(OLD)), member.Step)


@pytest.mark.parametrize(
    "message",
    [
        lambda one: Void(PLACE, NEW, one.member.ledger.ledger_id),
        lambda one: Abort(PLACE, NEW, 0),
        lambda one: Excluded(PLACE, NEW, "why"),
    ],
    ids=["void", "abort", "excluded"],
)
def test_a_new_leader_cannot_take_the_sum_of_a_term_whose_outcome_it_does_not_know(message: Any) -> None:
    one = One()
    one.obeys(OLD)
    one.holds(OLD)
    one.obeys(NEW)
    one.gets("t2", message(one))
    assert of_kind(one.gets("n0", commit_of(OLD)), member.Step)


def test_a_download_in_vain_forgets_no_sum_and_no_promise() -> None:
    one = One()
    one.obeys(OLD)
    one.holds(OLD)
    one.obeys(NEW)
    one.holds(NEW, digest=b"later")
    elsewhere = Place(5, b"x")
    assert of_kind(one.gets("t3", Where(elsewhere)), member.Download) == [member.Download(elsewhere, "t3")]
    one.does(member.Installed(PLACE, None))
    assert not of_kind(one.gets("n0", commit_of(OLD)), member.Step)
    assert of_kind(one.gets("t2", commit_of(NEW, digest=b"later")), member.Step)


def test_a_leader_that_lacks_the_sum_of_an_earlier_commit_hands_it_on_before_it_downloads() -> None:
    one = One()
    one.gets("t2", Redirect(PLACE, Term(7, "n1")))
    commit = commit_of(OLD)
    actions = one.gets("n0", commit)
    assert {peer for peer, _ in sent(actions, Commit)} == {"t2", "t3"} and of_kind(actions, member.Download)


def test_a_ledger_of_other_content_than_prepared_is_told_and_not_averaged() -> None:
    one = One()
    one.obeys(OLD)
    for ledger_id, units in ((one.member.ledger.ledger_id, {1}), (7, set())):
        actions = one.gets("n0", Prepare(PLACE, OLD, 0, (), ledger_id, frozenset(units)))
        ((_, failed),) = sent(actions, RoundFailed)
        assert failed.is_mismatch and not of_kind(actions, member.Average)


def test_an_aborted_attempt_is_not_begun_again_and_the_ledger_is_as_it_was() -> None:
    one = One()
    one.obeys(OLD)
    ledger = one.member.ledger
    ledger.add(AddTag(PLACE, OLD, ledger.ledger_id, 0), lambda: None)
    prepare = Prepare(PLACE, OLD, 0, (), ledger.ledger_id, frozenset({0}))
    one.gets("n0", prepare)
    assert ledger.accepts(AddTag(PLACE, OLD, ledger.ledger_id, 1)) is Added.OUTDATED
    assert of_kind(one.gets("n0", Abort(PLACE, OLD, 0)), member.StopAveraging)
    assert ledger.units == {0} and ledger.accepts(AddTag(PLACE, OLD, ledger.ledger_id, 1)) is Added.NOW
    assert not of_kind(one.gets("n0", prepare), member.Average)


def leased(one: One, serial: int = 1) -> list[Any]:
    return one.gets(one.member.term.peer, Lease(PLACE, one.member.term, 0, serial, (Owner("n0", 100),)))


def test_a_lease_that_comes_twice_runs_once() -> None:
    one = One("t2")
    one.obeys(OLD)
    assert len(of_kind(leased(one), member.Run)) == 1
    assert not of_kind(leased(one), member.Run)
    assert len(of_kind(leased(one, serial=2), member.Run)) == 1
    assert not sent(one.does(member.Ran(0, 1, (100,), UnitResult(0, 10, 1.0))), Done)  # of the lease before
    assert sent(one.does(member.Ran(0, 2, (100,), UnitResult(0, 10, 1.0))), Done)


def test_a_lease_that_is_told_again_after_it_ended_is_answered_again() -> None:
    one = One("t2")
    one.obeys(OLD)
    leased(one)
    one.does(member.DidNotRun(0, 1, "n0", "gone"))
    assert sent(leased(one), Failed)
    leased(one, serial=2)
    one.does(member.Ran(0, 2, (100,), UnitResult(0, 10, 1.0)))
    one.gets("n0", Confirm(PLACE, OLD, 0, one.member.ledger.ledger_id, True))
    ((_, failed),) = sent(leased(one, serial=2), Failed)  # else a leader that missed the Done would wait for ever
    assert (failed.serial, failed.culprit) == (2, "")


def test_a_gradient_of_the_ends_is_added_once_and_only_when_confirmed() -> None:
    one = One("t2")
    one.obeys(OLD)
    leased(one)
    one.does(member.Ran(0, 1, (100,), UnitResult(0, 10, 1.0)))
    confirm = Confirm(PLACE, OLD, 0, one.member.ledger.ledger_id, True)
    assert not of_kind(one.gets("n0", dataclasses.replace(confirm, ledger_id=7)), member.AddEnds)
    (added,) = of_kind(one.gets("n0", confirm), member.AddEnds)
    assert added.is_first and one.member.ledger.units == {0}
    assert not of_kind(one.gets("n0", confirm), member.AddEnds)


def test_a_gradient_of_the_ends_that_is_not_the_first_is_forgotten() -> None:
    one = One("t2")
    one.obeys(OLD)
    leased(one)
    one.does(member.Ran(0, 1, (100,), UnitResult(0, 10, 1.0)))
    (added,) = of_kind(one.gets("n0", Confirm(PLACE, OLD, 0, one.member.ledger.ledger_id, False)), member.AddEnds)
    assert not added.is_first and not one.member.ledger.units


def test_a_new_leader_is_told_again_what_was_not_confirmed() -> None:
    one = One("t3")
    one.obeys(OLD)
    leased(one)
    one.does(member.Ran(0, 1, (100,), UnitResult(0, 10, 1.0)))
    ((peer, done),) = sent(one.gets("t2", Lead(PLACE, NEW)), Done)
    assert (peer, done.term) == ("t2", NEW)


def test_the_longer_history_wins_and_of_equals_the_smaller_hash() -> None:
    short, long = Place(2, b"a"), Place(3, b"z")
    assert short.is_behind(long) and not long.is_behind(short)
    small, large = Place(3, b"a"), Place(3, b"b")
    assert large.is_behind(small) and not small.is_behind(large) and not small.is_behind(small)
    one = One()
    assert sent(one.gets("n0", Hello(Place(0, b"zzz"), NO_TERM, 0, 1, frozenset())), Where) == [("n0", Where(PLACE))]
    assert of_kind(one.gets("n0", Where(Place(0, b"a"))), member.Download)


def test_who_missed_only_the_last_step_is_given_its_commit() -> None:
    one = One()
    one.obeys(OLD)
    one.holds(OLD)
    one.gets("n0", commit_of(OLD))
    assert sent(one.gets("t3", hello("t3")), Commit) == [("t3", commit_of(OLD))]


def test_who_downloads_says_nothing_until_it_is_there() -> None:
    one = One()
    one.gets("n0", Where(Place(4, b"x")))
    assert one.member.is_downloading
    assert one.gets("n0", Lead(PLACE, OLD)) == one.does(member.Tick()) == []
    actions = one.does(member.Installed(Place(4, b"x"), None))
    assert one.member.place == Place(4, b"x") and sent(actions, Hello | Lead)  # type: ignore[arg-type]


# Values.


def test_the_order_of_leaders_differs_with_the_lineage_and_not_with_the_order_of_the_names() -> None:
    peers = [f"peer{number}" for number in range(8)]
    orders = {tuple(rank_leaders(Place(1, bytes([byte])), peers)) for byte in range(20)}
    assert len(orders) == 20 and len({order[0] for order in orders}) >= 4
    assert rank_leaders(PLACE, peers) == rank_leaders(PLACE, peers[::-1])


def test_a_ledger_adds_only_what_belongs_to_its_place_term_and_id() -> None:
    ids = iter(range(10, 20))
    ledger = Ledger(lambda: next(ids), lambda: None)
    ledger.open(PLACE)
    right = AddTag(PLACE, OLD, ledger.ledger_id, 0)
    assert ledger.add(right, lambda: None) is Added.OUTDATED  # it obeys nobody yet
    ledger.obey(OLD)
    for wrong in ({"place": Place(1, b"start")}, {"place": Place(0, b"x")}, {"term": NEW}, {"ledger_id": 7}):
        assert ledger.add(dataclasses.replace(right, **wrong), lambda: None) is Added.OUTDATED
    num_calls: list[int] = []
    assert ledger.add(right, lambda: num_calls.append(1)) is Added.NOW
    assert ledger.add(right, lambda: num_calls.append(1)) is Added.BEFORE
    ledger.freeze(True)
    assert ledger.add(right, lambda: num_calls.append(1)) is Added.BEFORE  # a repeated one is answered in a round too
    assert num_calls == [1] and ledger.units == {0}
    ledger.void()
    assert ledger.add(right, lambda: num_calls.append(1)) is Added.OUTDATED and not ledger.units
