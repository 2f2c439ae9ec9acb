"""Which stage a new node takes, and which nodes keep the ends."""

from __future__ import annotations

import random

import pytest

from node.training.placement import choose_stage, is_keeper_needed, withdrawn
from swarm.member_record import MemberRecord
from swarm.records import ShardState
from tests.support.runs import make_member

RUN = b"r" * 32
ENDS = 2


def node(peer_id: str, stage: int = 0, **fields: object) -> MemberRecord:
    return make_member(peer_id, stage=stage, **fields)


@pytest.mark.parametrize(
    ("members", "chosen"),
    [
        ([], 0),
        ([node("a", 0)], 1),
        ([node("a", 0, tokens_per_s=10.0), node("b", 1, tokens_per_s=100.0)], 0),
        ([node("a", 0, tokens_per_s=100.0), node("b", 1, tokens_per_s=20.0), node("c", 1, tokens_per_s=20.0)], 1),
        ([node("a", 0, state=ShardState.LEAVING), node("b", 1)], 0),
        ([node("t", ENDS), node("k", ENDS, is_keeper=True)], 0),
    ],
)
def test_a_node_takes_the_stage_with_the_least_throughput(members: list[MemberRecord], chosen: int) -> None:
    assert choose_stage(members, 2) == chosen


def test_a_node_that_comes_back_takes_the_stage_that_is_on_its_disk() -> None:
    members = [node("a", 1), node("b", 1)]
    assert choose_stage(members, 3, {1}) == 1 and choose_stage(members, 3, {1, 2, 3}) == 2
    assert choose_stage(members, 3, {3}) == 0, "the ends alone are no stage"


def keepers_among(names: list[str], members: list[MemberRecord], num_keepers: int = 2) -> list[str]:
    keeping = {member.peer_id for member in members if member.is_keeper}
    return [name for name in names if is_keeper_needed(name, members, RUN, ENDS, num_keepers, name in keeping)]


@pytest.mark.parametrize("num_nodes", [1, 2, 3, 7])
def test_so_many_nodes_keep_the_ends_as_the_run_says_or_all_if_there_are_fewer(num_nodes: int) -> None:
    names = [f"n{number}" for number in range(num_nodes)]
    members = [node(name, number % 2) for number, name in enumerate(names)] + [node("t", ENDS)]
    assert len(keepers_among(names, members)) == min(2, num_nodes)
    assert keepers_among(names, members, num_keepers=0) == []


def test_whoever_comes_and_goes_at_least_two_keep_the_ends_once_the_records_are_known() -> None:
    """Nodes look at the records one at a time, in any order."""
    rng = random.Random(1)
    for _ in range(50):
        nodes: list[str] = []
        keeping: set[str] = set()
        for step in range(30):
            if rng.random() < 0.3 and len(nodes) > 1:
                gone = nodes.pop(rng.randrange(len(nodes)))
                keeping.discard(gone)
            else:
                nodes.append(f"n{step}")
            for name in [*rng.sample(nodes, len(nodes)), *rng.sample(nodes, len(nodes))]:
                members = [node(one) for one in nodes] + [node(one, ENDS, is_keeper=True) for one in keeping]
                if is_keeper_needed(name, members, RUN, ENDS, 2, name in keeping):
                    keeping.add(name)
                elif name in keeping:
                    keeping.discard(name)
                    assert len(keeping) >= 2
            assert len(keeping) == min(2, len(nodes))


def test_a_keeper_goes_on_until_better_ones_are_at_work() -> None:
    members = [node(f"n{number}") for number in range(5)]
    first, second, *others = sorted((m.peer_id for m in members), key=lambda n: is_first(n, members))
    late = others[0]
    joining = [node(name, ENDS, is_keeper=True, state=ShardState.JOINING) for name in (first, second)]
    assert is_keeper_needed(late, [*members, *joining], RUN, ENDS, 2, True)
    assert not is_keeper_needed(late, [*members, *joining], RUN, ENDS, 2, False)
    online = [node(name, ENDS, is_keeper=True) for name in (first, second)]
    assert not is_keeper_needed(late, [*members, *online], RUN, ENDS, 2, True)


def is_first(name: str, members: list[MemberRecord]) -> int:
    """How many nodes come before it: the fewest keepers among which it is one."""
    return next(n for n in range(1, 9) if is_keeper_needed(name, members, RUN, ENDS, n, False))


def test_a_claim_that_is_taken_back_expires_last() -> None:
    claim = make_member("a", stage=1, state=ShardState.JOINING, lineage=b"", epoch=0)
    taken_back = withdrawn(claim)
    assert taken_back.state == ShardState.LEAVING and round(1000 * taken_back.expires_at) > round(
        1000 * claim.expires_at
    )
