"""StageHops: a trainer's streams to the replicas of stages, and the forward and backward of one microbatch on them."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass

from torch import Tensor

from protos import node_pb2
from swarm.client.config import ClientConfig
from swarm.client.peer_stream import PeerStream
from swarm.epoch.messages import Owner, Place, Term
from swarm.errors import BadReply, BadRequest, MicrobatchGone
from swarm.messages import encode_message, own_version
from swarm.p2p.host import Host
from swarm.tensors import FLOATING, Buffer, TensorLimits, WireFormat
from swarm.training.member_name import peer_of


@dataclass(frozen=True, slots=True)
class _Replica:
    """What a PeerStream must know of whom it talks to."""

    peer_id: str
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StageTask:
    """One microbatch at one stage."""

    place: Place
    term: Term
    unit: int
    stage: int
    owner: Owner
    first_sample: int


class StageHops:
    """Streams are kept and used again; one carries one microbatch at a time."""

    def __init__(self, host: Host, run_id: bytes, config: ClientConfig, wire: WireFormat) -> None:
        self.bytes_moved = 0
        self._host, self._run_id, self._config, self._wire = host, run_id, config, wire
        self._free: defaultdict[tuple[str, int], list[PeerStream[_Replica]]] = defaultdict(list)

    async def forward(
        self, task: StageTask, addresses: tuple[str, ...], hidden_BTH: Tensor, *, wants_gradients: bool
    ) -> Tensor:
        """The hidden states after the stage, [B, T, H]. Raises Outdated, PeerFailed or another SwarmError."""
        request = node_pb2.Request(stage_forward=self._forward_request(task, wants_gradients))
        message = encode_message(request, [hidden_BTH], self._wire)
        _, tensors = await self._ask(task, addresses, message, "stage_forward")
        return _checked(tensors, hidden_BTH, task)

    async def backward(
        self, task: StageTask, addresses: tuple[str, ...], gradient_BTH: Tensor, given_BTH: Tensor
    ) -> tuple[Tensor, bool]:
        """(gradient w.r.t. the stage's input [B, T, H], whether that w.r.t. its weights is finite and in the owner's ledger).

        given: the stage's input, sent again if the owner does not keep the microbatch any more.
        """
        backward = node_pb2.StageBackward(
            epoch=task.place.epoch,
            lineage=task.place.lineage,
            term_number=task.term.number,
            term_peer=task.term.peer,
            ledger_id=task.owner.ledger_id,
            unit=task.unit,
        )
        try:
            message = encode_message(node_pb2.Request(stage_backward=backward), [gradient_BTH], self._wire)
            reply, tensors = await self._ask(task, addresses, message, "stage_backward")
        except MicrobatchGone:
            backward.again.CopyFrom(self._forward_request(task, wants_gradients=True))
            request = node_pb2.Request(stage_backward=backward)
            message = encode_message(request, [gradient_BTH, given_BTH], self._wire)
            reply, tensors = await self._ask(task, addresses, message, "stage_backward")
        return _checked(tensors, given_BTH, task), reply.stage_backward.is_finite

    async def aclose(self) -> None:
        for streams in self._free.values():
            for stream in streams:
                await stream.aclose()
        self._free.clear()

    def _forward_request(self, task: StageTask, wants_gradients: bool) -> node_pb2.StageForward:
        return node_pb2.StageForward(
            epoch=task.place.epoch,
            lineage=task.place.lineage,
            unit=task.unit,
            first_sample=task.first_sample,
            wants_gradients=wants_gradients,
        )

    async def _ask(
        self, task: StageTask, addresses: tuple[str, ...], message: list[Buffer], answer: str
    ) -> tuple[node_pb2.Reply, list[Tensor]]:
        deadline = time.monotonic() + self._config.microbatch_timeout_s
        free = self._free[task.owner.peer, task.stage]
        stream = None
        while free and (stream is None or stream.is_broken):
            stream = free.pop()
        if stream is None or stream.is_broken:
            stream = await self._open(task, addresses, deadline)
        moved = stream.bytes_moved
        try:
            answered = await stream.ask(message, answer, deadline)
        except BaseException as error:
            if isinstance(error, MicrobatchGone):
                free.append(stream)
            else:
                await stream.aclose()
            raise
        finally:
            self.bytes_moved += stream.bytes_moved - moved
        free.append(stream)
        return answered

    async def _open(self, task: StageTask, addresses: tuple[str, ...], deadline: float) -> PeerStream[_Replica]:
        opening = node_pb2.OpenStage(version=own_version(), run_id=self._run_id, stage=task.stage)
        replica = _Replica(peer_of(task.owner.peer), addresses)
        stream = await PeerStream.open(
            self._host, replica, node_pb2.Request(open_stage=opening), "stage_opened", self._config, deadline
        )
        stream.accept_messages_of(64 * 2**20)
        return stream


def _checked(tensors: list[Tensor], like: Tensor, task: StageTask) -> Tensor:
    try:
        if len(tensors) != 1:
            raise BadRequest(f"{len(tensors)} tensors instead of one")
        return TensorLimits(FLOATING, tuple(like.shape), "stage output").check(tensors[0]).float()
    except BadRequest as error:
        raise BadReply(f"peer {task.owner.peer[-8:]} answered nonsense: {error}") from error
