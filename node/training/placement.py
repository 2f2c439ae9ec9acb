"""Which stage a new node should take, and who keeps the ends. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable
from dataclasses import replace

from swarm.member_record import MemberRecord
from swarm.records import ShardState


def choose_stage(members: Iterable[MemberRecord], num_stages: int, saved: Collection[int] = ()) -> int:
    """The stage with the least throughput; of equals the one with the fewest replicas, then the first.

    A member that has not measured itself counts as an average one. saved: stages that this node has on its disk; it takes one of
    them if there are any: perhaps nobody else has it.
    """
    present = [member for member in members if member.state != ShardState.LEAVING]
    measured = [member.tokens_per_s for member in present if member.tokens_per_s > 0]
    average = sum(measured) / len(measured) if measured else 1.0
    rates, counts = [0.0] * num_stages, [0] * num_stages
    for member in present:
        if member.stage < num_stages:
            rates[member.stage] += member.tokens_per_s or average
            counts[member.stage] += 1
    candidates = [stage for stage in range(num_stages) if stage in saved] or range(num_stages)
    return min(candidates, key=lambda stage: (rates[stage], counts[stage], stage))


def withdrawn(claim: MemberRecord) -> MemberRecord:
    """What takes a claim back: the DHT keeps the record that expires last. A run's start has its id for a lineage.

    A later claim of the same stage expires later than this: between the two lie some requests to the DHT, of 4 ms at least.
    """
    return replace(claim, state=ShardState.LEAVING, lineage=claim.run_id, expires_at=claim.expires_at + 0.002)


def is_keeper_needed(
    peer_id: str, members: Iterable[MemberRecord], run_id: bytes, ends_stage: int, num_keepers: int, is_keeper: bool
) -> bool:
    """Whether a node should keep the ends: the first num_keepers by rendezvous hashing do (Thaler and Ravishankar, 1998).

    Who is a keeper already stays one until so many nodes before it are at work.
    """
    present = [member for member in members if member.state == ShardState.ONLINE]

    def rank(one: str) -> bytes:
        return hashlib.sha256(run_id + one.encode()).digest()

    nodes = {member.peer_id for member in present if member.stage != ends_stage} - {peer_id}
    keepers = {member.peer_id for member in present if member.is_keeper} - {peer_id}
    before_us = [node for node in (keepers & nodes if is_keeper else nodes) if rank(node) < rank(peer_id)]
    return len(before_us) < num_keepers
