"""Which stage a new node should take. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from swarm.member_record import MemberRecord
from swarm.records import ShardState


def choose_stage(members: Iterable[MemberRecord], num_stages: int) -> int:
    """The stage with the least throughput; of equals the one with the fewest replicas, then the first.

    A member that has not measured itself counts as an average one.
    """
    present = [member for member in members if member.state != ShardState.LEAVING]
    measured = [member.tokens_per_s for member in present if member.tokens_per_s > 0]
    average = sum(measured) / len(measured) if measured else 1.0
    rates, counts = [0.0] * num_stages, [0] * num_stages
    for member in present:
        if member.stage < num_stages:
            rates[member.stage] += member.tokens_per_s or average
            counts[member.stage] += 1
    return min(range(num_stages), key=lambda stage: (rates[stage], counts[stage], stage))
