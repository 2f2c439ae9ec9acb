"""StepQueue: short steps at once, long ones in chunks, peers and groups in turns, and a bound on waiting for everybody."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from node.step_queue import BatchLimits, StepQueue, Waiting

LIMITS = BatchLimits(chunk_tokens=10, max_tokens=40, short_tokens=4)
MOST_WAITING = 25


@dataclass(eq=False)
class Step:
    """A step, and what its queue owes it."""

    peer: str
    group: int
    num_tokens: int
    name: str = ""
    done: int = 0
    others_turns: int = 0
    """Batches of other groups until its own group's turn, and the most that are allowed."""
    most_others_turns: int = 0
    own_turns: int = 0
    """Batches of its group without it, and the most that are allowed."""
    most_own_turns: int = 0

    def __repr__(self) -> str:
        return self.name or f"{self.num_tokens} of {self.peer}"


def make_queue(*steps: Step, together: bool = True, limits: BatchLimits = LIMITS) -> StepQueue[Step]:
    queue: StepQueue[Step] = StepQueue(limits, together=together)
    for step in steps:
        add(queue, step)
    return queue


def add(queue: StepQueue[Step], step: Step) -> Step:
    queue.add(Waiting(step, step.peer, step.group, step.num_tokens))
    return step


def long(peer: str, num_tokens: int = 30, group: int = 0) -> Step:
    return Step(peer, group, num_tokens)


def short(peer: str, num_tokens: int = 1, group: int = 0) -> Step:
    return Step(peer, group, num_tokens)


def test_all_short_steps_go_at_once_with_a_chunk_of_a_long_one() -> None:
    prompt, steps = long("a", 25), [short("b"), short("b", 4), short("c", 0), short("d", 3)]
    queue = make_queue(prompt, *steps)
    assert queue.next_batch() == [*((step, step.num_tokens) for step in steps), (prompt, 10)]
    assert queue.next_batch() == [(prompt, 10)]
    new = add(queue, short("b"))
    assert queue.next_batch() == [(new, 1), (prompt, 5)]
    assert len(queue) == 0 and queue.next_batch() == []


def test_long_steps_share_a_chunk_only_where_one_leaves_room() -> None:
    first, second, third = long("a", 7), long("b", 7), long("c", 20)
    queue = make_queue(first, second, third)
    assert queue.next_batch() == [(first, 7), (second, 3)]
    assert queue.next_batch() == [(second, 4), (third, 10)], "what is left of a step may be short"


def test_who_is_alone_is_not_held_up_by_chunks() -> None:
    prompt = long("a", 100)
    queue = make_queue(prompt)
    assert [queue.next_batch(alone=True) for _ in range(3)] == [[(prompt, 40)], [(prompt, 40)], [(prompt, 20)]]
    second = long("a", 100)
    queue = make_queue(prompt, second)
    assert queue.next_batch(alone=True) == [(prompt, 10)]


def test_peers_take_turns_however_many_steps_each_has() -> None:
    many, one = [long("a") for _ in range(5)], long("b")
    queue = make_queue(*many, one)
    turns = [queue.next_batch()[0][0] for _ in range(6)]
    assert turns == [many[0], one, many[1], one, many[2], one]


def test_a_peers_own_steps_take_turns() -> None:
    first, second = long("a", 25), long("a", 25)
    queue = make_queue(first, second)
    assert [queue.next_batch()[0] for _ in range(4)] == [(first, 10), (second, 10), (first, 10), (second, 10)]


def test_what_a_peer_had_before_does_not_count_and_idle_time_is_not_saved_up() -> None:
    """Nobody owes or is owed anything from the time when nobody else waited."""
    queue = make_queue(busy := long("busy", 1000))
    for _ in range(50):
        queue.next_batch()
    new = add(queue, long("new", 1000))
    turns = [queue.next_batch()[0][0] for _ in range(6)]
    assert turns == [new, busy, new, busy, new, busy]
    queue.discard(new)
    queue.discard(busy)
    first, second = add(queue, long("busy", 1000)), add(queue, long("third", 1000))
    assert [queue.next_batch()[0][0] for _ in range(4)] == [first, second, first, second]


def test_newcomers_do_not_hold_up_who_has_had_a_part() -> None:
    """One after another with a prompt of one chunk, as many as the node can compute: the long prompt goes on, too."""
    queue = make_queue(prompt := long("a", 50))
    others: list[Step] = []
    turns = []
    for number in range(10):
        turns.append(queue.next_batch()[0][0])
        others.append(add(queue, long(f"new {number}", 10)))
    assert turns == [prompt, others[0], prompt, others[1], others[2], prompt, others[3], others[4], others[5], prompt]


def test_groups_do_not_mix_and_take_turns() -> None:
    steps = [short("a", 1, group) for group in (1, 2, 1, 3, 2)]
    queue = make_queue(*steps)
    assert [[step.group for step, _ in queue.next_batch()] for _ in range(4)] == [[1, 1], [2, 2], [3], []]
    prompt, token = long("a", 1000, 1), short("b", 1, 2)
    queue = make_queue(prompt, token)
    turns = []
    for _ in range(6):
        ((step, _),) = queue.next_batch()
        turns.append(step)
        if step is token:
            add(queue, token)
    assert turns == [prompt, token] * 3


def test_a_step_that_is_not_wanted_any_more_is_not_computed() -> None:
    first, second = long("a"), short("b")
    queue = make_queue(first, second)
    queue.discard(first)
    queue.discard(first)
    assert queue.next_batch() == [(second, 1)] and len(queue) == 0
    assert not queue._last_turn, "nothing is kept of peers that wait for nothing"


def test_short_steps_leave_room_for_long_ones() -> None:
    """More decode than a batch holds, for ever: a prompt goes on all the same."""
    prompt = long("z", 100)
    queue = make_queue(*[short(f"peer {number}", 4) for number in range(12)], prompt)
    for _ in range(5):
        batch = dict(queue.next_batch())
        assert batch[prompt] == 10 and sum(batch.values()) <= 40
        for step in batch:
            if step is not prompt:
                add(queue, step)


@pytest.mark.parametrize("together", [True, False])
def test_one_at_a_time_a_batch_is_a_chunk_of_one_step(together: bool) -> None:
    steps = [short("a"), long("b", 25), short("c")]
    queue = make_queue(*steps, together=together)
    if together:
        assert len(queue.next_batch()) == 3
        return
    batches = [queue.next_batch() for _ in range(5)]
    a, b, c = steps
    assert batches == [[(a, 1)], [(b, 10)], [(c, 1)], [(b, 10)], [(b, 5)]]


def test_one_at_a_time_a_token_counts_for_as_much_as_a_chunk() -> None:
    prompt, token = long("a", 40), short("b")
    queue = make_queue(prompt, token, together=False)
    turns = []
    for _ in range(6):
        ((step, _),) = queue.next_batch()
        turns.append(step)
        if step is token:
            add(queue, token)
    assert turns == [prompt, token] * 3


@pytest.mark.parametrize("sizes", [(0, 512, 8), (10, 3, 1), (10, 8, 7)])
def test_limits_in_which_something_would_never_fit_are_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="a short step must fit"):
        BatchLimits(*sizes)


class QueueMachine(RuleBasedStateMachine):
    """Steps that come, go and are computed at random. Every promise of StepQueue is kept for each of them."""

    together = True

    @initialize()
    def begin(self) -> None:
        self.queue: StepQueue[Step] = StepQueue(LIMITS, together=self.together)
        self.waiting: list[Step] = []
        self.num_new = 0

    @rule(
        peer=st.sampled_from("abcd"),
        group=st.sampled_from([0, 0, 1, 2]),
        num_tokens=st.sampled_from([0, 1, 1, 4, 5, 11, 30]),
    )
    def come(self, peer: str, group: int, num_tokens: int) -> None:
        if len(self.waiting) < MOST_WAITING:
            self.add(Step(peer, group, num_tokens))

    @rule(count=st.integers(1, 4))
    def come_from_elsewhere(self, count: int) -> None:
        """New peers, with as much as a batch holds."""
        for _ in range(count):
            if len(self.waiting) < MOST_WAITING:
                self.num_new += 1
                self.add(Step(f"new {self.num_new}", 0, 10))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def go(self, data: st.DataObject) -> None:
        step = data.draw(st.sampled_from(self.waiting))
        self.queue.discard(step)
        self.waiting.remove(step)

    @rule(count=st.integers(1, 6), alone=st.booleans())
    def compute(self, count: int, alone: bool) -> None:
        for _ in range(count):
            was_waiting = list(self.waiting)
            lefts = {step: step.num_tokens - step.done for step in was_waiting}
            batch = self.queue.next_batch(alone=alone)
            assert bool(batch) == bool(was_waiting)
            if batch:
                self.check(batch, was_waiting, lefts, alone and len(was_waiting) == 1)

    def add(self, step: Step) -> None:
        others = [other for other in self.waiting if other.group == step.group]
        if self.together:
            step.most_others_turns = len({other.group for other in self.waiting} - {step.group})
            if step.num_tokens <= LIMITS.short_tokens:
                before = sum(other.num_tokens - other.done for other in others if self.is_short(other))
                step.most_own_turns = math.floor(before / (0.75 * LIMITS.max_tokens - LIMITS.short_tokens))
        else:
            others = list(self.waiting)
        self.bound_by_peers(step, others)
        self.waiting.append(step)
        add(self.queue, step)

    def bound_by_peers(self, step: Step, others: list[Step]) -> None:
        """Each other peer has a turn before it. If its own peer has other steps there, each of these has one before it, too, and
        for each of these all peers have one, also such as come later: never more than may wait."""
        if self.together and step.num_tokens <= LIMITS.short_tokens:
            return
        num_own = sum(other.peer == step.peer for other in others)
        num_peers = len({other.peer for other in others} - {step.peer})
        step.most_own_turns = num_peers if not num_own else (num_own + 1) * MOST_WAITING

    @staticmethod
    def is_short(step: Step) -> bool:
        return step.num_tokens - step.done <= LIMITS.short_tokens

    def check(self, batch: list[tuple[Step, int]], was: list[Step], lefts: dict[Step, int], is_alone: bool) -> None:
        tokens = dict(batch)
        assert len(tokens) == len(batch), "a step is in a batch once"
        groups = {step.group for step in tokens}
        short_ones = [step for step in was if lefts[step] <= LIMITS.short_tokens and step.group in groups]
        num_long = sum(count for step, count in batch if lefts[step] > LIMITS.short_tokens)
        for step, count in batch:
            assert 0 < count <= lefts[step] or count == lefts[step] == 0
            step.done += count
        if self.together:
            assert len(groups) == 1 and sum(tokens.values()) <= LIMITS.max_tokens
            assert is_alone or num_long <= LIMITS.chunk_tokens
            if sum(lefts[step] for step in short_ones) <= 0.75 * LIMITS.max_tokens:
                assert all(tokens[step] == lefts[step] for step in short_ones if step in tokens or lefts[step])
                assert set(short_ones) <= tokens.keys()
        else:
            assert len(batch) == 1 and (is_alone or batch[0][1] <= LIMITS.chunk_tokens)
        for step in was:
            if step in tokens:
                step.own_turns = step.others_turns = 0
                step.most_own_turns = step.most_others_turns = 10**9  # it has had its first
            elif self.together and step.group not in groups:
                step.others_turns += 1
                assert step.others_turns <= step.most_others_turns, "its group's turn is overdue"
            else:
                step.others_turns, step.most_others_turns = 0, 10**9
                step.own_turns += 1
                assert step.own_turns <= step.most_own_turns, "it is overdue"
        self.waiting = [step for step in was if step not in tokens or step.done < step.num_tokens]

    @invariant()
    def the_queue_has_who_waits(self) -> None:
        assert len(self.queue) == len(self.waiting)


class OneAtATimeMachine(QueueMachine):
    together = False


TestQueueMachine = QueueMachine.TestCase
TestOneAtATimeMachine = OneAtATimeMachine.TestCase
TestQueueMachine.settings = TestOneAtATimeMachine.settings = settings(max_examples=60, stateful_step_count=40)


@settings(max_examples=50)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.booleans())
def test_everybody_gets_all_tokens_in_the_end(sizes: list[int], together: bool) -> None:
    steps = [Step("abc"[number % 3], number % 2, size) for number, size in enumerate(sizes)]
    queue = make_queue(*steps, together=together)
    done = dict.fromkeys(steps, 0)
    while batch := queue.next_batch():
        for step, count in batch:
            done[step] += count
    assert list(done.values()) == sizes
