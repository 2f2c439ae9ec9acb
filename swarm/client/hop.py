"""RemoteHop: one hop of a session, on its stream. Knows how to open, step and replay; deciding what to do about failures is the session's."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from protos import node_pb2
from swarm.client.config import ClientConfig
from swarm.client.peer_stream import PeerStream
from swarm.errors import BadReply, BadRequest
from swarm.messages import MAX_HEADER_BYTES, encode_message
from swarm.p2p.host import Host
from swarm.routing import Hop
from swarm.span import Span
from swarm.tensors import FLOATING, TensorLimits


@dataclass(slots=True)
class HopTiming:
    """Seconds of the last step: whole, waiting for the device and computing on it, both as told by the node."""

    step_s: float = 0.0
    queue_s: float = 0.0
    compute_s: float = 0.0


@dataclass(frozen=True, slots=True)
class StepInput:
    """What a step adds to a session.

    mask: bool [batch, tokens], None if all tokens are real. rewind_to and reorder are applied before, in this order.
    """

    position: int
    version: int
    mask: Tensor | None = None
    rewind_to: int | None = None
    reorder: tuple[int, ...] = ()


class RemoteHop:
    """An open session on one peer. The history holds its inputs, so that another peer can take over by replay."""

    def __init__(self, stream: PeerStream[Hop], session_id: bytes) -> None:
        opened = stream.opened.opened
        self.hop = stream.hop
        self.numeric_class = opened.numeric_class
        self.max_tokens = opened.max_tokens_per_step
        self.history: list[Tensor] = []
        self.is_closed = False
        self.timing = HopTiming()
        self._stream = stream
        self._session_id = session_id

    @property
    def peer_id(self) -> str:
        return self.hop.peer_id

    @property
    def span(self) -> Span:
        return self.hop.span

    @property
    def bytes_moved(self) -> int:
        return self._stream.bytes_moved

    @classmethod
    async def open(
        cls, host: Host, hop: Hop, request: node_pb2.OpenSession, config: ClientConfig, deadline: float
    ) -> RemoteHop:
        """Connect, open a stream and a session on it. Raises PeerFailed, BadReply, Busy or BadRequest."""
        stream = await PeerStream.open(host, hop, node_pb2.Request(open=request), "opened", config, deadline)
        if stream.opened.opened.max_tokens_per_step < 1:
            await stream.aclose()
            raise BadReply(f"peer {hop.peer_id[-8:]} accepts no tokens")
        return cls(stream, request.session_id)

    async def step(self, hidden: Tensor, step: StepInput, deadline: float, *, wants_output: bool = True) -> Tensor:
        """Send new tokens, in as many messages as the peer asks for, and return the outputs [batch, tokens, hidden].

        Appends hidden to the history once the peer has it. deadline: time.monotonic() at which to give up.
        """
        outputs = []
        started = time.monotonic()
        queue_s = compute_s = 0.0
        for offset in range(0, hidden.shape[1], self.max_tokens):
            piece = hidden[:, offset : offset + self.max_tokens]
            request = node_pb2.Step(
                session_id=self._session_id,
                session_version=step.version,
                position=step.position + offset,
                no_reply_tensor=not wants_output,
            )
            if offset == 0 and step.rewind_to is not None:
                request.rewind_to = step.rewind_to
            if offset == 0:
                request.reorder.extend(step.reorder)
            masks = [] if step.mask is None else [step.mask[:, offset : offset + self.max_tokens]]
            # The reply is as large as the request.
            self._stream.accept_messages_of(piece.numel() * piece.element_size() + MAX_HEADER_BYTES)
            message = encode_message(node_pb2.Request(step=request), [piece, *masks])
            reply, tensors = await self._stream.ask(message, "step", deadline)
            done = reply.step
            self._check(done, step.version, step.position + offset + piece.shape[1])
            if wants_output:
                outputs.append(self._checked_output(tensors, piece))
            queue_s += done.queue_us / 1e6
            compute_s += done.compute_us / 1e6
        self.timing = HopTiming(time.monotonic() - started, queue_s, compute_s)
        self.history.append(hidden)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1) if outputs else hidden

    def edit_history(self, length: int, reorder: Sequence[int]) -> None:
        """Cut the history to length tokens and permute its rows, as the peer's cache will be."""
        if sum(part.shape[1] for part in self.history) == length and not reorder:
            return
        whole = torch.cat(self.history, dim=1)[:, :length] if self.history and length else None
        if whole is not None and reorder:
            whole = whole[torch.tensor(list(reorder))]
        self.history = [] if whole is None else [whole]

    async def aclose(self) -> None:
        """Free the cache on the peer. The history stays."""
        self.is_closed = True
        await self._stream.aclose()

    def _check(self, done: node_pb2.StepDone, version: int, position: int) -> None:
        if (done.session_version, done.position) != (version, position):
            raise BadReply(f"peer {self.peer_id[-8:]} answered for position {done.position}, not {position}")

    def _checked_output(self, tensors: list[Tensor], piece: Tensor) -> Tensor:
        try:
            if len(tensors) != 1:
                raise BadRequest(f"{len(tensors)} tensors")
            return TensorLimits(FLOATING, tuple(piece.shape), "hidden states").check(tensors[0]).to(piece.dtype)
        except BadRequest as error:
            raise BadReply(f"peer {self.peer_id[-8:]} answered nonsense: {error}") from error
