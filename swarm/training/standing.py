"""Standing: how a run stands, as one of its members tells anybody who asks (PutOrders)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from protos import training_pb2
from swarm.epoch.messages import Commit, Place
from swarm.errors import BadReply, PeerFailed
from swarm.member_record import MemberRecord
from swarm.p2p.directory import Directory
from swarm.p2p.framing import FramedStream
from swarm.p2p.host import Host
from swarm.records import ShardState
from swarm.run_orders import NO_ORDERS, Orders
from swarm.run_store import RunStore
from swarm.training.course import RunCourse
from swarm.training.requests import Donor, open_request, received
from swarm.training.wire import commit_from_wire, commit_to_wire, decode, is_signed, place_from_wire, place_to_wire

log = logging.getLogger(__name__)

MAX_ERA = 2**32
_TIMEOUT_S = 10.0
_CONNECT_TIMEOUT_S = 5.0


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
    if place.era > MAX_ERA:
        raise BadReply("a member tells of a run that went back more often than anybody can")
    if not (math.isfinite(wire.idle_s) and math.isfinite(wire.eval_loss)):
        raise BadReply("a member told of times and losses that make no sense")
    evaluation = (wire.eval_epoch, wire.eval_loss) if wire.HasField("eval_loss") else None
    return Standing(place, commit, wire.orders, evaluation, wire.idle_s)


async def ask_standings(
    host: Host, store: RunStore, records: Sequence[MemberRecord], orders: bytes = b""
) -> dict[tuple[str, int], Standing]:
    """What the members say who answer, by peer id and stage, all asked at once; who leaves is not asked, nor this peer itself.

    orders: signed, for the members to hear.
    """
    present = [record for record in records if record.state != ShardState.LEAVING and record.peer_id != host.peer_id]
    request = training_pb2.MemberMessage(put_orders=training_pb2.PutOrders(orders=orders))

    async def ask(record: MemberRecord) -> Standing:
        donor = Donor(record.peer_id, record.addresses)
        async with (
            asyncio.timeout(_TIMEOUT_S),
            open_request(
                host, donor, store.run_id, record.stage, request,
                connect_timeout_s=_CONNECT_TIMEOUT_S, introduction_timeout_s=_CONNECT_TIMEOUT_S,
            ) as stream,
        ):  # fmt: skip
            answer = decode(await received(stream))
            if answer.WhichOneof("kind") != "standing":
                raise BadReply(f"peer {record.peer_id[-8:]} answered something else")
            return standing_from_wire(answer.standing, store)

    answers = await asyncio.gather(*map(ask, present), return_exceptions=True)
    standings = {}
    for record, answer in zip(present, answers, strict=True):
        if isinstance(answer, Standing):
            standings[record.peer_id, record.stage] = answer
        elif isinstance(answer, PeerFailed | TimeoutError):
            log.info("a member does not say how the run stands peer=%s reason=%s", record.peer_id[-8:], answer)
        else:
            raise answer
    return standings


async def hear_members(
    host: Host, course: RunCourse, records: Sequence[MemberRecord]
) -> dict[tuple[str, int], Standing]:
    """Ask as `ask_standings`; the newest orders that they know are the course's from then on, and kept here."""
    standings = await ask_standings(host, course.store, records)
    for standing in standings.values():
        with contextlib.suppress(BadReply):  # what somebody else has made
            course.hear(standing.orders)
    return standings


async def newest_rules(host: Host, directory: Directory, store: RunStore) -> tuple[Orders, int]:
    """What the owner has said, as members know it who are there (it is kept here), and the epoch that most of them are in."""
    course = RunCourse(store)
    standings = await hear_members(
        host, course, await directory.find_members(store.run_id, range(store.spec.num_stages))
    )
    return course.newest, most_common_place(standings).epoch if standings else 0


def most_common_place(standings: Mapping[tuple[str, int], Standing]) -> Place:
    """Where the members of the most stages are: one of them may say anything of itself. Of several the newest."""
    stages: dict[Place, set[int]] = defaultdict(set)
    for (_, stage), standing in standings.items():
        stages[standing.place].add(stage)
    return min(stages, key=lambda place: (-len(stages[place]), place.rank))


def newest_orders(raws: Iterable[bytes], store: RunStore) -> tuple[Orders, bytes]:
    """Of those that the owner gave; what anybody else may have made is left out."""
    newest, newest_raw = NO_ORDERS, b""
    for raw in raws:
        try:
            orders = store.open_orders(raw)
        except ValueError:
            continue
        if orders.serial > newest.serial:
            newest, newest_raw = orders, raw
    return newest, newest_raw
