"""RemoteBlocks: whole sequences forward and backward through all blocks of the model, in microbatches that survive the loss of any hop.

    batch -> microbatches (by rows) -> each: plan a route -> hop 1 .. hop N      several at a time, so that no hop waits
    backward: each microbatch goes the same hops back; what a lost hop kept is computed again, elsewhere, from its input

We hold the input of every hop of a microbatch until its backward: whatever a peer loses can be made again from there.
B rows, T tokens, H hidden size.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import random
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from protos import node_pb2
from swarm.client.config import ClientConfig
from swarm.client.peer_stream import PeerStream
from swarm.client.router import Router, Work
from swarm.errors import BadReply, BadRequest, Busy, MicrobatchGone, PeerFailed, RouteBroken, SwarmError, UserError
from swarm.load import Load
from swarm.messages import MAX_HEADER_BYTES, encode_message, own_version
from swarm.p2p.host import Host
from swarm.routing import Hop, Route
from swarm.span import Span
from swarm.tensors import FLOATING, Buffer, TensorLimits, WireFormat, is_finite
from swarm.terminal import ProgressBar

log = logging.getLogger(__name__)

# A batch of more microbatches than this takes long enough for a progress bar.
_MANY_MICROBATCHES = 16
_MAX_IDLE_STREAMS = 4
_PAUSE_S = 0.3


@dataclass(frozen=True, slots=True)
class PassOptions:
    """What goes with hidden states [B, T, H]. None: what the model does by default."""

    mask: Tensor | None = None
    """bool [B, T]: which tokens are real."""
    positions: Tensor | None = None
    """int64 [1 or B, T]."""
    dropout_seed: int | None = None

    def rows(self, rows: slice) -> PassOptions:
        """For some of the rows."""
        shared = self.positions is None or self.positions.shape[0] == 1
        return PassOptions(
            None if self.mask is None else self.mask[rows],
            self.positions if shared else self.positions[rows],  # type: ignore[index]
            None if self.dropout_seed is None else self.dropout_seed + rows.start,
        )


@dataclass(frozen=True, slots=True)
class Segment:
    """What one hop did for a microbatch, and what it would need to do it again."""

    hop: Hop
    given: Tensor
    is_stashed: bool


@dataclass(slots=True)
class Microbatch:
    """Some rows of a batch, and its way through the blocks."""

    rows: slice
    options: PassOptions
    microbatch_id: bytes = field(default_factory=lambda: os.urandom(16))
    segments: list[Segment] = field(default_factory=list)

    @property
    def boundaries(self) -> dict[int, Tensor]:
        """Hidden states [rows, T, H] before block b, for every b > 0 at which a hop begins."""
        return {segment.hop.span.start: segment.given for segment in self.segments if segment.hop.span.start > 0}


@dataclass(slots=True)
class MicrobatchStats:
    """What happened so far."""

    num_forwards: int = 0
    """Of hops."""
    num_backwards: int = 0
    num_recomputed: int = 0
    """Backwards for which the hop had to compute its forward again."""
    num_reroutes: int = 0
    """Hops that were lost and replaced."""
    bytes_moved: int = 0


class RemoteBlocks:
    """The blocks of the model, in the swarm. One for each client; several batches may be under way."""

    def __init__(self, host: Host, router: Router, config: ClientConfig) -> None:
        self.stats = MicrobatchStats()
        self.load = Load()
        self._host, self._router, self._config = host, router, config
        self._wire = WireFormat(config.wire)
        self._lanes = asyncio.Semaphore(config.max_in_flight)
        self._idle: dict[tuple[str, Span], list[PeerStream[Hop]]] = defaultdict(list)
        self._max_tokens: dict[str, int] = {}  # of a microbatch, by peer, as they said

    async def forward(
        self, hidden: Tensor, options: PassOptions, *, wants_gradients: bool, keeps_inputs: bool = True
    ) -> tuple[Tensor, list[Microbatch]]:
        """Hidden states [B, T, H] after the last block, and the microbatches, with the inputs of their hops if they are kept.

        Raises RouteBroken, or UserError when a row is longer than any node takes.
        """
        rows, num_tokens = hidden.shape[:2]
        limit = min(self._config.microbatch_tokens, await self._largest_microbatch(num_tokens))
        microbatches = [Microbatch(part, options.rows(part)) for part in split_rows(rows, num_tokens, limit)]
        outputs: list[Tensor] = [hidden] * len(microbatches)

        async def run(index: int) -> None:
            microbatch = microbatches[index]
            segments, outputs[index] = await self._forward(
                microbatch, self._router.all_blocks, hidden[microbatch.rows].contiguous(), wants_gradients
            )
            microbatch.segments = segments if wants_gradients or keeps_inputs else []

        await self._run_all("forward", run, len(microbatches))
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0], microbatches

    async def backward(
        self, microbatches: Sequence[Microbatch], gradient: Tensor | None, boundary_gradients: Mapping[int, Tensor]
    ) -> Tensor:
        """Gradient w.r.t. the input of the first block, [B, T, H].

        gradient: w.r.t. the output of the last block; boundary_gradients: w.r.t. the hidden states before block b.
        Raises RouteBroken, or BadRequest if a gradient is not finite.
        """
        for given in (gradient, *boundary_gradients.values()):
            if given is not None and not is_finite(given):
                raise BadRequest(
                    "the gradient of the loss holds NaN or infinite values; look at the loss, or lower the learning rate"
                )
        results: list[Tensor | None] = [None] * len(microbatches)

        async def run(index: int) -> None:
            microbatch = microbatches[index]
            first = microbatch.segments[-1].given
            passed = torch.zeros_like(first) if gradient is None else gradient[microbatch.rows].to(first.dtype)
            deadline = time.monotonic() + self._config.microbatch_timeout_s
            for segment in reversed(microbatch.segments):
                added = boundary_gradients.get(segment.hop.span.end)
                if added is not None:
                    passed = passed + added[microbatch.rows]
                passed = await self._backward(microbatch, segment, passed.contiguous(), deadline)
            results[index] = passed

        await self._run_all("backward", run, len(microbatches))
        return torch.cat([result for result in results if result is not None])

    async def aclose(self) -> None:
        """End all streams; what nodes keep for us goes."""
        streams = [stream for idle in self._idle.values() for stream in idle]
        self._idle.clear()
        await asyncio.gather(*(stream.aclose() for stream in streams))

    async def _run_all(self, label: str, run: Callable[[int], Awaitable[None]], count: int) -> None:
        """Run all microbatches, max_in_flight at a time. The first error ends the others and is raised."""
        with ProgressBar(
            label, count, unit=" microbatches", wanted=None if count > _MANY_MICROBATCHES else False
        ) as bar:

            async def in_lane(index: int) -> None:
                async with self._lanes:
                    await run(index)
                bar.advance(1)

            try:
                async with asyncio.TaskGroup() as group:
                    for index in range(count):
                        group.create_task(in_lane(index))
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from None

    async def _largest_microbatch(self, num_tokens: int) -> int:
        """Tokens that every hop of the route that would be taken now accepts at once. UserError if not even one row fits."""
        deadline = time.monotonic() + self._config.request_timeout_s
        avoid: dict[str, SwarmError] = {}
        while True:
            route = await self._plan(self._router.all_blocks, num_tokens, deadline, avoid)
            for hop in route:
                if hop.peer_id not in self._max_tokens:
                    try:
                        self._give_back(await self._take_stream(hop, deadline))
                    except (PeerFailed, Busy) as error:
                        self._give_up(hop, error)
                        avoid[hop.peer_id] = error
                        break
                if self._max_tokens[hop.peer_id] < num_tokens:
                    limit = self._max_tokens[hop.peer_id]
                    avoid[hop.peer_id] = UserError(
                        f"a row of {num_tokens} tokens is too long: peer {hop.peer_id[-8:]}, which serves blocks {hop.span}, "
                        f"takes {limit} tokens at once; shorten the rows, or have nodes started with a larger --max-microbatch-tokens"
                    )
                    break
            else:
                return min(self._max_tokens[hop.peer_id] for hop in route)

    async def _forward(
        self,
        microbatch: Microbatch,
        wanted: Span,
        hidden: Tensor,
        wants_gradients: bool,
    ) -> tuple[list[Segment], Tensor]:
        """Through the blocks of wanted; from where a hop is lost, other hops go on."""
        deadline = time.monotonic() + self._config.microbatch_timeout_s
        segments: list[Segment] = []
        avoid: dict[str, SwarmError] = {}
        block = wanted.start
        while block < wanted.end:
            route = await self._plan(Span(block, wanted.end), _num_tokens(hidden), deadline, avoid)
            for hop in route:
                try:
                    output, is_stashed = await self._ask_forward(microbatch, hop, hidden, wants_gradients, deadline)
                except (PeerFailed, Busy) as error:
                    self._give_up(hop, error)
                    avoid[hop.peer_id] = error
                    break
                segments.append(Segment(hop, hidden, is_stashed))
                hidden, block = output, hop.span.end
        return segments, hidden

    async def _backward(self, microbatch: Microbatch, segment: Segment, gradient: Tensor, deadline: float) -> Tensor:
        """Gradient w.r.t. the segment's input. If its peer is lost, others compute the segment again from its input."""
        avoid: dict[str, SwarmError] = {}
        # Another microbatch may have found out already that this peer is lost.
        if not self._router.health.is_banned(segment.hop.peer_id, now=time.monotonic()):
            try:
                return await self._ask_backward(microbatch, segment, gradient, deadline)
            except (PeerFailed, Busy) as error:
                self._give_up(segment.hop, error)
                avoid[segment.hop.peer_id] = error
        while True:
            *earlier, last = await self._plan(
                segment.hop.span, _num_tokens(gradient), deadline, avoid, segment.hop.record.numeric_class
            )
            hop = last
            try:
                hidden, segments = segment.given, []
                for hop in earlier:
                    output, is_stashed = await self._ask_forward(microbatch, hop, hidden, True, deadline)
                    segments.append(Segment(hop, hidden, is_stashed))
                    hidden = output
                passed = gradient
                # The last hop is given its input with the gradient.
                for part in (Segment(last, hidden, False), *reversed(segments)):
                    hop = part.hop
                    passed = await self._ask_backward(microbatch, part, passed, deadline)
                return passed
            except (PeerFailed, Busy) as error:
                self._give_up(hop, error)
                avoid[hop.peer_id] = error

    async def _plan(
        self,
        wanted: Span,
        num_tokens: int,
        deadline: float,
        avoid: dict[str, SwarmError],
        numeric_class: str | None = None,
    ) -> Route:
        """The quickest route now; peers in `avoid` only when nobody else is left. Raises RouteBroken (or an error from avoid)."""
        work = Work(num_tokens, self.load)
        while True:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                reason = f"; last: {list(avoid.values())[-1]}" if avoid else ""
                raise RouteBroken(
                    f"a microbatch did not get through blocks {wanted} within {self._config.microbatch_timeout_s:.0f} s{reason}"
                )
            too_small = [error for error in avoid.values() if isinstance(error, UserError)]
            try:
                return await self._router.plan(
                    wanted,
                    timeout_s=min(left_s, self._config.request_timeout_s),
                    numeric_class=numeric_class,
                    avoid=avoid,
                    patience_s=0.0 if avoid or numeric_class else self._config.patience_s,
                    work=work,
                )
            except RouteBroken:
                if too_small:
                    raise too_small[0] from None
                if numeric_class is not None:
                    numeric_class = None
                elif avoid:  # they may be able again: a ban or a queue ends
                    last = list(avoid.values())[-1]
                    avoid.clear()
                    await asyncio.sleep(_PAUSE_S * random.uniform(0.8, 1.2))
                    try:
                        return await self._router.plan(
                            wanted,
                            timeout_s=min(left_s, self._config.request_timeout_s),
                            patience_s=self._config.patience_s,
                            work=work,
                        )
                    except RouteBroken as broken:
                        raise RouteBroken(f"{last}, and {broken}") from last
                else:
                    raise

    async def _ask_forward(
        self, microbatch: Microbatch, hop: Hop, hidden: Tensor, wants_gradients: bool, deadline: float
    ) -> tuple[Tensor, bool]:
        request = self._describe(microbatch)
        request.wants_gradients = wants_gradients
        message = encode_message(node_pb2.Request(forward=request), [hidden, *_extras(microbatch.options)], self._wire)
        reply, output = await self._ask(hop, message, "forward", hidden, deadline)
        done = reply.forward
        if done.microbatch_id != microbatch.microbatch_id:
            raise BadReply(f"peer {hop.peer_id[-8:]} answered for another microbatch")
        self.stats.num_forwards += 1
        return output, done.is_stashed

    async def _ask_backward(
        self, microbatch: Microbatch, segment: Segment, gradient: Tensor, deadline: float
    ) -> Tensor:
        request = node_pb2.Backward(microbatch_id=microbatch.microbatch_id)
        tensors = [gradient]
        again = [segment.given, *_extras(microbatch.options)]
        if not segment.is_stashed:
            request.again.CopyFrom(self._describe(microbatch))
            tensors += again
        try:
            message = encode_message(node_pb2.Request(backward=request), tensors, self._wire)
            reply, result = await self._ask(segment.hop, message, "backward", gradient, deadline)
        except MicrobatchGone:
            request.again.CopyFrom(self._describe(microbatch))
            message = encode_message(node_pb2.Request(backward=request), [gradient, *again], self._wire)
            reply, result = await self._ask(segment.hop, message, "backward", gradient, deadline)
        done = reply.backward
        if done.microbatch_id != microbatch.microbatch_id:
            raise BadReply(f"peer {segment.hop.peer_id[-8:]} answered for another microbatch")
        self.stats.num_backwards += 1
        self.stats.num_recomputed += not done.was_stashed
        return result

    async def _ask(
        self, hop: Hop, message: list[Buffer], answer: str, like: Tensor, deadline: float
    ) -> tuple[node_pb2.Reply, Tensor]:
        """A question whose answer holds one tensor of the shape and dtype of `like`."""
        work = float(_num_tokens(like) * len(hop.span))
        self.load.sent(hop.peer_id, work)
        is_done = False
        try:
            stream = await self._take_stream(hop, deadline)
            limit = stream.opened.microbatches_opened.max_tokens
            if _num_tokens(like) > limit:  # it came in the place of a peer that takes more
                self._give_back(stream)
                raise Busy(f"peer {hop.peer_id[-8:]} takes {limit} tokens at once, not {_num_tokens(like)}")
            before = stream.bytes_moved
            try:
                stream.accept_messages_of(like.numel() * 4 + MAX_HEADER_BYTES)
                reply, tensors = await stream.ask(message, answer, deadline)
                output = _checked(tensors, like, hop.peer_id)
            except (MicrobatchGone, Busy, BadRequest):  # the stream is as good as before
                self._give_back(stream)
                raise
            except BaseException:
                await stream.aclose()
                raise
            self.stats.bytes_moved += stream.bytes_moved - before
            self._give_back(stream)
            done = getattr(reply, answer)
            now, compute_s, queue_s = time.monotonic(), done.compute_us / 1e6, done.queue_us / 1e6
            self.load.answered(hop.peer_id, work, compute_s=compute_s, queue_s=queue_s, now=now)
            self._router.health.succeeded(hop.peer_id)
            is_done = True
            return reply, output
        finally:
            if not is_done:
                self.load.failed(hop.peer_id, work)

    async def _take_stream(self, hop: Hop, deadline: float) -> PeerStream[Hop]:
        """A stream for this hop that nobody uses: one from before, or a new one."""
        idle = self._idle[hop.peer_id, hop.span]
        while idle:
            stream = idle.pop()
            if not stream.is_broken:
                return stream
            await stream.aclose()
        others = [key for key in self._idle if key[0] == hop.peer_id and key[1] != hop.span]
        if sum(len(self._idle[key]) for key in others) >= _MAX_IDLE_STREAMS:  # a peer grants only so many
            await asyncio.gather(*(stream.aclose() for key in others for stream in self._idle.pop(key)))
        request = node_pb2.OpenMicrobatches(
            version=own_version(),
            model_digest=self._router.spec.digest,
            start=hop.span.start,
            end=hop.span.end,
            block_digests=[hop.record.digest_of(block) for block in hop.span],
        )
        return await PeerStream.open(
            self._host,
            hop,
            node_pb2.Request(open_microbatches=request),
            "microbatches_opened",
            self._config,
            deadline,
        )

    def _give_back(self, stream: PeerStream[Hop]) -> None:
        self._max_tokens[stream.peer_id] = stream.opened.microbatches_opened.max_tokens
        self._idle[stream.peer_id, stream.hop.span].append(stream)

    def _give_up(self, hop: Hop, error: SwarmError) -> None:
        log.warning("hop lost peer=%s span=%s reason=%s", hop.peer_id[-8:], hop.span, error)
        self.stats.num_reroutes += 1
        self._max_tokens.pop(hop.peer_id, None)
        if not isinstance(error, Busy):
            self._router.health.failed(hop.peer_id, now=time.monotonic(), blame=isinstance(error, BadReply))

    def _describe(self, microbatch: Microbatch) -> node_pb2.Forward:
        options = microbatch.options
        return node_pb2.Forward(
            microbatch_id=microbatch.microbatch_id,
            has_mask=options.mask is not None,
            has_positions=options.positions is not None,
            dropout_seed=options.dropout_seed,
        )


def split_rows(num_rows: int, num_tokens: int, max_tokens: int) -> list[slice]:
    """Rows of num_tokens tokens each, in the fewest parts of at most max_tokens (but at least one row), as equal as can be."""
    rows_per_part = max(1, max_tokens // num_tokens)
    num_parts = -(-num_rows // rows_per_part)
    edges = [round(index * num_rows / num_parts) for index in range(num_parts + 1)]
    return [slice(start, end) for start, end in itertools.pairwise(edges)]


def _extras(options: PassOptions) -> list[Tensor]:
    return [tensor for tensor in (options.mask, options.positions) if tensor is not None]


def _num_tokens(hidden: Tensor) -> int:
    return hidden.shape[0] * hidden.shape[1]


def _checked(tensors: list[Tensor], like: Tensor, peer_id: str) -> Tensor:
    try:
        if len(tensors) != 1:
            raise BadRequest(f"{len(tensors)} tensors")
        return TensorLimits(FLOATING, tuple(like.shape), "hidden states").check(tensors[0]).to(like.dtype)
    except BadRequest as error:
        raise BadReply(f"peer {peer_id[-8:]} answered nonsense: {error}") from error
