"""Microbatches: forward and backward of a hop for clients that train on it, and the stash of autograd graphs in between.

The weights are never changed by this: backward returns the gradient w.r.t. the hop's input, and nothing else is computed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from node.config import NodeConfig
from node.executor import Executor
from node.job_queue import JobKind
from node.shard import Shard
from node.stash import Stash, StashEntry
from protos import node_pb2
from swarm.errors import BadRequest, PeerFailed, SwarmError
from swarm.messages import MAX_HEADER_BYTES, Refused, encode_message, own_version
from swarm.p2p.framing import FramedStream
from swarm.span import Span
from swarm.tensors import FLOATING, Buffer, TensorLimits, wire_format_of

log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 64 * 2**20
MAX_STREAMS_PER_PEER = 8
MAX_STREAMS = 32
_DELIVERY_TIMEOUT_S = 1.0


@dataclass(frozen=True, slots=True)
class MicrobatchLimits:
    """What a node grants."""

    stash_bytes: int
    stash_expiry_s: float
    max_tokens: int
    """Rows x tokens of one microbatch."""
    idle_s: float


def microbatch_limits_of(config: NodeConfig, *, num_models: int = 1) -> MicrobatchLimits:
    """Of each of so many models, which share the memory for graphs."""
    return MicrobatchLimits(
        stash_bytes=config.stash_bytes // num_models,
        stash_expiry_s=config.stash_expiry_s,
        max_tokens=config.max_microbatch_tokens,
        idle_s=config.session_idle_s,
    )


@dataclass(frozen=True, slots=True)
class _ForwardInput:
    """The tensors of a Forward, checked."""

    hidden: Tensor
    mask: Tensor | None
    positions: Tensor | None
    dropout_seed: int | None


class Microbatches:
    """Answers Forward and Backward on streams that were opened for a hop."""

    def __init__(self, shard: Shard, executor: Executor, limits: MicrobatchLimits) -> None:
        self.stash = Stash(limits.stash_bytes, limits.stash_expiry_s)
        self.leaving = False
        self.num_forwards = 0
        self.num_backwards = 0
        self._shard, self._executor, self._limits = shard, executor, limits
        # A message holds the input again beside the gradient, both fp32 at worst, and mask and positions.
        self._bytes_per_token = 2 * shard.hidden_size * 4 + 9
        self._max_tokens = max(1, min(limits.max_tokens, MAX_MESSAGE_BYTES // self._bytes_per_token))
        self._open: set[FramedStream] = set()
        self._num_running = 0
        self._changed = asyncio.Event()

    def open(self, stream: FramedStream) -> list[Buffer]:
        """Admit a stream. Raises Refused."""
        if self.leaving:
            raise Refused(node_pb2.THIS_NODE_IS_LEAVING, "this node shuts down; use another")
        num_own = self._num_open(stream.peer_id)
        if num_own >= MAX_STREAMS_PER_PEER or len(self._open) >= MAX_STREAMS:
            raise Refused(
                node_pb2.THIS_NODE_HAS_NO_ROOM,
                f"{len(self._open)} streams for microbatches are open, {num_own} of them yours; close some",
            )
        self._open.add(stream)
        stream.accept_messages_of(self._max_tokens * self._bytes_per_token + MAX_HEADER_BYTES)
        opened = node_pb2.MicrobatchesOpened(
            version=own_version(),
            numeric_class=self._shard.numeric_class,
            max_tokens=self._max_tokens,
            idle_timeout_s=round(self._limits.idle_s),
        )
        return encode_message(node_pb2.Reply(microbatches_opened=opened))

    def close(self, stream: FramedStream) -> None:
        """A stream that was admitted has ended; with the peer's last one, what is kept for it goes."""
        self._open.remove(stream)
        if not self._num_open(stream.peer_id):
            self.stash.drop_peer(stream.peer_id)
            self._changed.set()

    def _num_open(self, peer_id: str) -> int:
        return sum(stream.peer_id == peer_id for stream in self._open)

    async def wait_until_idle(self) -> None:
        """Until nothing runs, no microbatch waits for its backward, and the peers have all answers."""
        while self._num_running or self.stash.num_entries:
            self._changed.clear()
            await self._changed.wait()
            self.stash.purge(time.monotonic())
        await asyncio.gather(*map(_delivered, self._open))

    async def answer(self, peer_id: str, hop: Span, request: node_pb2.Request, tensors: list[Tensor]) -> list[Buffer]:
        """The reply to a Forward or Backward. Raises Refused or BadRequest."""
        self._num_running += 1
        try:
            if request.WhichOneof("kind") == "forward":
                return await self._forward(peer_id, hop, request, tensors)
            return await self._backward(peer_id, hop, request, tensors)
        except SwarmError:
            raise
        except (RuntimeError, ValueError, IndexError, MemoryError) as error:  # torch's and transformers' own
            log.exception("microbatch failed peer=%s hop=%s", peer_id, hop)
            raise Refused(
                node_pb2.THE_COMPUTATION_FAILED,
                f"the microbatch failed on this node ({type(error).__name__}); use another node",
            ) from error
        finally:
            self._num_running -= 1
            self._changed.set()

    async def _forward(self, peer_id: str, hop: Span, message: node_pb2.Request, tensors: list[Tensor]) -> list[Buffer]:
        request = message.forward
        _check_id(request.microbatch_id)
        if self.leaving:
            raise Refused(node_pb2.THIS_NODE_IS_LEAVING, "this node shuts down; use another")
        submitted = time.monotonic()
        keeps = request.wants_gradients and self.stash.budget_bytes > 0
        done = node_pb2.ForwardDone(microbatch_id=request.microbatch_id)
        reply = node_pb2.Reply(forward=done)

        def compute() -> tuple[StashEntry | None, Tensor]:
            started = time.monotonic()
            checked = self._checked_input(request, tensors)
            if keeps:
                entry = self._differentiable(hop, checked)
                output = entry.output
            else:
                entry, output = None, self._compute(hop, checked)
            _note_times(reply.forward, submitted, started)
            return entry, output.detach()

        entry, output = await self._executor.run(compute, JobKind.FORWARD)
        self.num_forwards += 1
        if entry is not None:
            now = time.monotonic()
            reply.forward.is_stashed = self.stash.put(peer_id, request.microbatch_id, entry, now)
            asyncio.get_running_loop().call_later(self._limits.stash_expiry_s + 0.1, self._expire)
        return encode_message(reply, [output], wire_format_of(message.tensors[0]))

    async def _backward(
        self, peer_id: str, hop: Span, message: node_pb2.Request, tensors: list[Tensor]
    ) -> list[Buffer]:
        request = message.backward
        _check_id(request.microbatch_id)
        entry = self.stash.take(peer_id, request.microbatch_id, time.monotonic())
        if entry is not None and entry.hop != hop:
            raise BadRequest(f"microbatch was forwarded through blocks {entry.hop}, this stream is for {hop}")
        if entry is None and not request.HasField("again"):
            raise Refused(
                node_pb2.THE_MICROBATCH_IS_UNKNOWN,
                "nothing is kept of this microbatch (never seen, expired, or no room); send its input again",
            )
        if not tensors:
            raise BadRequest("a backward needs a gradient")
        submitted = time.monotonic()
        reply = node_pb2.Reply(
            backward=node_pb2.BackwardDone(microbatch_id=request.microbatch_id, was_stashed=entry is not None)
        )

        def compute() -> Tensor:
            started = time.monotonic()
            kept = entry or self._differentiable(hop, self._checked_input(request.again, tensors[1:]))
            wanted = TensorLimits(FLOATING, tuple(kept.output.shape), "gradient")
            gradient = wanted.check(tensors[0]).to(kept.output.dtype)
            result: Tensor
            (result,) = torch.autograd.grad(kept.output, kept.given, gradient)
            _note_times(reply.backward, submitted, started)
            return result

        result = await self._executor.run(compute, JobKind.BACKWARD)
        self.num_backwards += 1
        return encode_message(reply, [result], wire_format_of(message.tensors[0]))

    def _expire(self) -> None:
        self.stash.purge(time.monotonic())
        self._changed.set()

    def _compute(self, hop: Span, given: _ForwardInput) -> Tensor:
        with torch.no_grad():
            return self._shard.model.forward_whole(
                hop,
                given.hidden.to(self._shard.model.dtype),
                mask=given.mask,
                positions=given.positions,
                dropout_seed=given.dropout_seed,
            )

    def _differentiable(self, hop: Span, given: _ForwardInput) -> StashEntry:
        hidden, output, num_bytes = self._shard.model.differentiable(
            hop,
            given.hidden.to(self._shard.model.dtype),
            mask=given.mask,
            positions=given.positions,
            dropout_seed=given.dropout_seed,
        )
        return StashEntry(hop, hidden, output, num_bytes)

    def _checked_input(self, request: node_pb2.Forward, tensors: list[Tensor]) -> _ForwardInput:
        expected = 1 + request.has_mask + request.has_positions
        if len(tensors) != expected:
            raise BadRequest(f"{expected} tensors are announced (hidden states, mask, positions), got {len(tensors)}")
        hidden = TensorLimits(FLOATING, (None, None, self._shard.hidden_size), "hidden states").check(tensors[0])
        rows, num_tokens = hidden.shape[:2]
        if rows * num_tokens == 0:
            raise BadRequest("a microbatch needs at least one row and one token")
        if rows * num_tokens > self._max_tokens:
            raise Refused(
                node_pb2.THE_MICROBATCH_IS_TOO_LARGE,
                f"{rows} rows x {num_tokens} tokens: this node takes {self._max_tokens} tokens at once; send fewer rows",
            )
        mask = positions = None
        if request.has_mask:
            mask = TensorLimits((torch.bool,), (rows, num_tokens), "mask").check(tensors[1])
        if request.has_positions:
            positions = TensorLimits((torch.int64,), (None, num_tokens), "position ids").check(tensors[-1])
            if positions.shape[0] not in (1, rows) or int(positions.min()) < 0 or int(positions.max()) >= 2**20:
                raise BadRequest(f"position ids must be [1 or {rows}, {num_tokens}] of 0 .. 2**20 - 1")
        seed = request.dropout_seed if request.HasField("dropout_seed") else None
        return _ForwardInput(hidden, mask, positions, seed)


async def _delivered(stream: FramedStream) -> None:
    """Until the peer has all that was sent, or is given up. p2pd drops what it has not passed on when it ends."""
    with contextlib.suppress(PeerFailed):
        await stream.ping(_DELIVERY_TIMEOUT_S)


def _check_id(microbatch_id: bytes) -> None:
    if len(microbatch_id) != 16:
        raise BadRequest(f"a microbatch id has 16 bytes, got {len(microbatch_id)}")


def _note_times(done: node_pb2.ForwardDone | node_pb2.BackwardDone, submitted: float, started: float) -> None:
    done.compute_us = round((time.monotonic() - started) * 1e6)
    done.queue_us = round((started - submitted) * 1e6)
