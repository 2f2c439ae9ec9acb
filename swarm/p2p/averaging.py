"""Averager: takes part in the exchange of gradients in known groups, over framed streams.

What is exchanged, and how long peers are awaited, is swarm.exchange's; swarm.p2p.averaging_round runs one round. Here: the plan,
who may join, and what outlives rounds. A peer that joins before the round began here waits for it; one that comes late is
refused. Streams are kept for later rounds unless a round failed: then they are closed, with all that was still under way.
"""

from __future__ import annotations

import asyncio
import collections
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from protos import averaging_pb2
from swarm.errors import BadReply, BadRequest
from swarm.exchange import (
    ROUND_ID_BYTES,
    ExchangeFailed,
    ExchangeMember,
    ExchangePlan,
    PatienceSettings,
    cut_parts,
    plain_message,
    split_message,
)
from swarm.messages import own_version, versions_meet
from swarm.p2p.averaging_round import Round, Seat
from swarm.p2p.averaging_streams import EXCHANGE_PROTOCOL, StreamPool, leave
from swarm.p2p.framing import FramedStream
from swarm.p2p.host import Host
from swarm.tensors import WireFormat

log = logging.getLogger(__name__)

_MAX_ROUNDS_REMEMBERED = 1024
_CLOSE_TIMEOUT_S = 1.0


@dataclass(frozen=True, slots=True)
class AveragerConfig:
    """What an Averager grants to its peers."""

    patience: PatienceSettings = field(default_factory=PatienceSettings)
    connect_timeout_s: float = 10.0
    """For a connection and stream to a reducer."""
    join_timeout_s: float = 10.0
    """A peer that opens a stream must name a round within this time."""
    idle_s: float = 900.0
    """A stream that carried a round is kept so long for the next one."""
    park_s: float = 30.0
    """A peer that joins a round which has not begun here is kept waiting so long."""
    max_parked: int = 64
    """Peers that wait so; at most 0.5 MiB (2 MiB if they were in a round before) of each is in memory."""
    max_streams_per_peer: int = 8
    max_streams: int = 512


@dataclass(frozen=True, slots=True)
class Exchanged:
    """The outcome of a round for one member."""

    vector: Tensor
    """float32 [size]: the sum of all contributions, the same bytes for every member."""
    residual: Tensor | None
    """To be handed to the next round if this one is committed; otherwise drop it and keep the one from before."""
    bytes_sent: int
    bytes_received: int
    seconds: float
    rates: Mapping[str, float]
    """Bytes per second that each contributor sent to this reducer, as far as measured. A peer's rate for the next plan is the
    sum of what all reducers measured of it: it sends to all at once."""


def plan_exchange(
    round_id: bytes, members: Sequence[ExchangeMember], shares: Sequence[int], size: int, wire: WireFormat
) -> ExchangePlan:
    """The plan in which members with these shares sum that much of `size` values.

    Raises ValueError if nobody has a share, nobody has a gradient, or a member is named twice.
    """
    ordered = sorted(zip(members, shares, strict=True), key=lambda pair: pair[0].peer_id)
    parts = cut_parts(size, [share for _, share in ordered])
    return ExchangePlan(round_id, tuple(member for member, _ in ordered), parts, wire)


class Averager:
    """Takes part in rounds. One per process; rounds may run beside each other.

    `await start()` before the first round, `await aclose()` after the last.
    """

    def __init__(
        self,
        host: Host,
        config: AveragerConfig | None = None,
        *,
        executor: Executor | None = None,
        is_expected: Callable[[str], bool] = lambda peer_id: True,
    ) -> None:
        """executor: one thread for encoding, decoding and summing; None: an own one.

        is_expected: whether a peer may open streams here; members of running rounds always may.
        """
        self._host, self._config = host, config or AveragerConfig()
        self._worker = _single_threaded_worker() if executor is None else executor
        self._owns_worker = executor is None
        self._is_expected = is_expected
        self._pool = StreamPool(host, self._config.connect_timeout_s)
        self._rounds: dict[bytes, Round] = {}
        self._over: collections.OrderedDict[bytes, None] = collections.OrderedDict()
        self._parked: dict[asyncio.Future[Round | None], bytes] = {}
        self._serving: set[FramedStream] = set()
        self._is_closing = False

    async def start(self) -> None:
        """Let peers open streams to us."""
        await self._host.serve(EXCHANGE_PROTOCOL, self._serve)

    async def aclose(self) -> None:
        """Close all streams. No round may be running."""
        self._is_closing = True
        for parked in self._parked:
            if not parked.done():
                parked.set_result(None)
        leaving = (leave(stream, _CLOSE_TIMEOUT_S) for stream in self._serving)
        await asyncio.gather(self._pool.aclose(_CLOSE_TIMEOUT_S), *leaving)
        if self._owns_worker:
            self._worker.shutdown()

    async def average(
        self, plan: ExchangePlan, vector: Tensor | None, *, residual: Tensor | None = None, timeout_s: float
    ) -> Exchanged:
        """Exchange gradients with all members of the plan, of which this process must be one.

        vector: float32 [plan.size] on the CPU, finite; None for a member without gradient. Not to be changed until this returns.
        residual: what the last committed round left, or None. Neither is changed.
        Raises ExchangeFailed within timeout_s if any member fails: nobody gets a part of a sum; BadRequest if the arguments do
        not fit the plan, hold NaN or infinity, or the round id was used before.
        """
        me = plan.index_of(self._host.peer_id)
        if me is None:
            raise BadRequest("this process is no member of the round's plan")
        name = plan.round_id.hex()[:8]
        if plan.round_id in self._rounds or plan.round_id in self._over:
            raise BadRequest(f"round {name} was begun before; every attempt needs an id of its own")
        if plan.members[me].has_gradient is not (vector is not None):
            raise BadRequest("the plan and the caller disagree on whether this member has a gradient")
        started = time.monotonic()
        running = Round(plan, me, self._pool, self._worker, self._config.patience, timeout_s)
        self._begin(running)
        try:
            new_residual = await running.run(vector, residual)
        except ExchangeFailed as error:
            culprits, gave_up = (",".join(sorted(peers)) for peers in (error.culprits, error.gave_up))
            after_s = time.monotonic() - started
            log.warning(
                "exchange failed round=%s culprits=%s gave_up=%s after_s=%.1f reason=%s",
                *(name, culprits, gave_up, after_s, error),
            )
            raise
        finally:
            self._end(running)
            await running.aclose()
        seconds = time.monotonic() - started
        return Exchanged(
            running.result, new_residual, running.bytes_sent, running.bytes_received, seconds, running.rates
        )

    def _begin(self, running: Round) -> None:
        round_id = running.plan.round_id
        self._rounds[round_id] = running
        for parked, awaited_id in self._parked.items():
            if awaited_id == round_id and not parked.done():
                parked.set_result(running)

    def _end(self, running: Round) -> None:
        del self._rounds[running.plan.round_id]
        self._over[running.plan.round_id] = None
        if len(self._over) > _MAX_ROUNDS_REMEMBERED:
            self._over.popitem(last=False)

    async def _serve(self, stream: FramedStream) -> None:
        """One stream that a peer opened: it joins a round, and perhaps others later."""
        peer_id = stream.peer_id
        is_member = any(running.plan.index_of(peer_id) is not None for running in self._rounds.values())
        num_streams = sum(other.peer_id == peer_id for other in self._serving)
        if self._is_closing or not (is_member or self._is_expected(peer_id)):
            return await stream.fail("no round with you is expected here")
        if num_streams >= self._config.max_streams_per_peer or len(self._serving) >= self._config.max_streams:
            return await stream.fail("too many streams for exchanges are open here")
        self._serving.add(stream)
        timeout_s = self._config.join_timeout_s
        try:
            while True:
                async with asyncio.timeout(timeout_s):
                    message = await stream.receive()
                seat = None if message is None else await self._seat(stream, message)
                if seat is None:
                    return None
                if not await seat.released:
                    return await leave(stream)
                timeout_s = self._config.idle_s
        except TimeoutError:
            return None
        except _NoSeat as error:
            log.debug("joining refused peer=%s reason=%s", peer_id, error)
            stream.send_at_once(plain_message(averaging_pb2.ExchangeReply(refusal=error.refusal)))
        finally:
            self._serving.discard(stream)

    async def _seat(self, stream: FramedStream, message: bytes) -> Seat | None:
        """The seat in a round that a message asks for. Raises _NoSeat; None: the round ended meanwhile."""
        try:
            header, payload = split_message(message, averaging_pb2.ExchangeRequest)
        except BadReply as error:
            raise _NoSeat(averaging_pb2.THE_JOINING_IS_MALFORMED, f"you {error}") from None
        join = header.join
        if header.WhichOneof("kind") != "join" or len(payload) or len(join.round_id) != ROUND_ID_BYTES:
            raise _NoSeat(averaging_pb2.THE_JOINING_IS_MALFORMED, "a round must be joined first")
        if not versions_meet(join.version):
            reason = f"this member speaks protocol {own_version().major}, you speak {join.version.major}"
            raise _NoSeat(averaging_pb2.THE_EXCHANGE_VERSIONS_DIFFER, reason)
        name = f"round {join.round_id.hex()[:8]}"
        if join.round_id in self._over:
            raise _NoSeat(averaging_pb2.THIS_ROUND_IS_OVER, f"{name} has ended here")
        running = self._rounds.get(join.round_id) or await self._park(join.round_id)
        if running is None:
            raise _NoSeat(averaging_pb2.THIS_ROUND_DID_NOT_BEGIN, f"{name} did not begin here")
        if join.plan_digest != running.digest or not running.can_seat(stream.peer_id):
            raise _NoSeat(averaging_pb2.THE_PLANS_DIFFER, f"the plan of {name} here has no such place for you")
        if stream.is_broken:
            if await stream.receive() is None:  # otherwise its connection broke, and it comes again
                running.note_left(stream.peer_id)
            return None
        joined = averaging_pb2.ExchangeJoined(round_id=join.round_id)
        async with asyncio.timeout(self._config.join_timeout_s):
            await stream.send(plain_message(averaging_pb2.ExchangeReply(joined=joined)))
        if self._rounds.get(join.round_id) is not running or not running.can_seat(stream.peer_id):
            return None
        return running.seat(stream)

    async def _park(self, round_id: bytes) -> Round | None:
        """Wait until the round begins here. None: it did not in time, or too many wait already."""
        if len(self._parked) >= self._config.max_parked or self._is_closing:
            return None
        parked: asyncio.Future[Round | None] = asyncio.get_running_loop().create_future()
        self._parked[parked] = round_id
        try:
            async with asyncio.timeout(self._config.park_s):
                return await parked
        except TimeoutError:
            return None
        finally:
            del self._parked[parked]


class _NoSeat(Exception):
    """Refuses a peer that wants to join a round."""

    def __init__(self, code: averaging_pb2.ExchangeRefusalCode, reason: str) -> None:
        super().__init__(reason)
        self.refusal = averaging_pb2.ExchangeRefusal(code=code, message=reason[:200])


def _single_threaded_worker() -> ThreadPoolExecutor:
    """One thread, in which torch uses no others: OpenMP's threads spin while they wait for each other, which on busy cores costs
    more (measured: 2 to 20 times) than these short operations."""

    def use_one_thread() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # fixes it for this thread

    worker = ThreadPoolExecutor(1, thread_name_prefix="exchange")
    before = torch.get_num_threads()
    worker.submit(use_one_thread).result()
    torch.set_num_threads(before)  # what threads that begin later find
    return worker
