"""Standing: how a run stands, as one of its members tells anybody who asks (PutOrders)."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass

from protos import training_pb2
from swarm.epoch.messages import Commit, Place
from swarm.errors import BadReply
from swarm.p2p.framing import FramedStream
from swarm.run_store import RunStore
from swarm.training.wire import commit_from_wire, commit_to_wire, is_signed, place_from_wire, place_to_wire

_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Standing:
    """Of one member."""

    place: Place
    commit: Commit | None
    """The one that led there; None: the start of the run."""
    orders: bytes
    """The newest that it knows, signed."""
    evaluation: tuple[int, float] | None
    """Epoch and mean loss per token of the last one that it has seen."""
    idle_s: float
    """Since its last step."""


async def send_standing(stream: FramedStream, standing: Standing) -> None:
    """Answer PutOrders."""
    wire = training_pb2.Standing(place=place_to_wire(standing.place), orders=standing.orders, idle_s=standing.idle_s)
    if standing.commit is not None:
        wire.commit.CopyFrom(commit_to_wire(standing.commit))
    if standing.evaluation is not None:
        wire.eval_epoch, wire.eval_loss = standing.evaluation
    async with asyncio.timeout(_TIMEOUT_S):
        await stream.send([training_pb2.MemberMessage(standing=wire).SerializeToString()])
        await stream.receive()  # the asker ends the stream


def standing_from_wire(wire: training_pb2.Standing, store: RunStore) -> Standing:
    """BadReply if the member cannot prove where it is; its orders are not checked."""
    place = place_from_wire(wire.place)
    commit = commit_from_wire(wire.commit) if wire.HasField("commit") else None
    if not place.follows(commit, store.run_id) or (commit is not None and not is_signed(commit, store.run_id)):
        raise BadReply(f"a member cannot prove how it came to epoch {place.epoch}")
    if not (math.isfinite(wire.idle_s) and math.isfinite(wire.eval_loss)):
        raise BadReply("a member told of times and losses that make no sense")
    evaluation = (wire.eval_epoch, wire.eval_loss) if wire.HasField("eval_loss") else None
    return Standing(place, commit, wire.orders, evaluation, wire.idle_s)
