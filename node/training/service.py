"""StageService: answers the streams of trainers, for a node that hosts a stage of a training run.

Forward and backward as for anybody, and besides, once for each leased microbatch, the gradient w.r.t. the weights into the ledger.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections import Counter
from collections.abc import Sequence

from torch import Tensor

from node.device_share import Purpose
from node.executor import Executor
from node.job_queue import JobKind
from node.microbatches import MicrobatchLimits
from node.service import NodeService
from node.stash import Stash
from node.training.live import LiveModels
from node.training.stage import TrainableStage, TrainingEntry
from protos import node_pb2
from swarm.epoch.ledger import Added, AddTag
from swarm.epoch.messages import EARLY, Place, Term
from swarm.errors import BadRequest, SwarmError
from swarm.messages import (
    MAX_HEADER_BYTES,
    Refused,
    decode_message,
    encode_message,
    own_version,
    refusal_of,
    versions_meet,
)
from swarm.p2p.framing import FramedStream
from swarm.tensors import FLOATING, Buffer, TensorLimits, wire_format_of
from swarm.training.membership import Membership
from swarm.training.parameters import are_finite

log = logging.getLogger(__name__)

MAX_STREAMS_PER_PEER = 32
MAX_REFUSALS_PER_STREAM = 64
_OPEN_TIMEOUT_S = 10.0


class StageService:
    """Handles streams of the protocol "shardswarm/node" that open a stage."""

    def __init__(
        self,
        stage: TrainableStage,
        membership: Membership,
        executor: Executor,
        limits: MicrobatchLimits,
        live: LiveModels | None = None,
    ) -> None:
        """live: who serves streams that open something else."""
        self._live = live
        self.stash = Stash(limits.stash_bytes, limits.stash_expiry_s)
        self.num_forwards = 0
        self.num_backwards = 0
        self.num_added = 0
        self._stage, self._membership, self._executor, self._limits = stage, membership, executor, limits
        self._streams: Counter[str] = Counter()

    def is_meant(self, first: bytes) -> bool:
        """Whether the first message of a stream is for this stage, or for weights that are served here."""
        try:
            request, _ = decode_message(first, node_pb2.Request)
        except SwarmError:
            return False
        if request.WhichOneof("kind") == "open_stage":
            return request.open_stage.run_id == self._membership.run_id
        return self._service_for(request) is not None

    async def handle(self, stream: FramedStream, first: bytes | None = None) -> None:
        """Serve one stream until the peer ends it, it breaks, it is silent or says too much nonsense.

        first: a message that was received already.
        """
        is_open, refusals = False, 0
        self._streams[stream.peer_id] += 1
        try:
            while refusals < MAX_REFUSALS_PER_STREAM:
                message, first = first, None
                if message is None:
                    message = await _received(stream, self._limits.idle_s if is_open else _OPEN_TIMEOUT_S)
                if message is None:
                    return
                try:
                    request, tensors = decode_message(message, node_pb2.Request)
                    kind = request.WhichOneof("kind")
                    if kind == "open_stage":
                        answer, is_open = self._open(request.open_stage, stream), True
                    elif not is_open and (service := self._service_for(request)) is not None:
                        await service.handle(stream, message)
                        return
                    elif not is_open:
                        raise Refused(
                            node_pb2.THE_BLOCKS_ARE_NOT_SERVED_HERE,
                            "this node trains a stage of a run and serves no other",
                        )
                    elif kind == "stage_forward":
                        answer = await self._forward(stream.peer_id, request, tensors)
                    elif kind == "stage_backward":
                        answer = await self._backward(stream.peer_id, request, tensors)
                    else:
                        raise BadRequest("this stream was opened for a stage")
                except SwarmError as error:
                    refusals += 1
                    log.info("request refused peer=%s reason=%s", stream.peer_id[-8:], error)
                    answer = encode_message(refusal_of(error))
                async with asyncio.timeout(self._limits.idle_s):
                    await stream.send(answer)
            await stream.fail("too many refused requests on one stream")
        finally:
            self._streams[stream.peer_id] -= 1
            if not self._streams[stream.peer_id]:
                del self._streams[stream.peer_id]
                self.stash.drop_peer(stream.peer_id)

    def _service_for(self, request: node_pb2.Request) -> NodeService | None:
        """Of the frozen weights that a stream is opened for."""
        kind = request.WhichOneof("kind")
        if self._live is None or kind not in ("open", "open_microbatches", "status"):
            return None
        return self._live.find(None if kind == "status" else getattr(request, kind).model_digest)

    def forget_graphs(self) -> None:
        """The weights have changed: no graph of before may be used."""
        for peer in list(self._streams):
            self.stash.drop_peer(peer)

    def _open(self, request: node_pb2.OpenStage, stream: FramedStream) -> list[Buffer]:
        membership = self._membership
        if not versions_meet(request.version):
            raise Refused(node_pb2.THE_VERSIONS_DO_NOT_MEET, "one of the two must be upgraded")
        if request.run_id != membership.run_id or request.stage != membership.stage:
            raise Refused(
                node_pb2.THE_RUN_IS_ANOTHER,
                f"this node holds stage {membership.stage} of run {membership.run_id.hex()[:8]}",
            )
        if self._streams[stream.peer_id] > MAX_STREAMS_PER_PEER:
            raise Refused(
                node_pb2.THIS_NODE_HAS_NO_ROOM, f"{MAX_STREAMS_PER_PEER} streams of yours are open; close some"
            )
        # A message holds the input again beside the gradient, both float32 at worst.
        stream.accept_messages_of(self._limits.max_tokens * 8 * self._stage.hidden_size + MAX_HEADER_BYTES)
        opened = node_pb2.StageOpened(version=own_version(), max_tokens=self._limits.max_tokens)
        return encode_message(node_pb2.Reply(stage_opened=opened))

    def _place(self, epoch: int, lineage: bytes) -> Place:
        return Place(epoch, lineage, self._membership.place.era)

    async def _forward(self, peer: str, message: node_pb2.Request, tensors: list[Tensor]) -> list[Buffer]:
        request = message.stage_forward
        place = self._place(request.epoch, request.lineage)
        self._check_place(place)
        hidden, samples = self._checked_input(request, tensors)

        def compute() -> tuple[TrainingEntry | None, Tensor]:
            self._check_place(place)
            if not request.wants_gradients:  # evaluations are of the weights as they are
                self._stage.parameters.show(previous=False)
                return None, self._stage.forward(hidden)
            self._stage.parameters.show(previous=request.unit < EARLY)
            entry = self._stage.differentiable(hidden, samples)
            return entry, entry.output.detach()

        entry, output = await self._executor.run(compute, JobKind.FORWARD, Purpose.TRAINING)
        self.num_forwards += 1
        if entry is not None and self._membership.weights_at[0] == place:
            self.stash.put(peer, _stash_key(request.lineage, request.unit), entry, time.monotonic())
        reply = node_pb2.Reply(stage_forward=node_pb2.StageForwardDone(unit=request.unit))
        return encode_message(reply, [output], wire_format_of(message.tensors[0]))

    async def _backward(self, peer: str, message: node_pb2.Request, tensors: list[Tensor]) -> list[Buffer]:
        request = message.stage_backward
        tag = AddTag(
            self._place(request.epoch, request.lineage),
            Term(request.term_number, request.term_peer),
            request.ledger_id,
            request.unit,
        )
        self._check_place(tag.place)
        if not tensors:
            raise BadRequest("a backward needs a gradient")
        stashed = self.stash.take(peer, _stash_key(request.lineage, request.unit), time.monotonic())
        entry = stashed if isinstance(stashed, TrainingEntry) else None

        def compute() -> tuple[Tensor, Added, bool]:
            self._check_place(tag.place)
            found = self._membership.ledger_of(tag.ledger_id)
            if found is None:
                raise _outdated("this node keeps another ledger by now")
            ledger, gradient_sum = found
            kept = self._fresh(entry) or self._again(request, tensors)
            gradient = TensorLimits(FLOATING, tuple(kept.output.shape), "gradient").check(tensors[0])
            if ledger.accepts(tag) is Added.OUTDATED:
                raise _outdated("this node obeys another leader or keeps another ledger by now")
            of_input, of_weights = self._stage.backward(kept, gradient)
            if not are_finite([of_input, *of_weights]):
                return of_input.nan_to_num(), Added.OUTDATED, False
            added = ledger.add(tag, lambda: gradient_sum.add(of_weights))
            if added is Added.OUTDATED:
                raise _outdated("the ledger was closed while the microbatch ran")
            return of_input, added, True

        result, added, is_finite = await self._executor.run(compute, JobKind.BACKWARD, Purpose.TRAINING)
        self.num_backwards += 1
        self.num_added += added is Added.NOW
        done = node_pb2.StageBackwardDone(unit=request.unit, was_in_ledger=added is Added.BEFORE, is_finite=is_finite)
        return encode_message(node_pb2.Reply(stage_backward=done), [result], wire_format_of(message.tensors[0]))

    def _fresh(self, entry: TrainingEntry | None) -> TrainingEntry | None:
        """An entry of the weights that are shown now; it is too late for others."""
        is_fresh = entry is not None and entry.weights_version == self._stage.parameters.version
        return entry if is_fresh else None

    def _again(self, request: node_pb2.StageBackward, tensors: list[Tensor]) -> TrainingEntry:
        """The forward once more, from the input that came with the gradient."""
        if not request.HasField("again"):
            raise Refused(
                node_pb2.THE_MICROBATCH_IS_UNKNOWN, "nothing is kept of this microbatch; send its input again"
            )
        hidden, samples = self._checked_input(request.again, tensors[1:])
        self._stage.parameters.show(previous=request.unit < EARLY)
        return self._stage.differentiable(hidden, samples)

    def _check_place(self, place: Place) -> None:
        own = self._membership.weights_at[0]
        if place != own:
            history = "" if place.epoch != own.epoch else " of another history"
            raise _outdated(f"the weights here are at epoch {own.epoch}, asked for is {place.epoch}{history}")

    def _checked_input(self, request: node_pb2.StageForward, tensors: list[Tensor]) -> tuple[Tensor, range]:
        if len(tensors) != 1:
            raise BadRequest(f"a microbatch has one tensor of hidden states, got {len(tensors)}")
        hidden = TensorLimits(FLOATING, (None, None, self._stage.hidden_size), "hidden states").check(tensors[0])
        rows, num_tokens = hidden.shape[:2]
        if not 0 < rows * num_tokens <= self._limits.max_tokens:
            raise Refused(
                node_pb2.THE_MICROBATCH_IS_TOO_LARGE,
                f"{rows} rows x {num_tokens} tokens: this node takes 1 to {self._limits.max_tokens} tokens at once",
            )
        return hidden, range(request.first_sample, request.first_sample + rows)


class StageServices:
    """Those of the runs that one process hosts: each stream goes to the one that it is for."""

    def __init__(self, services: Sequence[StageService]) -> None:
        self._services = services

    async def handle(self, stream: FramedStream) -> None:
        """What is for none of them is refused by the first."""
        first = await _received(stream, _OPEN_TIMEOUT_S)
        if first is not None:
            service = next((one for one in self._services if one.is_meant(first)), self._services[0])
            await service.handle(stream, first)


async def _received(stream: FramedStream, timeout_s: float) -> bytes | None:
    """The next message; None if the peer has ended the stream, or was silent for too long."""
    try:
        async with asyncio.timeout(timeout_s):
            return await stream.receive()
    except TimeoutError:
        await stream.fail("nothing was heard for too long")
        return None


def _outdated(reason: str) -> Refused:
    return Refused(node_pb2.THE_EPOCH_IS_ANOTHER, reason)


def _stash_key(lineage: bytes, unit: int) -> bytes:
    return hashlib.sha256(lineage + unit.to_bytes(8, "big")).digest()[:16]
