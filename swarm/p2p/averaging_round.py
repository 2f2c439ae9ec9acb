"""One round of one member, over framed streams: see swarm.p2p.averaging, which starts it.

    to each reducer       one stream: Join -> Joined, then chunks of its part there and reduced chunks back, side by side
    as a reducer          a seat for each other member; once all are taken: chunk by chunk, await all contributions, sum, send to all

No task waits for another that could wait for it: every member takes results whatever else it does, so reducers get rid of them,
so they take contributions. One worker thread sums, encodes and decodes; the loop only moves bytes.

Who is blamed: a member whose contribution, or whose taking of results, a reducer awaits, after `cap_s` without a chunk; a
reducer, only after longer than it may itself wait for others. Whoever gives up ends its streams in good order, which tells the
others to give up without blaming it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from protos import averaging_pb2
from swarm.errors import BadReply, PeerFailed
from swarm.exchange import (
    MAX_CHUNK_BYTES,
    Chunk,
    ErrorFeedback,
    ExchangeFailed,
    ExchangeMember,
    ExchangePlan,
    Message,
    Patience,
    PatienceSettings,
    RateMeter,
    chunk_message,
    plain_message,
    read_chunk,
    result_patience_s,
    split_message,
)
from swarm.messages import own_version
from swarm.p2p.averaging_streams import Link, PeerOut, StreamPool
from swarm.p2p.framing import FramedStream
from swarm.tensors import Buffer, is_finite

log = logging.getLogger(__name__)

# Messages of so many bytes are accepted, and twice that is the window: 8 chunks, a round trip of 100 ms at 20 MB/s.
_MESSAGE_BYTES = 4 * (MAX_CHUNK_BYTES + 256)
_QUEUED_CHUNKS = 4
# Of a round's time: when contributions, the taking of results, and results are overdue. Those who can only be at fault
# themselves come first, so that the others hear of it before they blame who waits for them.
_CONTRIBUTIONS_DUE, _TAKING_DUE, _RESULTS_DUE = 0.8, 0.9, 0.95

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Seat:
    """The place of another member at this reducer."""

    link: Link
    released: asyncio.Future[bool]
    """Ends this round's use of the stream; True: another round may follow on it."""
    inbox: asyncio.Queue[bytes] = field(default_factory=lambda: asyncio.Queue(1))
    outbox: asyncio.Queue[list[Buffer]] = field(default_factory=lambda: asyncio.Queue(_QUEUED_CHUNKS))

    def release(self, is_clean: bool) -> None:
        if not self.released.done():
            self.released.set_result(is_clean)


class Round:
    """One round of one member."""

    def __init__(
        self,
        plan: ExchangePlan,
        me: int,
        pool: StreamPool,
        worker: Executor,
        patience: PatienceSettings,
        timeout_s: float,
    ) -> None:
        """me: the index of this member. worker: one thread."""
        self.plan, self.digest = plan, plan.digest
        self.result = torch.empty(plan.size)
        """float32: after run, the sum."""
        self._me, self._pool, self._worker, self._settings = me, pool, worker, patience
        self._timeout_s = timeout_s
        self._began_at = time.monotonic()
        self._links: list[Link] = []
        self._seats: dict[str, Seat] = {}
        others = [member.peer_id for index, member in enumerate(plan.members) if index != me]
        self._seated = {peer_id: asyncio.Event() for peer_id in others}
        self._has_begun_reducing = False
        self._left_before: set[str] = set()
        self._tasks = asyncio.TaskGroup()

    @property
    def bytes_sent(self) -> int:
        return sum(link.bytes_sent for link in self._links)

    @property
    def bytes_received(self) -> int:
        return sum(link.bytes_received for link in self._links)

    @property
    def rates(self) -> dict[str, float]:
        """Bytes per second that other contributors sent to this reducer."""
        rates = {peer_id: self._pool.meter(peer_id, "contributions").bytes_per_s for peer_id in self._seats}
        return {peer_id: rate for peer_id, rate in rates.items() if rate is not None}

    async def run(self, vector: Tensor | None, residual: Tensor | None) -> Tensor | None:
        """Fill `result` and return the new residual. Raises ExchangeFailed, and BadRequest for unfit arguments."""
        try:
            async with asyncio.timeout(self._timeout_s):
                self._feedback = await self._work(ErrorFeedback, self.plan, vector, residual)
                async with self._tasks:
                    await self._exchange()
        except BaseExceptionGroup as group:
            outs, others = group.split(PeerOut)
            if others is not None:
                raise
            raise _failure(outs) from group
        except TimeoutError:
            raise ExchangeFailed(frozenset(), frozenset(), f"it did not end within {self._timeout_s:.1f} s") from None
        return self._feedback.residual

    async def _exchange(self) -> None:
        watch = self._tasks.create_task(self._watch())
        work = [self._tasks.create_task(self._use_reducer(i)) for i in self.plan.reducers if i != self._me]
        if self.plan.parts[self._me]:
            work.append(self._tasks.create_task(self._reduce()))
        await asyncio.wait(work)  # the first failure of any task cancels this
        watch.cancel()

    async def aclose(self) -> None:
        """Give up or keep all streams. What had not passed yet never will."""
        for seat in self._seats.values():
            seat.release(seat.link.is_done)
        accepted = [seat.link for seat in self._seats.values()]
        opened = [link for link in self._links if link not in accepted]
        for link in opened:
            if link.is_done:
                await self._pool.keep(link.stream)
            else:
                self._pool.leave(link.stream)

    # As a member: each reducer

    async def _use_reducer(self, index: int) -> None:
        """Contribute to a reducer's part and take its results."""
        member = self.plan.members[index]
        link = await self._join(member)
        link.stream.accept_messages_of(_MESSAGE_BYTES)
        longest_s = result_patience_s(self._settings)
        link.receiving = self._patience(self._pool.meter(member.peer_id, "results"), longest_s, _RESULTS_DUE)
        contributing = None
        if self.plan.members[self._me].has_gradient:
            contributing = self._tasks.create_task(self._contribute(link, index))
        for chunk in self.plan.chunks_of(index):
            message = await link.receive(MAX_CHUNK_BYTES)
            await self._work(self._file_result, chunk, message, member.peer_id)
        if contributing is not None:
            await asyncio.wait([contributing], timeout=self._settings.min_s)
            if not contributing.done():
                raise link.out(f"peer {member.peer_id[-8:]} sent results without awaiting our contribution")
        link.is_done = True

    async def _join(self, member: ExchangeMember) -> Link:
        """A stream on which a reducer has joined us to the round: one from an earlier round if it still works."""
        while (kept := self._pool.take(member.peer_id)) is not None:
            try:
                return await self._join_on(kept)
            except _Refused:
                raise
            except PeerOut as out:
                log.debug("kept stream was of no use peer=%s reason=%s", member.peer_id, out)
        if self.plan.parts[self._me] and member.peer_id < self.plan.members[self._me].peer_id:
            # It opens a stream to us, too. If both dial at the same moment, both fail, and p2pd dials no more for 5 s.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._settings.min_s):
                    await self._seated[member.peer_id].wait()
        try:
            stream = await self._pool.open(member)
        except PeerFailed as error:
            raise PeerOut([member.peer_id], str(error)) from error
        return await self._join_on(stream)

    async def _join_on(self, stream: FramedStream) -> Link:
        link = Link(stream, self._patience(RateMeter(), self._settings.cap_s, _CONTRIBUTIONS_DUE))
        self._links.append(link)
        try:
            await self._ask_to_join(link)
        except PeerOut:
            self._links.remove(link)
            self._pool.leave(stream)
            raise
        return link

    async def _ask_to_join(self, link: Link) -> None:
        join = averaging_pb2.JoinExchange(version=own_version(), round_id=self.plan.round_id, plan_digest=self.digest)
        await link.send(plain_message(averaging_pb2.ExchangeRequest(join=join)))
        message = await link.receive(0)
        try:
            header, _ = split_message(message, averaging_pb2.ExchangeReply)
        except BadReply as error:
            raise link.out(f"peer {link.peer_id[-8:]} {error}") from error
        if header.WhichOneof("kind") == "refusal":
            raise _Refused(link.peer_id, header.refusal)
        if header.WhichOneof("kind") != "joined" or header.joined.round_id != self.plan.round_id:
            raise link.out(f"peer {link.peer_id[-8:]} did not answer the joining of the round")

    async def _contribute(self, link: Link, index: int) -> None:
        for chunk in self.plan.chunks_of(index):
            await link.send(await self._work(self._encode_contribution, chunk))

    def _encode_contribution(self, chunk: Chunk) -> list[Buffer]:
        """On the worker thread, as the two below."""
        header, raw, _ = self._feedback.contribution(chunk)
        return chunk_message(averaging_pb2.ExchangeRequest, self.plan, chunk, header, raw)

    def _file_result(self, chunk: Chunk, message: bytes, peer_id: str) -> None:
        self.result[chunk.start : chunk.end] = _read(averaging_pb2.ExchangeReply, self.plan, chunk, message, peer_id)

    # As a reducer: all other members

    def can_seat(self, peer_id: str) -> bool:
        """Whether a peer may join (again, if its first stream broke before anything was sent on it)."""
        return peer_id in self._seated and self.plan.parts[self._me] > 0 and not self._has_begun_reducing

    def seat(self, stream: FramedStream) -> Seat:
        """Give a member its place, which can_seat."""
        previous = self._seats.get(stream.peer_id)
        if previous is not None:
            self._links.remove(previous.link)
            previous.release(False)
        stream.accept_messages_of(_MESSAGE_BYTES)
        contributions, taking = (self._pool.meter(stream.peer_id, what) for what in ("contributions", "taking"))
        link = Link(
            stream,
            self._patience(contributions, self._settings.cap_s, _CONTRIBUTIONS_DUE),
            self._patience(taking, self._settings.cap_s, _TAKING_DUE),
        )
        self._links.append(link)
        seat = self._seats[stream.peer_id] = Seat(link, asyncio.get_running_loop().create_future())
        self._seated[stream.peer_id].set()
        return seat

    def note_left(self, peer_id: str) -> None:
        """A member that wanted to join has left already: the round cannot succeed any more."""
        self._left_before.add(peer_id)

    async def _reduce(self) -> None:
        """Sum this member's part."""
        await self._wait_for_seats()
        self._has_begun_reducing = True
        sending = [self._tasks.create_task(self._send_results(seat)) for seat in self._seats.values()]
        senders = [self._seats[peer_id] for peer_id in self._other_contributors()]
        for seat in senders:
            self._tasks.create_task(self._take_contributions(seat))
        for chunk in self.plan.chunks_of(self._me):
            messages = {seat.link.peer_id: await seat.inbox.get() for seat in senders}
            reduced = await self._work(self._reduce_chunk, chunk, messages)
            for seat in self._seats.values():
                await seat.outbox.put(reduced)
        if sending:
            await asyncio.wait(sending)

    async def _wait_for_seats(self) -> None:
        left_s = self._began_at + _CONTRIBUTIONS_DUE * self._timeout_s - time.monotonic()
        longest_s = min(self._settings.cap_s, left_s)
        try:
            async with asyncio.timeout(longest_s):
                for seated in self._seated.values():
                    await seated.wait()
        except TimeoutError:
            missing = [peer_id for peer_id, seated in self._seated.items() if not seated.is_set()]
            names = ", ".join(peer_id[-8:] for peer_id in missing)
            raise PeerOut(missing, f"peer {names} did not join within {longest_s:.1f} s") from None

    async def _take_contributions(self, seat: Seat) -> None:
        for _ in self.plan.chunks_of(self._me):
            await seat.inbox.put(await seat.link.receive(MAX_CHUNK_BYTES))

    async def _send_results(self, seat: Seat) -> None:
        for _ in self.plan.chunks_of(self._me):
            await seat.link.send(await seat.outbox.get())
        seat.link.is_done = True
        seat.release(True)

    def _other_contributors(self) -> list[str]:
        return [
            member.peer_id
            for index, member in enumerate(self.plan.members)
            if member.has_gradient and index != self._me
        ]

    def _reduce_chunk(self, chunk: Chunk, messages: Mapping[str, bytes]) -> list[Buffer]:
        """On the worker thread: sum one chunk in the order of the members, and encode the sum."""
        contributions: dict[str, Tensor] = {}
        for member in self.plan.members:
            if not member.has_gradient:
                continue
            if member.peer_id in messages:
                message = messages[member.peer_id]
                contributions[member.peer_id] = _read(
                    averaging_pb2.ExchangeRequest, self.plan, chunk, message, member.peer_id
                )
            else:
                contributions[member.peer_id] = self._feedback.contribution(chunk)[2]
        first, *others = contributions.values()
        total = first.clone()
        for values in others:
            total += values
        header, raw, decoded = self._feedback.result(chunk, total)
        if not is_finite(decoded):
            absurd = [
                peer_id for peer_id, values in contributions.items() if values.abs().max() > self.plan.largest_value
            ]
            raise PeerOut(absurd, "contributions are finite, but so large that their sum is not")
        self.result[chunk.start : chunk.end] = decoded
        return chunk_message(averaging_pb2.ExchangeReply, self.plan, chunk, header, raw)

    async def _work(self, function: Callable[..., T], *arguments: object) -> T:
        """The function's result, from the worker thread."""
        return await asyncio.get_running_loop().run_in_executor(self._worker, functools.partial(function, *arguments))

    # Over all links

    def _patience(self, meter: RateMeter, longest_s: float, due: float) -> Patience:
        """due: the share of the round's time after which all waits must be over."""
        return Patience(self._settings, meter, longest_s=longest_s, due_at=self._began_at + due * self._timeout_s)

    async def _watch(self) -> None:
        """Judge all peers again and again, until cancelled. Time in which we ourselves were stopped does not count."""
        tick_s = self._settings.min_s / 8
        before = time.monotonic()
        while True:
            await asyncio.sleep(tick_s)
            now = time.monotonic()
            late_s, before = now - before - tick_s, now
            if self._left_before:
                raise PeerOut(self._left_before, "a member left before the round began here", gave_up=True)
            for link in self._links:
                if late_s > tick_s:
                    link.forgive(late_s)
                if link.is_lost:
                    raise await link.last_words(f"the connection to peer {link.peer_id[-8:]} was lost")
                ping_timeout_s = link.judge(now)
                if ping_timeout_s is not None:
                    self._tasks.create_task(link.ping(ping_timeout_s))


def _failure(outs: BaseExceptionGroup[PeerOut] | None) -> ExchangeFailed:
    found: list[PeerOut] = []
    waiting: list[BaseException] = [outs] if outs is not None else []
    while waiting:
        error = waiting.pop()
        if isinstance(error, BaseExceptionGroup):
            waiting += error.exceptions
        elif isinstance(error, PeerOut):
            found.append(error)
    culprits = frozenset(peer_id for out in found if not out.gave_up for peer_id in out.peer_ids)
    gave_up = frozenset(peer_id for out in found if out.gave_up for peer_id in out.peer_ids) - culprits
    return ExchangeFailed(culprits, gave_up, "; ".join(sorted({str(out) for out in found})))


def _read(kind: type[Message], plan: ExchangePlan, chunk: Chunk, message: bytes, peer_id: str) -> Tensor:
    """A chunk that a peer sent. Raises PeerOut."""
    try:
        return read_chunk(message, kind, plan, chunk)
    except BadReply as error:
        raise PeerOut([peer_id], f"peer {peer_id[-8:]} {error}") from error


class _Refused(PeerOut):
    """A reducer's answer to the joining of a round."""

    def __init__(self, peer_id: str, refusal: averaging_pb2.ExchangeRefusal) -> None:
        reason = "".join(character for character in refusal.message[:200] if character.isprintable())
        gave_up = refusal.code == averaging_pb2.THIS_ROUND_IS_OVER
        super().__init__([peer_id], f"peer {peer_id[-8:]} refused: {reason}", gave_up)
